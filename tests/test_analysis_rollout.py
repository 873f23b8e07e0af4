"""Rollout against a literal one in numpy, on known matrices and on whole passes of the backbone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from eit_lab.analysis import rollout
from eit_lab.analysis.rollout import Rollout, RolloutMap, mean_over_heads, mixer_matrix, rollout_step
from eit_lab.compose import compose_model
from eit_lab.models.backbone import Backbone
from eit_lab.models.intermediates import AttentionMaps, ConvolutionTaps, Tap
from eit_lab.schedule import LayerSplit


def model_of(name: str, **ib: object) -> Backbone:
    """Three layers at 16 px with weights large enough for maps that are far from uniform."""
    config = compose_model(name)
    size = dataclasses.replace(config.size, embed_dim=24, depth=3, num_heads=4)
    torch.manual_seed(0)
    model = Backbone(
        dataclasses.replace(config, size=size, ib=dataclasses.replace(config.ib, **ib)), num_classes=5, img_size=16
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    return model.eval()


class Literal(Tap):
    """Writes each layer's mixer as a matrix, token by token, and multiplies them all up in float64."""

    def __init__(self, model: Backbone) -> None:
        self.model, self.splits = model, model.config.layer_splits()
        self.rollout: NDArray[np.float64] | None = None
        self.mixer: NDArray[np.float64] | float = 0.0

    def attention(self, layer: int, maps: AttentionMaps) -> None:
        conv_dim, attn_dim = self.splits[layer]
        self.mixer = self.mixer + attn_dim / (conv_dim + attn_dim) * maps.maps().double().numpy().mean(axis=1)

    def convolution(self, layer: int, taps: ConvolutionTaps) -> None:
        conv_dim, attn_dim = self.splits[layer]
        (h, w), weights = taps.grid, taps.taps().double().numpy()
        k = round(weights.shape[-1] ** 0.5)
        matrix = np.zeros((len(weights), 1 + h * w, 1 + h * w))
        matrix[:, 0, 0] = 1
        for row in range(h):
            for col in range(w):
                here = 1 + row * w + col
                for tap in range(k * k):
                    to_row, to_col = row + tap // k - k // 2, col + tap % k - k // 2
                    if 0 <= to_row < h and 0 <= to_col < w:
                        matrix[:, here, 1 + to_row * w + to_col] += weights[:, here - 1, tap]
                matrix[:, here] /= matrix[:, here].sum(axis=-1, keepdims=True)
        self.mixer = self.mixer + conv_dim / (conv_dim + attn_dim) * matrix

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if name.endswith("mixer"):
            step = 0.5 * np.asarray(self.mixer) + 0.5 * np.eye(x.shape[1])
            step = step / step.sum(axis=-1, keepdims=True)
            self.rollout = step if self.rollout is None else step @ self.rollout
            self.mixer = 0.0
        return x


def images(n: int = 5) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_rollout_of_identity_maps_is_the_identity() -> None:
    eye = torch.eye(6).expand(2, 6, 6)
    torch.testing.assert_close(rollout_step(eye, eye), eye)


def test_rollout_of_two_layers_by_hand() -> None:
    first = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])  # half of it and half the identity: [[.5, .5], [.25, .75]]
    second = torch.tensor([[[0.5, 0.5], [1.0, 0.0]]])  # [[.75, .25], [.5, .5]]
    expected = torch.tensor([[[0.4375, 0.5625], [0.375, 0.625]]])
    R = rollout_step(torch.eye(2)[None], first)
    torch.testing.assert_close(rollout_step(R, second), expected)


def test_uniform_attention_halves_what_cls_keeps_in_every_layer() -> None:
    N, passes = 17, Rollout([LayerSplit(0, 8)] * 3)
    for layer in range(3):
        passes.attention(layer, AttentionMaps(torch.zeros(2, 4, N, 2), torch.zeros(2, 4, N, 2)))
    row = passes.finish(2)
    spread = (1 - 0.5**3) / N
    torch.testing.assert_close(row[:, 1:], torch.full((2, 16), spread))
    torch.testing.assert_close(row[:, 0], torch.full((2,), 0.5**3 + spread))


def test_mean_over_heads_of_maps_that_do_not_fit_one_part() -> None:
    q, k = torch.randn(2, 2, 5, 480, 4).unbind()
    maps = AttentionMaps(q, k)
    parts = list(maps.parts())
    assert any(heads != slice(0, 5) for _, heads in parts), "several parts, of some heads each"
    expected = ((q @ k.transpose(-2, -1)) / 2).softmax(-1).mean(1)
    torch.testing.assert_close(mean_over_heads(maps), expected)


def test_mixer_matrix_weighs_its_branches_by_their_channels() -> None:
    A, C = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]]), torch.eye(2)[None]
    expected = torch.tensor([[[0.4, 0.6], [0.45, 0.55]]])
    torch.testing.assert_close(mixer_matrix(A, C, attn_dim=3, conv_dim=1), 0.75 * A + 0.25 * C)
    torch.testing.assert_close(mixer_matrix(A, C, attn_dim=3, conv_dim=1), expected)
    assert torch.equal(mixer_matrix(A, None, attn_dim=4, conv_dim=0), A)


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("vit_nano", 2**28),
        ("eit_nano", 2**28),
        ("lsra_lite_nano", 2**28),
        ("lsra_dynamic_nano", 2**28),
        ("eit_nano", 0),
    ],
)
def test_rollout_of_a_pass_equals_the_literal_one(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout, "LIMIT", limit)  # 0: the product of the layers so far is all that is kept
    model = model_of(name)
    literal, passes = Literal(model), Rollout(model.config.layer_splits())
    with torch.no_grad():
        for _ in range(2):  # the second pass starts anew
            model(images(), tap=passes)
            row = passes.finish(5)
        model(images(), tap=literal)
    assert literal.rollout is not None
    expected = torch.from_numpy(literal.rollout[:, 0]).float()
    torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(row.sum(1), torch.ones(5))
    assert float((expected[:, 1:] - expected[:, 1:].mean()).abs().max()) > 0.003, "far from uniform"


def test_cls_sees_itself_only_where_there_is_nothing_but_convolution() -> None:
    model = model_of("eit_nano", rule="custom", attn_dims=(0, 0, 0))
    passes = Rollout(model.config.layer_splits())
    with torch.no_grad():
        model(images(), tap=passes)
    row = passes.finish(5)
    torch.testing.assert_close(row, torch.eye(row.shape[1])[:1].expand(5, -1), rtol=0, atol=0)


@pytest.mark.parametrize(("cls", "of_itself"), [("pass", 1.0), ("zero", 0.0)])
def test_cls_sees_of_the_convolution_what_the_model_gives_it(cls: str, of_itself: float) -> None:
    model = model_of("lsra_nano", cls=cls)
    seen: list[torch.Tensor] = []

    class Matrices(Tap):
        def convolution(self, layer: int, taps: ConvolutionTaps) -> None:
            seen.append(taps.matrix())

    with torch.no_grad():
        model(images(), tap=Matrices())
    assert len(seen) == 3
    for matrix in seen:
        assert matrix[0, 0, 0] == of_itself
        assert not matrix[0, 0, 1:].any()
        torch.testing.assert_close(matrix[0, 1:].sum(-1), torch.ones(matrix.shape[1] - 1))


def test_map_is_the_mean_over_images_for_any_batches_and_ranks() -> None:
    rows = torch.rand(7, 1 + 6)
    expected = rows[:, 1:].double().mean(0).view(2, 3)
    for batch in (1, 3, 7):
        ranks = RolloutMap((2, 3)), RolloutMap((2, 3))
        for number, part in enumerate(rows.split(batch)):
            ranks[number % 2].update(part)
        if batch < 7:
            ranks[0].merge_state(ranks[1])
        torch.testing.assert_close(ranks[0].compute(), expected)


def test_a_pass_that_ends_early_is_refused() -> None:
    passes = Rollout([LayerSplit(0, 8)] * 2)
    passes.attention(0, AttentionMaps(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4)))
    with pytest.raises(AssertionError, match="ended after layer 1 of 2"):
        passes.finish(1)
