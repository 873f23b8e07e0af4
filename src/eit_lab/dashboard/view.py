"""TensorBoard on 127.0.0.1, fed from run folders, in one process: nothing is left behind when it ends."""

from __future__ import annotations

import json
import logging
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING
from urllib.parse import quote

from eit_lab.command import RunError
from eit_lab.config import ConfigError

if TYPE_CHECKING:
    from eit_lab.dashboard.replay import Replay

HOST = "127.0.0.1"
_PINNED = ("val/acc1", "train/loss", "test/acc1")
_LAST_PORT = 65535
_LOOK_S = 2.0  # between two looks at the runs
_RELOAD_S = "4"  # between two of TensorBoard's at what is written


def view(folders: Sequence[Path], *, port: int | None) -> None:
    """Serve until Ctrl-C or SIGTERM; prints the address. Raises ConfigError in one line."""
    if find_spec("tensorboard") is None:
        raise ConfigError("dashboard view needs TensorBoard, which is not installed: pip install 'eit_lab[dashboard]'")
    from eit_lab.dashboard.replay import Replay

    with ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, _end)
        stack.callback(signal.signal, signal.SIGTERM, before)
        target = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eit_lab-dashboard-")))
        try:
            replay = Replay(folders, target)
            replay.find()  # what is in them follows while the page is open already
            url = serve(target, port=port)
            print(f"{len(replay.runs)} runs of {', '.join(map(str, folders))}; Ctrl-C ends it")
            for folder in sorted(replay.left_out):
                print(f"left out: {folder}, whose record.json cannot be read")
            print(start_page(url), flush=True)
            _follow(replay)
        except KeyboardInterrupt:
            print("ended", flush=True)
        except OSError as error:
            raise RunError(f"{error.filename or target} cannot be read or written: {error.strerror or error}") from None


def _end(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _follow(replay: Replay) -> None:
    while True:
        replay.follow()
        time.sleep(_LOOK_S)


def start_page(url: str) -> str:
    """The address of the curves, a colour an arm, what one looks for first on top."""
    pinned = json.dumps([{"plugin": "scalars", "tag": tag} for tag in _PINNED], separators=(",", ":"))
    return f"{url}?smoothing=0&runColorGroup={quote('regex:(.*)/', safe='')}&pinnedCards={quote(pinned, safe='')}#timeseries"


def serve(logs: Path, *, port: int | None) -> str:
    """Start TensorBoard in a thread of this process; its address. Raises ConfigError where the port is taken."""
    if port:
        _check_port(port)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorBoard itself, at import
        from tensorboard import default, program
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    board = program.TensorBoard(plugins=default.get_plugins())
    # load_fast=false: its other way of reading is a process of its own, which could outlive this one.
    words = ["", "--logdir", str(logs), "--host", HOST, "--load_fast", "false", "--reload_interval", _RELOAD_S]
    words += [] if port is None else ["--port", str(port)]
    board.configure(argv=words)
    try:
        url: str = board.launch()
    except program.TensorBoardServerException as error:
        raise RunError(f"TensorBoard cannot be reached on {HOST}: {error.msg}") from None
    return url


def _check_port(port: int) -> None:
    """Raises ConfigError with the next port that is free."""
    if _is_free(port):
        return
    near = next((other for other in range(port + 1, min(port + 100, _LAST_PORT)) if _is_free(other)), 0)
    raise ConfigError(f"port must be one that is free on {HOST}, got {port}; nearest: {near}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a view that has just ended does not count
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True
