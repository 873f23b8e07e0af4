"""What submitit runs in a Slurm job, in every task of it: the frozen config, and the way back into the queue. No torch.

Who does what when Slurm wants the node back, at a preemption or shortly before the time limit:

1. Slurm sends SIGUSR2 or SIGTERM to every process of the job. Our handler (signals.py) takes note.
2. Training saves its state at the end of a step, on all ranks the same one, closes its loggers and ends with status 75.
3. Rank 0 asks Slurm what becomes of this job. Has Slurm requeued it already, there is nothing to do; was it cancelled, it
   must not come back; else submitit's handler requeues it. The other ranks wait for the end that follows.

submitit's handler alone would requeue at once, in the middle of a step, with nothing saved; Lightning's would do so for a
signal that submitit does not send. So neither hears the signal: ours is in front of both.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from eit_lab.command import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED
from eit_lab.config import ConfigError
from eit_lab.sweep.slurm_queue import Seen, ask, read_queue, squeue_command

_TRIES, _TRY_AGAIN_S = 6, 5.0  # a controller that restarts is back within seconds
_WAIT_S = 120.0  # of the other ranks, for the end of the job
_GRACE_S = 10.0  # of a failed rank, for rank 0 to write down what it saw; as in processes.py


class FrozenJob:
    """Runs a frozen config in this process; every part of a job, and every rank, calls it anew."""

    def __init__(self, *, module: str, frozen: str, log: str, max_parts: int, closing_s: float) -> None:
        self.module, self.frozen, self.log, self.max_parts = module, frozen, log, max_parts
        self.closing_s = closing_s
        """Seconds that the loggers may take to close."""

    def __call__(self) -> int:
        """Returns 0, or ends the process with the run's exit status, so that Slurm has it."""
        rank, part = _number("SLURM_PROCID"), 1 + _number("SLURM_RESTART_COUNT")
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's
        logging.getLogger("submitit").setLevel(logging.CRITICAL)  # what it has to say we say, once
        self._open_log(rank)
        print(f"{first_words(job_name(), part)} on {os.environ.get('SLURMD_NODENAME', '?')}", flush=True)
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            os.environ.setdefault("OMP_NUM_THREADS", cores)  # else torch counts the node's
        if stop_file(Path(self.frozen)).exists():
            print("asked to stop before it began", flush=True)
            status = EXIT_INTERRUPTED if rank == 0 else 0
        elif part > self.max_parts:
            status = self._give_up(self.max_parts)
        else:
            status = import_module(self.module).main(["--frozen", self.frozen])
            # Slurm signals every process of the job, again and again: from here on, none of them is to be disturbed.
            for signum in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
                signal.signal(signum, signal.SIG_IGN)
            if status == EXIT_PREEMPTED:
                status = self._make_way(requeue, part) if rank == 0 else _wait_for_the_end()
            elif rank > 0:
                status = self._follow(status)
        sys.stdout.flush()
        if status:
            raise SystemExit(status)
        return 0

    def checkpoint(self) -> Any:
        """What submitit is to run in the next part: the same. The run finds its own state."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def _open_log(self, rank: int) -> None:
        """Rank 0 goes on in the job's log, another one in its own beside it."""
        path = Path(self.log) if rank == 0 else Path(self.log).with_suffix(f".rank{rank}.log")
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.close(handle)

    def _make_way(self, requeue: Any, part: int) -> int:
        """Have the job come back, unless it does so already or is not to. Returns this process's exit status."""
        for attempt in range(_TRIES):
            seen = own_state()
            if seen is not None and (because := stays_out(seen, restarts=part - 1)):
                print(f"Slurm job {job_name()}: {because}", flush=True)
                return EXIT_PREEMPTED
            if part >= self.max_parts:
                return self._give_up(part)
            if not callable(requeue):
                raise ConfigError("a Slurm job must be started by submitit, whose handler of SIGUSR2 is missing")
            if (trouble := _requeue(requeue)) is None:
                print(f"Slurm job {job_name()}: requeued, its state is saved; part {part + 1} goes on", flush=True)
                return EXIT_PREEMPTED
            print(f"Slurm job {job_name()}: cannot be requeued: {trouble}", file=sys.stderr, flush=True)
            if attempt + 1 < _TRIES:
                time.sleep(_TRY_AGAIN_S)
        return EXIT_PREEMPTED  # the launcher requeues it, if it is there; else the same command goes on

    def _give_up(self, parts: int) -> int:
        print(
            f"eit_lab: not finished after {parts} parts; hydra.launcher.max_parts={self.max_parts} allows no more",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_FAILED

    def _follow(self, status: int) -> int:
        """How a rank beside rank 0 ends: srun ends all as soon as one ends badly, so it leaves rank 0 the time to close."""
        if status == EXIT_INTERRUPTED:
            return 0  # rank 0 was asked too, and says so
        if status:
            time.sleep(_GRACE_S + self.closing_s)
        return status


def first_words(job: str, part: int) -> str:
    """How each part of a job begins its log."""
    return f"Slurm job {job}, part {part},"


def stop_file(frozen: Path) -> Path:
    """What tells a job that was asked to stop so, where the signal came before there was a process: Slurm forgets those."""
    return frozen.with_suffix(".stop")


def _requeue(handler: Callable[[int, Any], Any]) -> str | None:
    """Let submitit's handler requeue this job; None, or why it could not."""
    from submitit import JobEnvironment

    # A part that was killed while submitit wrote this file would keep every later one from being requeued.
    pickle = Path(JobEnvironment().paths.submitted_pickle)
    pickle.with_suffix(f"{pickle.suffix}.save_tmp").unlink(missing_ok=True)
    try:
        handler(signal.SIGUSR2, None)
    except SystemExit:  # so it ends where it has requeued
        return None
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:  # its own errors are RuntimeErrors
        return str(error)
    return "submitit says that this is not the first task"


def job_name() -> str:
    """This job's number, with that of the task in an array, as squeue writes them."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "?")


def own_state() -> Seen | None:
    """This job as Slurm has it now; None where it does not say."""
    text, _ = ask(*squeue_command(f"--jobs={os.environ['SLURM_JOB_ID']}"), within_s=30.0)
    return read_queue(text or "").get(job_name())


def stays_out(seen: Seen, *, restarts: int) -> str | None:
    """Why this job, which has been requeued so often when this part began, is not to be requeued by itself; None: it is.

    At a time limit or a preemption without warning Slurm has ended the job when the signal comes: COMPLETING. Had it a
    reason, it was the time limit; without one, somebody cancelled it, or it was preempted in a way that cancels. The last
    is brought back by the launcher (slurm.py), which sees the difference once the job has ended.
    """
    if seen.restarts > restarts:
        return "Slurm has requeued it already"
    if seen.state in ("RUNNING", "TIMEOUT", "PREEMPTED", "SUSPENDED", "STOPPED", "SIGNALING"):
        return None
    if seen.state == "COMPLETING" and seen.reason == "TimeLimit":
        return None
    return f"Slurm is ending it ({seen.state}), and it was not the time limit: not requeued from here"


def _wait_for_the_end() -> int:
    """A rank beside rank 0: Slurm ends it with the job. Ending earlier could take rank 0 with it."""
    time.sleep(_WAIT_S)
    return 0


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    return int(text) if text.isdigit() else 0
