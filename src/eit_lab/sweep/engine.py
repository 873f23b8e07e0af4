"""What runs the jobs of a sweep: the machine's own processes, Slurm, or Ray, behind one small interface."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from eit_lab.config import Config


@dataclasses.dataclass(eq=False)
class Job:
    """One job of a sweep, ready to run: its frozen config is on disk."""

    label: str
    config: Config
    identity: str
    folder: Path
    """Of the run, as its identity names it now; the job itself makes it, and says if it came to be another."""
    frozen: Path
    log: Path
    attempts: int = 0
    """Times it was started in this launch."""

    @property
    def announced(self) -> Path:
        """Where the job's process writes the identity and the folder of its run."""
        return self.frozen.with_suffix(".run.json")

    def find_folder(self) -> None:
        """Take over what the job's process said: code or data that changed since launch give a run another identity."""
        if self.announced.is_file():
            self.folder = Path(json.loads(self.announced.read_text())["folder"])


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a job's process ended."""

    status: int | None
    """Exit status, as of a shell: 0 done, 75 asked to stop, state saved; -9 killed by signal 9; None where it is not known."""
    said: str
    """In words, where the status alone does not say it: ``killed by SIGKILL``, ``OUT_OF_MEMORY on node n1``."""


class Engine(Protocol):
    """Runs jobs. Every call but ``wait`` returns at once."""

    survives: bool
    """Whether jobs go on when the launcher ends."""

    def threads(self, config: Config) -> int | None:
        """CPU threads of each process of a job; None: as many as torch takes, or not known here."""
        ...

    def capacity(self) -> int:
        """How many more jobs it takes now."""
        ...

    def start(self, jobs: Sequence[Job]) -> list[str]:
        """Start or submit jobs; a handle for each, by which a later launcher finds it again."""
        ...

    def adopt(self, job: Job, handle: str) -> bool:
        """Take over a job that an earlier launcher started; False where it is no longer there."""
        ...

    def poll(self) -> list[tuple[Job, Ended]]:
        """The jobs that ended since the last call."""
        ...

    def wait(self, seconds: float) -> None:
        """Sleep, but no longer than until a job may have ended."""
        ...

    def is_running(self, job: Job) -> bool:
        """Whether a started job has begun: False while it waits in a queue."""
        ...

    def stop(self, job: Job, signum: int) -> None:
        """Hand a signal on to a job."""
        ...

    def close(self) -> None:
        """Let go of everything; jobs that do not survive are killed."""
        ...
