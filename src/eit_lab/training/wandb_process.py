"""The process that speaks with W&B for a run; wandb_log.py starts it and gives it its orders.

Why a process of its own: what wandb does may wait for a server, and a thread that waits cannot be ended, nor can wandb's own
hooks at the interpreter's exit. A process can. It also outlives the training: when that is killed without a word, this
one still has every row, hands it over and finishes the run as failed, where wandb's service would drop what it had not
yet written (up to 15 s) and the dashboard would show a run that goes on.

One JSON object a line, both ways: orders on stdin, replies on stdout. Deadlines are of the monotonic clock, which all
processes of a machine share. Nothing here imports torch.
"""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eit_lab.command import EXIT_PREEMPTED

# Metrics of a row that other metrics are drawn against; charts of their own would say nothing.
X_AXES = ("images", "step", "epoch")
_GAVE_UP = "Fatal error while uploading data"  # wandb's words, on stderr only, for what it will not try again
# Of logger.finish_timeout_s: what wandb has for its last uploads, and what is left over to end in order.
FINISH_SHARE = 0.75
MARGIN_SHARE = 0.1
_ASKS_THE_SERVER = ("table", "artifact")
_NO_MORE: Mapping[str, Any] = {}
_CLOSED_WITHOUT_A_WORD = 1  # exit code of a training that was killed


def main() -> None:
    """Take orders until ``finish``, or until the other end is closed."""
    # Signals that a scheduler or a terminal sends to the training reach all its processes; ours ends when the training does.
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    orders, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # wandb's service inherits these three, and must hold neither pipe open
    os.dup2(2, 1)

    def reply(state: str, **facts: Any) -> None:
        try:
            replies.write(json.dumps({"state": state, **facts}) + "\n")
            replies.flush()
        except BrokenPipeError:  # nobody is left to hear it
            pass

    first = json.loads(next(orders, "null"))
    if first is None:  # the training ended before it asked for anything
        return
    try:
        run = _Run(first)
    except Exception as error:  # noqa: BLE001 - whatever wandb raises, the training is to hear of it in one line
        reply("failed", cause=in_one_line(error))
        return
    reply("started", url=run.url)

    ending = threading.Event()

    def obey(order: Mapping[str, Any]) -> None:
        try:
            run.obey(order)
        except Exception as error:  # noqa: BLE001 - as above
            if not ending.is_set():  # a run that has ended takes nothing more: no news
                reply("problem", cause=in_one_line(error))

    # These ask the server, and wait for it as long as wandb likes: in a thread, so that rows and the end need not wait.
    slow: queue.SimpleQueue[Mapping[str, Any]] = queue.SimpleQueue()

    def obey_slowly() -> None:
        for order in iter(slow.get, _NO_MORE):
            obey(order)

    worker = threading.Thread(target=obey_slowly, daemon=True)
    worker.start()
    last: dict[str, Any] = {"exit_code": _CLOSED_WITHOUT_A_WORD, "deadline": None}
    for line in orders:
        order = json.loads(line)
        if order["do"] == "finish":
            last = order
            break
        (slow.put if order["do"] in _ASKS_THE_SERVER else obey)(order)
    slow.put(_NO_MORE)
    until = last["deadline"] or time.monotonic() + first["finish_timeout"]
    # wandb gets its share of the time whatever is still waiting.
    worker.join(timeout=max(0.0, until - time.monotonic() - FINISH_SHARE * first["finish_timeout"]))
    ending.set()
    if worker.is_alive():
        reply("problem", cause="the server does not answer, tables or checkpoints that wait for it are left out")
    run.finish(last["exit_code"])
    reply("finished")
    run.end_service()
    os._exit(0)  # a thread of ours or of wandb's may still wait; all is sent or written


class _Run:
    """One wandb run, and what may be asked of it."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        self._log = Path(order["log"])
        self._log_began = self._log.stat().st_size if self._log.exists() else 0
        sys.argv = order["argv"]  # wandb shows the command of the training, not of this process
        import wandb

        settings = dict(order["settings"])
        if (deadline := order["deadline"]) is not None:
            settings["init_timeout"] = max(0.1, deadline - time.monotonic())
        settings["finish_timeout"] = self._finish_timeout = (FINISH_SHARE - MARGIN_SHARE) * order["finish_timeout"]
        self._wandb = wandb
        self._online = order["init"]["mode"] == "online"
        # Older versions refuse what they do not know.
        settings = {key: value for key, value in settings.items() if key in wandb.Settings.model_fields}
        self._run = wandb.init(**order["init"], settings=wandb.Settings(**settings))
        for name in X_AXES:
            self._run.define_metric(name, hidden=True)
        self._run.define_metric("*", step_metric="images")
        self.url: str | None = self._run.url if self._online else None

    def obey(self, order: Mapping[str, Any]) -> None:
        """Anything but start and finish."""
        deeds: dict[str, Callable[[Mapping[str, Any]], None]] = {
            "row": lambda o: self._run.log(o["values"]),
            "summary": lambda o: self._run.summary.update(o["values"]),
            "table": self._table,
            "image": lambda o: self._run.log(o["at"] | {o["name"]: self._wandb.Image(o["path"], caption=o["caption"])}),
            "artifact": self._artifact,
        }
        deeds[order["do"]](order)

    def _table(self, order: Mapping[str, Any]) -> None:
        rows = [[self._cell(cell) for cell in row] for row in order["rows"]]
        self._run.log(order["at"] | {order["name"]: self._wandb.Table(columns=order["columns"], data=rows)})

    def _cell(self, cell: Any) -> Any:
        if not isinstance(cell, dict):
            return cell
        from PIL import Image

        return self._wandb.Image(Image.open(io.BytesIO(base64.b64decode(cell["png"]))))

    def _artifact(self, order: Mapping[str, Any]) -> None:
        artifact = self._wandb.Artifact(order["name"], type="model")
        # immutable: taken from where it lies. Else a copy of each checkpoint goes to a folder in the user's home.
        artifact.add_file(order["path"], policy="immutable")
        self._run.log_artifact(artifact, aliases=order["aliases"])

    def finish(self, exit_code: int) -> None:
        """End the run, and mark it where all of it is on the server."""
        began = time.monotonic()
        try:
            if exit_code == EXIT_PREEMPTED:  # W&B then shows it as preempted, not as crashed
                self._run.mark_preempting()
            self._run.finish(exit_code=exit_code)
        except Exception as error:  # noqa: BLE001 - a timeout, or a service that is gone: the data is on disk
            print(in_one_line(error), file=sys.stderr)
            return
        if self._online and time.monotonic() - began < self._finish_timeout and not self._gave_up():
            # The mark by which `wandb sync` knows that nothing is left to do.
            Path(self._run.settings.sync_dir, f"run-{self._run.id}.wandb.synced").touch()

    def end_service(self) -> None:
        """End wandb's own process; the training does not wait for this."""
        self._wandb.teardown()

    def _gave_up(self) -> bool:
        with self._log.open(errors="replace") as handle:
            handle.seek(self._log_began)
            return _GAVE_UP in handle.read()


def in_one_line(error: BaseException) -> str:
    """An exception's message without line breaks, its type where it has no message."""
    advice = "Consider increasing"  # wandb's, in terms of its own settings
    text = " ".join(str(error).partition(advice)[0].split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:237]}..."


if __name__ == "__main__":
    main()
