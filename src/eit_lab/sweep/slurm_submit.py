"""From jobs to a call of sbatch: what a job needs of the cluster, and how submitit is told so. No torch.

submitit writes the script, pickles what is to be run (slurm_job.py), and is what requeues a job on its node. Everything it
writes lies in ``jobs/submitit/TOKEN/`` of the sweep, a token for each call of sbatch, which its jobs carry as their comment.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eit_lab.command import RunError
from eit_lab.config import Config, ConfigError, WandbLogger
from eit_lab.launchers import SlurmLauncher
from eit_lab.loading import dump, load
from eit_lab.processes import LAUNCH_VARIABLES
from eit_lab.runs import write_text
from eit_lab.sweep.engine import Job
from eit_lab.sweep.slurm_job import FrozenJob, stop_file
from eit_lab.sweep.slurm_queue import ask

COMMENT = "eit_lab:"
"""Before the token, in the comment of a job."""
_ARRAY = 1001  # Slurm's own MaxArraySize
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
    needs, trainer = find_needs(config, launcher), config.trainer
    if (trainer.devices, trainer.num_nodes) == (needs.tasks, needs.nodes):
        return config
    plain = dump(config)
    plain["trainer"] |= {"devices": needs.tasks, "num_nodes": needs.nodes}
    return load(plain)  # which checks that the batch can be shared among so many


def find_needs(config: Config, launcher: SlurmLauncher) -> Needs:
    """What the launcher says, or where it says nothing what the trainer says. Raises ConfigError where they do not agree."""
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


class Submitter:
    """Calls sbatch for the jobs of one sweep. Raises ConfigError where that cannot be done here."""

    def __init__(self, launcher: SlurmLauncher, *, folder: Path, module: str) -> None:
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
        self.folder = folder.absolute() / "jobs" / "submitit"
        self.name = f"eit_lab-{re.sub(r'[^A-Za-z0-9_.-]', '_', folder.absolute().name)}"
        """Of every Slurm job of the sweep."""
        self._array = 0

    def submit(self, jobs: Sequence[Job]) -> dict[Job, str]:
        """Submit jobs, those with the same needs as one array, or as few as the cluster's limit allows; their numbers.

        Raises RunError where Slurm does not take them.
        """
        groups: dict[Needs, list[Job]] = {}
        for job in jobs:
            groups.setdefault(find_needs(job.config, self._launcher), []).append(job)
        numbers: dict[Job, str] = {}
        for needs, group in groups.items():
            for first in range(0, len(group), self._array_size()):
                chunk = group[first : first + self._array_size()]
                numbers.update(zip(chunk, self._submit(chunk, needs), strict=True))
        return numbers

    def _submit(self, jobs: Sequence[Job], needs: Needs) -> list[str]:
        """One call of sbatch; the jobs' numbers."""
        token = secrets.token_hex(4)
        folder = self.folder / token
        folder.mkdir(parents=True)
        write_text(folder / "jobs.json", json.dumps([job.identity for job in jobs]) + "\n")
        for job in jobs:
            stop_file(job.frozen).unlink(missing_ok=True)
        with _clean_environment():
            from submitit import SlurmExecutor

            executor = SlurmExecutor(folder, max_num_timeout=self._launcher.max_parts, python=_python())
            executor.update_parameters(**self._parameters(needs, token))
            try:
                with redirect_stderr(io.StringIO()):  # submitit repeats there what its exception says
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
            "job_name": self.name,
            "comment": f"{COMMENT}{token}",
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
