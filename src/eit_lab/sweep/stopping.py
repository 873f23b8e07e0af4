"""Asking a launcher to stop: the signals it got, for its loop to hand on to the jobs. No torch."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from eit_lab.command import EXIT_INTERRUPTED, EXIT_PREEMPTED
from eit_lab.signals import SAME_S

_LAST_S = 10.0  # after Ctrl-C for the second time, for jobs to end by themselves


class Signals:
    """Takes note of signals; the loop hands them on. A second Ctrl-C is handed on too, and ends a job at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.seen: set[int] = set()
        self.out_at: float | None = None
        """When Ctrl-C came for the second time."""
        self._interrupted_at: float | None = None
        self._new: list[int] = []
        self._before: Mapping[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {n: signal.signal(n, self._note) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT:
            now = time.monotonic()
            self._interrupted_at = self._interrupted_at or now
            if self.out_at is None and now - self._interrupted_at > SAME_S:
                self.out_at = now
        self.received = signum
        self.seen.add(signum)
        self._new.append(signum)

    def out_of_patience(self) -> bool:
        """Whether a job that still runs has not even heard the second Ctrl-C: stuck where Python's handlers are not called."""
        return self.out_at is not None and time.monotonic() - self.out_at > _LAST_S

    def take(self) -> list[int]:
        """The signals that came since the last call."""
        new, self._new = self._new, []
        return new

    def exit_status(self) -> int:
        """130 after Ctrl-C, 75 after another signal, 0 without."""
        if self.received is None:
            return 0
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_PREEMPTED
