"""The published recipe: its numbers, its batch on any number of devices, averaged weights, layer decay, its curve."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest
import torch

from conftest import TINY, TINY_MODEL, only_run
from eit_lab import published
from eit_lab.compose import compose_one
from eit_lab.config import ConfigError, RecipeConfig, micro_batches
from eit_lab.data.catalog import describe
from eit_lab.learning_rate import learning_rate
from eit_lab.plan import plan


@pytest.mark.parametrize(
    ("size", "batch", "lr", "steps"), [("mini", 1024, 2e-3, 1251), ("tiny", 1024, 2e-3, 1251), ("base", 512, 1e-3, 2502),
                                       ("large", 512, 1e-3, 2502)]
)  # fmt: skip
def test_eit300_is_the_published_recipe(size: str, batch: int, lr: float, steps: int) -> None:
    config = compose_one([f"model=eit_{size}", "data=imagenet", "recipe=eit300"])
    r = config.recipe
    assert (r.epochs, r.batch_size, r.lr, r.warmup_epochs, r.warmup_lr, r.min_lr) == (300, batch, lr, 5, 1e-6, 1e-5)
    assert (r.weight_decay, r.eps, r.label_smoothing) == (0.05, 1e-8, 0.1)
    assert (r.rand_augment, r.random_erasing_prob, r.mixup_alpha, r.cutmix_alpha) == (
        "rand-m9-mstd0.5-inc1",
        0.25,
        0.8,
        1.0,
    )
    assert (r.mixup_prob, r.mixup_switch_prob, r.repeated_augment, r.ema_decay) == (1.0, 0.5, 3, 0.99996)
    assert (config.trainer.gradient_clip_val, config.model.drop_path_rate, config.model.pos_embed) == (
        None,
        0.0,
        "none",
    )
    assert r.reference == size
    assert 1_281_167 // r.batch_size == steps
    assert published.GLOBAL_BATCH[size] == batch


def test_the_published_curves_are_whole_and_their_best_are_the_published_numbers() -> None:
    best = {"mini": (0.70026, 296), "tiny": (0.78118, 296), "base": (0.80620, 299), "large": (0.81816, 298)}
    for name, (acc1, epoch) in best.items():
        curve = published.curve(name)
        assert [row.epoch for row in curve] == list(range(300))
        top = max(curve, key=lambda row: row.test_acc1)
        assert (top.test_acc1, top.epoch) == (pytest.approx(acc1, abs=1e-9), epoch)


def test_the_device_batch_follows_from_the_global_one() -> None:
    base = ["model=eit_base", "data=imagenet"]
    for words, world_size, expected in (
        ([], 8, (64, 1)),
        ([], 1, (512, 1)),
        (["trainer.micro_batch_size=128"], 1, (128, 4)),
        (["trainer.micro_batch_size=100"], 2, (64, 4)),
        (["trainer.accumulate_grad_batches=2"], 8, (32, 2)),
        (["model=eit_mini"], 8, (128, 1)),
    ):
        assert micro_batches(compose_one([*base, *words]), world_size=world_size) == expected
    with pytest.raises(
        ConfigError, match=r"must divide the global recipe.batch_size \(512, in pairs\), got 6; nearest: 4 and 8"
    ):
        compose_one([*base, "trainer.devices=6"])
    with pytest.raises(ConfigError, match=r"trainer.accumulate_grad_batches must divide .* got 3; nearest: 2 and 4"):
        compose_one([*base, "trainer.accumulate_grad_batches=3"])
    with pytest.raises(ConfigError, match=r"recipe\.mixup_group must be even"):
        compose_one([*base, "recipe.mixup_group=5"])


def test_deit300_adds_stochastic_depth_and_finetune_decays_by_layer() -> None:
    deit = compose_one(["model=vit_s16", "recipe=deit300"])
    assert (deit.recipe.name, deit.model.drop_path_rate, deit.recipe.lr) == ("deit300", 0.1, 1e-3)
    assert compose_one(["model=vit_s16", "recipe=finetune", "data=cifar100"]).recipe.layer_decay == 0.75


def test_a_small_data_set_takes_the_small_recipe_unless_told_otherwise() -> None:
    assert compose_one(["data=cifar10"]).recipe.name == "small"
    assert compose_one(["data=cifar10", "recipe=eit300"]).recipe.name == "eit300"
    assert compose_one([]).recipe.name == "eit300"


def test_the_learning_rate_of_a_run_is_the_schedules(here: Path) -> None:
    from eit_lab.train import main

    for words in ((), ("recipe.published_lr=true",)):
        root = f"run{len(words)}"
        overrides = [
            *TINY,
            *words,
            "recipe.epochs=4",
            "recipe.warmup_epochs=1.5",
            "trainer.log_every_n_steps=1",
            f"run.root={root}",
        ]
        assert main(overrides) == 0
        config = compose_one(overrides)
        cut = plan(config, describe(config.data))
        with (only_run(here / root) / "metrics.csv").open(newline="") as handle:
            rows = [row for row in csv.DictReader(handle) if row["optim/lr"]]
        assert len(rows) == cut.total_steps == 12
        for row in rows:
            step = int(row["step"]) - 1
            rate = learning_rate(step, config.recipe, steps_per_epoch=cut.steps_per_epoch, total_steps=cut.total_steps)
            assert float(row["optim/lr"]) == pytest.approx(rate, rel=1e-12)
            assert int(row["images"]) == (step + 1) * 16


def test_layer_decay_falls_from_the_head_down() -> None:
    from eit_lab.models.create import create_model
    from eit_lab.training.optim import build_optimizer

    model = create_model("eit_mini", num_classes=10)
    recipe = RecipeConfig(lr=1.0, layer_decay=0.5)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {
        names[id(p)]: group["lr"] for group in build_optimizer(model, recipe).param_groups for p in group["params"]
    }
    assert rates.keys() == dict(model.named_parameters()).keys()
    assert rates["head.weight"] == rates["norm.bias"] == 1.0
    assert [rates[f"blocks.{layer}.mlp.fc1.weight"] for layer in range(5)] == [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5]
    assert rates["stem.conv.weight"] == rates["cls_token"] == 0.5**6


@pytest.mark.slow
def test_averaged_weights_are_the_running_average_of_every_steps_weights(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab.train import main
    from eit_lab.training.ema import WeightAverage

    expected: dict[str, torch.Tensor] = {}
    real = WeightAverage.update

    def watch(self: WeightAverage, model: torch.nn.Module) -> None:
        """The slow reference: one multiplication and one addition a weight, in float64."""
        if not expected:
            expected.update({name: p.double().clone() for name, p in self.model.state_dict().items()})
        for name, weight in model.state_dict().items():
            expected[name] = self.decay * expected[name] + (1 - self.decay) * weight.double()
        real(self, model)

    monkeypatch.setattr(WeightAverage, "update", watch)
    assert main([*TINY, "recipe=debug", "recipe.epochs=3"]) == 0
    folder = only_run(here / "runs")
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["ema"]["updates"] == state["eit_lab"]["step"] == 9
    for name, average in state["ema"]["state_dict"].items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-7)
        assert not torch.equal(average, state["state_dict"][f"model.{name}"])
    result = json.loads((folder / "record.json").read_text())["result"]
    assert {"test/acc1", "test/acc1_ema", "test/loss", "test/loss_ema"} <= result.keys()
    assert result["test/loss"] != result["test/loss_ema"]


@pytest.mark.slow
def test_a_run_says_how_far_it_is_from_the_published_epoch(
    here: Path, lookalike: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    words = [
        *TINY_MODEL,
        "recipe=eit300",
        "recipe.reference=mini",
        "recipe.batch_size=8",
        "recipe.epochs=3",
        "data.num_workers=0",
    ]
    assert main([*words, "data=imagenet", f"data.root={lookalike}", "data.img_size=32", "data.val_size=4"]) == 0
    folder = only_run(here / "runs")
    progress = json.loads((folder / "record.json").read_text())["progress"]
    assert progress["published/acc1"] == pytest.approx(0.05294)
    assert progress["published/gap"] == pytest.approx(progress["val/acc1"] - 0.05294)
    out = capsys.readouterr().out
    assert "published 5.29%" in out
    assert "published eit_mini: top-1 70.03% at its best epoch; this run " in out
    assert (folder / "curve.png").stat().st_size > 10_000
    with (folder / "metrics.csv").open(newline="") as handle:
        gaps = [row["published/gap"] for row in csv.DictReader(handle)]
    assert sum(map(bool, gaps)) == 3


def test_the_mean_of_an_evaluation_does_not_depend_on_order_batches_or_processes() -> None:
    from eit_lab.training.metrics import ExactMean

    values = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 8
    means = set()
    for seed in range(5):
        order = list(range(1000))
        random.Random(seed).shuffle(order)
        ranks = [ExactMean(), ExactMean()]
        for place in range(0, 1000, 7 + seed):
            ranks[place % 2].update(values[order[place : place + 7 + seed]])
        whole = ExactMean()
        for name in ("total", "broken", "count"):
            setattr(whole, name, getattr(ranks[0], name) + getattr(ranks[1], name))
        whole._update_count = 1
        means.add(float(whole.compute()))
    assert len(means) == 1
    assert means.pop() == pytest.approx(float(values.double().mean()), rel=2e-7)
    broken = ExactMean()
    broken.update(torch.tensor([1.0, float("nan")]))
    assert broken.compute() == float("inf")


@pytest.mark.slow
def test_keys_are_clean_under_compile(here: Path) -> None:
    from eit_lab.train import main

    words = [*TINY, "recipe=debug", "recipe.epochs=1"]
    assert main([*words, "run.root=plain"]) == 0
    assert main([*words, "trainer.compile=true", "run.root=compiled"]) == 0
    plain, compiled = (
        torch.load(only_run(here / root) / "checkpoints" / "last.ckpt", weights_only=True)
        for root in ("plain", "compiled")
    )
    assert plain["state_dict"].keys() == compiled["state_dict"].keys()
    assert plain["ema"]["state_dict"].keys() == compiled["ema"]["state_dict"].keys()
