"""The guard: what may differ between arms, what each costs, and what happens over a budget."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_MODEL, only_run, record_of
from eit_lab.command import RunError
from eit_lab.compose import parse_flags
from eit_lab.config import Config, ConfigError
from eit_lab.data.prepare import prepare
from eit_lab.plan import plan
from eit_lab.runs import DataFacts, identity, run_name
from eit_lab.sweep.arms import Sweep, read_sweep
from eit_lab.sweep.guard import ArmCost, disk_bytes, guard
from eit_lab.sweep.matched import match_arms
from eit_lab.sweep.probe import Probe

TWO = ("data=digits", "logger=none", "recipe.epochs=2", "model=vit_nano,eit_nano", "seed=0,1")


class Told(Probe):
    """A probe that is told what to answer, and notes what it was asked."""

    def __init__(self, img_per_s: float | None = 100.0) -> None:
        super().__init__()
        self.img_per_s, self.asked = img_per_s, []

    def cost(self, config: Config, *, num_classes: int) -> dict[str, int]:
        return {"params": 1_000_000, "macs": 2_500_000}

    def match(self, config: Config, *, num_classes: int, budget: str, target: int) -> dict[str, int]:
        raise AssertionError("nothing to match")

    def speed(
        self, config: Config, *, num_classes: int, seconds: float, threads: int | None, within_s: float
    ) -> dict[str, Any]:
        self.asked.append((config.model.name, seconds, threads))
        return {"img_per_s": self.img_per_s, "device": "a device", "error": "out of memory"}


def sweep_of(*overrides: str) -> Sweep:
    return read_sweep(parse_flags(["-m", *overrides]))


def look(sweep: Sweep, folder: Path, *, probe: Probe, finished: Sequence[int] = (), **more: Any) -> list[ArmCost]:
    facts = [prepare(point.config) for point in sweep.points]
    identities = [identity(point.config, known) for point, known in zip(sweep.points, facts, strict=True)]
    done = {identities[place] for place in finished}
    return guard(sweep, folder=folder, facts=facts, identities=identities, finished=done, probe=probe, **more)


# ------------------------------------------------------------------------------------------------------- what may differ

UNFAIR = [
    (["data=digits", "model/size=mini,base", "recipe=eit300"], ["recipe.batch_size", "recipe.lr"]),
    (["data=digits", "model/size=mini,base", "recipe=eit300", "factor=recipe.lr"], ["recipe.batch_size"]),
    (["data=digits,synthetic"], ["model.stem.kernel_size", "model.stem.stride"]),  # which follow from the image size
    (["data=digits,synthetic", "factor=model.stem"], []),
    (["experiment=demo"], []),
    (["data=digits", "model=vit_base,lsra_base,lsra_lite_base,eit_base,deit_small"], []),
    (["data=digits", "model=vit_nano,eit_nano", "seed=0,1", "data.split_seed=${seed}"], ["data.split_seed"]),
    (["data=digits", "model.drop_path_rate=0.0,0.1", "recipe.ema_decay=null,0.9"], []),
]  # fmt: skip


@pytest.mark.parametrize(("args", "keys"), UNFAIR, ids=[" ".join(args) for args, _ in UNFAIR])
def test_arms_that_differ_beyond_the_factor_are_refused_with_the_list(
    args: list[str], keys: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not keys:
        assert look(sweep_of(*args, "guard.speed_s=0"), here / "sweep", probe=Told())
        return
    from eit_lab.train import main

    assert main(["-m", *args]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert f"got {', '.join(keys)}" in err
    for key in keys:
        assert f"  {key} " in out
    assert not list(here.rglob("sweep.json"))


def test_the_list_says_each_arms_value(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"got recipe\.batch_size, recipe\.lr; make them equal, or declare them too"):
        look(sweep_of("data=digits", "model/size=mini,base", "recipe=eit300"), here, probe=Told())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "the arms differ beyond the declared factor (model.size):"
    assert lines[1].split() == ["recipe.batch_size", "eit_mini:", "1024", "eit_base:", "512"]
    assert lines[2].split() == ["recipe.lr", "eit_mini:", "0.002", "eit_base:", "0.001"]


def test_other_files_and_other_weights_count_though_their_places_do_not(here: Path) -> None:
    sweep = sweep_of(*TWO)
    first = prepare(sweep.points[0].config)
    other = dataclasses.replace(first, fingerprint="other")
    whole = {"folder": here, "identities": ["a", "b", "c", "d"], "finished": (), "probe": Told()}
    with pytest.raises(ConfigError, match=r"got data \(content\)"):
        guard(sweep, facts=[first, first, other, other], **whole)
    with pytest.raises(
        ConfigError, match=r"the seeds of vit_nano must differ in nothing but the seed, got data \(content\)"
    ):
        guard(sweep, facts=[first, other, first, first], **whole)
    roots = sweep_of(*TWO[:-2], "model=eit_nano", "data.split_seed=0,1", "seed=0,1")
    assert guard(roots, facts=[first, first, other, other], **whole)  # data is the factor
    for name in ("one.pth", "two.pth"):
        (here / name).write_text(name)
    start = sweep_of(*TWO[:-2], "model=eit_nano", "checkpoint=one.pth,two.pth", "seed=0,1")
    assert guard(start, facts=[first] * 4, **whole)
    for seed in (0, 1):
        (here / f"{seed}.pth").write_text(str(seed))
    own = sweep_of(*TWO[:-2], "model=vit_nano,eit_nano", "checkpoint=${seed}.pth", "seed=0,1", "factor=checkpoint")
    assert own.id != sweep_of(*TWO).id
    assert guard(own, facts=[first] * 4, **whole)
    points = [dataclasses.replace(p, arm=f"arm{n // 2}") for n, p in enumerate(start.points)]
    undeclared = dataclasses.replace(start.declaration, factor=("model",))
    with pytest.raises(ConfigError, match=r"got checkpoint \(content\)"):
        guard(dataclasses.replace(start, points=points, declaration=undeclared), facts=[first] * 4, **whole)


def test_matched_arms_may_differ_in_their_width(here: Path) -> None:
    sweep = sweep_of("experiment=000-digits-demo", "match=params", "seed=0")
    widths = {"vit": 96, "lsra": 111, "eit": 105}
    points = [
        dataclasses.replace(
            point,
            config=dataclasses.replace(
                point.config,
                model=dataclasses.replace(
                    point.config.model, size=dataclasses.replace(point.config.model.size, embed_dim=widths[point.arm])
                ),
            ),
        )
        for point in sweep.points
    ]
    matched = dataclasses.replace(sweep, points=points)
    assert len(look(matched, here, probe=Told())) == 3
    unmatched = dataclasses.replace(matched, declaration=dataclasses.replace(sweep.declaration, match=None))
    with pytest.raises(ConfigError, match=r"got model\.size\.embed_dim"):
        look(unmatched, here, probe=Told())


# ---------------------------------------------------------------------------------------------------------------- costs


def test_hours_are_images_to_train_on_over_images_per_second_and_only_of_jobs_still_to_do(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = sweep_of(*TWO)
    counts = plan(sweep.points[0].config, prepare(sweep.points[0].config))
    images = counts.total_steps * 128
    assert images == 2 * 10 * 128
    arms = look(sweep, here / "sweep", probe=Told(), finished=[0])
    assert [(arm.arm, arm.seeds, arm.waiting) for arm in arms] == [("vit_nano", [0, 1], 1), ("eit_nano", [0, 1], 2)]
    assert [arm.device_hours for arm in arms] == pytest.approx([images / 100 / 3600, 2 * images / 100 / 3600])
    text = capsys.readouterr().out
    assert "3 of 4 jobs to do" in text
    assert "1,000,000" in text
    kept = json.loads((here / "sweep" / "guard.json").read_text())
    assert [arm["device_hours"] for arm in kept["arms"]] == [arm.device_hours for arm in arms]
    everything = look(sweep, here / "sweep", probe=(silent := Told()), finished=[0, 1, 2, 3])
    assert [(arm.device_hours, arm.waiting) for arm in everything] == [(0.0, 0)] * 2
    assert silent.asked == []


def test_what_was_measured_is_not_measured_again(here: Path) -> None:
    first, second, third = Told(200.0), Told(1.0), Told(1.0)
    look(sweep_of(*TWO), here, probe=first, threads=3)
    assert first.asked == [("vit_nano", 1.0, 3), ("eit_nano", 1.0, 3)]
    arms = look(sweep_of(*TWO[:-1], "seed=0,1,2"), here, probe=second, threads=3)
    assert second.asked == []
    assert {arm.img_per_s for arm in arms} == {200.0}
    look(sweep_of(*TWO, "recipe.lr=0.1"), here, probe=second, threads=3)
    assert second.asked == []  # a step takes as long
    look(sweep_of(*TWO), here, probe=third, threads=1)
    assert len(third.asked) == 2  # other threads


def test_finished_runs_say_how_fast_an_arm_is(here: Path) -> None:
    sweep = sweep_of(*TWO)
    config = sweep.points[0].config
    folder = here / "runs" / run_name(config, identity(config, prepare(config)))
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({"img_per_s": 50.0, "placement": {"world_size": 2}}))
    arms = look(sweep, here / "sweep", probe=(probe := Told()), finished=[0])
    assert (arms[0].img_per_s, arms[0].source) == (25.0, "its finished runs")  # of one device
    assert [name for name, _, _ in probe.asked] == ["eit_nano"]


def test_speed_is_not_measured_where_that_says_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sources(*more: str, probe: Told) -> list[str]:
        return [arm.source for arm in look(sweep_of(*TWO, *more), here / "-".join(more), probe=probe)]

    assert sources("guard.speed_s=0", probe=Told()) == ["not measured: guard.speed_s=0"] * 2
    slurm = "hydra/launcher=slurm"
    assert (
        sources(slurm, "budget.device_hours=1", probe=Told()) == ["not measured: this is not the cluster's device"] * 2
    )
    assert "budget.device_hours=1 says nothing of 2 of the arms: their speed is not known" in capsys.readouterr().out
    asked = Told()
    assert sources(slurm, "guard.speed_s=0.5", probe=asked) == ["measured, a device"] * 2
    assert [seconds for _, seconds, _ in asked.asked] == [0.5, 0.5]
    assert sources("recipe.epochs=1", probe=Told(None)) == ["not measured: out of memory"] * 2


def test_a_sweep_of_thousands_is_looked_at_once_an_arm(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = sweep_of(*TWO[:-1], "seed=range(3000)", "guard.speed_s=0")
    facts = prepare(sweep.points[0].config)
    places = [str(number) for number in range(6000)]
    arms = guard(sweep, folder=here, facts=[facts] * 6000, identities=places, finished=(), probe=Told())
    assert [arm.waiting for arm in arms] == [3000, 3000]
    assert "0..2999" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------------------- budget

OVER = [
    ("budget.device_hours=0.001", "device-hours, and budget.device_hours is 0.001"),
    ("budget.disk_gb=0.01", "GB is 0.01"[3:]),
]


@pytest.mark.parametrize(("limit", "words"), OVER)
def test_over_the_budget_a_script_is_refused_and_a_yes_goes_on(
    limit: str, words: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))  # nobody's terminal
    with pytest.raises(ConfigError, match="yes=true goes on") as refused:
        look(sweep_of(*TWO, limit), here / "sweep", probe=Told())
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (here / "sweep").exists()
    assert look(sweep_of(*TWO, limit, "yes=true"), here / "sweep", probe=Told())
    assert look(sweep_of(*TWO, "budget.device_hours=1", "budget.disk_gb=1"), here / "sweep", probe=Told())


def test_hours_measured_without_compiling_are_a_bound_and_no_reason_to_refuse(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = look(sweep_of(*TWO, "trainer.compile=true", "budget.device_hours=0.001"), here, probe=Told())
    assert [(arm.at_most, arm.source) for arm in arms] == [(True, "measured, a device, not compiled")] * 2
    text = capsys.readouterr().out
    assert "4 of 4 jobs to do; fewer than 0.0284 device-hours (budget 0.001)" in text
    assert "budget.device_hours=0.001 is not held against 2 of the arms: they train with torch.compile" in text
    look(sweep_of(*TWO, "trainer.compile=true", "budget.device_hours=1"), here, probe=Told())
    assert "not held" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "compile_s", "bound"),
    [("a device", 0.0, True), ("a device", 1e9, False), ("cpu, 2 threads", 0.0, False)],
)
def test_hours_of_auto_are_a_bound_where_the_jobs_will_compile(
    device: str, compile_s: float, bound: bool, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eit_lab.plan.COMPILE_S", compile_s)
    probe = Told()
    monkeypatch.setattr(probe, "speed", lambda config, **asked: {"img_per_s": 100.0, "device": device})
    arms = look(sweep_of(*TWO), here, probe=probe)
    assert [arm.at_most for arm in arms] == [bound] * 2


@pytest.mark.parametrize(
    ("answer", "goes_on"), [("y\n", True), ("yes\n", True), ("\n", False), ("n\n", False), ("", False)]
)
def test_on_a_terminal_it_asks(
    answer: str, goes_on: bool, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = io.StringIO(answer)
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    sweep = sweep_of(*TWO, "budget.device_hours=0.001")
    if goes_on:
        look(sweep, here, probe=Told())
    else:
        with pytest.raises(ConfigError, match="not started"):
            look(sweep, here, probe=Told())
    assert "go on? [y/N]" in capsys.readouterr().out


def test_disk_is_of_whole_states_and_predictions() -> None:
    config = sweep_of(*TWO).points[0].config
    facts = DataFacts(num_classes=10, num_train=1000, num_val=10, num_test=500, fingerprint="")
    beside = 3 * 100_000 + 36 * 500  # random states and the like in each file; predictions
    one = 3 * 4 * 3 * 1000  # best, last, previous; 4 bytes; weights and two moments
    assert disk_bytes(config, facts, params=1000) == one + beside
    averaged = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, ema_decay=0.9))
    assert disk_bytes(averaged, facts, params=1000) == one * 4 // 3 + beside
    kept = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, keep_epochs=1))
    assert disk_bytes(kept, facts, params=1000) == one * 4 // 3 + beside + 100_000


# ------------------------------------------------------------------------------------------------------- with real torch


@pytest.mark.slow
def test_one_process_counts_matches_and_measures(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EIT_LAB_CACHE", str(here / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    words = ("experiment=000-digits-demo", "seed=0", "match=params", "guard.speed_s=0.1", "budget.device_hours=null")
    with Probe() as probe:
        sweep = match_arms(sweep_of(*words), probe=probe)
        assert {p.arm: p.config.model.size.embed_dim for p in sweep.points} == {"vit": 96, "lsra": 111, "eit": 105}
        table = capsys.readouterr().out.splitlines()
        assert table[0] == "arms matched in params to vit (340,042):"
        assert table[2].split() == ["vit", "96", "340,042", "5,932,032", "+0.00%"]
        assert table[3].split()[:4] == ["lsra", "96", "->", "111"]
        arms = look(sweep, here / "sweep", probe=probe)
        assert [arm.params for arm in arms] == [340_042, 341_107, 341_680]
        assert all(arm.img_per_s and arm.source.startswith("measured, cpu, 1 threads") for arm in arms)
        wide = dataclasses.replace(
            sweep.points[0].config, data=dataclasses.replace(sweep.points[0].config.data, img_size=(8, 6))
        )
        assert probe.cost(wide, num_classes=10)["params"] < 340_042  # fewer tokens, fewer positions

    def refuse(*_: object) -> None:
        raise AssertionError("no process is needed for what is known")

    monkeypatch.setattr(Probe, "_start", refuse)
    again = match_arms(sweep_of(*words))
    assert again.points == sweep.points
    with Probe() as probe:
        assert look(again, here / "sweep", probe=probe) == arms


def test_what_goes_wrong_in_that_process_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EIT_LAB_CACHE", str(here))
    monkeypatch.setattr("eit_lab.sweep.probe.sys.executable", "/bin/false")
    config = sweep_of(*TWO).points[0].config
    with Probe() as probe, pytest.raises(RunError, match=r"what models cost could not be found out \(exit status 1\)"):
        probe.cost(config, num_classes=10)


@pytest.mark.slow
def test_a_declared_ablation_runs_with_its_arms_on_record_and_no_more_disk_than_was_said(
    command: Any, tmp_path: Path
) -> None:
    tiny = [text for text in TINY_MODEL if not text.startswith(("model=", "recipe="))]
    args = (
        "experiment=000-digits-demo",
        *tiny,
        "arms=eit",
        "seed=0",
        "run.sweep=tried",
        "match=params",
        "reference=vit",
    )
    done = command("train", "-m", *args)
    assert done.status == 0, done.err
    assert "arms matched in params to vit" in done.out
    record = record_of(only_run(tmp_path / "runs"))
    assert (record["config"]["run"]["arm"], record["config"]["run"]["sweep"]) == ("eit", "tried")
    kept = json.loads((tmp_path / "runs" / "sweeps" / "tried" / "guard.json").read_text())
    (arm,) = kept["arms"]
    assert arm["params"] == record["cost"]["params"]
    files = [path for path in only_run(tmp_path / "runs").rglob("*") if path.suffix in (".ckpt", ".npz")]
    assert len(files) >= 3
    assert 0.6 * arm["disk_bytes"] < sum(path.stat().st_size for path in files) <= arm["disk_bytes"]
