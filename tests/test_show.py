"""The pictures of a configuration: the published learning rates to the last digits, and images as the network gets them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eit_lab.show
from eit_lab.compose import compose_one
from eit_lab.config import Config, ConfigError
from eit_lab.data.augment import BatchAugment
from eit_lab.data.catalog import describe
from eit_lab.data.module import ImageData
from eit_lab.learning_rate import learning_rate
from eit_lab.plan import plan
from eit_lab.published import curve
from eit_lab.runs import DataFacts
from eit_lab.show import batches_figure, schedule_figure, schedule_lines, show

IMAGENET = DataFacts(num_classes=1000, num_train=1_281_167, num_val=1, num_test=50_000, fingerprint="0")
DIGITS = ("model=eit_nano", "data=digits", "recipe=debug")


def shown(
    config: Config, capsys: pytest.CaptureFixture[str], facts: DataFacts | None = None
) -> tuple[list[str], list[Path]]:
    """The printed numbers, and the two files."""
    assert show(config, facts or describe(config.data)) == 0
    lines = capsys.readouterr().out.splitlines()
    return lines[:-2], [Path(line) for line in lines[-2:]]


@pytest.mark.parametrize(("size", "batch", "steps"), [("mini", 1024, 1251), ("tiny", 1024, 1251), ("base", 512, 2502), ("large", 512, 2502)])  # fmt: skip
def test_published_lr_gives_the_authors_log_in_all_300_epochs(size: str, batch: int, steps: int) -> None:
    recipe = compose_one([f"model=eit_{size}", "recipe=eit300", "recipe.published_lr=true"]).recipe
    assert (recipe.epochs, recipe.batch_size, recipe.reference) == (300, batch, size)
    assert IMAGENET.num_train // batch == steps
    for row in curve(size):
        for step in (0, steps // 2, steps - 1):
            rate = learning_rate(row.epoch * steps + step, recipe, steps_per_epoch=steps, total_steps=300 * steps)
            assert rate == pytest.approx(row.train_lr, abs=1e-12, rel=0)
    assert len(curve(size)) == 300


@pytest.mark.parametrize("published", [False, True])
def test_a_schedule_is_drawn_beside_the_published_one(
    published: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose_one(
        ["debug=schedule", "model=eit_base", f"recipe.published_lr={str(published).lower()}", f"run.root={tmp_path}"]
    )
    lines, files = shown(config, capsys, IMAGENET)
    assert files == [tmp_path / "show" / f"schedule-eit_base-imagenet-eit300.{suffix}" for suffix in ("png", "svg")]
    assert all(file.stat().st_size > 10_000 for file in files)
    assert lines[0].startswith(
        f"learning rate {'as published, one an epoch' if published else 'by step'}: first 1e-06, peak "
    )
    assert lines[1:] == [
        "warm-up: 5 epochs from 1e-06 to 0.001; cosine to 1e-05",
        "2,502 steps of 512 images an epoch; 750,600 steps, 300 epochs in all",
    ]
    whole, close = schedule_figure(config, plan(config, IMAGENET)).axes
    labels = [text.get_text() for text in whole.get_legend().get_texts()]
    this_run = [label.removesuffix(" (this run)") for label in labels if label.endswith(" (this run)")]
    assert this_run == ["as published" if published else "by step"]
    assert labels[2] == "authors' log of EIT-Base"
    dots = close.collections[0].get_offsets()
    assert dots[:, 1].tolist() == [row.train_lr for row in curve("base")[:10]]
    (steps,) = close.patches
    assert np.allclose(steps.get_data().values, dots[:, 1], atol=1e-12, rtol=0)


def test_the_printed_numbers_follow_the_limits_of_the_trainer() -> None:
    config = compose_one([*DIGITS, "trainer.max_steps=30", "trainer.limit_train_batches=20"])
    counts = plan(config, describe(config.data))
    assert schedule_lines(config.recipe, counts) == [
        "learning rate by step: first 1e-06, peak 0.001 at step 10, last 1.60943e-05",
        "warm-up: 0.5 epochs from 1e-06 to 0.001; cosine to 1e-05",
        "20 steps of 16 images an epoch; 30 steps, 1.5 epochs in all",
    ]
    assert len(schedule_figure(config, counts).axes) == 1  # too short for a close-up


def test_a_schedule_needs_no_torch(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys\n"
        "from eit_lab.compose import compose_one\n"
        "from eit_lab.data.catalog import describe\n"
        "from eit_lab.show import show\n"
        f"config = compose_one([{', '.join(map(repr, DIGITS))}, 'debug=schedule', 'run.root={tmp_path}'])\n"
        "show(config, describe(config.data))\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_batches_are_drawn_as_the_network_gets_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose_one([*DIGITS, "debug=batches", f"run.root={tmp_path}", "trainer.accumulate_grad_batches=2"])
    drawn = []
    monkeypatch.setattr(
        eit_lab.show, "batches_figure", lambda rows, config: drawn.append(rows) or batches_figure(rows, config)
    )
    lines, files = shown(config, capsys)
    assert lines == ["32 images, from the first 4 of 80 steps of an epoch; 16 images a step, of 6 samples"]
    assert files == [tmp_path / "show" / f"batches-eit_nano-digits-debug.{suffix}" for suffix in ("png", "svg")]
    assert all(file.stat().st_size > 10_000 for file in files)
    data = ImageData(compose_one(DIGITS))  # whole steps
    data.setup("fit")
    augment = BatchAugment(config.data, config.recipe, num_classes=10, seed=config.seed)
    for (pictures, texts), batch in zip(drawn[0], data.train_dataloader(), strict=False):
        images, targets = augment(batch)
        places = [0, 1, 4, 5, 8, 9, 12, 13]
        expected = (images[places, 0] * config.data.std[0] + config.data.mean[0]).clamp(0, 1)
        np.testing.assert_allclose(pictures, expected.numpy(), atol=1e-6)
        for text, target in zip(texts, targets[places], strict=True):
            label, share = text.split(", ")[0].split(": ")
            assert float(share.rstrip("%")) / 100 * 0.9 + 0.01 == pytest.approx(target[int(label)].item(), abs=0.005)


def test_images_that_are_not_mixed_have_their_class_above_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose_one(
        ["model=eit_nano", "data=synthetic", "data.img_size=[8,16]", "data.num_samples=20", "data.val_size=1",
         "recipe.batch_size=7", "debug=batches", f"run.root={tmp_path}"]
    )  # fmt: skip
    before = torch.get_rng_state()
    lines, files = shown(config, capsys)
    assert torch.equal(torch.get_rng_state(), before)
    assert lines == ["12 images, from the first 2 of 2 steps of an epoch; 7 images a step, of 7 samples"]
    data = ImageData(config)
    data.setup("fit")
    first = next(iter(data.train_dataloader()))
    titles = files[1].read_text()
    assert all(f"<!-- {label} -->" in titles for label in first.labels[:6].tolist())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = compose_one([*DIGITS, "debug=schedule", f"run.root={tmp_path / 'file'}"])
    with pytest.raises(ConfigError, match=r"run.root must be a folder that can be written, got .*file'"):
        show(config, describe(config.data))


@pytest.mark.parametrize("data", ["imagenet", "cifar100"])
def test_the_schedule_of_a_known_data_set_needs_no_files(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    monkeypatch.chdir(tmp_path)
    assert main(["debug=schedule", "model=eit_mini", f"data={data}", "recipe=eit300", "data.val_size=1"]) == 0
    steps = {"imagenet": 1_281_166 // 1024, "cifar100": 49_999 // 1024}[data]
    assert f"{steps:,} steps of 1024 images an epoch" in capsys.readouterr().out
