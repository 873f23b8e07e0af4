"""Asking a run to stop: SIGTERM, SIGUSR2 and the first Ctrl-C set a flag, which training reads after each step. No torch.

Nothing is saved inside a handler: a handler interrupts any instruction, a checkpoint wants a whole step. The second Ctrl-C
ends the process at once. Install before anything slow is imported: until then a signal ends the process, unless whoever
started it has these signals blocked, as our Slurm jobs have (sweep/slurm_submit.py); then what came meanwhile is heard now.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from types import FrameType
from typing import Any

SAME_S = 0.5
"""Two interrupts so close are one: Slurm sends it to a rank, and the supervisor hands its own on."""
_POLITE = (signal.SIGTERM, signal.SIGUSR2)


class StopRequest:
    """Whether somebody asked this process to stop, and how."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._pid: int | None = None
        self._asked_at = 0.0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take over SIGTERM, SIGUSR2 and SIGINT in this process, and unblock them."""
        self.signum, self._pid = None, os.getpid()
        self._before = {signum: signal.signal(signum, self._on_signal) for signum in (*_POLITE, signal.SIGINT)}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)

    def uninstall(self) -> None:
        """Give the signals back to whoever had them before: submitit's handlers, in a Slurm job."""
        if self._pid == os.getpid():
            self._pid = None
            for signum, handler in self._before.items():
                # None: a handler that Python knows nothing of
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if (
            os.getpid() != self._pid
        ):  # a loader's worker, forked with our handlers: Slurm signals every process of a step
            return
        if signum == signal.SIGINT:
            if self.signum == signal.SIGINT:
                if time.monotonic() - self._asked_at < SAME_S:
                    return
                raise KeyboardInterrupt
            self._asked_at = time.monotonic()
            print("\nstopping after this step; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        self.signum = signum

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self.signum is not None


STOP = StopRequest()
