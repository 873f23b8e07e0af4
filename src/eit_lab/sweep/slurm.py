"""Jobs of a Slurm cluster. submitit submits them, as arrays, and requeues them; squeue says what became of them.

A job is known by its number in Slurm for as long as it lives, however often it is requeued: at a time limit, at a preemption
(both in slurm_job.py, on the node), when its node fails (Slurm itself), or here, where none of these could. So a launcher may
end and another take its jobs over. Everything submitit writes lies in ``jobs/submitit/TOKEN/`` of the sweep, a token for each
call of sbatch, which the job carries as its comment: that is how jobs are found again whose launcher was killed before it
could write their numbers down.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eit_lab.command import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED, RunError
from eit_lab.config import Config, ConfigError, WandbLogger
from eit_lab.launchers import SlurmLauncher
from eit_lab.loading import dump, load
from eit_lab.processes import LAUNCH_VARIABLES
from eit_lab.runs import Run, read_record, write_text
from eit_lab.sweep.engine import Ended, Job
from eit_lab.sweep.slurm_job import FrozenJob, stop_file
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

_HANDLE = "slurm:"
_COMMENT = "eit_lab:"
_ROOM = 100_000  # jobs at once: how many may wait in the queue is the cluster's to say
_MOST_POLL_S = 60.0
_PATIENCE_S = 600.0  # for a controller that does not answer when a launcher starts and must know what runs
_FRESH_S = 2.0
_SETTLE_S = 60.0  # until a record written on another machine is seen here, at worst
_ARRAY = 1001  # Slurm's own MaxArraySize
_LOG_BYTES = 4096
_EARLY = "USR2,TERM,INT"
"""Signals that wait from the start of a job's process until our handlers are there."""
_OURS = ("array", "signal", "output", "error", "open-mode", "requeue", "no-requeue", "job-name", "comment")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_CONF_SERVER")
_BINDING = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


@dataclass(frozen=True)
class Needs:
    """What one job takes of the cluster; jobs of an array take the same."""

    nodes: int
    tasks: int
    """On each node, one for each device."""
    gpus: int
    """Of each node."""


def place_slurm(config: Config, launcher: SlurmLauncher) -> Config:
    """The config with trainer.devices and trainer.num_nodes as the launcher's nodes and tasks have them.

    Raises ConfigError in one line where both are set and do not agree, or the batch cannot be shared among so many.
    """
    needs, trainer = _needs(config, launcher), config.trainer
    if (trainer.devices, trainer.num_nodes) == (needs.tasks, needs.nodes):
        return config
    plain = dump(config)
    plain["trainer"] |= {"devices": needs.tasks, "num_nodes": needs.nodes}
    return load(plain)  # which checks that the batch can be shared among so many


def _needs(config: Config, launcher: SlurmLauncher) -> Needs:
    trainer = config.trainer
    devices = _count(trainer.devices)
    tasks = launcher.tasks_per_node or devices or 1
    if devices not in (None, tasks):
        raise ConfigError(
            "hydra.launcher.tasks_per_node must be trainer.devices, one process for each device, "
            f"got {tasks} and {devices}; nearest: {devices}"
        )
    nodes = launcher.nodes or trainer.num_nodes
    if trainer.num_nodes not in (1, nodes):
        raise ConfigError(
            f"hydra.launcher.nodes must be trainer.num_nodes, got {nodes} and {trainer.num_nodes}; "
            f"nearest: {trainer.num_nodes}"
        )
    gpus = launcher.gpus_per_node
    if gpus is None:
        gpus = 0 if trainer.accelerator == "cpu" else tasks
    wanted = tasks if trainer.accelerator in ("gpu", "cuda") or (gpus and trainer.accelerator == "auto") else 0
    if gpus < wanted:
        raise ConfigError(
            f"hydra.launcher.gpus_per_node must be {wanted} or more, one for each of a node's processes, got {gpus}; "
            f"nearest: {wanted}"
        )
    return Needs(nodes, tasks, gpus)


def _count(devices: Any) -> int | None:
    """trainer.devices as a number; None for all there are. Which ones they are is Slurm's choice."""
    if devices in ("auto", -1, "-1"):
        return None
    if isinstance(devices, int) or (isinstance(devices, str) and devices.isdigit()):
        return int(devices)
    raise ConfigError(
        f"trainer.devices must be a number or auto with hydra/launcher=slurm, which chooses the devices, got {devices!r}"
    )


class SlurmEngine:
    """Submits jobs, follows them, and brings those back that Slurm ended before their time. They go on without it."""

    survives = True

    def __init__(self, launcher: SlurmLauncher, *, folder: Path, module: str = "eit_lab.train") -> None:
        for name in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
            if shutil.which(name) is None:
                raise ConfigError(f"hydra/launcher=slurm needs Slurm's {name}, which is not on PATH; nearest: local")
        if importlib.util.find_spec("submitit") is None:
            raise ConfigError(
                "hydra/launcher=slurm needs submitit, which is not installed; pip install 'eit_lab[slurm]'"
            )
        for key in launcher.additional_parameters or {}:
            if key.replace("_", "-") in _OURS:
                raise ConfigError(
                    f"hydra.launcher.additional_parameters.{key} must be left out: eit_lab sets it itself"
                )
        self._launcher, self._module = launcher, module
        self._folder = folder.absolute() / "jobs" / "submitit"
        self._name = f"eit_lab-{re.sub(r'[^A-Za-z0-9_.-]', '_', folder.absolute().name)}"
        self._ids: dict[Job, str] = {}
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
        self._array = 0

    # ------------------------------------------------------------------------------------------------------------ start

    def threads(self, config: Config) -> int | None:
        """Of each process of a job; None: what its node gives it."""
        return int(os.environ.get("OMP_NUM_THREADS", 0)) or self._launcher.cpus_per_task

    def capacity(self) -> int:
        """As many as there are: the queue is Slurm's."""
        return _ROOM

    def start(self, jobs: Sequence[Job]) -> list[str]:
        """Submit jobs, those with the same needs as one array, but for those that are in the queue already."""
        living = self._find_living()
        groups: dict[Needs, list[Job]] = {}
        for job in jobs:
            if (found := living.get(job.identity)) is not None:
                self._follow(job, found)
            else:
                groups.setdefault(_needs(job.config, self._launcher), []).append(job)
        for needs, group in groups.items():
            for first in range(0, len(group), self._array_size()):
                chunk = group[first : first + self._array_size()]
                for job, id_ in zip(chunk, self._submit(chunk, needs), strict=True):
                    self._follow(job, id_)
        return [f"{_HANDLE}{self._ids[job]}" for job in jobs]

    def _follow(self, job: Job, id_: str) -> None:
        self._ids[job] = id_
        self._ask_anew()  # an answer on its way may be from before this job was there

    def _ask_anew(self) -> None:
        if self._question is not None:
            self._question.drop()
            self._question = None
        self._ask_at = time.monotonic() + min(1.0, self._launcher.poll_s)

    def _submit(self, jobs: Sequence[Job], needs: Needs) -> list[str]:
        """One call of sbatch; the jobs' numbers."""
        token = secrets.token_hex(4)
        folder = self._folder / token
        folder.mkdir(parents=True)
        write_text(folder / "jobs.json", json.dumps([job.identity for job in jobs]) + "\n")
        for job in jobs:
            stop_file(job.frozen).unlink(missing_ok=True)
        with _clean_environment():
            from submitit import SlurmExecutor

            executor = SlurmExecutor(folder, max_num_timeout=self._launcher.max_parts, python=_python())
            executor.update_parameters(**self._parameters(needs, token))
            try:
                submitted = executor.submit_array([self._frozen_job(job) for job in jobs])
            except (RuntimeError, OSError, subprocess.SubprocessError) as error:  # its own errors are RuntimeErrors
                raise RunError(f"Slurm does not take the jobs: {_refusal(error)}") from None
        return [str(one.job_id) for one in submitted]

    def _frozen_job(self, job: Job) -> FrozenJob:
        logger = job.config.logger
        closing = logger.finish_timeout_s if isinstance(logger, WandbLogger) else 0.0
        return FrozenJob(
            module=self._module,
            frozen=str(job.frozen.absolute()),
            log=str(job.log.absolute()),
            max_parts=self._launcher.max_parts,
            closing_s=closing,
        )

    def _parameters(self, needs: Needs, token: str) -> dict[str, Any]:
        """Options of sbatch and srun, as submitit names them."""
        o = self._launcher
        srun = list(o.srun_args)
        if o.cpus_per_task is not None:
            srun.insert(0, f"--cpus-per-task={o.cpus_per_task}")  # since 22.05 srun no longer takes over sbatch's
        if needs.nodes * needs.tasks > 1:
            srun.insert(0, "--kill-on-bad-exit=1")  # no rank waits for one that has gone
        more: dict[str, Any] = {"requeue": True, **(o.additional_parameters or {})}
        if o.mem_gb is not None:
            more["mem"] = f"{math.ceil(o.mem_gb * 1e9 / 2**20)}M"  # Slurm's M is 2**20 bytes
        given = {
            "job_name": self._name,
            "comment": f"{_COMMENT}{token}",
            "partition": o.partition,
            "account": o.account,
            "qos": o.qos,
            "constraint": o.constraint,
            "exclude": o.exclude,
            "time": o.timeout_min,
            "nodes": needs.nodes,
            "ntasks_per_node": needs.tasks,
            "gpus_per_node": needs.gpus or None,
            "cpus_per_task": o.cpus_per_task,
            "signal_delay_s": o.signal_delay_s,
            "array_parallelism": o.array_parallelism,
            "setup": list(o.setup) or None,
            "stderr_to_stdout": True,
            "srun_args": srun or None,
            "additional_parameters": more,
        }
        return {key: value for key, value in given.items() if value is not None}

    def _array_size(self) -> int:
        """Most tasks of an array on this cluster."""
        if not self._array:
            text, _ = ask("scontrol", "show", "config")
            found = re.search(r"^MaxArraySize\s*=\s*(\d+)", text or "", re.MULTILINE)
            self._array = max(1, int(found[1])) if found else _ARRAY
        return self._array

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
        listed = {path.parent.name: path for path in self._folder.glob("*/jobs.json")}
        if not listed:
            return {}
        living, identities = {}, {}
        for seen in self._snapshot().values():
            name = seen.comment.removeprefix(_COMMENT)
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
        return squeue_command(f"--user={os.getuid()}", f"--name={self._name}")

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
            said = f"Slurm no longer knows job {id_}, nor how it ended"
            return Ended(0, "") if finished else Ended(None, said)
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
            return Ended(status, "")  # it has said why itself
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
        logs = sorted(self._folder.glob(f"*/{id_}_0_log.out"))
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


def _refusal(error: BaseException) -> str:
    """What sbatch said, in one line, out of submitit's exception."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("sbatch: ")]
    return re.sub(r"^sbatch: (error: )?", "", (ours or lines or [type(error).__name__])[-1])


def _python() -> str:
    """How a job's process is started, as a word of shell: with the signals blocked that come before our handlers are there.

    A process that a signal meets before that would die, and its job with it. coreutils has had the option since 8.31.
    """
    python = shlex.quote(sys.executable)
    with suppress(OSError):
        done = subprocess.run(["env", f"--block-signal={_EARLY}", "true"], capture_output=True, check=False)
        if done.returncode == 0:
            return f"env --block-signal={_EARLY} {python}"
    return python


@contextmanager
def _clean_environment() -> Iterator[None]:
    """What sbatch hands on to jobs: nothing of the process that launches, which may be in a job of Slurm itself."""
    inside = "SLURM_JOB_ID" in os.environ
    taken = {
        key: value
        for key, value in os.environ.items()
        if key in LAUNCH_VARIABLES
        or key.startswith(("SUBMITIT_", "SLURMD_", "SRUN_"))
        or (key.startswith("SLURM_") and key not in _KEPT)
        or (inside and key in _BINDING)
    }
    for key in taken:
        del os.environ[key]
    try:
        yield
    finally:
        os.environ.update(taken)
