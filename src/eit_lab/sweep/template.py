"""A process that has imported everything a job needs and touched no accelerator; each job is forked from it.

Importing torch, Lightning and the rest takes seconds, which a sweep of small jobs would pay once a job. What makes a job a
fresh process all the same: it is forked from a process that has only imported, has a session, a log, signals, cores and
devices of its own, seeds its own random numbers, and ends as any Python process does.

Orders come on standard input, answers go to standard output, a JSON object a line:
{"id", "module", "argv", "log", "env", "cores", "threads"} starts a job, {"id", "signal"} hands a signal on;
{"id", "pid"} says that a job runs, {"id", "status"} how it ended (negative: by that signal). When the orders end, so does this
process, and its jobs with it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NoReturn

from eit_lab.processes import PARENT, die_with_parent, end_with_parent
from eit_lab.runs import versions

PRELOADED = (
    "eit_lab.train",
    "eit_lab.selftest",
    "eit_lab.data.prepare",
    "eit_lab.training.fit",
    "sklearn.datasets",
    "matplotlib.figure",
)
"""What every job imports. Nothing of it starts a thread that a fork would lose, or looks for a device."""


class _Template:
    def __init__(self) -> None:
        self.jobs: dict[int, int] = {}  # process -> id of the order
        self._rest = b""
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever an import prints goes to the log
        self._woken, waker = os.pipe()
        for end in (self._woken, waker):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(waker)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> Mapping[str, Any] | None:
        """Obey until the orders end. In the forked process of a job it returns that job's order."""
        while True:
            ready, _, _ = select.select([0, self._woken], [], [])
            if self._woken in ready:
                os.read(self._woken, 1 << 16)
            self._reap()
            if 0 not in ready:
                continue
            new = os.read(0, 1 << 16)
            if not new:
                return None
            *lines, self._rest = (self._rest + new).split(b"\n")
            for line in lines:
                order = json.loads(line)
                if "signal" in order:
                    self._signal(order)
                    continue
                pid = os.fork()
                if pid == 0:
                    return dict(order)
                self.jobs[pid] = order["id"]
                self._say(id=order["id"], pid=pid)

    def _signal(self, order: Mapping[str, Any]) -> None:
        for pid, number in self.jobs.items():  # only what has not been waited for: its number cannot be another's
            if number == order["id"]:
                os.kill(pid, order["signal"])

    def _reap(self) -> None:
        while self.jobs:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid in self.jobs:
                self._say(id=self.jobs.pop(pid), status=os.waitstatus_to_exitcode(status))

    def _say(self, **answer: int) -> None:
        self._answers.write(f"{json.dumps(answer)}\n")
        self._answers.flush()


def _become(order: Mapping[str, Any]) -> None:
    """Make this forked process what a shell would have started."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()  # the terminal's Ctrl-C reaches the launcher only, which hands it on
    log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.closerange(3, max(log, nothing) + 1)  # the orders' and the answers' other ends among them
    os.environ.update(order["env"])
    if order["cores"]:
        os.sched_setaffinity(0, order["cores"])
    if order["threads"] and (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(order["threads"])
    sys.argv = [order["module"], *order["argv"]]


def main() -> int:
    """Import, then serve; in a job's process, run it and return its exit status."""
    die_with_parent()
    os.environ.pop(PARENT, None)
    template = _Template()
    for name in PRELOADED:
        import_module(name)
    versions()  # found once, of the code that is loaded now
    gc.collect()
    gc.freeze()  # a job that collects garbage must not copy every page of what is shared
    here = os.getpid()
    order = template.serve()
    if order is None:
        return 0
    end_with_parent()
    if os.getppid() != here:
        return 1  # it ended before the line above
    _become({**order, "env": {**order["env"], PARENT: str(here)}})
    return _end(_run(order))


def _run(order: Mapping[str, Any]) -> int:
    try:
        status: int = import_module(order["module"]).main(order["argv"])
    except SystemExit as asked:
        if isinstance(asked.code, str):
            print(asked.code, file=sys.stderr)
        return asked.code if isinstance(asked.code, int) else int(asked.code is not None)
    except BaseException:  # noqa: BLE001 - the end of a process: what Python itself does with it
        traceback.print_exc()
        return 1
    return status


def _end(status: int) -> NoReturn:
    """End as Python does, but for taking every module apart: that would copy each page shared with the template (seconds)."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
