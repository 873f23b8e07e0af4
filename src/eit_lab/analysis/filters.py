"""Accuracy under wave filters and band noise, of the input and of the tokens after a layer.

Sources: noise confined to a band of frequencies, Park & Kim 2022 (arXiv:2202.06709). The wave filters are our own definition:
arXiv:2203.07116 filters what goes into a network, its formula was not at hand. Frequencies are those of ``frequency``: radius 1 is
the Nyquist frequency on an axis of the map that is filtered, image or token grid.

An input is the normalised image. The tokens of a layer are the patch tokens of the residual stream on their grid, CLS untouched;
only the layers after it run again. A low and a high pass split a map into two parts whose sum it is. The standard deviation of
the noise is in units of the map's own: the root of the variance over (h, w), averaged over channels, image by image. Each image
has one draw of white noise, seeded by its index in the data set, from which every band is cut, so that figures do not depend on
batches or ranks, and the bands and the arms meet the same noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isnan
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from eit_lab.analysis.frequency import band_noise, high_pass, low_pass, radius
from eit_lab.analysis.layout import count_token_layers, forward
from eit_lab.config import ConfigError
from eit_lab.loading import nearest
from eit_lab.models.backbone import Backbone
from eit_lab.models.image_model import ImageModel
from eit_lab.models.intermediates import Tap

INPUT = "input"
"""The place of the filter that is no layer."""

_ON_CUTOFF = 1e-9
"""A frequency that lies on a cutoff is within it, whatever its last digit."""


_LARGE_PX = 96
"""Images from here on have what is worth seeing at low radii; config.py makes the stems larger at the same side."""


@dataclass(frozen=True, kw_only=True)
class FilterSettings:
    """What is filtered, and how; ``filter_settings`` chooses for a model.

    ``cutoffs``: radii rho of the low and the high pass. A 4x4 grid has the radii 0, 0.5, 0.71, 1, 1.12 and 1.41, and each step
    between them has a cutoff here.
    ``centres``, ``band_width``: rings of noise; these ones lie side by side from 0 to 1.4.
    ``noise_std``: in units of the map's own standard deviation.
    ``layers``: points of the residual stream, ``stem`` or ``blocks.l.mlp``.
    """

    cutoffs: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.55, 0.75, 0.95, 1.05, 1.2)
    centres: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9, 1.1, 1.3)
    band_width: float = 0.2
    noise_std: float = 1.0
    layers: tuple[str, ...] = ()


def filter_settings(
    model: ImageModel, *, img_hw: tuple[int, int], layers: Sequence[str] | None = None
) -> FilterSettings:
    """Settings for a model and images (H, W) in px. The cutoffs depend on the images alone, so that arms can be compared.

    ``layers``: whose tokens are filtered; None: the stem's and those in the middle of the depth. A model that
    hands out features instead of tokens (timm's ConvNets and pyramids) has none.
    ConfigError for a layer that cannot be filtered.
    """
    cutoffs = FilterSettings.cutoffs
    if min(img_hw) >= _LARGE_PX:
        cutoffs = tuple(sorted((*cutoffs, 0.05, 0.15)))
    depth = count_token_layers(model)
    possible = ["stem", *(f"blocks.{layer}.mlp" for layer in range(depth - 1))] if depth else []
    if layers is None:
        layers = [possible[0], possible[depth // 2]] if depth > 1 else possible
    for name in layers:
        if name not in possible:
            allowed = (
                f"stem or blocks.l.mlp with l < {depth - 1} (after the last block only CLS counts)" if depth else ""
            )
            fallback = f"; nearest: {possible[-1] if possible else 'none'}"
            raise ConfigError(
                f"filter_layers must be {allowed or 'none for a model that hands out no tokens'}, got {name!r}"
                f"{nearest(name, possible) or fallback}"
            )
    return FilterSettings(cutoffs=cutoffs, layers=tuple(dict.fromkeys(layers)))  # one named twice is filtered once


class FilteredAccuracy(Metric):
    """Top-1 accuracy under each filter and each noise, counted in whole numbers."""

    full_state_update = False
    hits: Tensor
    seen: Tensor
    unfiltered: Tensor
    images: Tensor

    def __init__(self, settings: FilterSettings) -> None:
        super().__init__()
        self.settings = settings
        num_rho, num_bands = len(settings.cutoffs), len(settings.centres)
        self.columns = {"low": (0, num_rho), "high": (num_rho, num_rho), "band": (2 * num_rho, num_bands)}
        for name in ("hits", "seen"):
            counts = torch.zeros(1 + len(settings.layers), 2 * num_rho + num_bands, dtype=torch.int64)
            self.add_state(name, counts, dist_reduce_fx="sum")
        for name in ("unfiltered", "images"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, correct: Tensor, condition: tuple[str, str, int] | None = None) -> None:
        """Add which of some images (B,) were right, without a filter or under a condition.

        A condition is (place, kind, number): ``input`` or a layer; low, high or band; the place in cutoffs or centres.
        """
        if condition is None:
            self.unfiltered = self.unfiltered + correct.sum()
            self.images = self.images + correct.numel()
            return
        place, kind, number = condition
        row = (INPUT, *self.settings.layers).index(place)
        first, length = self.columns[kind]
        assert 0 <= number < length, f"{kind} has {length} conditions, got number {number}"
        here = torch.zeros_like(self.hits)
        here[row, first + number] = 1
        self.hits = self.hits + here * correct.sum()
        self.seen = self.seen + here * correct.numel()

    def compute(self) -> dict[str, Tensor]:
        """``acc1`` and ``images`` (), and ``filtered`` (1 + layers, conditions): the input, then each layer; low, high, band.

        Not a number for a band in which the grid has no frequency.
        """
        return {
            "acc1": self.unfiltered.double() / self.images,
            "images": self.images,
            "filtered": self.hits.double() / self.seen,
        }

    def result(self) -> dict[str, Any]:
        """The same as plain numbers, with the settings: ``input`` and each of ``tokens`` is {low, high, band: [acc1]}.

        None for a band in which the grid has no frequency. All ranks must call.
        """
        found, settings = self.compute(), self.settings
        kinds = [
            {
                kind: [None if isnan(x) else x for x in row[first : first + n]]
                for kind, (first, n) in self.columns.items()
            }
            for row in found["filtered"].tolist()
        ]
        return {
            "images": int(found["images"]),
            "acc1": float(found["acc1"]),
            "cutoffs": list(settings.cutoffs),
            "centres": list(settings.centres),
            "band_width": settings.band_width,
            "noise_std": settings.noise_std,
            "input": kinds[0],
            "tokens": dict(zip(settings.layers, kinds[1:], strict=True)),
        }


class _Keep(Tap):
    """Keeps the tokens of some points."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.kept: dict[str, tuple[Tensor, tuple[int, int]]] = {}

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if name in self.names:
            self.kept[name] = x, grid
        return x


@torch.no_grad()
def filter_batch(
    model: ImageModel,
    images: Tensor,
    labels: Tensor,
    *,
    settings: FilterSettings,
    metric: FilteredAccuracy,
    index: Tensor,
) -> None:
    """Run every condition on normalised images (B, C, H, W) with labels (B,) and count the right answers.

    ``index`` (B,): the images' places in the data set, which seed their noise. Filler images are left out by the caller.
    """
    assert not model.training, "accuracy under filters is one of evaluation: call eval() first"
    tap = _Keep(settings.layers)
    logits = forward(model, images, tap=tap) if settings.layers else model(images)
    correct = logits.argmax(dim=-1) == labels
    metric.update(correct)
    conditions = _Conditions(settings, metric, labels, index.tolist(), correct)
    conditions.run(INPUT, images, model)
    for layer in settings.layers:
        x, grid = tap.kept.pop(layer)
        maps = x[:, 1:].transpose(1, 2).unflatten(2, grid)
        if isinstance(model, Backbone):
            first = 0 if layer == "stem" else 1 + int(layer.split(".")[1])
            conditions.run(layer, maps, partial(_rest_of_model, model, x[:, :1], grid, first))
        else:  # timm has no door into the middle: the whole pass again, its tokens exchanged on the way
            conditions.run(layer, maps, partial(_with_tokens, model, images, layer))


def _rest_of_model(model: Backbone, cls: Tensor, grid: tuple[int, int], first: int, maps: Tensor) -> Tensor:
    """CLS (B, 1, D) and patch tokens as block ``first`` gets them, as maps (B, D, h, w) -> logits."""
    tokens = torch.cat([cls, maps.flatten(2).transpose(1, 2)], dim=1)
    return model.forward_head(model.forward_blocks(tokens, grid, first=first))


def _with_tokens(model: ImageModel, images: Tensor, layer: str, maps: Tensor) -> Tensor:
    """Images (B, C, H, W) -> logits, the patch tokens after a layer being these maps (B, D, h, w)."""
    return forward(model, images, tap=_Exchange(layer, maps))


class _Exchange(Tap):
    """Puts other patch tokens in the place of a point's; CLS stays."""

    def __init__(self, name: str, maps: Tensor) -> None:
        self.name, self.patches = name, maps

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return (
            torch.cat([x[:, :1], self.patches.flatten(2).transpose(1, 2).to(x.dtype)], dim=1)
            if name == self.name
            else x
        )


@dataclass(frozen=True)
class _Conditions:
    """All conditions for the images of one batch."""

    settings: FilterSettings
    metric: FilteredAccuracy
    labels: Tensor
    index: list[int]
    correct: Tensor
    """Which are right without a filter."""

    def run(self, place: str, maps: Tensor, model: Callable[[Tensor], Tensor]) -> None:
        """Every condition at one place. ``model``: maps (B, C, h, w) -> logits."""
        settings, radii = self.settings, radius((maps.shape[-2], maps.shape[-1]))
        # Cutoffs between the same two radii of a coarse grid are one filter. The one that keeps everything is none.
        low: dict[int, Tensor] = {radii.numel(): self.correct}
        high: dict[int, Tensor] = {}
        for number, rho in enumerate(settings.cutoffs):
            kept = int((radii <= rho + _ON_CUTOFF).sum())
            if kept not in low:
                low[kept] = self._right(model(low_pass(maps, rho)))
            if kept not in high:
                high[kept] = self._right(model(high_pass(maps, rho)))
            self.metric.update(low[kept], (place, "low", number))
            self.metric.update(high[kept], (place, "high", number))
        std = settings.noise_std * maps.float().var(dim=(-2, -1), correction=0).mean(dim=1).sqrt()  # (B,)
        for number, centre in enumerate(settings.centres):
            if ((radii - centre).abs() <= settings.band_width / 2 + _ON_CUTOFF).any():
                noisy = maps.float() + self._noise(maps, centre, std.tolist())
                self.metric.update(self._right(model(noisy.to(maps.dtype))), (place, "band", number))

    def _right(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=-1) == self.labels

    def _noise(self, maps: Tensor, centre: float, std: list[float]) -> Tensor:
        """Noise in one band for maps (B, C, h, w), each image's cut from its own white noise: the same shape, float32."""
        shape, width = maps.shape[1:], self.settings.band_width
        return torch.stack(
            [
                band_noise(shape, centre, width, s, torch.Generator().manual_seed(i), maps.device)
                for s, i in zip(std, self.index, strict=True)
            ]
        )
