"""Jobs on this machine: in order, or side by side, each bound to its own cores or devices."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from eit_lab.command import RunError
from eit_lab.config import Config, ConfigError
from eit_lab.launchers import LocalLauncher
from eit_lab.processes import LAUNCH_VARIABLES, PARENT, count_ranks, visible_gpus
from eit_lab.sweep.engine import Ended, Job

_TELL_S = 10.0
_LAST_LINES = 5
_POLL_S = 0.05
_MOST_DEATHS = 3


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one job at a time may use; empty: everything."""

    cores: tuple[int, ...] = ()
    devices: tuple[str, ...] = ()

    def threads(self, config: Config) -> int:
        """Threads of each of a job's ranks; 0: as many as torch takes by itself."""
        if not self.cores:
            return 0
        ranks = count_ranks(config) if _is_number(config) else max(1, len(self.devices))
        told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # a number for each level of nesting
        return int(told) if told.isdigit() and int(told) else max(1, len(self.cores) // ranks)

    def environment(self, config: Config) -> dict[str, str]:
        """Of a job in this slot."""
        threads = {"OMP_NUM_THREADS": str(self.threads(config))} if self.cores else {}
        return {**threads, **({"CUDA_VISIBLE_DEVICES": ",".join(self.devices)} if self.devices else {})}


def build_slots(options: LocalLauncher, configs: Sequence[Config]) -> list[Slot]:
    """Share the machine's devices and cores among as many jobs at once as asked for, or as there is room for.

    Raises ConfigError where the wish is for more than the machine has.
    """
    if options.jobs_at_once == 1 and options.cores_per_job is None and options.devices_per_job is None:
        return [Slot()]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    gpus = visible_gpus() if any(c.trainer.accelerator in ("auto", "gpu", "cuda") for c in configs) else []
    if gpus:
        asked = max(count_ranks(c) if _is_number(c) else 1 for c in configs)
        each = options.devices_per_job or asked
        _check("devices_per_job", each, len(gpus), "GPUs")
        at_once = options.jobs_at_once or len(gpus) // each
        _check("jobs_at_once", at_once, len(gpus) // each, f"jobs with {each} of {len(gpus)} GPUs each")
    else:
        if options.devices_per_job is not None:
            raise ConfigError(f"hydra.launcher.devices_per_job needs GPUs, and there is none, got {options.devices_per_job}; nearest: null")  # fmt: skip
        each = 0
        needed = options.cores_per_job or max(_processes(c) for c in configs)
        at_once = options.jobs_at_once or max(1, len(cores) // needed)
        _check("jobs_at_once", at_once, max(1, len(cores)), f"jobs on {len(cores)} cores")
    at_once = min(at_once, len(configs))
    share = options.cores_per_job or max(1, len(cores) // at_once)
    if cores:
        _check("cores_per_job", share, len(cores) // at_once, f"cores for each of {at_once} jobs at once")
    return [
        Slot(cores=tuple(cores[n * share : (n + 1) * share]), devices=tuple(gpus[n * each : (n + 1) * each]))
        for n in range(at_once)
    ]


def _check(key: str, got: int, most: int, of_what: str) -> None:
    if got > most:
        raise ConfigError(f"hydra.launcher.{key} must be at most {most} ({of_what}), got {got}; nearest: {most}")


def _is_number(config: Config) -> bool:
    return config.trainer.devices not in ("auto", "-1", -1)


def _processes(config: Config) -> int:
    """Processes of a job that compute: its ranks, with their loaders."""
    ranks = count_ranks(config) if _is_number(config) else 1
    return ranks * (1 + (config.data.num_workers or 0))


class LocalEngine:
    """Starts jobs in free slots. They end with this process."""

    survives = False

    def __init__(self, slots: Sequence[Slot], *, template: bool, folder: Path, module: str = "eit_lab.train") -> None:
        self._slots, self._free = list(slots), list(slots)
        self._slot: dict[Job, Slot] = {}
        self._forker = _Forker(folder / "template.log", module) if template else _Starter(module)
        self._numbers = itertools.count(1)
        self._jobs: dict[int, Job] = {}

    def threads(self, config: Config) -> int | None:
        """Of each process of a job; None: as many as torch takes."""
        return self._slots[0].threads(config) or None

    def capacity(self) -> int:
        """Free slots."""
        return len(self._free)

    def start(self, jobs: Sequence[Job]) -> list[str]:
        """Start jobs, at most as many as there are free slots."""
        handles = []
        for job in jobs:
            slot, number = self._free.pop(0), next(self._numbers)
            self._slot[job], self._jobs[number] = slot, job
            self._forker.start(number, job, slot)
            handles.append(f"local:{number}")
        return handles

    def adopt(self, job: Job, handle: str) -> bool:
        """Never: local jobs end with their launcher."""
        return False

    def poll(self) -> list[tuple[Job, Ended]]:
        """The jobs that ended since the last call."""
        ended = []
        for number, how in self._forker.ended():
            job = self._jobs.pop(number)
            self._free.append(self._slot.pop(job))
            ended.append((job, how))
        return ended

    def wait(self, seconds: float) -> None:
        """Until a job has ended, or so many seconds."""
        self._forker.wait(seconds)

    def is_running(self, job: Job) -> bool:
        """True: a local job begins at once."""
        return job in self._slot

    def stop(self, job: Job, signum: int) -> None:
        """Hand a signal on."""
        for number, mine in self._jobs.items():
            if mine is job:
                self._forker.signal(number, signum)

    def close(self) -> None:
        """End what still runs."""
        self._forker.close()


def _how(status: int) -> Ended:
    """An exit status, a signal also in words."""
    return Ended(status, f"killed by {signal.Signals(-status).name}" if status < 0 else "")


def _clean_environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    return {**kept, PARENT: str(os.getpid())}


class _Starter:
    """Each job a new Python process."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int, job: Job, slot: Slot) -> None:
        with job.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", self._module, "--frozen", str(job.frozen)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_clean_environment(), **slot.environment(job.config)},
                start_new_session=True,  # the terminal's Ctrl-C reaches the launcher only, which hands it on
            )
        if slot.cores:
            os.sched_setaffinity(process.pid, slot.cores)
        self._processes[number] = process

    def ended(self) -> list[tuple[int, Ended]]:
        done = [(number, process.poll()) for number, process in self._processes.items()]
        for number, status in done:
            if status is not None:
                del self._processes[number]
        return [(number, _how(status)) for number, status in done if status is not None]

    def wait(self, seconds: float) -> None:
        time.sleep(min(seconds, _POLL_S))

    def signal(self, number: int, signum: int) -> None:
        self._processes[number].send_signal(signum)

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()


class _Forker:
    """Each job forked from a template (template.py), which starts with the first one."""

    def __init__(self, log: Path, module: str) -> None:
        self._log, self._module = log, module
        self._template: subprocess.Popen[bytes] | None = None
        self._selector = selectors.DefaultSelector()
        self._rest = b""
        self._running: set[int] = set()
        self._obeyed = False
        """Whether the template has ever answered."""
        self._deaths = 0
        """Templates in a row that ended before any of their jobs did."""

    def start(self, number: int, job: Job, slot: Slot) -> None:
        self._running.add(number)
        self._order(
            {
                "id": number,
                "module": self._module,
                "argv": ["--frozen", str(job.frozen.absolute())],
                "log": str(job.log.absolute()),
                "env": slot.environment(job.config),
                "cores": list(slot.cores),
                "threads": slot.threads(job.config),
            }
        )

    def ended(self) -> list[tuple[int, Ended]]:
        if self._template is None or not self._selector.select(timeout=0):
            return []
        assert self._template.stdout is not None
        new = os.read(self._template.stdout.fileno(), 1 << 20)
        if not new:
            return self._lost()
        *lines, self._rest = (self._rest + new).split(b"\n")
        answers = [json.loads(line) for line in lines]
        self._obeyed |= bool(answers)
        done = [(answer["id"], _how(answer["status"])) for answer in answers if "status" in answer]
        self._running.difference_update(number for number, _ in done)
        self._deaths = 0 if done else self._deaths
        return done

    def _lost(self) -> list[tuple[int, Ended]]:
        """The template has ended, killed as a rule, and its jobs with it; the next job gets a new one."""
        self._deaths += 1
        said = f"the process that jobs are forked from has ended: {self._last_words()}"
        if not self._obeyed or self._deaths > _MOST_DEATHS:
            raise RunError(said)
        lost, self._running = sorted(self._running), set()
        self.close()
        return [(number, Ended(-signal.SIGKILL, said)) for number in lost]

    def wait(self, seconds: float) -> None:
        self._selector.select(seconds) if self._template is not None else time.sleep(seconds)

    def signal(self, number: int, signum: int) -> None:
        self._order({"id": number, "signal": signum})

    def close(self) -> None:
        if self._template is None:
            return
        assert self._template.stdin is not None
        assert self._template.stdout is not None
        for number in self._running:
            self.signal(number, signal.SIGKILL)
        self._selector.unregister(self._template.stdout)
        with suppress(BrokenPipeError):
            self._template.stdin.close()
        try:
            self._template.wait(_TELL_S)
        except subprocess.TimeoutExpired:
            self._template.kill()
            self._template.wait()
        self._template.stdout.close()
        self._template, self._rest = None, b""

    def _order(self, order: dict[str, object]) -> None:
        if self._template is None:
            self._obeyed = False
            with self._log.open("ab") as log:
                self._template = subprocess.Popen(
                    [sys.executable, "-m", "eit_lab.sweep.template"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=_clean_environment(),
                    start_new_session=True,
                )
            assert self._template.stdout is not None
            self._selector.register(self._template.stdout, selectors.EVENT_READ)
        assert self._template.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: ended() finds that out, and says what became of its jobs
            self._template.stdin.write(f"{json.dumps(order)}\n".encode())
            self._template.stdin.flush()

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        return " | ".join([line for line in lines if line.strip()][-_LAST_LINES:]) or "it said nothing"
