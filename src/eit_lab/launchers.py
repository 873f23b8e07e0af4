"""What ``hydra/launcher=...`` chooses: where the jobs of a sweep run, and how many at a time. Typed like every other key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from pydantic.dataclasses import dataclass

from eit_lab.config import _CHECKED, ConfigError, Flag, NonNegInt, PosInt, Text, _opt, _req
from eit_lab.loading import load_part, nearest


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class _LauncherBase:
    keep_going: Flag = _opt(
        True, "go on with the other jobs when one has failed; false: start no more, and stop the rest"
    )
    retries: NonNegInt = _opt(0, "times that a job which fails is tried again in the same launch")
    retry_failed: Flag = _opt(True, "try jobs again that failed in an earlier launch; false: they stay failed")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class LocalLauncher(_LauncherBase):
    kind: Literal["local"] = _req("jobs on this machine, each a process of its own")
    jobs_at_once: PosInt | None = _opt(None, "null: as many as there are devices, or on CPU cores, for")
    cores_per_job: PosInt | None = _opt(
        None, "CPU cores that a job is bound to; null: with several jobs at once, an equal share of them"
    )
    devices_per_job: PosInt | None = _opt(
        None, "GPUs that a job sees; null: trainer.devices where that is a number, else one (in order: all)"
    )
    template: Flag = _opt(True, "fork jobs from a process that has imported everything, rather than start each anew")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class SlurmLauncher(_LauncherBase):
    kind: Literal["slurm"] = _req("jobs of a Slurm cluster, in arrays, submitted through submitit")
    partition: Text | None = _opt(None, "partition; null: the cluster's default")
    account: Text | None = _opt(None, "account to charge")
    qos: Text | None = _opt(None, "quality of service")
    timeout_min: PosInt = _opt(60, "time limit of one part of a job in minutes; a run goes on in the next part")
    nodes: PosInt | None = _opt(None, "nodes of a job; null: trainer.num_nodes")
    tasks_per_node: PosInt | None = _opt(
        None, "processes on each node, one for each device; null: trainer.devices where that is a number, else one"
    )
    gpus_per_node: NonNegInt | None = _opt(
        None, "GPUs of each node; null: one for each process, none with trainer.accelerator=cpu"
    )
    cpus_per_task: PosInt | None = _opt(None, "cores of each process")
    mem_gb: PosInt | None = _opt(None, "memory of each node in 1e9 bytes")
    constraint: Text | None = _opt(None, "features that the nodes must have")
    exclude: Text | None = _opt(None, "nodes to leave out")
    array_parallelism: PosInt = _opt(256, "jobs of an array that run at the same time")
    max_parts: PosInt = _opt(100, "parts, by time limit, preemption or failed node, after which a job counts as failed")
    signal_delay_s: PosInt = _opt(90, "seconds before the time limit at which a job is told to save and make way")
    setup: tuple[Text, ...] = _opt((), "lines of shell before the job, such as module load or export")
    srun_args: tuple[Text, ...] = _opt((), "further arguments of srun")
    additional_parameters: dict[str, str | int] | None = _opt(None, "further options of sbatch, without the dashes")
    poll_s: PosInt = _opt(5, "seconds between two questions to Slurm")
    wait: Flag = _opt(True, "stay and show the state of the jobs; false: return once they are submitted")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class RayLauncher(_LauncherBase):
    kind: Literal["ray"] = _req("jobs of a Ray cluster; needs the extra eit_lab[ray]")
    address: Text | None = _opt(None, "of the cluster, e.g. auto; null: one on this machine for as long as the sweep")
    cpus_per_job: PosInt = _opt(1, "cores of a job")
    gpus_per_job: NonNegInt = _opt(0, "GPUs of a job")


Launcher: TypeAlias = LocalLauncher | SlurmLauncher | RayLauncher
LAUNCHERS: dict[str, type[Any]] = {"local": LocalLauncher, "slurm": SlurmLauncher, "ray": RayLauncher}
_OPTIONS = ("process", *LAUNCHERS)  # of the group; process is local, in order


def load_launcher(plain: Mapping[str, Any]) -> Launcher:
    """The typed launcher of a composed ``hydra.launcher``. Raises ConfigError in one line."""
    kind = str(plain.get("kind") or plain.get("_target_"))
    if kind not in LAUNCHERS:
        close = nearest(kind, _OPTIONS)
        raise ConfigError(f"hydra/launcher must be one of {', '.join(_OPTIONS)}, got {kind!r}{close}")
    launcher: Launcher = load_part(LAUNCHERS[kind], plain, prefix="hydra.launcher.")
    return launcher
