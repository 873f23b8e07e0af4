"""One process per device on this machine, each started with the run's frozen config. No torch.

The command that was typed becomes a supervisor: it trains nothing, hands signals on, and ends with the status of rank 0.
Nothing is re-executed from the command line (a launcher that does so repeats a whole sweep in every rank), no rank outlives
the supervisor, and one rank that dies takes the others down within seconds instead of leaving them waiting.

Under torchrun or Slurm the processes are there already, and this module does nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from eit_lab.command import EXIT_INTERRUPTED, EXIT_PREEMPTED, EXIT_WRONG_INPUT, RunError
from eit_lab.config import Config, TrainerConfig

COMMAND = "EIT_LAB_COMMAND"
"""Environment variable: what the user typed, as JSON, for the record of a run whose ranks were started here."""
PARENT = "EIT_LAB_PARENT"
"""Environment variable: the process without which this one must not go on."""
_GRACE_S = 10.0  # between the death of one rank and the end of the others
_LAST_SECONDS = 3.0  # after Ctrl-C for the second time
_POLL_S = 0.05
_LAST_LINES = 5
_HANDED_ON = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
# Set by whoever starts the processes of one run; a fresh run must not see another one's.
LAUNCH_VARIABLES = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "TORCHELASTIC_RUN_ID", COMMAND, PARENT,
    # of a process that srun started: what it starts itself is a rank of nothing
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE",
    "SLURM_STEP_ID", "SLURM_STEPID", "SLURM_STEP_NUM_TASKS",
)  # fmt: skip


def started_by_launcher() -> bool:
    """Whether this process is one of several that torchrun, Slurm or ``run_ranks`` started for one run."""
    return "LOCAL_RANK" in os.environ or ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or is_slurm_rank()


def is_slurm_rank() -> bool:
    """Whether srun started this process as one of several for one run.

    The shell of sbatch, salloc or ``srun --pty`` is none, whatever number of tasks its allocation is for.
    """
    several = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1 and "SLURM_PROCID" in os.environ
    return several and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def count_ranks(config: Config) -> int:
    """Processes that this machine needs for the config: one for each device."""
    trainer = config.trainer
    match trainer.devices:
        case tuple(devices):
            return len(devices)
        case int(count) if count > 0:
            return count
        case str(text) if text.isdigit():
            return int(text)
        case str(text) if "," in text:
            return len([part for part in text.split(",") if part.strip()])
    return _count_gpus(trainer)


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them. No torch."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    found = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((name for name in found if name.isdigit()), key=int)


def _count_gpus(trainer: TrainerConfig) -> int:
    """All GPUs for ``auto`` and -1; torch is asked only where there is a device to ask about."""
    if trainer.accelerator not in ("auto", "gpu", "cuda") or not any(Path("/dev").glob("nvidia[0-9]*")):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


class RankLostError(RunError):
    """A process of a run failed before, or without, rank 0."""

    def __init__(self, message: str, *, said: str, main_status: int) -> None:
        super().__init__(message)
        self.said = said
        """The last lines of its output."""
        self.main_status = main_status
        """How rank 0 ended, when it then did."""


def run_ranks(module: str, frozen: str, *, count: int, command: Sequence[str], patience_s: float = _GRACE_S) -> int:
    """Start ``python -m MODULE --frozen FILE`` once for each rank, watch over them, and return rank 0's exit status.

    ``frozen`` is the file's content: the resolved config. After the first failure the others have ``patience_s`` seconds to
    end by themselves. Raises RankLostError when another rank than 0 was the first to fail.
    """
    with tempfile.TemporaryDirectory(prefix="eit_lab-ranks-") as scratch:
        config = Path(scratch, "config.yaml")
        config.write_text(frozen)
        port = _free_port()
        ranks: list[subprocess.Popen[bytes]] = []
        asked = _Asked(ranks)
        before = {signum: signal.signal(signum, asked.hand_on) for signum in _HANDED_ON}
        try:
            for rank in range(count):
                with ExitStack() as files:
                    output = files.enter_context(Path(scratch, f"rank{rank}").open("wb")) if rank else None
                    ranks.append(
                        subprocess.Popen(
                            [sys.executable, "-m", module, "--frozen", str(config)],
                            env=_rank_environment(rank, count=count, port=port, command=command),
                            stdin=subprocess.DEVNULL,
                            stdout=output,
                            stderr=output,
                            start_new_session=True,  # the terminal's Ctrl-C reaches the supervisor only, which hands it on
                        )
                    )
                for signum in asked.signals:  # what came while this rank was being started
                    ranks[-1].send_signal(signum)
            return _watch(ranks, asked, Path(scratch), patience_s)
        finally:
            for rank_process in ranks:
                if rank_process.poll() is None:
                    rank_process.kill()
                    rank_process.wait()
            for signum, handler in before.items():
                signal.signal(signum, handler)


class _Asked:
    """The signals that came, handed on to every rank."""

    def __init__(self, ranks: list[subprocess.Popen[bytes]]) -> None:
        self.ranks = ranks
        self.signals: list[int] = []
        self.out_at: float | None = None
        """When Ctrl-C came for the second time."""

    def hand_on(self, signum: int, _: FrameType | None) -> None:
        if signum == signal.SIGINT and signum in self.signals and self.out_at is None:
            self.out_at = time.monotonic()
        self.signals.append(signum)
        for rank in self.ranks:
            if rank.poll() is None:
                rank.send_signal(signum)

    def obeyed(self, status: int) -> bool:
        """Whether a rank ended as it was asked to: its state saved, or before there was any."""
        return status in (0, EXIT_PREEMPTED, EXIT_INTERRUPTED) or -status in self.signals

    def exit_status(self) -> int:
        return EXIT_INTERRUPTED if signal.SIGINT in self.signals else EXIT_PREEMPTED


def _watch(ranks: Sequence[subprocess.Popen[bytes]], asked: _Asked, scratch: Path, patience_s: float) -> int:
    """Wait for all; the first failure sets the others a time, and Ctrl-C for the second time a short one."""
    first_failed, failed_at = None, 0.0
    while any(rank.poll() is None for rank in ranks):
        for number, rank in enumerate(ranks):
            status = rank.poll()
            if first_failed is None and status is not None and not asked.obeyed(status):
                first_failed, failed_at = number, time.monotonic()
        patience = 0.0 if ranks[0].poll() == EXIT_WRONG_INPUT else patience_s  # found before anything began
        late = first_failed is not None and time.monotonic() - failed_at > patience
        if late or (asked.out_at is not None and time.monotonic() - asked.out_at > _LAST_SECONDS):
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        time.sleep(_POLL_S)
    statuses = [rank.returncode for rank in ranks]
    if asked.out_at is not None:
        return EXIT_INTERRUPTED
    if first_failed is None:
        first_failed = next((number for number, status in enumerate(statuses) if not asked.obeyed(status)), None)
    if first_failed is None:
        return statuses[0] if statuses[0] >= 0 else asked.exit_status()
    if statuses[0] == EXIT_WRONG_INPUT or (first_failed == 0 and statuses[0] > 0):
        return statuses[0]  # rank 0 has said why
    said = _last_words(scratch / f"rank{first_failed}")
    status = statuses[first_failed]
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    message = f"process {first_failed} {how}{f': {said}' if said else ''}; the same command resumes"
    raise RankLostError(message, said=said, main_status=statuses[0])


def _last_words(output: Path) -> str:
    """Our own line at the end of a rank's output, or else its last lines."""
    lines = [line.strip() for line in output.read_text(errors="replace").splitlines()] if output.exists() else []
    ours = [line.removeprefix("eit_lab: ") for line in lines if line.startswith("eit_lab: ")]
    return ours[-1] if ours else " | ".join([line for line in lines if line][-_LAST_LINES:])


def _rank_environment(rank: int, *, count: int, port: int, command: Sequence[str]) -> Mapping[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    threads = {} if "OMP_NUM_THREADS" in kept else {"OMP_NUM_THREADS": str(max(1, count_cores() // count))}
    return {
        **kept,
        **threads,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        COMMAND: json.dumps(list(command)),
        PARENT: str(os.getpid()),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def die_with_parent() -> None:
    """In a rank or a sweep's job: end when the process that started it ends, however that ends (Linux)."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    end_with_parent()
    if sys.platform.startswith("linux") and os.getppid() != int(parent):  # it ended before the line above
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_parent() -> None:
    """End when the process that forked or started this one ends, however that ends (Linux; elsewhere nothing happens)."""
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def typed_command(argv: list[str]) -> list[str]:
    """What the user typed: ours, or the supervisor's that started this rank."""
    given = os.environ.get(COMMAND)
    return list(json.loads(given)) if given else argv
