"""Files of a store, fetched into its cache before they are needed, by a process of its own. No torch.

NOTE: not by threads of the process that asks: it forks workers, and a lock that a thread holds at that moment (of a module
that is being imported, of the resolver) is never released in the child. With threads, 5 of 1600 workers hung.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

from eit_lab.command import RunError
from eit_lab.data.cache import FileCache, Make
from eit_lab.data.store import LOG


class Wanted(NamedTuple):
    """A file to be fetched ahead, as ``FileCache.open`` takes it."""

    name: str
    size: int | None = None
    checksum: str | None = None
    make: Make | None = None


class Prefetcher:
    """Has files fetched into a cache before they are needed, in the order in which they will be.

    It holds nobody up: an error is a line in the log, after which it rests until the next ``want`` or ``reached``, and
    whoever needs the file fetches it and says what is wrong. It ends with the process that made it.
    """

    def __init__(self, cache: FileCache, *, ahead_bytes: int | None = None, parallel: int = 4) -> None:
        """``ahead_bytes``: how much is fetched beyond what was reached, ``parallel`` files at a time; half the cache where None.

        NOTE: processes that share a cache share its space: each should take its part.
        """
        ahead_bytes = cache.limit_bytes // 2 if ahead_bytes is None else ahead_bytes
        self._setting = (cache, ahead_bytes, parallel)
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None
        self._closed = False

    def want(self, files: Sequence[Wanted]) -> None:
        """The files that will be needed, in that order; an earlier list is forgotten. ``make`` is a module's function."""
        self._tell(("want", tuple(files)))

    def reached(self, count: int) -> None:
        """The first ``count`` files of the list are in use, or were."""
        self._tell(("reached", count))

    def close(self) -> None:
        """End it; what was on its way is thrown away."""
        self._closed = True
        self._end()
        self._setting[0].tidy()

    def _tell(self, message: tuple[str, object]) -> None:
        if self._closed:
            return
        try:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", "from eit_lab.data.prefetch import serve; serve()"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,  # an interrupt from the keyboard is for the command
                )
                self._end = weakref.finalize(self, _end_process, self._process, os.getpid())
                self._send(self._setting)
            self._send(message)
        except (OSError, ValueError) as error:  # it was killed, or this process is at its end
            LOG.warning("nothing more is fetched ahead: %s", error)
            self._closed = True

    def _send(self, message: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin)
        self._process.stdin.flush()


def _end_process(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a forked copy of what the owner still uses
        return
    process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.communicate()


def serve() -> None:
    """The body of a prefetcher's process: obeys what comes on stdin, until its end or that of the parent."""
    parent = os.getppid()
    logging.basicConfig(format="eit_lab: %(message)s")

    def follow() -> None:
        # NOTE: stdin has an end only when all workers that inherited it have ended too.
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
    with contextlib.suppress(EOFError, pickle.UnpicklingError):  # the parent has gone, perhaps in mid-word
        cache, ahead_bytes, parallel = pickle.load(sys.stdin.buffer)
        ahead = _Ahead(cache, ahead_bytes=ahead_bytes, parallel=parallel)
        while True:
            match pickle.load(sys.stdin.buffer):
                case "want", files:
                    ahead.want(files)
                case "reached", count:
                    ahead.reached(count)
    os._exit(0)  # nothing that is on its way is waited for


class _Ahead:
    """The threads that fetch, and what they know."""

    def __init__(self, cache: FileCache, *, ahead_bytes: int, parallel: int) -> None:
        self.cache, self.ahead_bytes, self.parallel = cache, ahead_bytes, parallel
        self._changed = threading.Condition()
        self._files: Sequence[Wanted] = ()
        self._reached = self._next = 0
        self._resting = False
        for _ in range(parallel):
            threading.Thread(target=self._run, daemon=True).start()

    def want(self, files: Sequence[Wanted]) -> None:
        with self._changed:
            self._files, self._reached, self._next, self._resting = files, 0, 0, False
            self._changed.notify_all()

    def reached(self, count: int) -> None:
        with self._changed:
            self._reached, self._resting = max(self._reached, count), False
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._may_go_on)
                file = self._files[self._next]
                self._next += 1
            try:
                self.cache.path(file.name, size=file.size, checksum=file.checksum, make=file.make)
            except (RunError, OSError, ValueError) as error:
                with self._changed:
                    first, self._resting = not self._resting, True
                if first:
                    LOG.warning("not fetched ahead: %s", error)

    def _may_go_on(self) -> bool:
        self._next = max(self._next, self._reached)
        if self._resting or self._next >= len(self._files):
            return False
        unknown = self.ahead_bytes // self.parallel
        ahead = sum(file.size or unknown for file in self._files[self._reached : self._next + 1])
        return self._next == self._reached or ahead <= self.ahead_bytes
