"""Accuracy under filters: known answers, the slow way of filtering, and one figure for any batches and ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eit_lab import create_model
from eit_lab.analysis.filters import FilteredAccuracy, FilterSettings, filter_batch, filter_settings
from eit_lab.analysis.frequency import band_noise, radius
from eit_lab.compose import compose_model
from eit_lab.config import ConfigError
from eit_lab.models.backbone import Backbone
from eit_lab.models.intermediates import Tap


@pytest.fixture(scope="module")
def model() -> Backbone:
    config = compose_model("eit_nano")
    size = dataclasses.replace(config.size, embed_dim=24, depth=3, num_heads=4)
    torch.manual_seed(0)
    model = Backbone(dataclasses.replace(config, size=size), num_classes=7, img_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        model.eval().head.bias -= model(IMAGES).mean(dim=0)  # so that answers differ from image to image
    return model


IMAGES = torch.randn(14, 3, 16, 16, generator=torch.Generator().manual_seed(1))
INDEX = torch.arange(14) * 3
SETTINGS = FilterSettings(
    cutoffs=(0.3, 0.6, 1.0, 1.42), centres=(0.5, 1.0), noise_std=1.0, layers=("stem", "blocks.0.mlp", "blocks.1.mlp")
)


def labels_of(model: nn.Module) -> Tensor:
    """What the model answers, but for two images."""
    with torch.no_grad():
        labels = model(IMAGES).argmax(dim=1)
    labels[:2] = (labels[:2] + 1) % 7
    return labels


def run(
    model: Any, settings: FilterSettings, images: Tensor, labels: Tensor, *, batch: int, num_ranks: int = 1
) -> dict[str, Any]:
    ranks = [FilteredAccuracy(settings) for _ in range(num_ranks)]
    index = INDEX[: len(images)]
    for number, rows in enumerate(torch.arange(len(images)).split(batch)):
        metric = ranks[number % num_ranks]
        filter_batch(model, images[rows], labels[rows], settings=settings, metric=metric, index=index[rows])
    for other in ranks[1:]:
        ranks[0].merge_state(other)
    return ranks[0].result()


class Change(Tap):
    """Goes on with other patch tokens after one layer."""

    def __init__(self, layer: str, change: Any) -> None:
        self.layer, self.change = layer, change

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if name != self.layer:
            return x
        maps = self.change(x[:, 1:].transpose(1, 2).unflatten(2, grid))
        return torch.cat([x[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)


def slow_filter(maps: Tensor, kind: str, value: float, index: int, settings: FilterSettings) -> Tensor:
    """One image's maps (1, C, h, w) under one condition."""
    h, w = maps.shape[-2:]
    r = 2 * np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None])
    low = torch.from_numpy(np.fft.ifft2(np.fft.fft2(maps.double().numpy()) * (r <= value)).real)
    if kind == "low":
        return low.float()
    if kind == "high":
        return (maps.double() - low).float()
    scale = settings.noise_std * float(np.sqrt(maps[0].numpy().var(axis=(1, 2)).mean()))
    generator = torch.Generator().manual_seed(index)
    return maps + band_noise(maps.shape[1:], value, settings.band_width, scale, generator, "cpu")


def test_every_condition_equals_the_pass_that_is_filtered_the_slow_way(model: Backbone) -> None:
    labels = labels_of(model)
    found = run(model, SETTINGS, IMAGES, labels, batch=14)
    assert found["images"] == 14
    assert found["acc1"] == pytest.approx(12 / 14)
    values = {"low": SETTINGS.cutoffs, "high": SETTINGS.cutoffs, "band": SETTINGS.centres}
    different = set()
    for place in ("input", *SETTINGS.layers):
        for kind, at in values.items():
            for number, value in enumerate(at):

                def change(maps: Tensor, kind: str = kind, value: float = value) -> Tensor:
                    each = zip(maps.split(1), INDEX.tolist(), strict=True)
                    return torch.cat([slow_filter(one, kind, value, index, SETTINGS) for one, index in each])

                with torch.no_grad():
                    logits = model(change(IMAGES)) if place == "input" else model(IMAGES, tap=Change(place, change))
                hits = int((logits.argmax(dim=1) == labels).sum())
                part = found["input"] if place == "input" else found["tokens"][place]
                assert part[kind][number] == pytest.approx(hits / 14), (place, kind, value)
                different.add((place, kind, hits))
    assert len(different) > 18, "the filters do something to this model"


def test_a_low_pass_of_everything_is_exactly_no_filter(model: Backbone) -> None:
    found = run(model, SETTINGS, IMAGES, labels_of(model), batch=5)
    for part in (found["input"], *found["tokens"].values()):
        assert part["low"][3] == found["acc1"]
        assert part["high"][3] < found["acc1"]


def test_batches_and_ranks_do_not_matter(model: Backbone) -> None:
    labels, settings = labels_of(model), FilterSettings(cutoffs=(0.6,), centres=(0.5, 1.0), layers=("blocks.0.mlp",))
    expected = run(model, settings, IMAGES, labels, batch=14)
    for batch, num_ranks in ((1, 2), (3, 1)):
        assert run(model, settings, IMAGES, labels, batch=batch, num_ranks=num_ranks) == expected


class Waves(nn.Module):
    """Class 0 where the image's mean is above 1/2, class 1 where its checkerboard is, else class 2. Keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        rows, cols = torch.arange(x.shape[-2])[:, None], torch.arange(x.shape[-1])
        board = 1.0 - 2 * ((rows + cols) % 2)
        return torch.stack([x.mean((1, 2, 3)), (x * board).mean((1, 2, 3)), torch.full((len(x),), 0.5)], dim=1)


def constants_and_checkerboards() -> tuple[Tensor, Tensor]:
    rows, cols = torch.arange(8)[:, None], torch.arange(8)
    board = 1.0 - 2 * ((rows + cols) % 2)
    return torch.stack([torch.ones(8, 8), board] * 3)[:, None].expand(-1, 3, -1, -1), torch.tensor([0, 1] * 3)


def test_constants_pass_low_and_checkerboards_pass_high() -> None:
    images, labels = constants_and_checkerboards()
    settings = FilterSettings(cutoffs=(0.0, 0.5, 1.3, 1.42), centres=(0.7,))
    found = run(Waves().eval(), settings, images, labels, batch=4)
    assert found == {
        "images": 6, "acc1": 1.0, "cutoffs": [0.0, 0.5, 1.3, 1.42], "centres": [0.7], "band_width": 0.2, "noise_std": 1.0,
        "input": {"low": [0.5, 0.5, 0.5, 1.0], "high": [0.5, 0.5, 0.5, 0.0], "band": [1.0]}, "tokens": {},
    }  # fmt: skip


def test_noise_lies_in_its_band_and_has_the_images_own_scale() -> None:
    images = torch.randn(4, 3, 32, 32) * torch.tensor([1.0, 2.0, 4.0, 0.0]).view(4, 1, 1, 1)
    images += torch.tensor([5.0, 0.0, -5.0]).view(3, 1, 1)  # the colours' own levels are no part of the scale
    settings = FilterSettings(cutoffs=(), centres=(0.3, 0.9), noise_std=0.25)
    waves = Waves().eval()
    run(waves, settings, images, torch.zeros(4, dtype=torch.int64), batch=4)
    assert len(waves.seen) == 3  # without noise, and each band
    for centre, shown in zip(settings.centres, waves.seen[1:], strict=True):
        noise = shown - images
        std = noise.flatten(1).std(dim=1) / torch.tensor([1.0, 2.0, 4.0, 1.0])
        torch.testing.assert_close(std[:3], torch.full((3,), 0.25), rtol=0.15, atol=0)
        assert float(noise[3].abs().max()) == 0
        outside = (radius((32, 32)) - centre).abs() > 0.1 + 1e-6
        assert float((torch.fft.fft2(noise).abs() * outside).max()) < 1e-2 * float(torch.fft.fft2(noise).abs().max())


def test_a_band_without_a_frequency_has_no_figure() -> None:
    images, labels = constants_and_checkerboards()
    settings = FilterSettings(cutoffs=(), centres=(0.125, 0.5), band_width=0.1)  # 8 px: multiples of 0.25 on an axis
    assert run(Waves().eval(), settings, images, labels, batch=6)["input"]["band"] == [None, 1.0]


def test_default_cutoffs_part_the_radii_of_the_smallest_grid_that_we_train() -> None:
    radii = radius((4, 4)).flatten()
    kept = [int((radii <= rho + 1e-9).sum()) for rho in FilterSettings().cutoffs]
    assert sorted(set(kept)) == [1, 5, 9, 11, 15]  # of 16: each step but the last, which is no filter


def test_default_layers_are_the_stem_and_the_middle(model: Backbone) -> None:
    assert filter_settings(model, img_hw=(16, 16)).layers == ("stem", "blocks.0.mlp")
    assert filter_settings(Waves(), img_hw=(16, 16)).layers == ()  # type: ignore[arg-type]
    assert filter_settings(model, img_hw=(16, 16), layers=("stem", "stem")).layers == ("stem",)  # once
    small, large = (filter_settings(model, img_hw=(side, side)).cutoffs for side in (64, 224))
    assert set(small) < set(large)


@pytest.mark.parametrize(
    ("layer", "nearest"),
    [
        ("blocks.2.mlp", "blocks.1.mlp"),
        ("blocks.0.mixer", "blocks.0.mlp"),
        ("block.1", "blocks.1.mlp"),
        ("stemm", "stem"),
        ("?", "blocks.1.mlp"),
    ],
)
def test_a_layer_that_cannot_be_filtered_is_one_line(model: Backbone, layer: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as error:
        filter_settings(model, img_hw=(16, 16), layers=("stem", layer))
    assert str(error.value) == (
        "filter_layers must be stem or blocks.l.mlp with l < 2 (after the last block only CLS counts), got "
        f"{layer!r}; nearest: {nearest}"
    )


@pytest.mark.slow
def test_tokens_of_timms_vit_are_filtered_as_those_of_ours_with_the_same_weights(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=64).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1.5)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    ours = create_model("vit_ti16", num_classes=7, img_size=64, checkpoint=tmp_path / "vit.pth").eval()
    images = torch.randn(12, 3, 64, 64)
    with torch.no_grad():
        theirs.head.bias -= theirs(images).mean(dim=0)
        ours.head.bias.copy_(theirs.head.bias)
        labels = theirs(images).argmax(dim=1)
    assert len(labels.unique()) > 2
    settings = filter_settings(theirs, img_hw=(64, 64), layers=("stem", "blocks.6.mlp"))
    settings = dataclasses.replace(settings, cutoffs=(0.3, 0.8), centres=(0.5,))
    found = []
    for model in (theirs, ours):
        metric = FilteredAccuracy(settings)
        filter_batch(model, images, labels, settings=settings, metric=metric, index=torch.arange(12))
        found.append(metric.result())
    assert found[0] == found[1]
    shares = [share for kinds in found[0]["tokens"].values() for kind in kinds.values() for share in kind]
    assert min(shares) < 1, "a filter changes answers"


def test_a_model_without_tokens_has_no_layers_to_filter() -> None:
    import timm

    resnet = timm.create_model("resnet10t", num_classes=7)
    assert filter_settings(resnet, img_hw=(64, 64)).layers == ()
    with pytest.raises(
        ConfigError, match="filter_layers must be none for a model that hands out no tokens, got 'stem'"
    ):
        filter_settings(resnet, img_hw=(64, 64), layers=("stem",))
