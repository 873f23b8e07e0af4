"""From the typed launcher to the engine that runs its jobs. An engine's own library is imported only where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eit_lab.config import Config
from eit_lab.launchers import Launcher, LocalLauncher, RayLauncher, SlurmLauncher
from eit_lab.sweep.engine import Engine
from eit_lab.sweep.local import LocalEngine, build_slots


def placed(config: Config, launcher: Launcher) -> Config:
    """The config of a job as this launcher will run it: its placement may follow from the launcher, its result never does."""
    if isinstance(launcher, SlurmLauncher):
        from eit_lab.sweep.slurm_submit import place_slurm

        return place_slurm(config, launcher)
    return config


def build_engine(
    launcher: Launcher, configs: Sequence[Config], *, folder: Path, module: str = "eit_lab.train"
) -> Engine:
    """The engine for these jobs; ``folder`` is the sweep's. Raises ConfigError where it cannot be had here.

    ``module`` is what a job runs: another one's ``main(["--frozen", FILE])`` to time the engine itself.
    """
    match launcher:
        case LocalLauncher():
            return LocalEngine(build_slots(launcher, configs), template=launcher.template, folder=folder, module=module)
        case SlurmLauncher():
            from eit_lab.sweep.slurm import SlurmEngine

            return SlurmEngine(launcher, folder=folder, module=module)
        case RayLauncher():
            from eit_lab.sweep.ray_engine import RayEngine

            return RayEngine(launcher, module=module)
