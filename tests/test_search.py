"""Hyper-parameter search: ordinary runs, told apart from disk; Optuna's own loop is the reference that it must agree with."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import TINY, Done
from eit_lab.compose import OpenSpace, compose_points, parse_flags
from eit_lab.config import Config
from eit_lab.manifest import read_manifest
from eit_lab.runs import read_record
from eit_lab.search.__main__ import main
from eit_lab.search.curves import mean_curve, read_curve, run_value
from eit_lab.search.request import read_request
from eit_lab.search.space import read_space
from eit_lab.sweep.engine import Ended, Job
from slurm_cluster import SlurmCluster, why_not

Command = Callable[..., Done]
LR = "recipe.lr=tag(log,interval(1e-4,1e-1))"
DECAY = "recipe.weight_decay=interval(0.0,0.3)"
EPOCHS = 6
BASE = ("data=digits", "model=eit_nano", "logger=none", f"recipe.epochs={EPOCHS}", "trainer.accelerator=cpu")


def quality(config: Config) -> float:
    """What a pretended run ends with: best at a learning rate of 3e-3 and a weight decay of 0.1."""
    distance = (math.log10(config.recipe.lr / 3e-3)) ** 2 + (5 * (config.recipe.weight_decay - 0.1)) ** 2
    return 0.9 - 0.1 * distance - 0.01 * config.seed - (0.05 if config.model.name.startswith("vit") else 0)


def accuracy(config: Config, epoch: int) -> float:
    """After so many epochs; small learning rates begin more slowly."""
    return quality(config) * (1 - math.exp(-epoch * (1 + math.log10(config.recipe.lr / 1e-5)) / 4))


class DiedError(Exception):
    """The launcher is gone, in the middle of whatever it did."""


@dataclasses.dataclass
class Machine:
    """Stands in for the engine: runs that know their curve in closed form, and resume from where their folder is."""

    at_once: int = 1
    epochs_a_look: int = 1
    """Epochs that pass between two looks of the launcher."""
    diverges: Callable[[Config], bool] = lambda config: False
    fails: Callable[[Config], bool] = lambda config: False
    on_poll: Callable[[int], None] = lambda polls: None
    started: list[str] = dataclasses.field(default_factory=list)
    resumed: list[int] = dataclasses.field(default_factory=list)
    stopped: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    epochs: dict[str, int] = dataclasses.field(default_factory=dict)
    """How far each run is, by identity."""
    survives: bool = False
    queue: dict[str, Job] = dataclasses.field(default_factory=dict)
    """By handle: what a cluster still has when a launcher is gone."""
    adopted: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.jobs: dict[Job, int] = {}
        self.asked: dict[Job, int] = {}
        self.polls = 0

    def capacity(self) -> int:
        return self.at_once - len(self.jobs)

    def start(self, jobs: Sequence[Job]) -> list[str]:
        for job in jobs:
            assert job.frozen.is_file()
            self.started.append(job.identity)
            job.folder.mkdir(parents=True, exist_ok=True)
            self.jobs[job] = max(read_curve(job.folder, "val/acc1"), default=0)
            self.resumed.append(self.jobs[job])
        handles = [f"{'slurm' if self.survives else 'local'}:{job.identity}" for job in jobs]
        if self.survives:
            self.queue.update(zip(handles, jobs, strict=True))
        return handles

    def adopt(self, job: Job, handle: str) -> bool:
        if handle not in self.queue:
            return False
        self.adopted.append(job.identity)
        self.jobs[job] = max(read_curve(job.folder, "val/acc1"), default=0)
        return True

    def is_running(self, job: Job) -> bool:
        return job in self.jobs

    def stop(self, job: Job, signum: int) -> None:
        self.stopped.append((job.identity, signum))
        self.asked[job] = signum

    def close(self) -> None:
        self.jobs.clear()

    def wait(self, seconds: float) -> None:
        pass

    def poll(self) -> list[tuple[Job, Ended]]:
        self.polls += 1
        self.on_poll(self.polls)
        ended = []
        for job in list(self.jobs):
            if (status := self._go_on(job)) is not None:
                del self.jobs[job]
                self.queue.pop(f"slurm:{job.identity}", None)
                ended.append((job, Ended(status, "")))
        return ended

    def _go_on(self, job: Job) -> int | None:
        signum = self.asked.pop(job, None)
        if signum is not None:
            write_run(job, self.jobs[job], "preempted")
            return 130 if signum == signal.SIGINT else 75
        if self.fails(job.config):
            job.log.write_text("some words\neit_lab: the disk is full\n")
            return 1
        epoch = self.jobs[job] = min(EPOCHS, self.jobs[job] + self.epochs_a_look)
        self.epochs[job.identity] = epoch
        if self.diverges(job.config):
            write_run(job, epoch, "failed", error="the loss is nan at step 3", nonfinite={"step": 3})
            return 1
        write_run(job, epoch, "finished" if epoch == EPOCHS else "running")
        return 0 if epoch == EPOCHS else None


def write_run(job: Job, epochs: int, status: str, **more: Any) -> None:
    rows = [
        f"{9 * n},{n - 1},{accuracy(job.config, n)!r},{1 - accuracy(job.config, n)!r}" for n in range(1, epochs + 1)
    ]
    (job.folder / "metrics.csv").write_text("\n".join(["step,epoch,val/acc1,val/loss", *rows]) + "\n")
    record = {"status": status, "identity": job.identity, "seconds": 1, "seed": job.config.seed, **more}
    (job.folder / "record.json").write_text(json.dumps(record))


@pytest.fixture
def machine(here: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Machine]:
    """A machine that the next searches of this test run on."""

    def make(*, draws: bool = False, **traits: Any) -> Machine:
        made = Machine(**traits)
        monkeypatch.setattr("eit_lab.sweep.engines.build_engine", lambda launcher, configs, *, folder: made)
        if not draws:  # which takes a second each time
            monkeypatch.setattr("eit_lab.search.figure.save_search_figure", lambda request, studies, stem: None)
        return made

    monkeypatch.setattr("eit_lab.search.running._POLL_S", 0.0)
    monkeypatch.setattr("eit_lab.search.running._ELSEWHERE_S", 0.0)
    return make


def rows(root: Path = Path("runs")) -> list[dict[str, str]]:
    """trials.csv of the one search, or of the one named."""
    path = next(root.glob("searches/*/trials.csv")) if root.name == "runs" else root / "trials.csv"
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def told(found: Sequence[dict[str, str]]) -> list[tuple[str, ...]]:
    """All that a search finds out: which trials, what became of them, to the last digit."""
    return [(r["arm"], r["trial"], r["state"], r["val/acc1"], r["recipe.lr"], r["epochs"], r["said"]) for r in found]


# ------------------------------------------------------------------------------------------------------- mistakes, first


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([LR, "trails=3"], "trails is not a key, got '3'; nearest: trials"),
        (["recipe.lrr=interval(1,2)"], "recipe.lrr is not a key, got 1.0; nearest: recipe.lr"),
        (["recipe.lr=log(1e-4,1e-2)"], "nearest: recipe.lr=tag(log,interval(1e-4,1e-2))"),
        (["recipe.lr=interval(2,1)"], "an interval goes from a smaller number to a larger one"),
        (["recipe.lr=tag(lgo,interval(1,2))"], "the only tag is log, got 'lgo'; nearest: log"),
        (["recipe.batch_size=interval(16,64)"], "whole numbers are recipe.batch_size=int(interval(16,64))"),
        (["model.ib.kernel_size=range(3,8)"], "model.ib.kernel_size must be odd, so that the token grid keeps its size, got 4"),
        (["model/ib=choice(eit,lsar)"], "got 'lsar'; nearest: lsra"),
        (["recipe.lr=1e-3"], "nothing is searched: give a key an interval"),
        ([LR, "objective=test/acc1"], "the test set gives the final number only, got 'test/acc1'; nearest: val/acc1"),
        ([LR, "objective=val/acc1_ema"], "needs averaged weights (recipe.ema_decay)"),
        ([LR, "sampler=tpee"], "sampler must be one of tpe, random, grid, got 'tpee'; nearest: tpe"),
        ([LR, "sampler=grid"], "sampler=grid needs a list of values for every key, and recipe.lr has an interval"),
        ([LR, "seed=interval(0,9)"], "seed is not searched"),
        ([LR, "per=model"], "per must name a key that has a list of values, got 'model'"),
        ([LR, "pruner=median", "recipe.epochs=range(2,5)"], "these differ in how long they train; nearest: none"),
        ([LR, "pruner=median", "prune_after=6"], "prune_after must be below the 6 epochs of a trial, got 6; nearest: 5"),
        ([LR, "run.overwrite=true"], "run.overwrite must be false"),
        ([LR, "space=nothing.yaml"], "space must be a YAML file, got 'nothing.yaml': No such file or directory"),
        ([LR, "name=a/b"], "name must be a plain file name"),
        ([LR, "-m"], "search takes no -m"),
        (["data.num_workers=choice(0,1)"], "data.num_workers is not a part of what a run computes"),
        ([LR, "hydra/launcher=slurm", "hydra.launcher.wait=false"], "hydra.launcher.wait must be true"),
        ([LR, "per=arms"], "per=arms searches the arms of a declared experiment"),
        ([LR, "arms=[]"], "arms must name one arm at least, got []"),
        ([LR, "arms=[eit]"], "arms=... names arms of a declared experiment, and needs experiment=NAME per=arms"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_is_written(
    args: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BASE, *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert list(here.iterdir()) == []


def test_a_typo_answers_without_optuna_and_torch(here: Path) -> None:
    probe = (
        "import sys; from eit_lab.search.__main__ import main; status = main(sys.argv[1:]); "
        "loaded = {'optuna', 'torch', 'matplotlib', 'wandb'} & set(sys.modules); sys.exit(3 if loaded else status)"
    )
    done = subprocess.run([sys.executable, "-c", probe, *BASE, "recipe.lrr=interval(1,2)"], check=False)
    assert done.returncode == 2


# ------------------------------------------------------------------------------------------------------------- the space


def test_hydras_grammar_gives_these_axes() -> None:
    found = read_space(
        OpenSpace(
            [
                "recipe.lr=tag(log,interval(1e-4,1e-2))", "recipe.weight_decay=interval(0,0.3)", "seed=3,4",
                "recipe.batch_size=int(interval(16,64))", "model.size.depth=range(2,13,5)", "model/ib=eit,lsra",
                "recipe.label_smoothing=range(0,0.35,0.1)", "recipe.epochs=tag(log,range(1,9))", "recipe.beta2=0.9",
            ]
        )
    )  # fmt: skip
    assert found.seeds == (3, 4)
    axes = {axis.key: (axis.kind, axis.low, axis.high, axis.step, axis.log, axis.choices) for axis in found.axes}
    assert axes == {
        "recipe.lr": ("float", 1e-4, 1e-2, None, True, ()),
        "recipe.weight_decay": ("float", 0.0, 0.3, None, False, ()),
        "recipe.batch_size": ("int", 16, 64, None, False, ()),
        "model.size.depth": ("int", 2, 12, 5, False, ()),
        "model/ib": ("choice", 0, 0, None, False, ("eit", "lsra")),
        "recipe.label_smoothing": ("float", 0.0, 0.3, 0.1, False, ()),
        "recipe.epochs": ("int", 1, 8, None, True, ()),
    }
    by_key = {axis.key: axis for axis in found.axes}
    assert by_key["model.size.depth"].values() == [2, 7, 12]
    assert by_key["recipe.label_smoothing"].values() == [0.0, 0.1, 0.2, 0.3]
    assert by_key["recipe.lr"].override(0.1 + 0.2) == "recipe.lr=0.30000000000000004"
    assert by_key["recipe.label_smoothing"].override(0.1 + 0.2) == "recipe.label_smoothing=0.3"


def test_a_file_gives_the_space_and_the_command_line_goes_over_it(here: Path) -> None:
    Path("space.yaml").write_text(
        "data: digits\nmodel: eit_nano\nrecipe.lr: tag(log,interval(1e-4,1e-2))\nrecipe.epochs: 3\n"
        "data.mean: [0.5]\ntrials: 7\nsampler: random\n"
    )
    request = read_request(parse_flags(["space=space.yaml", "trials=9", "recipe.epochs=4"]))
    assert (request.trials, request.options.sampler, request.epochs) == (9, "random", 4)
    assert [axis.key for axis in request.space.axes] == ["recipe.lr"]
    assert request.config.data.mean == (0.5,)


# -------------------------------------------------------------------------------------------------------- against Optuna


def reference(
    trials: int, *, sampler_seed: int = 0, startup: int = 10, pruner: Any = None, name: str | None = None
) -> list[tuple[str, ...]]:
    """The plain loop of Optuna's documentation, in memory, with a sampler seeded anew for every trial."""
    import hashlib

    import optuna
    from optuna.distributions import FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    (config,) = OpenSpace(BASE).configs([[]])
    study = optuna.create_study(study_name=name, direction="maximize", pruner=pruner or optuna.pruners.NopPruner())
    axes = {"recipe.lr": FloatDistribution(1e-4, 1e-1, log=True), "recipe.weight_decay": FloatDistribution(0.0, 0.3)}
    found = []
    for number in range(trials):
        digits = hashlib.sha256(f"{sampler_seed}:{number}".encode()).digest()[:4]
        study.sampler = optuna.samplers.TPESampler(seed=int.from_bytes(digits, "big"), n_startup_trials=startup)
        trial = study.ask(axes)
        lr, decay = trial.params["recipe.lr"], trial.params["recipe.weight_decay"]
        run = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, lr=lr, weight_decay=decay))
        state, value, said = "finished", repr(accuracy(run, EPOCHS)), ""
        for epoch in range(1, EPOCHS + 1):
            trial.report(accuracy(run, epoch), epoch)
            if epoch < EPOCHS and trial.should_prune():
                state, value, said = "pruned", "", f"pruned after epoch {epoch}: val/acc1 {accuracy(run, epoch):.4f}"
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, accuracy(run, EPOCHS))
        found.append(("", str(number + 1), state, value, repr(lr), str(epoch), said))
    return found


def test_one_at_a_time_a_search_is_optunas_own_loop_to_the_last_digit(machine: Callable[..., Machine]) -> None:
    here = machine()
    assert main([*BASE, LR, DECAY, "trials=12", "startup=4", "sampler_seed=3"]) == 0
    assert told(rows()) == reference(12, sampler_seed=3, startup=4)
    assert len(set(here.started)) == len(here.started) == 12
    assert here.stopped == []


@pytest.mark.parametrize("epochs_a_look", [1, 4])
def test_pruning_is_optunas_own_however_late_the_launcher_looks(
    machine: Callable[..., Machine], epochs_a_look: int
) -> None:
    from optuna.pruners import MedianPruner

    here = machine(epochs_a_look=epochs_a_look)
    assert main([*BASE, LR, DECAY, "trials=14", "startup=6", "pruner=median", "prune_after=2"]) == 0
    wanted = reference(14, startup=6, pruner=MedianPruner(n_startup_trials=5, n_warmup_steps=2))
    assert told(rows()) == wanted
    pruned = [row for row in wanted if row[2] == "pruned"]
    assert 2 <= len(pruned) <= 10
    (folder,) = Path("runs/searches").iterdir()
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    ended = [event for event in events if event["state"] == "pruned"]
    if epochs_a_look == 1:  # each was asked to save its state and stop, and did before its end
        assert [signum for _, signum in here.stopped] == [signal.SIGTERM] * len(pruned)
        assert [event["said"] for event in ended] == [row[6] for row in pruned]
        records = [read_record(path) for path in Path("runs").glob("eit_nano-*")]
        assert sum(record is not None and record["status"] == "preempted" for record in records) == len(pruned)


@pytest.mark.slow
def test_hyperband_is_optunas_own_too(machine: Callable[..., Machine]) -> None:
    from optuna.pruners import HyperbandPruner

    machine()
    assert main([*BASE, LR, DECAY, "trials=14", "pruner=hyperband", "prune_after=1", "name=hb"]) == 0
    pruner = HyperbandPruner(min_resource=1, max_resource=EPOCHS, reduction_factor=3)
    wanted = reference(14, pruner=pruner, name="hb")  # on which a trial's bracket depends
    assert told(rows()) == wanted
    assert 2 <= sum(row[2] == "pruned" for row in wanted) <= 12


# --------------------------------------------------------------------------------------------------- going on, two at once


@pytest.mark.parametrize(
    "dies_at", [20, *(pytest.param(polls, marks=pytest.mark.slow) for polls in (1, 3, 6, 7, 31, 44))]
)
def test_a_search_whose_launcher_died_goes_on_as_if_nothing_had_happened(
    machine: Callable[..., Machine], dies_at: int
) -> None:
    def die(polls: int) -> None:
        if polls == dies_at:
            raise DiedError

    search = [*BASE, LR, DECAY, "trials=10", "startup=4", "pruner=median", "prune_after=2"]
    dying = machine(on_poll=die)
    with pytest.raises(DiedError):
        main(search)
    second = machine()
    assert main(search) == 0
    from optuna.pruners import MedianPruner

    assert told(rows()) == reference(10, startup=4, pruner=MedianPruner(n_startup_trials=5, n_warmup_steps=2))
    again = set(dying.started) & set(second.started)
    assert len(again) == 1  # the one that was at work, which went on from where its folder was
    assert second.resumed[0] == dying.epochs.get(second.started[0], 0)
    assert not any(second.resumed[1:])


def test_asked_to_stop_it_stops_its_run_and_the_same_command_goes_on(
    machine: Callable[..., Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    first = machine(on_poll=lambda polls: signal.raise_signal(signal.SIGINT) if polls == 16 else None)
    search = [*BASE, LR, "trials=5"]
    assert main(search) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert [signum for _, signum in first.stopped] == [signal.SIGINT]
    assert [row["state"] for row in rows()] == ["finished", "finished", "open"]
    second = machine()
    assert main(search) == 0
    assert len(set(first.started) | set(second.started)) == 5
    assert second.started[0] == first.started[-1]
    third = machine()
    before = rows()
    assert main(search) == 0  # nothing is left to do
    assert third.started == []
    assert rows() == before
    assert main([*BASE, LR, "trials=7"]) == 0  # more of the same search
    assert rows()[:5] == before
    assert len(third.started) == 2


def test_jobs_of_a_cluster_go_on_without_the_launcher_and_the_next_one_finds_them(
    machine: Callable[..., Machine],
) -> None:
    search = [*BASE, LR, DECAY, "trials=12", "startup=12", "trials_at_once=3"]
    queue: dict[str, Job] = {}
    traits = {"survives": True, "queue": queue, "at_once": 100}
    first = machine(**traits, on_poll=lambda polls: signal.raise_signal(signal.SIGTERM) if polls == 9 else None)
    assert main(search) == 75
    assert first.stopped == []
    assert len(first.started) == 6  # three at once, and each of the first three is over after six looks
    assert len(queue) == 3
    second = machine(**traits)
    assert main(search) == 0
    assert sorted(second.adopted) == sorted(first.started[3:])
    assert sorted(first.started + second.started) == sorted(set(first.started + second.started))
    assert told(rows()) == reference(12, startup=12)


def test_a_run_that_something_else_is_busy_with_is_waited_for(machine: Callable[..., Machine]) -> None:
    import fcntl

    first = machine()
    assert (
        main([*BASE, "recipe.lr=choice(1e-3)", "model.pos_embed=choice(none,learned)", "trials=1", "sampler=grid"]) == 0
    )
    (run,) = Path("runs").glob("*nano-*")
    (run / "record.json").unlink()
    (run / "metrics.csv").unlink()
    handle = (run / "lock").open("w")
    fcntl.flock(handle, fcntl.LOCK_EX)
    second = machine(on_poll=lambda polls: handle.close() if polls == 5 else None)
    again = ["recipe.lr=choice(1e-3)", "model.pos_embed=choice(none,learned)", "trials=1", "sampler=grid", "name=again"]
    assert main([*BASE, *again]) == 0
    assert second.started == first.started
    assert second.polls >= 5 + EPOCHS


def test_two_launchers_share_the_trials_and_take_over_from_one_that_dies(machine: Callable[..., Machine]) -> None:
    search = [*BASE, LR, "trials=9", "sampler=random"]
    other = Machine()

    def look(polls: int) -> None:
        if polls == 4:  # a second launcher comes by, takes trials of its own, and dies in the middle of one
            monkey = pytest.MonkeyPatch()
            monkey.setattr("eit_lab.sweep.engines.build_engine", lambda launcher, configs, *, folder: other)
            with pytest.raises(DiedError):
                main(search)
            monkey.undo()

    def die(polls: int) -> None:
        if polls == 15:
            raise DiedError

    other.on_poll = die
    first = machine(on_poll=look)
    assert main(search) == 0
    assert len(first.started) + len(other.started) == 10
    assert set(first.started) & set(other.started) == {other.started[-1]}
    found = rows()
    assert [row["state"] for row in found] == ["finished"] * 9
    assert len({row["runs"] for row in found}) == 9
    single = machine()
    assert main([*search, "name=alone"]) == 0  # the same trials, whoever ran them, and none is run again
    assert single.started == []
    key = ("trial", "recipe.lr", "val/acc1")
    alone = rows(Path("runs/searches/alone"))
    assert [[row[k] for k in key] for row in alone] == [[row[k] for k in key] for row in found]


def test_a_search_under_a_name_that_is_taken_by_another_is_refused(
    machine: Callable[..., Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    machine()
    assert main([*BASE, LR, "trials=1", "name=mine"]) == 0
    assert main([*BASE, "recipe.beta2=0.9", LR, DECAY, "trials=1", "name=mine", "pruner=median"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "name=mine is a search with other space, pruner, runs, and" in err


# ------------------------------------------------------------------------------------------------ trials that are not to be


def test_a_run_that_diverges_is_a_bad_point_and_no_failure(machine: Callable[..., Machine]) -> None:
    machine(diverges=lambda config: config.recipe.lr > 1e-2)
    assert main([*BASE, LR, "trials=10", "sampler=random"]) == 0
    found = rows()
    for row in found:
        assert row["state"] == ("diverged" if float(row["recipe.lr"]) > 1e-2 else "finished")
    assert {row["state"] for row in found} == {"diverged", "finished"}
    best = yaml.safe_load(next(Path("runs").glob("searches/*/best.yaml")).read_text())
    assert float(best["arms"]["eit_nano"]["value"]) == max(float(row["val/acc1"]) for row in found if row["val/acc1"])


@pytest.mark.slow
def test_a_run_that_fails_is_said_and_is_done_again_by_the_next_command(
    machine: Callable[..., Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    search = [*BASE, LR, "trials=4", "sampler=random"]
    first = machine(fails=lambda config: config.recipe.lr > 1e-2)
    assert main(search) == 1
    failed = [row for row in rows() if row["state"] == "failed"]
    assert 1 <= len(failed) <= 3
    assert {row["said"] for row in failed} == {"failed: the disk is full"}
    assert len(rows()) == 4
    assert "failed: the disk is full" in capsys.readouterr().err
    assert main([*search, "hydra.launcher.retry_failed=false"]) == 1
    assert len(first.started) == 4
    second = machine()
    assert main(search) == 0
    found = rows()
    assert [row["retry_of"] for row in found[4:]] == [row["trial"] for row in failed]
    assert [row["recipe.lr"] for row in found[4:]] == [row["recipe.lr"] for row in failed]
    assert {row["state"] for row in found[4:]} == {"finished"}
    assert len(second.started) == len(failed)


def test_retries_and_fail_fast_are_the_launchers(machine: Callable[..., Machine]) -> None:
    tried = machine(fails=lambda config: True)
    assert main([*BASE, LR, "trials=3", "hydra.launcher.retries=1", "hydra.launcher.keep_going=false"]) == 1
    assert len(tried.started) == 2
    assert len(set(tried.started)) == 1
    assert [row["state"] for row in rows()] == ["failed"]


def test_points_that_make_no_config_do_not_count(machine: Callable[..., Machine]) -> None:
    machine()
    widths = ["model.size.embed_dim=range(16,1041,8)", "model.size.num_heads=16", "model.ib.rule=none"]
    assert main([*BASE, *widths, "trials=3", "sampler=random"]) == 0
    found = [{**row, "recipe.lr": ""} for row in rows()]
    good = [row for row in found if row["state"] == "finished"]
    assert len(good) == 3
    assert all(int(row["model.size.embed_dim"]) % 16 == 0 for row in good)
    bad = [row for row in found if row["state"] == "impossible"]
    assert len(bad) + 3 == len(found)
    assert all("num_heads" in row["said"] and int(row["model.size.embed_dim"]) % 16 for row in bad)


# -------------------------------------------------------------------------------------------------- arms, seeds, objectives


def test_arms_get_the_same_trials_at_the_same_random_points(machine: Callable[..., Machine]) -> None:
    here = machine(on_poll=lambda polls: signal.raise_signal(signal.SIGTERM) if polls == 31 else None)
    search = [*BASE[:1], *BASE[2:], "model=vit_nano,eit_nano", "per=model", LR, "trials=4", "startup=3"]
    assert main(search) == 75
    so_far = [row["arm"] for row in rows() if row["state"] == "finished"]
    assert abs(so_far.count("vit_nano") - so_far.count("eit_nano")) <= 1
    here = machine()
    assert main(search) == 0
    lrs = {arm: [row["recipe.lr"] for row in rows() if row["arm"] == arm] for arm in ("vit_nano", "eit_nano")}
    assert len(lrs["vit_nano"]) == len(lrs["eit_nano"]) == 4
    assert lrs["vit_nano"][:3] == lrs["eit_nano"][:3]
    assert here.started
    best = yaml.safe_load(next(Path("runs").glob("searches/*/best.yaml")).read_text())
    assert list(best["arms"]) == ["vit_nano", "eit_nano"]
    for arm, one in best["arms"].items():
        values = [float(row["val/acc1"]) for row in rows() if row["arm"] == arm]
        assert one["value"] == max(values)
        (at,) = (row["recipe.lr"] for row in rows() if row["arm"] == arm and row["val/acc1"] == repr(one["value"]))
        assert one["overrides"] == [f"model={arm}", f"recipe.lr={at}"]


def test_the_command_of_the_best_trains_its_very_config_with_new_seeds(machine: Callable[..., Machine]) -> None:
    machine()
    assert main([*BASE, LR, "model/ib=choice(eit,lsra)", "trials=3", "seed=4,6"]) == 0
    best = yaml.safe_load(next(Path("runs").glob("searches/*/best.yaml")).read_text())["arms"]["eit_nano"]
    words = shlex.split(best["command"])
    assert words[:4] == ["python", "-m", "eit_lab.train", "-m"]
    points, _ = compose_points(words[4:])
    assert [point.config.seed for point in points] == [7, 8, 9]
    (row,) = (row for row in rows() if row["trial"] == str(best["trial"]))
    assert points[0].config.recipe.lr == float(row["recipe.lr"])
    assert points[0].config.model.ib.name == row["model/ib"]


def test_a_trial_of_several_seeds_counts_by_their_mean(machine: Callable[..., Machine]) -> None:
    here = machine()
    assert main([*BASE, LR, "trials=3", "seed=0,5"]) == 0
    (config,) = OpenSpace(BASE).configs([[]])
    assert len(here.started) == 6
    for row in rows():
        recipe = dataclasses.replace(config.recipe, lr=float(row["recipe.lr"]))
        ends = [accuracy(dataclasses.replace(config, recipe=recipe, seed=seed), EPOCHS) for seed in (0, 5)]
        assert float(row["val/acc1"]) == sum(ends) / 2
        assert len(row["runs"].split()) == 2


def test_a_grid_is_walked_once_in_a_shuffled_order(machine: Callable[..., Machine]) -> None:
    here = machine()
    grid = ["recipe.lr=choice(1e-3,1e-2)", "recipe.weight_decay=range(0,0.25,0.1)", "sampler=grid"]
    assert main([*BASE, *grid]) == 0
    points = [(float(row["recipe.lr"]), float(row["recipe.weight_decay"])) for row in rows()]
    assert sorted(points) == [(lr, decay) for lr in (1e-3, 1e-2) for decay in (0.0, 0.1, 0.2)]
    assert points != sorted(points)
    assert len(here.started) == 6
    assert main([*BASE, *grid, "trials=4", "sampler_seed=1", "name=part"]) == 0
    part = [(float(r["recipe.lr"]), float(r["recipe.weight_decay"])) for r in rows(Path("runs/searches/part"))]
    assert len(set(part)) == 4
    assert len(here.started) == 6  # all of them were runs that are finished


def test_a_loss_is_minimized_and_the_last_epoch_can_count(machine: Callable[..., Machine]) -> None:
    machine()
    assert main([*BASE, LR, "trials=4", "objective=val/loss", "at=last"]) == 0
    found = {row["trial"]: float(row["val/loss"]) for row in rows()}
    best = yaml.safe_load(next(Path("runs").glob("searches/*/best.yaml")).read_text())["arms"]["eit_nano"]
    assert best["value"] == min(found.values()) == found[str(best["trial"])]


def test_a_runs_value_is_its_best_epoch_or_its_last(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(
        "step,epoch,train/loss,val/acc1\n5,0,1.0,\n9,0,,0.25\n18,1,,0.75\n27,2,,0.5\n36,3,,nan\n"
    )
    curve = read_curve(tmp_path, "val/acc1")
    assert {epoch: value for epoch, value in curve.items() if epoch < 4} == {1: 0.25, 2: 0.75, 3: 0.5}
    assert run_value(curve, {}, "val/acc1", at="best", maximize=True) == 0.75
    assert run_value(curve, {}, "val/acc1", at="best", maximize=False) == 0.25
    assert run_value(curve, {}, "val/acc1", at="last", maximize=True) is None
    assert run_value({1: 0.5, 2: 0.4}, {}, "val/acc1", at="last", maximize=True) == 0.4
    # Ended by max_steps within its first epoch: validated at its end, which its record has alone.
    assert run_value({}, {"best": {"val/acc1": 0.3}}, "val/acc1", at="best", maximize=True) == 0.3
    assert run_value({}, {"best": None}, "val/acc1", at="best", maximize=True) is None
    assert mean_curve([{1: 0.2, 2: 0.4, 3: 0.9}, {1: 0.4, 2: 0.8}]) == {1: pytest.approx(0.3), 2: pytest.approx(0.6)}
    assert read_curve(tmp_path / "nothing", "val/acc1") == {}


def test_declared_arms_are_searched_apart(machine: Callable[..., Machine], capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path("experiments/007-arms")
    folder.mkdir(parents=True)
    arms = {"plain": ["model=vit_nano", "recipe.lr=1e-3"], "eit": ["model=eit_nano", "recipe.lr=2e-3"]}
    declared = {
        "question": "which?",
        "factor": ["model"],
        "arms": arms,
        "base": [*BASE[:1], *BASE[2:]],
        "seeds": [0, 1],
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(declared, sort_keys=False))
    here = machine()
    assert main(["experiment=007-arms", "per=arms", LR, "trials=2"]) == 0
    assert len(here.started) == 4
    found = rows()
    assert [(row["arm"], row["trial"]) for row in found] == [("plain", "1"), ("plain", "2"), ("eit", "1"), ("eit", "2")]
    assert [row["runs"].split("-")[0] for row in found] == ["vit_nano", "vit_nano", "eit_nano", "eit_nano"]
    assert [row["recipe.lr"] for row in found[:2]] == [row["recipe.lr"] for row in found[2:]]
    assert main(["experiment=007-arms", "per=arms", "arms=[eit]", LR, "trials=2", "name=one"]) == 0
    assert len(here.started) == 4, "the same two runs as before"
    with (Path("runs/searches/one") / "trials.csv").open() as file:
        alone = list(csv.DictReader(file))
    assert [(row["arm"], row["runs"]) for row in alone] == [("eit", row["runs"]) for row in found[2:]]
    assert main(["experiment=007-arms", "per=arms", "arms=[ei]", LR, "trials=2"]) == 2
    assert "arms" in (said := capsys.readouterr().err)
    assert "'ei'" in said
    assert "nearest: eit" in said


@pytest.mark.slow
def test_arms_of_equal_budget_are_matched_before_they_are_searched(
    machine: Callable[..., Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path("experiments/007-arms")
    folder.mkdir(parents=True)
    declared = {
        "factor": ["model"],
        "arms": {"vit": ["model=vit_nano"], "eit": ["model=eit_nano"]},
        "base": [*BASE[:1], *BASE[2:]],
        "match": "params",
        "reference": "vit",
    }
    (folder / "experiment.yaml").write_text(yaml.safe_dump(declared, sort_keys=False))
    search = ["experiment=007-arms", "per=arms", "trials=1"]
    assert main([*search, "model.ib.kernel_size=3,5"]) == 2
    assert "model.ib.kernel_size cannot be searched with match=params" in capsys.readouterr().err
    machine()
    assert main([*search, LR]) == 0
    (folder,) = Path("runs/searches").iterdir()
    widths = {
        job.entry.arm: json.loads((folder / job.entry.frozen).read_text())["model"]["size"]["embed_dim"]
        for job in read_manifest(folder).jobs.values()
    }
    assert widths["vit"] == 96
    assert widths["eit"] > 96


# --------------------------------------------------------------------------------------------------------- what it leaves


@pytest.mark.slow
def test_the_table_and_the_figure_say_what_was_found(
    machine: Callable[..., Machine], capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np
    from PIL import Image

    machine(at_once=3, draws=True)
    args = [*BASE[:1], *BASE[2:], "model=vit_nano,eit_nano", "per=model", LR, DECAY, "trials=6", "sampler=random"]
    assert main(args) == 0
    out = capsys.readouterr().out
    best = max((row for row in rows() if row["arm"] == "eit_nano"), key=lambda row: float(row["val/acc1"]))
    assert re.search(
        rf"^trial {best['trial']} +{float(best['val/acc1']):.4f} +{float(best['recipe.lr']):.4g}", out, re.M
    )
    shares = re.findall(r"explains: (.*)", out)
    assert len(shares) == 2
    for line in shares:
        assert sum(int(share) for share in re.findall(r"(\d+)%", line)) in range(99, 102)
    (folder,) = Path("runs/searches").iterdir()
    image = np.asarray(Image.open(folder / "search.png").convert("RGB"))
    colours = {tuple(pixel) for pixel in image.reshape(-1, 3)}
    assert {(0, 114, 178), (230, 159, 0)} <= colours  # each arm's
    assert "<svg" in (folder / "search.svg").read_text()
    assert len(read_manifest(folder).jobs) == 12
    assert {job.state for job in read_manifest(folder).jobs.values()} == {"finished"}


def test_the_names_of_many_arms_stay_inside_the_figure(machine: Callable[..., Machine]) -> None:
    import numpy as np
    from PIL import Image

    machine(at_once=3, draws=True)
    arms = "model=vit_nano,eit_nano,lsra_nano,lsra_lite_nano,lsra_dynamic_nano,eit_mini,eit_tiny"
    assert main([*BASE[:1], *BASE[2:], arms, "per=model", LR, "trials=1", "sampler=random"]) == 0
    (folder,) = Path("runs/searches").iterdir()
    image = np.asarray(Image.open(folder / "search.png").convert("L"))
    assert (image[:, -3:] == 255).all()


@pytest.mark.slow
def test_a_wandb_sweep_is_the_same_search_to_wandbs_own_reader(here: Path) -> None:
    import optuna

    from eit_lab.search.study import distribution

    reader = pytest.importorskip(
        "wandb.sdk.sweeps.scheduler.optuna"
    )  # newer than the oldest wandb that we keep working

    words = [
        *BASE, LR, DECAY, "recipe.batch_size=tag(log,int(interval(16,64)))", "recipe.label_smoothing=range(0,0.35,0.1)",
        "model.size.depth=range(2,9)", "recipe.warmup_epochs=range(1,4,0.75)", "model.ib.kernel_size=range(3,8,2)",
        "model/ib=eit,lsra", "recipe.beta2=0.98,0.999", "recipe.rand_augment=null,rand-m9-mstd0.5-inc1",
    ]  # fmt: skip
    assert main([*words, "wandb=sweep.yaml", "pruner=hyperband", "prune_after=2", "trials=30"]) == 0
    assert [path.name for path in here.iterdir()] == ["sweep.yaml"]
    sweep = yaml.safe_load(Path("sweep.yaml").read_text())
    theirs = reader.search_space_from_sweep_config(sweep["parameters"])
    space = read_request(parse_flags(words)).space
    assert list(theirs) == [axis.key for axis in space.axes]
    for axis in space.axes:
        if isinstance(theirs[axis.key], optuna.distributions.CategoricalDistribution):
            assert [str(value) for value in theirs[axis.key].choices] == [axis.text(v) for v in axis.values() or ()]
        else:
            assert theirs[axis.key] == distribution(axis)
    lists = {key for key, one in theirs.items() if isinstance(one, optuna.distributions.CategoricalDistribution)}
    assert lists == {
        "recipe.warmup_epochs", "model.ib.kernel_size", "model/ib", "recipe.beta2", "recipe.rand_augment",
    }  # fmt: skip
    assert (sweep["method"], sweep["run_cap"]) == ("bayes", 30)
    assert sweep["metric"] == {"name": "val/acc1", "goal": "maximize"}
    assert sweep["early_terminate"] == {"type": "hyperband", "min_iter": 2, "eta": 3}
    # The agent puts key=value for every parameter in the place of ${args_no_hyphens}: train must take it.
    typed = list(sweep["command"][4:-1]) + [
        f"{key}={one.choices[-1] if key in lists else one.high}" for key, one in theirs.items()
    ]
    assert sweep["command"][:4] == ["${env}", "python", "-m", "${program}"]
    points, _ = compose_points(typed)
    assert (points[0].config.logger.kind, points[0].config.model.ib.name) == ("wandb", "lsra")
    assert (points[0].config.recipe.lr, points[0].config.recipe.batch_size) == (0.1, 64)


def test_arms_and_seeds_of_a_wandb_sweep_satisfy_wandbs_schema(here: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    from importlib import metadata

    try:
        (path,) = (file for file in metadata.files("sweeps") or () if file.match("sweeps/config/schema.json"))
    except metadata.PackageNotFoundError:
        pytest.skip("W&B's schema is in the package sweeps, which is not installed")
    schema = json.loads(Path(str(path.locate())).read_text())
    words = [BASE[0], *BASE[2:], "model=vit_nano,eit_nano", "per=model", LR, "recipe.epochs=range(2,5)", "seed=0,1"]
    assert main([*words, "wandb=mine.yaml", "sampler=random"]) == 0
    for arm in ("vit_nano", "eit_nano"):
        sweep = yaml.safe_load(Path(f"mine-{arm}.yaml").read_text())
        assert sweep.pop("run_cap") == 40  # newer than the schema, read by wandb.sdk.launch.sweeps
        assert list(jsonschema.Draft7Validator(schema).iter_errors(sweep)) == []
        assert f"model={arm}" in sweep["command"]
        assert sweep["parameters"]["seed"] == {"values": [0, 1]}
        assert list(jsonschema.Draft7Validator(schema).iter_errors({**sweep, "method": "annealing"})) != []


# ------------------------------------------------------------------------------------------------------------- real runs


@pytest.mark.slow
def test_killed_and_started_again_real_runs_end_with_the_same_trials_and_numbers(
    command: Command, tmp_path: Path
) -> None:
    search = [*TINY, LR, "model/ib=choice(eit,none)", "recipe.epochs=6", "trials=5", "startup=3", "pruner=median"]
    whole = command("search", *search, "run.root=undisturbed")
    assert whole.status == 0, whole.err
    killed = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.search", *search], cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while len(list(tmp_path.glob("runs/*/checkpoints/last.ckpt"))) < 2:
        assert killed.poll() is None
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait(timeout=60)
    again = command("search", *search)
    assert again.status == 0, again.err
    (one,), (two,) = tmp_path.glob("undisturbed/searches/*"), tmp_path.glob("runs/searches/*")
    assert told(rows(one)) == told(rows(two))
    assert len(rows(two)) == 5
    assert len(list(tmp_path.glob("runs/*/record.json"))) == len({row["runs"] for row in rows(two)})


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_on_a_real_slurm_the_jobs_go_on_and_the_next_launcher_takes_their_values(tmp_path: Path) -> None:
    search = [
        *(sys.executable, "-m", "eit_lab.search"), *TINY, LR, "trials=4", "sampler=random", "trials_at_once=2",
        "recipe.epochs=8", "hydra/launcher=slurm", "hydra.launcher.poll_s=1",
    ]  # fmt: skip
    with (  # a short path: munge's socket lies in it
        tempfile.TemporaryDirectory(prefix="eit-slurm-", dir="/tmp", ignore_cleanup_errors=True) as short,
        SlurmCluster(Path(short)) as cluster,
    ):
        environment = {**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"}
        first = subprocess.Popen(search, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")):
            assert first.poll() is None
            time.sleep(0.1)
        first.send_signal(signal.SIGTERM)
        out, _ = first.communicate(timeout=60)
        assert (first.returncode, "the jobs in the queue go on without it" in out) == (75, True)
        again = subprocess.run(search, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    (folder,) = tmp_path.glob("runs/searches/*")
    assert [row["state"] for row in rows(folder)] == ["finished"] * 4
    for row in rows(folder):
        run = tmp_path / "runs" / row["runs"]
        assert float(row["val/acc1"]) == max(read_curve(run, "val/acc1").values())
    assert {job.attempts for job in read_manifest(folder).jobs.values()} == {1}
