"""Jobs of a Slurm cluster. submitit submits them, as arrays, and requeues them; squeue says what became of them.

A job is known by its number in Slurm for as long as it lives, however often it is requeued: at a time limit, at a preemption
(both in slurm_job.py, on the node), when its node fails (Slurm itself), or here, where none of these could. So a launcher may
end and another take its jobs over; jobs whose launcher was killed before it could write their numbers down are found again by
the token of the call that submitted them (slurm_submit.py).
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from eit_lab.command import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED, RunError
from eit_lab.config import Config, ConfigError
from eit_lab.launchers import SlurmLauncher
from eit_lab.runs import Run, read_record
from eit_lab.sweep.engine import Ended, Job
from eit_lab.sweep.slurm_job import first_words, stop_file
from eit_lab.sweep.slurm_queue import (
    ENDED,
    NEVER,
    PENDING,
    Question,
    Seen,
    ask,
    ask_accounting,
    read_queue,
    squeue_command,
)
from eit_lab.sweep.slurm_submit import COMMENT, Submitter

_HANDLE = "slurm:"
_ROOM = 100_000  # jobs at once: how many may wait in the queue is the cluster's to say
_MOST_POLL_S = 60.0
_PATIENCE_S = 600.0  # for a controller that does not answer when a launcher starts and must know what runs
_FRESH_S = 2.0
_SETTLE_S = 60.0  # until a record written on another machine is seen here, at worst
_LOG_BYTES = 4096


class SlurmEngine:
    """Submits jobs, follows them, and brings those back that Slurm ended before their time. They go on without it."""

    survives = True

    def __init__(self, launcher: SlurmLauncher, *, folder: Path, module: str = "eit_lab.train") -> None:
        self._launcher = launcher
        self._submitter = Submitter(launcher, folder=folder, module=module)
        self._ids: dict[Job, str] = {}
        self._followed: set[str] = set()
        """Every number there ever was in the line above."""
        self._seen: dict[str, Seen] = {}
        self._missed: dict[str, int] = {}
        self._odd_since: dict[str, float] = {}
        self._stopping: dict[str, int] = {}
        """Jobs to be stopped, and how often that was asked."""
        self._to_stop: set[str] = set()
        self._question: Question | None = None
        self._ask_at = 0.0
        self._failures = 0
        self._said: set[str] = set()
        self._taken: dict[str, Seen] = {}
        self._taken_at = -math.inf

    # ------------------------------------------------------------------------------------------------------------ start

    def threads(self, config: Config) -> int | None:
        """Of each process of a job; None: what its node gives it."""
        return int(os.environ.get("OMP_NUM_THREADS", 0)) or self._launcher.cpus_per_task

    def capacity(self) -> int:
        """As many as there are: the queue is Slurm's."""
        return _ROOM

    def start(self, jobs: Sequence[Job]) -> list[str]:
        """Submit jobs, those with the same needs as one array, but for those that are in the queue already."""
        living = {identity: id_ for identity, id_ in self._find_living().items() if id_ not in self._followed}
        numbers = {job: living[job.identity] for job in jobs if job.identity in living}
        numbers |= self._submitter.submit([job for job in jobs if job not in numbers])
        for job in jobs:
            self._follow(job, numbers[job])
        return [f"{_HANDLE}{self._ids[job]}" for job in jobs]

    def _follow(self, job: Job, id_: str) -> None:
        self._ids[job] = id_
        self._followed.add(id_)
        self._ask_anew()  # an answer on its way may be from before this job was there

    def _ask_anew(self) -> None:
        if self._question is not None:
            self._question.drop()
            self._question = None
        self._ask_at = time.monotonic() + min(1.0, self._launcher.poll_s)

    # ------------------------------------------------------------------------------------------------ jobs of before

    def adopt(self, job: Job, handle: str) -> bool:
        """Take over a job that an earlier launcher submitted, if Slurm still has it.

        Waits for a controller that does not answer: a job that may be running must not be submitted once more.
        """
        id_ = handle.removeprefix(_HANDLE)
        seen = self._snapshot().get(id_)
        if seen is None or seen.state in ENDED:
            if (found := self._find_living().get(job.identity)) is None:
                return False
            id_ = found
        self._follow(job, id_)
        return True

    def _find_living(self) -> dict[str, str]:
        """The jobs of this sweep that are in the queue: their numbers by identity."""
        listed = {path.parent.name: path for path in self._submitter.folder.glob("*/jobs.json")}
        if not listed:
            return {}
        living, identities = {}, {}
        for seen in self._snapshot().values():
            name = seen.comment.removeprefix(COMMENT)
            if seen.state not in ENDED and name in listed:
                if name not in identities:
                    identities[name] = json.loads(listed[name].read_text())
                _, _, place = seen.id.partition("_")
                living[identities[name][int(place or 0)]] = seen.id
        return living

    def _snapshot(self) -> dict[str, Seen]:
        """The queue as it was two seconds ago or less; waits for it. Raises RunError when it does not come for ten minutes."""
        if time.monotonic() - self._taken_at < _FRESH_S:
            return self._taken
        until, wait = time.monotonic() + _PATIENCE_S, 1.0
        while True:
            text, why = ask(*self._command())
            if text is not None:
                self._taken, self._taken_at = read_queue(text), time.monotonic()
                return self._taken
            if time.monotonic() > until:
                raise RunError(f"Slurm does not answer ({why}); the same command goes on once it does")
            self._say(f"Slurm does not answer ({why}); asking again")
            time.sleep(wait)
            wait = min(2 * wait, _MOST_POLL_S)

    def _command(self) -> tuple[str, ...]:
        return squeue_command(f"--user={os.getuid()}", f"--name={self._submitter.name}")

    # ------------------------------------------------------------------------------------------------------------- poll

    def poll(self) -> list[tuple[Job, Ended]]:
        """The jobs that ended since the last call. Asks for all of them at once, every ``poll_s`` seconds, and never waits."""
        self._send_stops()
        if not self._ids:
            return []
        if self._question is None:
            if time.monotonic() >= self._ask_at:
                self._question = Question(self._command())
            return []
        answer = self._question.answer()
        if answer is None:
            return []
        self._question = None
        queue, why = answer
        if queue is None:  # says nothing of the jobs
            self._failures += 1
            self._ask_at = time.monotonic() + min(self._launcher.poll_s * 2.0**self._failures, _MOST_POLL_S)
            self._say(f"Slurm does not answer ({why}); its jobs go on, asking again")
            return []
        if self._failures:
            self._failures = 0
            self._say("Slurm answers again", once=False)
        self._ask_at = time.monotonic() + self._launcher.poll_s
        return self._judge_all(queue)

    def _judge_all(self, queue: dict[str, Seen]) -> list[tuple[Job, Ended]]:
        gone = []
        for id_ in self._ids.values():
            if (seen := queue.get(id_)) is not None:
                self._seen[id_], self._missed[id_] = seen, 0
                self._warn_of_held(seen)
            else:
                self._missed[id_] = self._missed.get(id_, 0) + 1
                if self._missed[id_] > 1:  # an answer may be older than the job
                    gone.append(id_)
        accounts = ask_accounting(gone) if gone else {}
        ended = []
        for job, id_ in list(self._ids.items()):
            seen = accounts.get(id_) if id_ in gone else queue.get(id_)
            if (how := self._judge(job, id_, seen, gone=id_ in gone)) is not None:
                ended.append((job, how))
                del self._ids[job]
                self._stopping.pop(id_, None)
        return ended

    def _judge(self, job: Job, id_: str, seen: Seen | None, *, gone: bool) -> Ended | None:
        """How a job ended; None while it lives, or lives again."""
        if not gone and (seen is None or seen.state not in ENDED):
            return None
        job.find_folder()
        record = _read(job.folder)
        finished = record is not None and record["status"] == "finished"
        if seen is None or seen.state not in ENDED:
            if finished:
                return Ended(0, "")
            last = self._seen.get(id_)
            if id_ in self._stopping or (last is not None and last.state in PENDING):
                # Of a task that is cancelled while it waits, nothing is left in the queue.
                return Ended(EXIT_INTERRUPTED, f"cancelled while it waited (Slurm job {id_})")
            return Ended(None, f"Slurm no longer knows job {id_}, nor how it ended")
        if finished and (seen.state == "COMPLETED" or _written_since(job.folder / "record.json", seen.started)):
            return Ended(0, "")
        where = f"Slurm job {id_} on {seen.nodes or 'no node'}"
        status = seen.status
        if seen.state == "CANCELLED":
            return Ended(EXIT_INTERRUPTED, f"cancelled ({where})")
        if seen.state == "COMPLETED":
            if time.monotonic() - self._odd_since.setdefault(id_, time.monotonic()) < _SETTLE_S:
                return None
            return Ended(EXIT_FAILED, f"{where} is COMPLETED, but the run's record does not say finished")
        if seen.state in ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL"):
            return self._bring_back(id_, seen, f"{seen.state}: {where}")
        if seen.state == "TIMEOUT":
            said = f"TIMEOUT after {self._launcher.timeout_min} min: {where}"
            if _written_since(_last_checkpoint(job), seen.started):
                return self._bring_back(id_, seen, said)
            return self._fail(job, id_, seen, EXIT_FAILED, f"{said}; no state was saved in that time")
        if status == EXIT_PREEMPTED:  # saved, but it could not requeue itself
            return self._bring_back(id_, seen, f"{where} was stopped with its state saved")
        if seen.state == "FAILED" and status is not None and status > 0:
            if _has_begun(job, seen):
                return Ended(status, "")  # it has said why itself
            return self._fail(job, id_, seen, status, f"ended with status {status} before it began: {where}")
        if seen.state == "FAILED" and status is not None and status < 0:
            return self._fail(job, id_, seen, status, f"killed by {_signal_name(-status)}: {where}")
        return self._fail(job, id_, seen, status or EXIT_FAILED, f"{seen.state}: {where}")

    def _bring_back(self, id_: str, seen: Seen, why: str) -> Ended | None:
        """Requeue a job that Slurm ended, and that did not, or could not, see to it itself."""
        part = seen.restarts + 1
        if id_ in self._stopping:
            return Ended(EXIT_PREEMPTED, why)
        if part >= self._launcher.max_parts:
            return Ended(EXIT_FAILED, f"{why}; it was part {part}, and hydra.launcher.max_parts allows no more")
        text, refused = ask("scontrol", "requeue", id_, within_s=60.0)
        if text is None:
            return Ended(EXIT_FAILED, f"{why}; Slurm does not requeue it: {refused}")
        self._say(f"{why}; requeued, part {part + 1}", once=False)
        return None

    def _fail(self, job: Job, id_: str, seen: Seen, status: int, said: str) -> Ended:
        """A job that ended without being able to say why: Slurm's own lines go to the end of its log."""
        logs = sorted(self._submitter.folder.glob(f"*/{id_}_0_log.out"))
        if logs:
            lines = [line for line in _tail(logs[-1]).splitlines() if line.strip() and not line.startswith("submitit ")]
            with suppress(OSError), job.log.open("a") as log:
                log.write("".join(f"{line}\n" for line in lines))
        return Ended(status, said)

    def _warn_of_held(self, seen: Seen) -> None:
        if seen.state in PENDING and NEVER.search(seen.reason):
            self._say(f"Slurm does not start jobs of this sweep: {seen.reason} (job {seen.id})", key=seen.reason)

    def wait(self, seconds: float) -> None:
        """Sleep: Slurm tells nobody by itself that a job has ended."""
        time.sleep(seconds)

    def is_running(self, job: Job) -> bool:
        """Whether Slurm has given it a node, as far as the last answer says."""
        seen = self._seen.get(self._ids.get(job, ""))
        return seen is not None and seen.state not in PENDING and seen.state not in ENDED

    # ------------------------------------------------------------------------------------------------------------- stop

    def stop(self, job: Job, signum: int) -> None:
        """Have a job save its state and end, for good; one that waits leaves the queue. The second time it is cancelled.

        Whatever the signal was, the job gets SIGINT: after SIGTERM and SIGUSR2 it would come back by itself.
        """
        if (id_ := self._ids.get(job)) is not None:
            stop_file(job.frozen).touch()
            self._stopping[id_] = self._stopping.get(id_, 0) + (2 if signum == signal.SIGKILL else 1)
            self._to_stop.add(id_)

    def _send_stops(self) -> None:
        if not self._to_stop:
            return
        again = sorted(id_ for id_ in self._to_stop if self._stopping[id_] > 1)
        first = sorted(self._to_stop.difference(again))
        self._to_stop.clear()
        for ids, options in ((first, ("--state=PENDING",)), (first, ("--signal=INT",)), (again, ())):
            for start in range(0, len(ids), 500):
                ask("scancel", "--quiet", *options, *ids[start : start + 500])

    def close(self) -> None:
        """Let go; the jobs go on."""
        self._send_stops()
        if self._question is not None:
            self._question.drop()
            self._question = None

    def _say(self, text: str, *, key: str = "", once: bool = True) -> None:
        if once and (key or text) in self._said:
            return
        self._said.add(key or text)
        print(f"eit_lab: {text}", file=sys.stderr, flush=True)


def _read(folder: Path) -> dict[str, Any] | None:
    """The run's record; None where there is none, or a part of one."""
    with suppress(ConfigError, OSError):
        return read_record(folder)
    return None


def _last_checkpoint(job: Job) -> Path:
    return Run(job.folder, job.identity, "new").last_checkpoint


def _has_begun(job: Job, seen: Seen) -> bool:
    """Whether the present part of a job came as far as its first word (slurm_job.py)."""
    with suppress(OSError):
        return first_words(seen.id, seen.restarts + 1) in job.log.read_text(errors="replace")
    return False


def _written_since(path: Path, moment: float | None) -> bool:
    """Whether a file was written after a moment, by the clocks of machines that agree to a few seconds."""
    with suppress(OSError):
        return moment is not None and path.stat().st_mtime > moment - 5.0
    return False


def _tail(path: Path) -> str:
    with path.open("rb") as handle:
        handle.seek(max(0, path.stat().st_size - _LOG_BYTES))
        return handle.read().decode(errors="replace")


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:
        return f"signal {signum}"
