"""A trial and the runs it is made of: one for each seed, under the identity and in the folder that they would have anyway."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eit_lab.config import Config, ConfigError
from eit_lab.data.prepare import prepare
from eit_lab.launchers import Launcher
from eit_lab.manifest import Entry
from eit_lab.plan import plan
from eit_lab.runs import DataFacts, identity, read_record, run_name
from eit_lab.search.curves import read_curve
from eit_lab.search.request import Request
from eit_lab.search.space import Arm, Value
from eit_lab.search.study import ArmStudy
from eit_lab.sweep.engine import Job
from eit_lab.sweep.engines import placed


@dataclasses.dataclass(eq=False)
class Trial:
    """A trial that is at work."""

    study: ArmStudy
    number: int
    values: Mapping[str, Value]
    jobs: dict[str, Job]
    """By identity, in the order of the seeds."""
    entries: list[Entry]
    found: bool
    """All of its runs were finished before it was thought of: nothing is left to stop early."""
    reported: int = 0
    """Epochs that Optuna knows of."""
    curve: dict[int, float] = dataclasses.field(default_factory=dict)
    """Epochs done -> objective, the mean over the seeds."""

    @property
    def title(self) -> str:
        """``vit_nano trial 3``: numbers of trials begin with 1 where people see them."""
        return f"{self.study.arm.label} trial {self.number + 1}".strip()

    @property
    def label(self) -> str:
        """The title and the values."""
        return f"{self.title}  {self.study.request.space.short(self.values)}"


class Runs:
    """Makes the runs of trials; lists the files of a data set once, not once a trial."""

    def __init__(self, request: Request, launcher: Launcher, folder: Path) -> None:
        self._request, self._launcher, self._folder = request, launcher, folder
        self._facts: dict[object, DataFacts] = {}
        self._curves: dict[Path, tuple[tuple[int, int], dict[int, float]]] = {}
        self._made: dict[tuple[str, int], dict[str, tuple[Entry, Job]]] = {}
        self._jobs: dict[str, Job] = {}

    def trial(self, study: ArmStudy, number: int, values: Mapping[str, Value]) -> Trial:
        """A trial with its runs. Raises ConfigError where its values make no valid config."""
        key = study.arm.label, number
        if key not in self._made:
            made: dict[str, tuple[Entry, Job]] = {}
            for seed in self._request.space.seeds:
                entry, job = self._job(study.arm, number, values, seed)
                if job.identity in made:
                    raise ConfigError(f"seed={seed} is no other run than the seed before it")
                made[job.identity] = entry, self._jobs.setdefault(job.identity, job)  # two trials may be the same run
            self._made[key] = made
        entries = [entry for entry, _ in self._made[key].values()]
        jobs = {identity: job for identity, (_, job) in self._made[key].items()}
        return Trial(study, number, values, jobs, entries, found=all(is_finished(job) for job in jobs.values()))

    def _job(self, arm: Arm, number: int, values: Mapping[str, Value], seed: int) -> tuple[Entry, Job]:
        overrides = self._request.space.overrides(values)
        config = self._request.space.config(arm, values, seed)
        run = dataclasses.replace(config.run, sweep=self._folder.name)
        config = placed(dataclasses.replace(config, run=run), self._launcher)
        facts = self.facts(config)
        plan(config, facts)
        run_id = identity(config, facts)
        name = run_name(config, run_id)
        home = Path(config.run.root) / name
        frozen, log = Path("jobs", f"{name}.json"), Path("jobs", f"{name}.log")
        seeds = f" seed={seed}" if len(self._request.space.seeds) > 1 else ""
        label = f"{f'{arm.label} ' if arm.label else ''}trial {number + 1} {' '.join(overrides)}{seeds}"
        entry = Entry(
            label=label, point=(*arm.overrides, *overrides, f"seed={seed}"), arm=arm.label or config.model.name, seed=seed,
            identity=run_id, name=name, folder=os.path.relpath(home, self._folder), frozen=str(frozen), log=str(log),
        )  # fmt: skip
        return entry, Job(label, config, run_id, home, self._folder / frozen, self._folder / log)

    def facts(self, config: Config) -> DataFacts:
        """What the config's data set is."""
        key = (config.data, config.recipe.batch_size)
        if key not in self._facts:
            self._facts[key] = prepare(config)
        return self._facts[key]

    def check(self) -> list[str]:
        """Identities of every arm's first corner; what a trial's end says about its runs is known of no other thing.

        Raises ConfigError for corners whose steps cannot be planned, and for axes that make no other run.
        """
        space = self._request.space
        start = space.start()
        first = []
        for arm in space.arms:
            first.append(self._identity(arm, start))
            for axis in space.axes:
                points = [{**start, axis.key: value} for value in axis.corners()]
                if len(points) > 1 and len({self._identity(arm, point) for point in points}) == 1:
                    raise ConfigError(
                        f"{axis.key} is not a part of what a run computes, so there is nothing to search; "
                        f"leave it at one value, got {', '.join(axis.text(value) for value in axis.corners())}"
                    )
        return first

    def _identity(self, arm: Arm, values: Mapping[str, Value]) -> str:
        config = self._request.space.config(arm, values, self._request.space.seeds[0])
        facts = self.facts(config)
        plan(config, facts)
        return identity(config, facts)

    def curve(self, job: Job) -> dict[int, float]:
        """Epochs done -> objective of a run; its file is read again only when it has changed."""
        path = job.folder / "metrics.csv"
        try:
            stat = path.stat()
        except FileNotFoundError:
            return {}
        stamp = stat.st_mtime_ns, stat.st_ino  # it is replaced whole
        known = self._curves.get(path)
        if known is None or known[0] != stamp:
            known = self._curves[path] = stamp, read_curve(job.folder, self._request.options.objective)
        return known[1]


def record_of(job: Job) -> dict[str, Any]:
    """The record of a job's run; empty where there is none."""
    return (read_record(job.folder) if job.folder.is_dir() else None) or {}


def is_finished(job: Job) -> bool:
    """Whether its run has been trained and tested."""
    return record_of(job).get("status") == "finished"


def has_diverged(job: Job) -> bool:
    """Whether its run ended because its loss was not finite."""
    record = record_of(job)
    return record.get("status") == "failed" and bool(record.get("nonfinite"))
