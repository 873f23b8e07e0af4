"""Weights & Biases beside metrics.csv: one run a job, online or offline, and never in the training's way.

wandb runs in a process of its own (wandb_process.py), fed through a queue: what the training calls here costs microseconds,
whatever the server does. Only two calls wait, the start for at most ``logger.init_timeout_s`` and the end for at most
``logger.finish_timeout_s``; then that process is ended. What could not be sent lies in the run folder, and the last line
says how to send it.
"""

from __future__ import annotations

import base64
import io
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from eit_lab.config import Config, WandbLogger
from eit_lab.loading import dump
from eit_lab.runs import Run
from eit_lab.training.mistakes import ConfusionCount, Mistake, class_name
from eit_lab.training.wandb_process import X_AXES, in_one_line

Mode = Literal["online", "offline", "absent"]

_QUEUED_ORDERS = 50_000  # some 20 MB of rows: then the process that takes them has long stopped
_LAST_BREATH_S = 0.2  # for the process to go by itself, once all is sent or written
_HEADER_BYTES = 7  # a .wandb file that holds no record; `wandb sync` stops at such a file, and sends the others neither


class WandbLog(Logger):
    """Lightning's logger for one run: ``start`` before the first row, ``close`` with the exit code at the very end."""

    def __init__(self, config: Config, run: Run, *, resumed: bool) -> None:
        super().__init__()
        assert isinstance(config.logger, WandbLogger), "made for logger=wandb only"
        self.run_id = run.run_id
        """The run's identity is its id on the server too: a job that is requeued finds its own run again."""
        self.mode_now: Mode = "absent"
        """Where the data goes at this moment."""
        self.url: str | None = None
        """The run's page, where it is online."""
        self.longest_call_s = 0.0
        """Longest time that a call other than start and close took, in seconds."""
        self.start_s = self.close_s = 0.0
        """Time that these two took."""
        self._config, self._options, self._run, self._resumed = config, config.logger, run, resumed
        self._channel: _Channel | None = None
        self._row: dict[str, Any] = {}
        self._at: dict[str, int] = {}  # the step and the images seen of the last row
        self._said: set[str] = set()
        self._troubled = False

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return "wandb"

    @property
    def version(self) -> str:
        """The run's id."""
        return self.run_id

    # ---------------------------------------------------------------------------------------------------------- start

    @rank_zero_only
    def start(self) -> None:
        """Begin the run; back within ``logger.init_timeout_s``, online, or else offline with one line that says why."""
        began = time.monotonic()
        self.mode_now = self._wanted_mode()
        if self.mode_now == "online":
            self._start_online(began + self._options.init_timeout_s)
        if self.mode_now == "offline":  # which asks no server, so that there is nothing to wait for
            self._channel = self._open("offline", None)
        self.start_s = time.monotonic() - began

    def _start_online(self, deadline: float) -> None:
        parts = self._parts()
        channel = self._open("online", deadline)
        answer = channel.wait("started", "failed", until=deadline)
        if answer is not None and answer["state"] == "started":
            self._channel, self.url = channel, answer["url"]
            return
        cause = (answer or {}).get("cause", f"no answer within {self._options.init_timeout_s:g} s")
        channel.end(within=0.0)
        for part in self._parts() - parts:  # it holds no row, and would only be sent for nothing
            shutil.rmtree(part, ignore_errors=True)
        self.mode_now = "offline"
        self._say(f"offline from here: {cause}; the data stays in {self._folder}")

    def _wanted_mode(self) -> Mode:
        wanted = self._options.mode or os.environ.get("WANDB_MODE") or "offline"
        if wanted == "disabled":
            return "absent"
        spec = find_spec("wandb")
        if spec is None or spec.origin is None:  # a folder called wandb/ is found as a package without an origin
            self._say("wandb is not installed; metrics.csv goes on")
            return "absent"
        return "online" if wanted in ("online", "run", "shared") else "offline"

    def _open(self, mode: Mode, deadline: float | None) -> _Channel:
        self._folder.mkdir(parents=True, exist_ok=True)
        # wandb's own timeouts first, so that it ends in order and says why; ours is for when it does not.
        margin = min(1.0, 0.2 * self._options.init_timeout_s)
        log = self._folder / "process.log"
        channel = _Channel(log, on_trouble=self._trouble)
        channel.send(
            {
                "do": "start",
                "argv": sys.argv,
                "log": str(log),
                "deadline": None if deadline is None else deadline - margin,
                "init": self._init_arguments(mode),
                "finish_timeout": self._options.finish_timeout_s,
                "settings": {
                    "finish_timeout_raises": True,
                    "console": "off",
                    "silent": True,
                    "program": sys.argv[0],  # not ours, in the dashboard
                    "x_disable_viewer": True,  # one request less at the start; it is for greetings only
                    "x_stats_pid": os.getpid(),  # the load that is shown is the training's
                    "x_transaction_log_flush_interval": 5.0,
                },
            }
        )
        return channel

    def _init_arguments(self, mode: Mode) -> dict[str, Any]:
        return {
            "id": self.run_id,
            "name": self._run.folder.name,
            "dir": str(self._run.folder),
            "project": self._options.project,
            "entity": self._options.entity,
            "group": self._config.run.sweep,
            "job_type": self._config.run.arm or self._config.model.name,  # by which dashboards group
            "tags": list(self._options.tags) or None,
            "config": dump(self._config),
            # A run that starts anew under an id that is there already (run.overwrite) replaces it, and does not add to it.
            "resume": "allow" if self._resumed else None,
            "mode": mode,
        }

    @property
    def _folder(self) -> Path:
        return self._run.folder / "wandb"

    def _parts(self) -> set[Path]:
        """Folders of this run's parts, one for each time that it was started."""
        return set(self._folder.glob(f"*run-*-{self.run_id}*"))  # a number follows when two began in the same second

    # ------------------------------------------------------------------------------------------------------------ log

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved config went along with the start."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values at an optimizer step; values of the same step share a row.

        Every row has ``step`` and ``images`` (training images seen so far, the default x axis), from ``metrics`` or, where it
        is not there, as it last was. NOTE: the step is not W&B's own: that one only grows, also when parts of a run are sent
        later, so that a resumed run would lose rows. Steps that are redone after a crash are there twice, with the same values.
        """
        with self._timed():
            if step is not None and step != self._at.get("step"):
                self._send_row()
                self._at["step"] = step
            if "images" in metrics:
                self._at["images"] = int(metrics["images"])
            for name, value in metrics.items():
                self._row[name] = int(value) if name in X_AXES else float(value)

    @rank_zero_only
    def set_summary(self, values: Mapping[str, Any]) -> None:
        """The run's final numbers, nested or flat."""
        with self._timed():
            self._send_row()
            self._send({"do": "summary", "values": dict(values)})

    @rank_zero_only
    def log_confusion(self, counts: Sequence[ConfusionCount], *, class_names: Sequence[str] | None = None) -> None:
        """The confusion of the test set as a table: true class, predicted class, number of images."""
        with self._timed():
            rows = [
                [class_name(c.label, class_names), class_name(c.predicted, class_names), c.num_images] for c in counts
            ]
            self._send_table("test/confusion", ["true", "predicted", "images"], rows)

    @rank_zero_only
    def log_mistakes(
        self, mistakes: Sequence[Mistake], *, figure: Path | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        """The worst mistakes as a table with their images, and as the figure in the run folder (a PNG)."""
        with self._timed():
            columns = ["image", "index", "true", "predicted", "probability of true", "loss"]
            rows = [
                [_png(m), m.index, class_name(m.label, class_names), class_name(m.predicted, class_names), m.probability, m.loss]
                for m in mistakes
            ]  # fmt: skip
            if figure is not None:  # first: it asks nothing of the server, as a table does
                caption = f"{len(mistakes)} wrong answers with the highest loss"
                image = {"name": "test/mistakes_figure", "path": str(figure.resolve()), "caption": caption}
                self._send_row()
                self._send({"do": "image", "at": self._at, **image})
            self._send_table("test/mistakes", columns, rows)

    @rank_zero_only
    def save_checkpoints(self, paths: Sequence[Path]) -> None:
        """Those of the checkpoints that ``logger.artifacts`` asks for, each an artifact: best.ckpt as ``best``, and so on."""
        with self._timed():
            wanted = self._options.artifacts
            for path in paths:
                if wanted == "all" or path.stem == wanted:
                    name = f"checkpoint-{self.run_id}-{path.stem}"
                    self._send({"do": "artifact", "name": name, "path": str(path.resolve()), "aliases": [path.stem]})

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """A run that resumes from this checkpoint does not log its step again."""
        with self._timed():
            self._send_row()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Pass on the last row. Lightning calls this after every fit and test: the run ends with ``close`` only."""
        with self._timed():
            self._send_row()

    def _send_table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        self._send_row()
        self._send({"do": "table", "at": self._at, "name": name, "columns": columns, "rows": rows})

    def _send_row(self) -> None:
        row, self._row = self._row, {}
        if row:
            self._send({"do": "row", "values": row | self._at})

    def _send(self, order: dict[str, Any]) -> None:
        if self._channel is not None:
            self._channel.send(order)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Nothing that is logged may stop a training, nor go unmeasured."""
        began = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001 - a logger must not end the run
            self._say(f"{in_one_line(error)}; metrics.csv goes on")
        finally:
            self.longest_call_s = max(self.longest_call_s, time.perf_counter() - began)

    # ---------------------------------------------------------------------------------------------------------- close

    @rank_zero_only
    def close(self, exit_code: int, *, within_s: float | None = None) -> str | None:
        """End the run with the job's exit code, within ``logger.finish_timeout_s`` or the time that is given.

        Returns one line that says how to send what is not on the server, or None where all of it is. A second call does
        nothing and returns the line again.
        """
        if self._channel is not None:
            began = time.monotonic()
            deadline = began + (self._options.finish_timeout_s if within_s is None else within_s)
            self._send_row()
            self._channel.send({"do": "finish", "exit_code": exit_code, "deadline": deadline})
            self._channel.wait("finished", until=deadline)
            self._channel.end(within=_LAST_BREATH_S)
            self._channel = None
            self.close_s = time.monotonic() - began
        return self.how_to_sync()

    def how_to_sync(self) -> str | None:
        """The command that sends every part of this run which is not on the server, or None."""
        parts = []
        for part in self._parts():
            file = part / f"run-{self.run_id}.wandb"
            sent = file.with_name(f"{file.name}.synced").exists()
            if not sent and file.exists() and file.stat().st_size > _HEADER_BYTES:
                parts.append(part)
        if not parts:
            return None
        parts.sort(key=lambda part: part.name.removeprefix("offline-"))
        # NOTE: wandb leaves out online runs without this flag, also those that are named.
        flag = " --include-online" if any(part.name.startswith("run-") for part in parts) else ""
        return f"W&B: not on the server yet; to send it: wandb sync{flag} {shlex.join(map(str, parts))}"

    # --------------------------------------------------------------------------------------------------------- report

    def _trouble(self, reply: Mapping[str, Any]) -> None:
        if reply["state"] != "problem":  # the process has ended, could not begin, or is stuck
            self.mode_now = "absent"
        elif self._troubled:  # the first of its kind is enough to hear of
            return
        self._troubled = True
        self._say(f"{reply.get('cause', 'its process has ended')}; training and metrics.csv go on")

    def _say(self, text: str) -> None:
        """One line on stderr, once."""
        if text not in self._said:
            self._said.add(text)
            print(f"eit_lab: W&B: {text}", file=sys.stderr, flush=True)


class _Channel:
    """The process that speaks with W&B, and the two threads that write to it and read from it."""

    def __init__(self, log: Path, *, on_trouble: Callable[[Mapping[str, Any]], None]) -> None:
        env = {
            "WANDB_ERROR_REPORTING": "false",  # one more server, which may hang at the end
            # Of tables and artifacts on their way, which are to be sent later too; else it is in the user's home.
            "WANDB_DATA_DIR": str(log.parent.resolve()),
            **os.environ,
        }
        for name in ("WANDB_SERVICE", "WANDB_RESUME"):  # of a wandb process around us: the run is ours
            env.pop(name, None)
        with log.open("ab") as chatter:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "eit_lab.training.wandb_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=chatter,
                env=env,
                start_new_session=True,  # Ctrl-C is for the training, which then closes
            )
        self._on_trouble = on_trouble
        self._awaited = self._stuck = False
        self._orders: queue.Queue[str | None] = queue.Queue(_QUEUED_ORDERS)
        self._replies: queue.Queue[dict[str, Any]] = queue.Queue()
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._write, self._read)]
        for thread in self._threads:
            thread.start()

    def send(self, order: Mapping[str, Any]) -> None:
        """Queue an order; never waits."""
        if self._stuck:
            return
        try:
            self._orders.put_nowait(json.dumps(order))
        except queue.Full:
            self._stuck = True
            self._on_trouble({"state": "stuck", "cause": "its process takes nothing any more"})

    def wait(self, *states: str, until: float) -> dict[str, Any] | None:
        """The first reply of these states, or None when the process ends or the time comes."""
        self._awaited = True
        with suppress(queue.Empty):
            while True:
                reply = self._replies.get(timeout=max(0.0, until - time.monotonic()))
                if reply["state"] in states:
                    self._awaited = False
                    return reply
                if reply["state"] == "gone":
                    break
        return None

    def end(self, *, within: float) -> None:
        """See the process end, by itself within so many seconds or else at once. wandb's service ends with it."""
        self._awaited = True
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(within)
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1.0)  # killed, but perhaps in the middle of a write to a disk that hangs
        with suppress(queue.Full):
            self._orders.put_nowait(None)
        for thread in self._threads:
            thread.join(timeout=1.0)

    def _write(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError), self._process.stdin as pipe:  # closing may fail too: the process may be gone
            while (order := self._orders.get()) is not None:
                pipe.write(f"{order}\n".encode())
                pipe.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as pipe:
            for line in pipe:
                self._hear(json.loads(line))
        self._hear({"state": "gone"})

    def _hear(self, reply: dict[str, Any]) -> None:
        if reply["state"] == "problem" or (reply["state"] in ("failed", "gone") and not self._awaited):
            self._on_trouble(reply)
        self._replies.put(reply)


def _png(mistake: Mistake) -> dict[str, str]:
    handle = io.BytesIO()
    Image.fromarray(mistake.image).save(handle, "PNG")
    return {"png": base64.b64encode(handle.getvalue()).decode()}
