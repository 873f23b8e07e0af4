"""Effective receptive field: contributions by finite differences, the centre token's place, squares of known maps."""

from __future__ import annotations

import dataclasses
from math import inf, nan

import pytest
import torch
from torch import Tensor, nn

from eit_lab.analysis.receptive_field import (
    EffectiveReceptiveField,
    binned,
    centre_px,
    contribution,
    last_features,
    smallest_square,
)
from eit_lab.compose import compose_model
from eit_lab.config import ConvStem, EITStem, PatchifyStem, StemConfig
from eit_lab.models.backbone import Backbone
from eit_lab.models.intermediates import Tap


def model_of(stem: StemConfig | None = None, img_size: int | tuple[int, int] = 16) -> Backbone:
    config = compose_model("eit_nano")
    size = dataclasses.replace(config.size, embed_dim=24, depth=2, num_heads=4)
    torch.manual_seed(0)
    config = dataclasses.replace(config, size=size, stem=stem or config.stem)
    return Backbone(config, num_classes=5, img_size=img_size).eval()


class Blur(nn.Module):
    """A model whose last features are a 3x3 window of the image, in two channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1, bias=False)
        nn.init.ones_(self.conv.weight)
        self.conv.weight.data[1, 0, 0, 0] = -5.0

    def forward_features(self, x: Tensor) -> Tensor:
        return self.conv(x)


class PositiveCentre(Tap):
    """What the contribution is the gradient of: the positive part of the centre token after the last block."""

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        self.value = float(x[0, 1 + grid[0] // 2 * grid[1] + grid[1] // 2].relu().sum())
        return x


def test_contribution_is_the_positive_part_of_the_gradient() -> None:
    model = model_of().double()
    images = torch.randn(1, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = contribution(model, images)
    assert found.shape == (1, 16, 16)
    assert all(parameter.grad is None for parameter in model.parameters())
    signs = set()
    for row, col in ((8, 8), (7, 10), (9, 6), (3, 12)):
        expected = 0.0
        for colour in range(3):
            values = []
            for step in (1e-5, -1e-5):
                moved, tap = images.clone(), PositiveCentre()
                moved[0, colour, row, col] += step
                with torch.no_grad():
                    model(moved, tap=tap)
                values.append(tap.value)
            slope = (values[0] - values[1]) / 2e-5
            signs.add(slope > 0)
            expected += max(slope, 0.0)
        assert float(found[0, row, col]) == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert signs == {True, False}


def test_contribution_of_a_convolution_is_its_kernel() -> None:
    images = torch.rand(2, 1, 9, 9) + 1
    images[1] += 100
    expected = torch.zeros(2, 9, 9)
    assert (Blur().conv(images)[:, :, 4, 4] > 0).all(), "both channels count"
    expected[:, 3:6, 3:6] = 2
    expected[:, 3, 3] = 0  # 1 - 5, below 0
    found = contribution(Blur().eval(), images)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("stem", "img_size"),
    [
        (EITStem(kind="eit"), 8),
        (EITStem(kind="eit"), 32),
        (EITStem(kind="eit", kernel_size=16, stride=4, pool=3), (36, 48)),
        (EITStem(kind="eit", kernel_size=3, stride=2, pool=1), (20, 33)),
        (PatchifyStem(kind="patchify"), 28),
        (PatchifyStem(kind="patchify", pitch=5), (31, 17)),
        (ConvStem(kind="conv", depth=2, act="gelu"), 32),
        (ConvStem(kind="conv", depth=1, pitch=6), (32, 45)),
        (ConvStem(kind="conv", depth=3, norm="layer", pitch=12), (36, 49)),
    ],
)
def test_centre_is_the_middle_of_the_pixels_that_the_stem_sees(
    stem: StemConfig, img_size: int | tuple[int, int]
) -> None:
    """A pixel that is not a number shows wherever it is seen."""
    model = model_of(stem, img_size).double()  # in float32 a convolution may work in tiles, which carry it further
    H, W = model.img_size
    h, w = model.grid
    middles = []
    with torch.no_grad():
        for side, at in ((H, lambda i: (slice(None), i)), (W, lambda i: (slice(None), slice(None), i))):
            seen = []
            for i in range(side):
                image = torch.zeros(3, H, W, dtype=torch.float64)
                image[at(i)] = nan
                if model.stem(image[None])[0, h // 2, w // 2].isnan().any():
                    seen.append(i)
            middles.append((seen[0] + seen[-1]) / 2)
    assert centre_px(model, (H, W), in_chans=3) == tuple(middles)


def test_centre_of_the_published_stem_is_the_middle_of_the_image() -> None:
    assert centre_px(model_of(EITStem(kind="eit"), 224), (224, 224), in_chans=3) == (12 * 9 + 3.5, 111.5)
    assert centre_px(model_of(PatchifyStem(kind="patchify", pitch=16), 224), (224, 224), in_chans=3) == (119.5, 119.5)


def test_a_model_of_another_kind_has_the_middle_of_a_tokens_share() -> None:
    assert centre_px(Blur().eval(), (9, 6), in_chans=1) == (4, 3)  # type: ignore[arg-type]


def test_a_model_without_a_grid_has_no_centre() -> None:
    pooled = nn.Sequential(nn.Flatten(), nn.Linear(9, 4))
    pooled.forward_features = pooled.forward  # type: ignore[assignment]
    assert centre_px(pooled.eval(), (3, 3), in_chans=1) is None  # type: ignore[arg-type]


def test_tokens_of_a_square_grid_become_maps() -> None:
    class Tokens(nn.Module):
        num_prefix_tokens = 2

        def forward_features(self, x: Tensor) -> Tensor:
            return torch.cat([torch.full((len(x), 2, x.shape[1]), inf), x.flatten(2).transpose(1, 2)], dim=1)

    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(last_features(Tokens(), images), images)  # type: ignore[arg-type]
    assert last_features(Tokens(), torch.randn(2, 3, 4, 5)) is None  # type: ignore[arg-type]


def test_squares_of_known_maps() -> None:
    shares = (0.25, 0.5, 1.0)
    uniform = smallest_square(torch.ones(9, 9), shares, centre=(4, 4))
    torch.testing.assert_close(uniform, torch.tensor([4.5, 9 * 0.5**0.5, 9], dtype=torch.float64), atol=1e-5, rtol=0)
    point = torch.zeros(8, 10)
    point[3, 6] = 7
    here = smallest_square(point, shares, centre=(3, 6))
    torch.testing.assert_close(here, torch.tensor([0.5, 0.5**0.5, 1], dtype=torch.float64), atol=1e-5, rtol=0)
    aside = smallest_square(point, shares, centre=(3, 3))  # 2.5 px to its near edge
    torch.testing.assert_close(aside, torch.tensor([5.5, 6, 7], dtype=torch.float64), atol=1e-5, rtol=0)
    between = smallest_square(torch.ones(6, 6), (1.0,), centre=(3, 3))  # of a token that is half a pixel off the middle
    torch.testing.assert_close(between, torch.tensor([7.0], dtype=torch.float64), atol=1e-5, rtol=0)
    assert smallest_square(torch.zeros(4, 4), shares, centre=(2, 2)).isnan().all()


def test_binning_keeps_the_sum_and_small_maps() -> None:
    large = torch.rand(100, 70)
    cells = binned(large)
    assert cells.shape == (64, 64)
    torch.testing.assert_close(cells.sum(), large.double().sum())
    torch.testing.assert_close(binned(torch.ones(96, 128)), torch.full((64, 64), 3.0, dtype=torch.float64))
    assert torch.equal(binned(large[:20, :30]), large[:20, :30].double())


def test_figure_is_the_same_for_any_batches_and_ranks_in_inference_mode_too() -> None:
    model = model_of()
    images = torch.randn(5, 3, 16, 16)
    centre = centre_px(model, (16, 16), in_chans=3)
    assert centre == (8, 8)
    whole = EffectiveReceptiveField((16, 16), centre=centre)
    whole.update(contribution(model, images))
    expected = whole.result()
    torch.testing.assert_close(
        torch.tensor(expected["side_px"], dtype=torch.float64), smallest_square(whole.total, centre=centre)
    )
    assert sum(map(sum, expected["map"])) == pytest.approx(1)
    assert (expected["images"], expected["shares"]) == (5, [0.2, 0.3, 0.5, 0.99])
    with torch.inference_mode():
        for batch in (1, 3):
            ranks = [EffectiveReceptiveField((16, 16), centre=centre) for _ in range(2)]
            for number, part in enumerate(images.split(batch)):
                ranks[number % 2].update(contribution(model, part.clone(), chunk=2))
            ranks[0].merge_state(ranks[1])
            found = ranks[0].result()
            assert found["images"] == 5
            torch.testing.assert_close(torch.tensor(found["map"]), torch.tensor(expected["map"]), rtol=1e-4, atol=1e-7)
            assert found["side_px"] == pytest.approx(expected["side_px"], abs=1e-3)


def test_squares_of_more_share_are_larger_and_no_contribution_is_said() -> None:
    field = EffectiveReceptiveField((4, 4), centre=(2, 2))
    field.update(torch.zeros(2, 4, 4))
    assert field.result() == {
        "images": 2, "map": None, "shares": [0.2, 0.3, 0.5, 0.99], "side_px": [None] * 4, "centre_px": [2, 2],
        "centre_of": "token",
    }  # fmt: skip


def test_the_squares_of_a_convnet_lie_around_what_it_sees() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5).eval()
    field = EffectiveReceptiveField((96, 96), centre=None)
    field.update(contribution(model, torch.randn(8, 3, 96, 96)))
    found = field.compute()
    peak = divmod(int(field.total.argmax()), 96)
    away = max(abs(at - float(centre)) for at, centre in zip(peak, found["centre_px"], strict=True))
    assert away <= float(found["side_px"][2]) / 2, "the brightest pixel lies within the square of half the sum"
    middle = smallest_square(field.total, centre=(47.5, 47.5))
    assert float(middle[0]) > 1.5 * float(found["side_px"][0]), "the image's middle is not where the feature looks"
    assert field.result()["centre_of"] == "map"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_models_of_timm_have_a_field(name: str) -> None:
    import timm

    model = timm.create_model(name, num_classes=5).eval()
    features = last_features(model, torch.zeros(1, 3, 224, 224))
    assert features is not None
    assert features.shape[2:] == ((14, 14) if name.startswith("vit") else (7, 7))
    centre = centre_px(model, (224, 224), in_chans=3)
    field = EffectiveReceptiveField((224, 224), centre=centre or (nan, nan))
    field.update(contribution(model, torch.randn(2, 3, 224, 224)))
    assert 0 < field.result()["side_px"][0] < field.result()["side_px"][3] < 2 * 224
