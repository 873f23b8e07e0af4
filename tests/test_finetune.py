"""Fine-tuning: a checkpoint brings its model and image size along; what was chosen stays; what cannot be is one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from conftest import TINY_MODEL
from eit_lab.compose import compose_one, compose_points
from eit_lab.config import Config, ConfigError
from eit_lab.finetune import checkpoint_file, checkpoint_hash
from eit_lab.loading import dump

Runs = Callable[..., Path]


@pytest.fixture
def run_of(tmp_path: Path) -> Runs:
    """A run folder as training leaves one, untrained: config.yaml and checkpoints/{best,last}.ckpt."""

    def make(*args: str, name: str = "run", num_classes: int = 10) -> Path:
        from eit_lab.models.backbone import Backbone

        config = compose_one([*TINY_MODEL, *args])
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(dump(config)))
        data = config.data
        model = Backbone(config.model, num_classes=num_classes, img_size=data.img_size, in_chans=data.in_chans)
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        for checkpoint in ("best", "last"):
            torch.save(
                {"state_dict": state, "eit_lab": {"which": checkpoint}}, folder / "checkpoints" / f"{checkpoint}.ckpt"
            )
        return folder

    return make


def finetuned(run: Path | str, *args: str) -> Config:
    return compose_one([f"checkpoint={run}", "recipe=finetune", "logger=none", *args])


def test_a_checkpoint_brings_its_model_with_the_stems_numbers_and_its_image_size(run_of: Runs) -> None:
    run = run_of("data=synthetic", "data.img_size=32", "model.ib.strength=0.5")
    pretrained = compose_one([*TINY_MODEL, "data=synthetic", "data.img_size=32", "model.ib.strength=0.5"])
    for name in (run, run / "checkpoints" / "last.ckpt"):
        config = finetuned(name, "data=cifar100")
        assert config.model == pretrained.model
        assert config.data.img_size == 32
        assert config.data.num_classes == 100
    larger = finetuned(run, "data=cifar100", "data.img_size=96")
    assert larger.data.img_size == 96
    assert larger.model == pretrained.model  # the stem of 32 px, not the one that 96 px would have
    small = run_of("data=synthetic", "data.img_size=[24,32]", name="oblong")
    assert finetuned(small, "data=cifar10").data.img_size == (24, 32)


def test_what_was_chosen_stays(run_of: Runs) -> None:
    run = run_of("data=synthetic")
    chosen = compose_one(["model=vit_nano", "data=cifar10"]).model
    assert finetuned(run, "data=cifar10", "model=vit_nano").model == chosen
    assert finetuned(run, "data=cifar10", "model/size=mini").model.size.name == "mini"
    dropping = finetuned(run, "data=cifar10", "model.drop_path_rate=0.1").model
    assert (dropping.drop_path_rate, dropping.size.embed_dim) == (0.1, 16)
    assert compose_one(["data=cifar10"]).model.size.name == "base"  # and without a checkpoint nothing changes


def test_what_follows_from_the_model_follows_from_the_checkpoints(run_of: Runs) -> None:
    run = run_of("data=synthetic", "model/size=mini", "model.size.embed_dim=20", "model.size.num_heads=10")
    config = compose_one([f"checkpoint={run}", "recipe=eit300", "data=imagenet"])
    assert config.recipe.batch_size == 1024  # mini's; the default model's is 512


def test_grey_images_are_repeated_to_the_checkpoints_channels_and_colours_are_refused(run_of: Runs) -> None:
    run = run_of("data=synthetic")
    config = finetuned(run, "data=digits")
    assert (config.data.in_chans, config.data.mean, config.data.std) == (3, (0.3053,) * 3, (0.3759,) * 3)
    grey = run_of("data=digits", name="grey")
    assert finetuned(grey, "data=fashion_mnist").data.in_chans == 1
    with pytest.raises(ConfigError, match=r"data\.in_chans must be 1 for this checkpoint .*, got 3 \(data=cifar10\)"):
        finetuned(grey, "data=cifar10")


def test_every_point_of_a_sweep_follows(run_of: Runs) -> None:
    run = run_of("data=synthetic")
    points, _ = compose_points(
        [
            f"checkpoint={run}",
            "data=synthetic",
            "recipe=finetune",
            "logger=none",
            "model.drop_path_rate=0,0.1",
            "seed=0,1",
        ]
    )
    assert [(p.config.model.drop_path_rate, p.config.seed) for p in points] == [(0, 0), (0, 1), (0.1, 0), (0.1, 1)]
    assert {p.config.model.size.embed_dim for p in points} == {16}


def test_a_sweep_over_data_is_checked_at_its_points_only(run_of: Runs) -> None:
    grey = run_of("data=digits")  # which the default data set, of three channels, would not fit
    points, _ = compose_points([f"checkpoint={grey}", "data=digits,fashion_mnist", "recipe=finetune", "logger=none"])
    assert [p.config.data.in_chans for p in points] == [1, 1]
    with pytest.raises(ConfigError, match=r"data\.in_chans must be 1 .*\[at .*data=cifar10"):
        compose_points([f"checkpoint={grey}", "data=digits,cifar10", "recipe=finetune", "logger=none"])


@pytest.mark.parametrize("name", ["nothing", "nothing.ckpt", "empty"])
def test_a_checkpoint_that_does_not_exist_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    (tmp_path / "empty").mkdir()
    assert main([f"checkpoint={tmp_path / name}", "data=digits", "recipe=finetune"]) == 2
    err = capsys.readouterr().err
    assert "checkpoint must be a run folder" in err
    assert err.count("\n") == 1


def test_a_run_without_weights_and_a_damaged_config_are_one_line(run_of: Runs) -> None:
    run = run_of("data=synthetic")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match=r"has no best\.ckpt in checkpoints/; has it trained for an epoch\?"):
        finetuned(run, "data=digits")
    (run / "config.yaml").write_text("model: [")
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged"):
        finetuned(run, "data=digits")


def test_the_checkpoint_counts_by_its_content_not_its_path(run_of: Runs, tmp_path: Path) -> None:
    run = run_of("data=synthetic")
    config = finetuned(run, "data=digits")
    assert compose_one(["data=digits"]).checkpoint is None
    assert checkpoint_file(compose_one(["data=digits"])) is checkpoint_hash(compose_one(["data=digits"])) is None
    assert checkpoint_file(config) == run / "checkpoints" / f"{compose_one(list(TINY_MODEL)).recipe.select}.ckpt"
    digest = checkpoint_hash(config)
    assert digest is not None
    assert len(digest) == 16
    shutil.copytree(run, tmp_path / "elsewhere")
    assert checkpoint_hash(finetuned(tmp_path / "elsewhere", "data=digits")) == digest
    other = "best" if config.recipe.select == "last" else "last"
    assert checkpoint_hash(finetuned(run / "checkpoints" / f"{other}.ckpt", "data=digits")) != digest


def test_an_oblong_position_embedding_is_resized_from_the_grid_its_run_had(run_of: Runs) -> None:
    from eit_lab.models.backbone import Backbone
    from eit_lab.models.checkpoints import start_from

    run = run_of("data=synthetic", "data.img_size=[16,32]", "model.pos_embed=learned")
    config = finetuned(run, "data=synthetic", "data.img_size=32", "data.num_classes=3")
    model = Backbone(config.model, num_classes=3, img_size=32)
    notes = start_from(model, run)
    h, w = model.grid
    assert notes == [
        f"raw weights of {checkpoint_file(config)} (eit_lab format)",
        "classifier anew: 10 -> 3 classes (head.weight, head.bias)",
        f"position embedding {h // 2}x{w} -> {h}x{w}",
    ]


def test_fine_tuning_trains_on_another_size_and_number_of_classes(
    run_of: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    monkeypatch.chdir(tmp_path)
    run = run_of("data=synthetic", "data.img_size=8", "model.pos_embed=learned")
    args = [
        f"checkpoint={run}", "data=synthetic", "recipe=finetune", "data.num_classes=4", "data.img_size=16",
        "data.num_samples=64", "recipe.batch_size=16", "trainer.max_epochs=1", "logger=none", "trainer.accelerator=cpu",
    ]  # fmt: skip
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "classifier anew: 10 -> 4 classes" in out
    assert "position embedding 4x4 -> 8x8" in out
    (record,) = tmp_path.glob("runs/*/record.json")
    assert json.loads(record.read_text())["result"]["test/acc1"] >= 0
