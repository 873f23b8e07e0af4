"""Looks inside a network while it trains: what is logged where, when, of which images, and that the training is none the wiser."""

from __future__ import annotations

import csv
import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conftest import TINY, Done, only_run, record_of
from eit_lab.compose import compose_one
from eit_lab.config import ConfigError
from eit_lab.dashboard.panels import ANALYSIS
from eit_lab.data.catalog import describe
from eit_lab.loading import dump, load
from eit_lab.models.intermediates import AttentionMaps, Tap
from eit_lab.plan import Looks, plan
from eit_lab.runs import DataFacts, identity
from eit_lab.selftest import compare
from eit_lab.selftest import main as selftest
from eit_lab.training.inside import scalars

Command = Callable[..., Done]
NAMES = [name for figures in ANALYSIS.values() for name in figures]
EVERY = ("analysis.every_n_epochs=1", "analysis.num_images=8")


def train(*args: str) -> int:
    from eit_lab.train import main

    return main([*TINY, *args])


def history_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "analysis" / "history.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as handle:
        return [{name: text for name, text in row.items() if text} for row in csv.DictReader(handle)]


# ------------------------------------------------------------------------------------------------------ how many, and when

DIGITS = DataFacts(num_classes=10, num_train=1294, num_val=144, num_test=359, fingerprint="")
IMAGENET = DataFacts(num_classes=1000, num_train=1_268_355, num_val=12_812, num_test=50_000, fingerprint="")


@pytest.mark.parametrize(
    ("facts", "words", "looks"),
    [
        (IMAGENET, ["data=imagenet"], Looks(every=10, num_images=512)),
        # 100 epochs of 10 steps of 128 in 10 looks: 0.01 * 3 * 128,000 / (1.6 * 10) = 240, of which there are 144.
        (DIGITS, ["data=digits"], Looks(every=10, num_images=144)),
        # 0.01 * 3 * 12,800 / 1.6
        (DIGITS, ["data=digits", "recipe.epochs=10", "analysis.every_n_epochs=7"], Looks(every=7, num_images=120)),
        (DIGITS, ["data=digits", "recipe.epochs=10", "analysis.every_n_epochs=1"], Looks(every=1, num_images=24)),
        (DIGITS, ["data=digits", "trainer.max_steps=1"], Looks(every=10, num_images=2)),
        (DIGITS, ["data=digits", "analysis.num_images=9"], Looks(every=10, num_images=9)),
        (DIGITS, ["data=digits", "analysis.every_n_epochs=0"], None),
        (DIGITS, ["data=digits", "trainer.strategy=fsdp"], None),
    ],
)
def test_the_default_is_512_images_every_10_epochs_or_what_costs_one_percent(
    facts: DataFacts, words: list[str], looks: Looks | None
) -> None:
    config = compose_one(["model=eit_nano", "logger=none", *words])
    assert plan(config, facts).looks == looks
    if config.recipe.batch_size % 4 == 0:
        assert plan(config, facts, world_size=4).looks == looks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["analysis.every_n_epochs=-1"],
            "analysis.every_n_epochs must be greater than or equal to 0, got -1; nearest: 0",
        ),
        (["analysis.num_images=0"], "analysis.num_images must be greater than or equal to 1, got 0; nearest: 1"),
        (["analysis.every=1"], "analysis.every is not a key, got 1; nearest: analysis.every_n_epochs"),
        (
            ["analysis.every_n_epochs=5", "trainer.strategy=fsdp"],
            "analysis.every_n_epochs must be 0 or null with trainer.strategy=fsdp, where no process has all weights, got 5; "
            "nearest: 0",
        ),
        (
            ["analysis.num_images=9"],
            "analysis.num_images must be at most the 8 images that are held out of train, got 9; nearest: 8",
        ),
    ],
)
def test_a_bad_value_is_one_line(
    words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*words) == 2
    assert capsys.readouterr().err == f"eit_lab: {message}\n"


def test_whether_a_run_is_looked_at_is_not_part_of_what_it_is() -> None:
    config = compose_one(list(TINY))
    facts = describe(config.data)
    assert identity(compose_one([*TINY, *EVERY]), facts) == identity(config, facts)
    before = {key: value for key, value in dump(config).items() if key != "analysis"}
    assert load(before) == config, "a config frozen before there was such a thing is read as the default"


def test_arms_may_be_looked_at_differently() -> None:
    from eit_lab.compose import parse_flags
    from eit_lab.sweep.arms import read_sweep
    from eit_lab.sweep.fairness import compare_arms

    words = ("data=digits", "model=vit_nano,eit_nano", "logger=none")
    sweep = read_sweep(parse_flags(["-m", *words, "analysis.num_images=${model.size.depth}", "model.size.depth=3,4"]))
    assert {point.config.analysis.num_images for point in sweep.points} == {3, 4}
    compare_arms(sweep, [describe(point.config.data) for point in sweep.points])
    unequal = read_sweep(parse_flags(["-m", *words, "recipe.epochs=${model.size.depth}", "model.size.depth=3,4"]))
    with pytest.raises(ConfigError, match=r"recipe\.epochs"):
        compare_arms(unequal, [describe(point.config.data) for point in unequal.points])


# ----------------------------------------------------------------------------------------------------------- what is logged


def test_every_run_carries_the_figures_of_its_last_epoch(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    folder = only_run(here / "runs")
    (look,) = history_of(folder)
    record = record_of(folder)
    assert (look["epoch"], look["step"]) == (1, record["steps"]) == (1, 6)
    assert look["data"] == {
        "name": "synthetic", "part": "val", "images": 1, "img_size": [8, 8], "num_classes": 10, "acc1": look["data"]["acc1"],
    }  # fmt: skip
    assert {key: look[key] for key in ("schema", "model", "arm", "seed", "weights", "layers", "heads_per_layer")} == {
        "schema": 1, "model": "eit_nano", "arm": "eit_nano", "seed": 0, "weights": "raw", "layers": 2, "heads_per_layer": 4,
    }  # fmt: skip
    assert look["identity"] == record["identity"]

    analysis = record["analysis"]
    assert {**analysis, "seconds": 0, "share_of_training": 0} == {**look, "seconds": 0, "share_of_training": 0}
    assert analysis["seconds"] == look["seconds"] > 0
    assert analysis["share_of_training"] == pytest.approx(analysis["seconds"] / (3600 * record["hours"]))
    said = re.findall(r"^analysis: .*$", capsys.readouterr().out, re.MULTILINE)
    assert said == [
        f"analysis: 1 image every 10 epochs, {analysis['seconds']:.1f} s, "
        f"{100 * analysis['share_of_training']:.1f}% of training; analysis/history.jsonl"
    ]

    first, last = rows_of(folder)
    assert not [name for name in first if name.startswith("analysis/")]
    assert (last["step"], last["epoch"], last["images"]) == ("6", "1", "96")
    assert float(last["perf/analysis_seconds"]) == pytest.approx(analysis["seconds"])
    logged = {name.removeprefix("analysis/"): float(x) for name, x in last.items() if name.startswith("analysis/")}
    assert set(logged) == {*NAMES, *(f"{name}/{layer:02d}" for name in NAMES for layer in range(2))}
    assert {name: logged[name] for name in NAMES} == look["means"]
    for name in NAMES:
        assert (logged[f"{name}/00"] + logged[f"{name}/01"]) / 2 == pytest.approx(logged[name]), name
    assert logged["hfd_share/01"] == look["frequency"]["hfd_share"][2][look["points"].index("blocks.1.mlp")]
    assert logged["cls_mass/00"] == pytest.approx(sum(look["heads"]["cls_mass"][0]) / 4)


class Plain(Tap):
    """Share of high frequencies of every point and mass on CLS of every layer, written out."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.cls: list[float] = []

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        energy = torch.fft.fft2(x[:, 1:].unflatten(1, grid), dim=(1, 2)).abs().square().sum(dim=-1).double()
        fu, fv = (torch.fft.fftfreq(n, dtype=torch.float64) for n in grid)
        high = 2 * (fu[:, None] ** 2 + fv**2).sqrt() > 0.5 + 1e-9
        self.shares.append(float((energy[:, high].sum(dim=-1) / energy.flatten(1).sum(dim=-1)).mean()))
        return x

    def attention(self, layer: int, maps: AttentionMaps) -> None:
        weights = (maps.q @ maps.k.mT / maps.head_dim**0.5).softmax(dim=-1)
        self.cls.append(float(weights[..., 1:, 0].mean()))


@pytest.mark.slow
def test_what_is_looked_at_are_the_raw_weights_on_the_same_held_out_images_whatever_the_seed(here: Path) -> None:
    from eit_lab.data.small import load_small
    from eit_lab.models.build import build_model

    words = ("analysis.num_images=5", "trainer.eval_batch_size=2", "model.drop_path_rate=0.2", "data.num_samples=128")
    for seed in (0, 1):
        root = f"seed{seed}"
        assert train(*words, f"run.root={root}", f"seed={seed}", "recipe.ema_decay=0.5", "recipe.epochs=1") == 0
        config = compose_one([*TINY, *words])
        held_out = load_small(config.data, config.recipe, seed=0)["val"]
        chosen = np.random.default_rng(0).permutation(len(held_out))[:5]
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (config.data.mean, config.data.std))
        images = (held_out.images[chosen].float() / 255 - mean) / std
        model = build_model(config.model, num_classes=10, img_size=8, in_chans=config.data.in_chans).eval()
        state = torch.load(only_run(here / root) / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
        tap = Plain()
        with torch.no_grad():
            logits = model.forward(images, tap=tap)
        (look,) = history_of(only_run(here / root))
        assert look["frequency"]["hfd_share"][2] == pytest.approx(tap.shares, rel=1e-4)
        assert [sum(layer) / 4 for layer in look["heads"]["cls_mass"]] == pytest.approx(tap.cls, rel=1e-4)
        hits = int((logits.argmax(dim=-1) == held_out.labels[chosen]).sum())
        assert look["data"]["acc1"] == pytest.approx(hits / 5)


TIMM = ("model=timm", "model.timm_name=test_resnet", "data.img_size=32", "recipe.epochs=1")


def test_a_baseline_without_attention_has_the_figures_of_its_features_and_a_line_says_so(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in TINY if not word.startswith(("model", "data.img_size"))]
    from eit_lab.train import main

    assert main([*words, *TIMM]) == 0
    assert " inside  no figures of heads: ResNet hands out features, not attention maps" in capsys.readouterr().out
    folder = only_run(here / "runs")
    (look,) = history_of(folder)
    assert look["heads"] is None
    assert {name for name, value in look["means"].items() if value is not None} == set(ANALYSIS["Frequency"])
    logged = {name for name in rows_of(folder)[-1] if name.startswith("analysis/")}
    layers = range(len(look["points"]))
    assert logged == {
        f"analysis/{name}{layer}" for name in ANALYSIS["Frequency"] for layer in ("", *(f"/{n:02d}" for n in layers))
    } - {"analysis/log_amplitude/03", "analysis/log_amplitude/04"}  # of 2x2 and of 1x1 positions


def test_a_model_that_shows_nothing_trains_unseen_and_a_line_says_so(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab.models import timm_intermediates
    from eit_lab.train import main

    closed = timm_intermediates.Support(False, False, "it hands out nothing")
    monkeypatch.setattr(timm_intermediates, "supports", lambda _: closed)
    words = [word for word in TINY if not word.startswith(("model", "data.img_size"))]
    assert main([*words, *TIMM]) == 0
    assert " inside  not analysed while it trains: it hands out nothing\n" in capsys.readouterr().out
    assert record_of(only_run(here / "runs"))["analysis"] is None


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_every_precision_of_training_can_be_looked_at(precision: str, here: Path) -> None:
    assert train("recipe.epochs=1", f"trainer.precision={precision}", *EVERY) == 0
    (look,) = history_of(only_run(here / "runs"))
    assert look["precision"] == precision
    # Weights drawn anew see evenly; with half the digits as well as with all of them.
    assert look["means"]["attention_entropy"] == pytest.approx(1, abs=1e-3)
    assert look["means"]["cls_mass"] == pytest.approx(1 / 17, rel=1e-2)
    assert 0.1 < look["means"]["hfd_share"] < 0.9


def test_a_grid_without_a_frequency_on_its_diagonal_logs_no_amplitude(here: Path) -> None:
    assert train(*EVERY, "recipe.epochs=1", "data.img_size=4", "trainer.progress_bar=false", "data.num_samples=64") == 0
    (look,) = history_of(only_run(here / "runs"))
    assert look["grid"] == [2, 2]
    names = {name.split("/")[1] for name in scalars(look)}
    assert "hfd_share" in names
    assert "log_amplitude" not in names


def test_nothing_is_looked_at_with_0(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("analysis.every_n_epochs=0") == 0
    folder = only_run(here / "runs")
    assert record_of(folder)["analysis"] is None
    assert not (folder / "analysis").exists()
    assert not [name for row in rows_of(folder) for name in row if "analysis" in name]
    assert "analysis" not in capsys.readouterr().out


def test_a_run_that_ends_inside_an_epoch_is_looked_at_too(here: Path) -> None:
    assert train("trainer.max_steps=4", "analysis.every_n_epochs=1") == 0
    assert [(look["epoch"], look["step"]) for look in history_of(only_run(here / "runs"))] == [(0, 3), (1, 4)]


@pytest.mark.slow
def test_epochs_between_validations_are_looked_at_too_and_the_clock_of_the_training_stands_still(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab.analysis.profile import Profile

    result = Profile.result

    def slowly(self: Profile) -> dict[str, Any]:
        time.sleep(0.3)
        return result(self)

    monkeypatch.setattr(Profile, "result", slowly)
    assert train("recipe.epochs=4", "trainer.check_val_every_n_epoch=4", *EVERY) == 0
    folder = only_run(here / "runs")
    record = record_of(folder)
    assert [look["step"] for look in history_of(folder)] == [3, 6, 9, 12]
    assert record["analysis"]["seconds"] > 1.2
    assert 3600 * record["hours"] < 1.2
    assert record["analysis"]["share_of_training"] > 1
    assert 96 / record["img_per_s"] < 1.2, "twelve steps less the first ones took less than the four looks"


# -------------------------------------------------------------------------------------------------- the training goes its way


def test_weights_and_losses_are_the_same_to_the_last_bit_with_and_without(here: Path) -> None:
    same = ("model.drop_path_rate=0.2", "recipe=debug", "trainer.record_samples=true", "trainer.log_every_n_steps=1")
    for root, words in (("off", ("analysis.every_n_epochs=0",)), ("on", EVERY)):
        assert train(*same, *words, f"run.root={root}") == 0
    off, on = (only_run(here / root) for root in ("off", "on"))
    assert off.name == on.name
    assert len(history_of(on)) == 2
    losses = [[row["train/loss"] for row in rows_of(folder) if "train/loss" in row] for folder in (off, on)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == record_of(on)["steps"]
    differences = [
        line for line in compare(off, on) if not line.startswith(("metrics.csv", "analysis", "record.json analysis"))
    ]
    assert differences == []
    assert [line for line in compare(off, on) if line.startswith("analysis/history.jsonl")], "which compares it too"


@pytest.mark.slow
@pytest.mark.parametrize("saved", ["a step before the look", "right before the look"])
def test_a_run_that_is_stopped_and_goes_on_has_each_look_once(
    saved: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab.training.checkpoint import Keeper
    from eit_lab.training.module import Classifier

    words = (
        *EVERY,
        "recipe.epochs=4",
        "trainer.record_samples=true",
        "model.drop_path_rate=0.2",
        "trainer.checkpoint_every_n_steps=2",
    )
    assert train(*words, "run.root=alone") == 0
    alone = only_run(here / "alone")
    assert [look["step"] for look in history_of(alone)] == [3, 6, 9, 12]
    end = Keeper.on_train_epoch_end

    def lost(self: Keeper, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 9:  # after the look, before the state is saved
            raise OSError(28, "No space left on device", "last.ckpt")
        end(self, trainer, pl_module)

    if saved == "right before the look":
        step = Classifier.training_step

        def stopped(self: Classifier, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 8:
                signal.raise_signal(signal.SIGTERM)
            return step(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(Classifier, "training_step", stopped)
            assert train(*words, "run.root=killed") == 75
    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "on_train_epoch_end", lost)
        assert train(*words, "run.root=killed") == 1
    killed = only_run(here / "killed")
    first = history_of(killed)
    assert [look["step"] for look in first] == [3, 6, 9]
    with (killed / "analysis" / "history.jsonl").open("a") as handle:
        handle.write('{"step": 9, "cut')
    assert train(*words, "run.root=killed") == 0
    assert [look["step"] for look in history_of(killed)] == [3, 6, 9, 12]
    assert list(compare(alone, killed)) == []
    record = record_of(killed)
    assert record["analysis"]["step"] == 12
    both = sum(look["seconds"] for look in history_of(killed))
    assert record["analysis"]["seconds"] == pytest.approx(both), "of both parts, and of what was done twice once"


def test_a_run_that_goes_on_with_its_test_alone_keeps_its_figures(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eit_lab.training.module import Classifier

    def stop(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "on_test_epoch_start", stop)
        assert train() == 75
    before = record_of(only_run(here / "runs"))["analysis"]
    assert train() == 0
    after = record_of(only_run(here / "runs"))
    assert after["analysis"] == before
    assert after["analysis"]["step"] == after["steps"] == 6


def test_rows_of_metrics_are_put_into_words_once_and_are_right_after_a_step_is_done_again(tmp_path: Path) -> None:
    from eit_lab.training.metrics_file import MetricsFile

    log = MetricsFile(tmp_path / "metrics.csv")

    def now() -> list[str]:
        log.flush()
        return (tmp_path / "metrics.csv").read_text().splitlines()

    assert now() == ["step,epoch"]
    log.log_metrics({"a": 1.0}, step=1)
    assert now() == ["step,epoch,a", "1,,1.0"]
    log.log_metrics({"epoch": 0}, step=1)
    log.log_metrics({"a": 2.0}, step=2)
    assert now() == ["step,epoch,a", "1,0,1.0", "2,,2.0"]
    log.log_metrics({"b": 0.5}, step=2)
    assert now() == ["step,epoch,a,b", "1,0,1.0,", "2,,2.0,0.5"]
    log.log_metrics({"a": 3.0}, step=1)
    assert now() == ["step,epoch,a,b", "1,0,3.0,"]


# ------------------------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
@pytest.mark.parametrize("images", [150, 3])  # three batches, of two processes; one batch, of one of them
def test_two_processes_have_the_figures_of_one(images: int, command: Command, tmp_path: Path) -> None:
    words = ["data.num_samples=512", "data.val_size=160", "recipe.epochs=1", f"analysis.num_images={images}"]
    words += ["recipe.batch_size=32", "recipe.lr=1.0e-30", "recipe.min_lr=0.0"]  # so that the weights are the same
    for root, devices in (("one", 1), ("two", 2)):
        done = command("train", *TINY, *words, f"run.root={root}", f"trainer.devices={devices}")
        assert done.status == 0, done.err
    one, two = (record_of(only_run(tmp_path / root))["analysis"] for root in ("one", "two"))
    assert one["data"]["images"] == two["data"]["images"] == images
    assert two["means"] == pytest.approx(one["means"], rel=1e-12)
    for name in ("hf_dc_ratio", "feature_variance"):
        assert two["frequency"][name] == pytest.approx(one["frequency"][name], rel=1e-12)
    assert two["data"]["acc1"] == one["data"]["acc1"]
    assert len(history_of(only_run(tmp_path / "two"))) == 1


@pytest.mark.slow
def test_killed_runs_have_the_same_history(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("kills=3", "processes=2", "signals=KILL,TERM", "analysis.every_n_epochs=1", "analysis.num_images=16")
    assert selftest(["resume", *words, "keep=kept"]) == 0, capsys.readouterr().out
    for root in ("alone", "killed"):
        assert [look["epoch"] for look in history_of(only_run(here / "kept" / root))] == [0, 1, 2]


@pytest.mark.slow
def test_the_default_costs_less_than_two_percent_of_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eit_lab.train import main

    monkeypatch.setattr(time, "perf_counter", time.process_time)  # whatever else this machine does
    assert main(["data=digits", "model=eit_nano", "recipe.epochs=20", "logger=none", "trainer.accelerator=cpu"]) == 0
    analysis = record_of(only_run(here / "runs"))["analysis"]
    assert len(history_of(only_run(here / "runs"))) == 2
    print(f"{analysis['seconds']:.3f} s, {100 * analysis['share_of_training']:.2f}% of training")
    assert analysis["share_of_training"] < 0.02, analysis["seconds"]
