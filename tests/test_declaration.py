"""Declaring an ablation: experiments/NNN-slug, the command line over it, ad-hoc multiruns, and the name of a sweep."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from eit_lab.compose import compose_one, compose_points, parse_flags
from eit_lab.config import ConfigError
from eit_lab.data.catalog import published_facts
from eit_lab.data.prepare import prepare
from eit_lab.declaration import find_experiment, load_declaration, read_experiment
from eit_lab.loading import dump
from eit_lab.sweep.arms import Sweep, read_sweep
from eit_lab.sweep.fairness import compare_arms

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SHIPPED = sorted(path.parent.name for path in EXPERIMENTS.glob("*/experiment.yaml"))
DEMO = "experiment=000-digits-demo"


def sweep_of(*overrides: str) -> Sweep:
    return read_sweep(parse_flags(["-m", *overrides]))


@cache
def id_of(*overrides: str) -> str:
    return sweep_of(*overrides).id


def write_experiment(root: Path, text: str, *, name: str = "900-mine") -> None:
    folder = root / "experiments" / name
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(text)


MINE = """\
factor: model.ib
base: [data=digits, logger=none, model=eit_nano]
arms:
  vit: model/ib=none
  half: [model.ib.strength=0.5]
  eit: []
seeds: [3, 4]
baseline: vit
"""

# --------------------------------------------------------------------------------------------------- what is shipped

_OWN = {"name", "question", "match", "reference", "budget"}


def _is_matched_twin(name: str) -> bool:
    return "-arms-params-" in name or "-arms-macs-" in name


def _is_like_another(name: str) -> bool:
    """What another shipped one composes too, but for the size or the width."""
    others = ("-arms-tiny", "-arms-base", "-arms-large", "-fashion-macs", "-cifar100-arms", "-imagenet-arms")
    return _is_matched_twin(name) or name.endswith(others)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if _is_like_another(name) else []) for name in SHIPPED],
)
def test_every_shipped_experiment_composes_and_its_arms_differ_in_its_factor_alone(name: str) -> None:
    in_a_package = {"data=digits", "data=mnist_5k"} & set(read_experiment(EXPERIMENTS / name).base)
    sweep = sweep_of(f"experiment={name}", *(() if in_a_package else ("data.root=null",)))
    assert sweep.id == sweep.declaration.name == name
    facts = [published_facts(point.config.data) or prepare(point.config) for point in sweep.points]
    compare_arms(sweep, facts)
    assert len(sweep.points) == len(sweep.declaration.arms) * len(sweep.declaration.seeds)
    assert all(point.config.run.arm == point.arm and point.config.run.sweep == name for point in sweep.points)
    what = {repr((point.config.model, point.config.data, point.config.recipe.epochs)) for point in sweep.points}
    assert len(what) == len(sweep.declaration.arms)


def test_the_matched_versions_are_the_headline_but_for_the_match() -> None:
    twins = [name for name in SHIPPED if _is_matched_twin(name)]
    assert len(twins) == 8
    for name in twins:
        size = name.rpartition("-")[2]
        (headline,) = (other for other in SHIPPED if other.endswith(f"-arms-{size}") and not _is_matched_twin(other))
        ours, theirs = (dataclasses.asdict(read_experiment(EXPERIMENTS / which)) for which in (name, headline))
        assert {key: ours[key] for key in ours.keys() - _OWN} == {key: theirs[key] for key in theirs.keys() - _OWN}
        assert ours["match"] == name.split("-")[2]
        assert ours["reference"] == "eit"


def test_every_shipped_experiment_says_what_it_asks_costs_and_would_change() -> None:
    index = (EXPERIMENTS / "README.md").read_text()
    assert len(SHIPPED) == 32
    for name in SHIPPED:
        text = (EXPERIMENTS / name / "README.md").read_text()
        assert f"experiment={name}" in text
        assert f"]({name})" in index
        for words in (
            "**Question.**",
            "**Command.**",
            "**Cost.**" if (EXPERIMENTS / name / "records.jsonl").is_file() else "**Expected cost.**",
            "**What would change our mind.**",
            "**Answer.**",
        ):
            assert words in text
        assert " ".join(read_experiment(EXPERIMENTS / name).question.split()) in " ".join(text.split())


def test_what_a_readme_asks_of_two_arms_is_a_planned_comparison() -> None:
    planned = {name: set(read_experiment(EXPERIMENTS / name).compare) for name in SHIPPED}
    assert ("eit", "lsra") in planned["000-digits-demo"]  # whether the way the channels fall matters
    steps = ["s0", "s0.25", "s0.5", "s0.75", "s1"]
    assert {*zip(steps[1:], steps, strict=False), *(("s1", step) for step in steps[:-1])} == planned["013-strength"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experiment_costs", "experiment_results"])
def test_what_readmes_say_of_cost_and_results_is_what_is_computed(name: str) -> None:
    script = EXPERIMENTS.parent / "benchmarks" / f"{name}.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


# ----------------------------------------------------------------------------------------- a declaration on a command line


def test_arms_times_seeds_and_the_command_line_goes_over_both(here: Path) -> None:
    write_experiment(here, MINE)
    sweep = sweep_of("experiment=900-mine")
    assert [(p.arm, p.config.seed) for p in sweep.points] == [
        ("vit", 3), ("vit", 4), ("half", 3), ("half", 4), ("eit", 3), ("eit", 4),
    ]  # fmt: skip
    assert sweep.points[2].overrides == ("arms=half", "seed=3")
    base = ["data=digits", "logger=none", "model=eit_nano"]
    for arm, own in (("vit", "model/ib=none"), ("half", "model.ib.strength=0.5"), ("eit", "seed=3")):
        (found,) = (p.config for p in sweep.points if (p.arm, p.config.seed) == (arm, 3))
        alone = compose_one([*base, own, *({"seed=3"} - {own})])
        assert dataclasses.replace(found, run=alone.run) == alone
    over = sweep_of("experiment=900-mine", "seed=0,1,2", "recipe.epochs=1", "arms=vit,eit", "trainer.devices=1")
    assert [(p.arm, p.config.seed) for p in over.points] == [(a, s) for a in ("vit", "eit") for s in (0, 1, 2)]
    assert {(p.config.recipe.epochs, p.config.trainer.devices) for p in over.points} == {(1, 1)}
    assert over.declaration.seeds == (0, 1, 2)
    assert list(over.declaration.arms) == ["vit", "half", "eit"]  # the record knows all that was declared
    assert sweep_of("experiment=experiments/900-mine", "seed=7").points[0].config.seed == 7


def test_a_second_factor_on_the_command_line_makes_arms_of_its_own(here: Path) -> None:
    write_experiment(here, MINE)
    sweep = sweep_of("experiment=900-mine", "recipe.epochs=1,2", "factor=recipe.epochs", "arms=vit", "seed=0")
    assert [p.arm for p in sweep.points] == ["vit recipe.epochs=1", "vit recipe.epochs=2"]
    assert sweep.declaration.factor == ("model.ib", "recipe.epochs")


def test_what_is_said_of_the_sweep_goes_over_what_is_declared(here: Path) -> None:
    write_experiment(here, f"{MINE}match: params\nreference: eit\nbudget: {{device_hours: 2, disk_gb: 3}}\n")
    declared = sweep_of("experiment=900-mine", "arms=vit").declaration
    assert (declared.match, declared.reference, declared.budget.device_hours) == ("params", "eit", 2.0)
    sweep = sweep_of(
        "experiment=900-mine", "arms=vit", "match=macs", "reference=half", "budget.disk_gb=1.5", "yes=true"
    )
    assert (sweep.declaration.match, sweep.declaration.reference) == ("macs", "half")
    assert (sweep.declaration.budget.device_hours, sweep.declaration.budget.disk_gb) == (2.0, 1.5)
    assert sweep.options.yes
    assert sweep.reference is not None
    assert sweep.reference.model.ib.strength == 0.5  # of an arm that is not run
    assert {p.arm for p in sweep.points} == {"vit"}
    lifted = sweep_of("experiment=900-mine", "match=none", "budget.device_hours=null")
    assert (lifted.declaration.match, lifted.declaration.budget.device_hours, lifted.reference) == (None, None, None)


def test_planned_interactions_come_through_a_command_line_and_sweep_json(here: Path) -> None:
    write_experiment(here, f"{MINE}interactions:\n  - [[eit, vit], [half, vit]]\n")
    declared = sweep_of("experiment=900-mine", "seed=0", "match=params").declaration
    assert declared.interactions == ((("eit", "vit"), ("half", "vit")),)
    plain = json.loads(json.dumps(dump(declared)))
    assert plain["interactions"] == [[["eit", "vit"], ["half", "vit"]]]
    assert load_declaration(plain) == declared
    del plain["interactions"]  # of a sweep from before there were any
    assert load_declaration(plain).interactions == ()


def test_an_experiment_of_the_current_folder_comes_before_one_that_is_shipped(here: Path) -> None:
    assert find_experiment("000-digits-demo") == EXPERIMENTS / "000-digits-demo"
    write_experiment(here, MINE, name="000-digits-demo")
    assert find_experiment("000-digits-demo") == Path("experiments/000-digits-demo")
    assert sweep_of(DEMO).declaration.seeds == (3, 4)


WRONG_FILES = [
    ("baseline: vit", "baseline: vti", "baseline must be one of the arms vit, half, eit, got 'vti'; nearest: vit"),
    ("baseline: vit", "baselin: vit", "baselin is not a key, got 'vit'; nearest: baseline"),
    ("baseline: vit", "compare: [[eit, vit], [eit, hlf]]", "compare[1] must be one of the arms vit, half, eit, got 'hlf'"),
    ("baseline: vit", "compare: [[hlf, vit]]", "compare[0] must be one of the arms vit, half, eit, got 'hlf'; nearest: half"),
    ("baseline: vit", "interactions: [[[eit, vit], [half, vti]]]", "interactions[0] must be one of the arms vit, half, eit, got 'vti'; nearest: vit"),
    ("baseline: vit", "interactions: [[[eit, vit], [half, vit]], [[et, vit], [half, vit]]]", "interactions[1] must be one of the arms vit, half, eit, got 'et'; nearest: eit"),
    ("baseline: vit", "interactions: [[eit, vit], [half, vit]]", "interactions[0][0] must be a list, got 'eit'"),
    ("baseline: vit", "interactions: [[[eit, vit]]]", "interactions[0][1] must be given, and is missing"),
    ("baseline: vit", "interaction: []", "interaction is not a key, got []; nearest: interactions"),
    ("baseline: vit", "match: parms", "match must be one of params, macs, got 'parms'; nearest: params"),
    ("baseline: vit", "budget: {device_hour: 3}", "budget.device_hour is not a key, got 3; nearest: budget.device_hours"),
    ("baseline: vit", "name: x", "name is not a key, got 'x'"),
    ("seeds: [3, 4]", "seeds: [3, 3]", "seeds must be different numbers, one at least, got [3, 3]"),
    ("seeds: [3, 4]", "seeds: 3", "seeds must be a list, got 3"),
    ("factor: model.ib", "question: why", "factor must be given"),
    ("factor: model.ib", "factor: model.bi", "factor must be a key, or the beginning of some, got 'model.bi'; nearest: model.ib"),
    ("model=eit_nano]", "model=eit_nano, seed=1]", "base cannot hold 'seed=1': seeds belong into seeds"),
    ("eit: []", "eit: model.ib.strength=0.5,1", "an arm is one configuration; write an arm for each value"),
    ("eit: []", "eit: model.ib.strenght=1.0", "model.ib.strenght is not a key, got 1.0; nearest: model.ib.strength"),
    ("eit: []", "eit: model.ib.strength=2", "model.ib.strength must be less than or equal to 1, got 2"),
    ("eit: []", "eit: model.ib.strength=0.5", "the arms half and eit of 900-mine are the same"),
    ("arms:", "arm:", "must declare arms: a mapping of labels to overrides"),
    ("arms:", "arms: [", "is not YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), WRONG_FILES, ids=[new for _, new, _ in WRONG_FILES])
def test_a_mistake_in_a_declaration_is_one_line(old: str, new: str, message: str, here: Path) -> None:
    assert old in MINE
    write_experiment(here, MINE.replace(old, new))
    with pytest.raises(ConfigError) as caught:
        sweep_of("experiment=900-mine")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


WRONG_LINES = [
    (["-m", DEMO, "arms=vti"], "arms must be one of the arms vit, lsra, eit, got 'vti'; nearest: vit"),
    (["-m", DEMO, "model/ib=eit"], "model/ib=eit: this would make the arms vit and lsra of 000-digits-demo the same"),
    (["-m", "experiment=000-digit-demo"], "experiment must be one of 000-digits-demo", ),
    (["-m", "experiment=experiments/none"], "experiment must be a folder with experiment.yaml, got 'experiments/none'"),
    (["-m", DEMO, "match=parms"], "match must be one of params, macs, none, got 'parms'; nearest: params"),
    (["-m", DEMO, "mach=params"], "mach is not a key, got 'params'; nearest: match"),
    (["-m", DEMO, "budget.device_hour=3"], "budget.device_hour is not a key, got '3'; nearest: budget.device_hours"),
    (["-m", DEMO, "budget=3"], "there are: budget.device_hours, budget.disk_gb"),
    (["-m", DEMO, "guard.speed=3"], "guard.speed is not a key, got '3'; nearest: guard.speed_s"),
    (["-m", DEMO, "run.sweep=a/b"], "run.sweep must be a plain file name"),
    (["-m", DEMO, "factor=model.sizes"], "factor must be a key, or the beginning of some, got 'model.sizes'; nearest: model.size"),
    (["-m", "data=digits", "model=vit_nano,eit_nano", "match=macs"], "match=macs needs reference=ARM, one of vit_nano, eit_nano"),
    (["-m", "data=digits", "model=vit_nano,eit_nano", "match=macs", "reference=x"], "reference must be one of the arms vit_nano, eit_nano"),
    (["-m", "data=digits", "seed=0,1", "reference=x"], "reference=x needs match=params or match=macs"),
    ([DEMO], "experiment=000-digits-demo: a declared experiment is a sweep, and needs -m"),
    (["data=digits", "match=params"], "match=params: this is said of a sweep, and needs -m"),
    (["data=digits", "budget.disk_gb=1"], "budget.disk_gb=1: this is said of a sweep, and needs -m"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "message"), WRONG_LINES, ids=[" ".join(args) for args, _ in WRONG_LINES])
def test_a_mistake_on_the_command_line_is_one_line_and_exit_status_2(
    args: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert not list(here.iterdir())


def test_help_names_the_words_of_a_sweep_and_the_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    from eit_lab.train import main

    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for words in ("arms ", "factor ", "match ", "budget.disk_gb ", "guard.speed_s ", "yes ", "000-digits-demo"):
        assert words in text


# ---------------------------------------------------------------------------------------------------------- ad hoc, ids


def test_the_axes_of_an_ad_hoc_multirun_are_its_factors_and_make_its_arms() -> None:
    sweep = sweep_of("data=digits", "model=vit_nano,eit_nano", "seed=0,1")
    assert sweep.declaration.factor == ("model",)
    assert list(sweep.arms()) == ["vit_nano", "eit_nano"]
    assert sweep.declaration.arms == {}
    assert sweep.declaration.seeds == (0, 1)
    assert sweep_of("data=digits", "seed=0,1").points[0].config.run.arm == "eit_base"
    strengths = sweep_of("data=digits", "model=eit_nano", "model.ib.strength=0,0.5", "factor=model/stem")
    assert [p.config.run.arm for p in strengths.points] == ["model.ib.strength=0", "model.ib.strength=0.5"]
    assert strengths.declaration.factor == ("model.ib.strength", "model.stem")
    demo = sweep_of("experiment=demo", "seed=0")
    assert (demo.id, list(demo.arms())) == ("demo", ["vit_nano", "lsra_nano", "eit_nano"])


BASE = ("data=digits", "model=vit_nano,eit_nano", "seed=0,1")


@pytest.mark.parametrize(
    "same",
    [
        ("data=digits", "model=vit_nano,lsra_nano", "seed=range(5)"),
        ("model=vit_nano,eit_nano", "seed=7", "data=digits"),
        (*BASE, "trainer.devices=1", "run.root=elsewhere", "logger=none", "hydra/launcher=process"),
        (*BASE, "arms=vit_nano", "budget.disk_gb=1", "guard.speed_s=0", "yes=true", "factor=model.ib"),
    ],
)
def test_more_seeds_more_arms_and_another_place_are_the_same_sweep(same: tuple[str, ...]) -> None:
    assert id_of(*same) == id_of(*BASE)


@pytest.mark.parametrize(
    "other",
    [
        (*BASE, "recipe.epochs=1"),
        (*BASE, "recipe.epochs=1,2"),
        (*BASE, "match=params", "reference=vit_nano"),
        ("data=synthetic", *BASE[1:]),
    ],
)
def test_another_configuration_or_another_axis_is_another_sweep(other: tuple[str, ...]) -> None:
    first, second = id_of(*BASE), id_of(*other)
    assert first != second
    assert len(first) == len(second) == 10


def test_a_sweep_can_be_named_and_a_changed_experiment_is_not_the_declared_one() -> None:
    named = sweep_of("data=digits", "seed=0,1", "run.sweep=mine")
    assert (named.id, named.points[0].config.run.sweep) == ("mine", "mine")
    one = (DEMO, "arms=eit")
    assert id_of(*one, "seed=5", "trainer.devices=1") == "000-digits-demo"
    tried = sweep_of(*one, "recipe.epochs=1")
    assert tried.id.startswith("000-digits-demo-")
    assert tried.id == id_of(*one, "recipe.epochs=1", "seed=9")
    assert tried.id != id_of(*one, "recipe.epochs=2")
    assert tried.declaration.name == "000-digits-demo"


# ------------------------------------------------------------------------------------------------------- many points


@pytest.mark.parametrize(
    "axes",
    [
        ("seed=3,4", "recipe=eit300", "recipe.batch_size=64,128"),  # the learning rate follows the batch
        ("model.size.name=tiny,base", "recipe=eit300", "data.img_size=8,16"),  # batch and stem follow from these
        ("data.mean=[0.3],[0.5]", "recipe.ema_decay=null,0.9", "seed=1"),
        ("data.split_seed=${seed},3", "seed=1,2"),
        ("recipe.lr=1e-3,${recipe.min_lr}", "recipe.min_lr=1e-6,1e-5", "seed=0,5"),
        ("model.stem.pool=null,3", "model/ib=eit,none"),
    ],
)
def test_a_point_is_the_config_of_its_single_run_whatever_follows_from_its_values(axes: tuple[str, ...]) -> None:
    points, _ = compose_points(["data=digits", *axes])
    fixed = [text for text in axes if "," not in text.replace("],[", ",")]
    assert len(points) >= 2
    for point in (points[0], points[len(points) // 2], points[-1]):
        assert compose_one(["data=digits", *fixed, *point.overrides]) == point.config


def test_thousands_of_points_cost_less_than_a_millisecond_each() -> None:
    began = time.process_time()
    sweep = sweep_of("data=digits", "model=vit_nano,eit_nano", "seed=range(2000)")
    assert len(sweep.points) == 4000
    assert len({point.key for point in sweep.points}) == 4000
    assert time.process_time() - began < 4.0  # 0.8 s; 40 s when each point was composed anew
