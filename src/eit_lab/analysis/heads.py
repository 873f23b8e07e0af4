"""What the heads of an attention layer look at: how far, how evenly, how much at CLS, and how different from each other.

Sources: attention distance: Raghu et al. 2021 (arXiv:2108.08810), Dosovitskiy et al. 2021 (arXiv:2010.11929, figure 7);
normalised mutual information: Park et al. 2023 (arXiv:2305.00729). Head Diversity is our own definition: arXiv:2203.07116 names the
quantity (the diversity of the heads' attention distances), its formula was not at hand.

Maps A are (B, H, N, N), N = 1 + h w with CLS first, rows summing to 1. Every figure but ``cls_mass`` is of the token maps: token
rows and token columns only, rows divided by what is left of them. Distances are in px of the input, pitch (py, px) px a token.

Where we differ: published notebooks leave the rows of the token maps undivided, so that a head that looks at CLS seems local.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from math import log
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from eit_lab.analysis.means import as_float, chunk_size, full_precision
from eit_lab.models.intermediates import AttentionMaps

Grid = tuple[int, int]
Pitch = tuple[float, float]

_TINY = torch.finfo(torch.float32).tiny
_ROUNDING = 1e-6
"""Nats of mutual information up to which it is rounding: both entropies are sums in float32."""


def token_distances(grid: Grid, pitch: Pitch) -> Tensor:
    """Distance in px between the centres of any two tokens of a grid (h, w), row by row: (h w, h w), float64."""
    at = torch.cartesian_prod(
        *(p * torch.arange(n, dtype=torch.float64, device="cpu") for n, p in zip(grid, pitch, strict=True))
    )
    return torch.cdist(at, at, compute_mode="donot_use_mm_for_euclid_dist")  # exact


def uniform_distance(grid: Grid, pitch: Pitch) -> float:
    """The attention distance in px of a head that looks at all tokens alike: the baseline."""
    return float(token_distances(grid, pitch).mean())


@lru_cache(maxsize=8)
def _distances(grid: Grid, pitch: Pitch, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``token_distances`` with a row and a column of zeros for CLS: (N, N)."""
    with torch.inference_mode(mode=False):  # the cached one serves whoever comes next
        return torch.nn.functional.pad(token_distances(grid, pitch), (1, 0, 1, 0)).to(device, dtype)


class _TokenMaps:
    """Figures of the maps (b, h, N, N) of some images and heads, with what they share. n = N - 1 tokens.

    Rows are not divided: what is summed over keys is divided instead. A slice of the maps is only ever summed, which costs
    less than to compute with it.
    """

    def __init__(self, maps: Tensor) -> None:
        self.maps = as_float(maps)
        self.mass = self.maps[..., 1:, 1:].sum(dim=-1)
        """Of each token query on tokens: (b, h, n)."""

    def distance(self, distances: Tensor) -> Tensor:
        """(b, h) px, for ``_distances``."""
        return ((self.maps * distances).sum(dim=-1)[..., 1:] / self.mass.clamp_min(_TINY)).mean(dim=-1)

    def cls_mass(self) -> Tensor:
        """(b, h)."""
        return self.maps[..., 1:, 0].mean(dim=-1)

    @cached_property
    def entropies(self) -> Tensor:
        """Of each token query's keys, in nats: (b, h, n); 0 where all its mass is on CLS."""
        logs = _times_log(self.maps)[..., 1:, 1:].sum(dim=-1)
        mass = self.mass.clamp_min(_TINY)
        return torch.where(self.mass == 0, 0, mass.log() - logs / mass).clamp_min(0)

    def entropy(self) -> Tensor:
        """(b, h) in [0, 1]."""
        return self.entropies.mean(dim=-1) / log(max(2, self.mass.shape[-1]))

    def nmi(self) -> Tensor:
        """(b, h) in [0, 1]."""
        n = self.mass.shape[-1]
        weights = torch.nn.functional.pad(1 / (n * self.mass.clamp_min(_TINY)), (1, 0))  # of a row in p(k)
        with full_precision(self.maps):
            key_shares = (weights[..., None, :] @ self.maps)[..., 0, 1:]  # p(k)
        keys = -_times_log(key_shares).sum(dim=-1)
        information = keys - self.entropies.mean(dim=-1)
        return torch.where(information <= _ROUNDING, 0, information / (keys * log(max(2, n))).clamp_min(_TINY).sqrt())

    @cached_property
    def divided(self) -> Tensor:
        """Token maps with rows that sum to 1: (b, h, n, n); a row all on CLS stays 0."""
        return self.maps[..., 1:, 1:] / self.mass.clamp_min(_TINY)[..., None]

    def cosine(self) -> Tensor:
        """(b,), mean over pairs of the h heads."""
        p = self.divided.flatten(2)
        H = p.shape[1]
        with full_precision(p):
            products = p @ p.transpose(1, 2)
        norms = products.diagonal(dim1=1, dim2=2).clamp_min(_TINY).sqrt()
        cosine = products / (norms[:, :, None] * norms[:, None])
        return (1 - cosine).clamp_min(0).triu(1).sum(dim=(1, 2)) / max(1, H * (H - 1) // 2)

    def js(self) -> Tensor:
        """(b,) in bits, mean over pairs of the h heads and over queries.

        With m = p + p' the divergence of two rows is ((p + p') log 2 - m log m + p log p + p' log p') / 2, summed over keys.
        """
        p = self.divided
        b, H, n, _ = p.shape
        own = _times_log(p).sum(dim=-1).double()
        total = (H - 1) * (own + log(2) * p.sum(dim=-1)).sum(dim=(1, 2))
        queries = max(1, chunk_size(p.device) // (2 * b * H * n))  # half as many elements: a sum, its logarithm
        for block in p.split(queries, dim=2):
            for head in range(1, H):
                total -= _times_log(block[:, head:] + block[:, head - 1, None]).sum(dim=-1).double().sum(dim=(1, 2))
        return total.clamp_min(0) / (2 * log(2) * n * max(1, H * (H - 1) // 2))


def _times_log(p: Tensor) -> Tensor:
    """Each element p as p log p, 0 at 0; several times as fast on CPU as torch's own entr."""
    return (p + _TINY).log_().mul_(p)


def attention_distance(maps: Tensor, grid: Grid, pitch: Pitch) -> Tensor:
    """Mean over token queries of the distance in px to what they look at: maps (B, H, N, N) -> (B, H)."""
    tokens = _TokenMaps(maps)
    return tokens.distance(_distances(grid, pitch, maps.device, tokens.maps.dtype))


def cls_mass(maps: Tensor) -> Tensor:
    """Mean over token queries of the attention to CLS: maps (B, H, N, N) -> (B, H) in [0, 1]."""
    return _TokenMaps(maps).cls_mass()


def attention_entropy(maps: Tensor) -> Tensor:
    """Mean over token queries of the entropy over log(h w): maps (B, H, N, N) -> (B, H) in [0, 1], 1 is uniform."""
    return _TokenMaps(maps).entropy()


def attention_nmi(maps: Tensor) -> Tensor:
    """Normalised mutual information of query and key: maps (B, H, N, N) -> (B, H) in [0, 1]. Park et al. 2023.

    p(q) = 1 / (h w), p(k) = mean over q of A, MI / sqrt(H(q) H(k)). 0: every query looks at the same, one key included; 1: each
    at a key of its own.
    """
    return _TokenMaps(maps).nmi()


def head_cosine(maps: Tensor) -> Tensor:
    """Mean over pairs of heads of 1 - cosine of their flattened token maps: (B, H, N, N) -> (B,) in [0, 1]; one head: 0."""
    return _TokenMaps(maps).cosine()


def head_js(maps: Tensor) -> Tensor:
    """Mean over pairs of heads and token queries of the Jensen-Shannon divergence in bits: (B, H, N, N) -> (B,), float64.

    In [0, 1]. 0: all heads look at the same; 1: no two heads look at the same token. One head: 0. The work grows with the square of
    the number of heads: with 16 of them it costs more than a forward pass on CPU.
    """
    return _TokenMaps(maps).js()


class Diversity(NamedTuple):
    """How different the heads' mean distances are: population std and range in units of the uniform baseline, std over mean."""

    std: Tensor
    range: Tensor
    cv: Tensor


def head_diversity(distance: Tensor, uniform: float) -> Diversity:
    """Head Diversity of one layer from the mean distances (H,) of its heads over a data set and ``uniform_distance``, both in px.

    All 0 where the distances are.
    """
    std, uniform = distance.std(correction=0), max(uniform, _TINY)
    return Diversity(std / uniform, (distance.max() - distance.min()) / uniform, std / distance.mean().clamp_min(_TINY))


QUANTITIES = ("attention_distance", "attention_entropy", "attention_nmi", "cls_mass", "head_cosine", "head_js")
"""What ``HeadStatistics`` can be asked for; head_diversity, head_range and head_cv come with attention_distance."""

_OF_PAIRS = ("head_cosine", "head_js")


class HeadStatistics(Metric):
    """All figures of the heads of one layer over a data set, each the mean over images."""

    full_state_update = False
    images: Tensor

    def __init__(self, num_heads: int, grid: Grid, pitch: Pitch, quantities: Sequence[str] = QUANTITIES) -> None:
        """``quantities``: some of QUANTITIES; what is not asked for costs nothing."""
        super().__init__()
        assert set(quantities) <= set(QUANTITIES), f"{quantities} are not among {QUANTITIES}"
        self.grid, self.pitch, self.quantities = grid, pitch, tuple(quantities)
        for name in self.quantities:
            shape = () if name in _OF_PAIRS else (num_heads,)
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, maps: AttentionMaps | Tensor) -> None:
        """Add the maps of B images (B, H, N, N), with CLS first."""
        B, H, N, _ = maps.shape
        chunk = chunk_size(maps.device if isinstance(maps, Tensor) else maps.q.device)
        if isinstance(maps, Tensor):
            for part in maps.split(max(1, chunk // (H * N**2))):
                self._add(_TokenMaps(part), slice(None))
        else:
            if set(self.quantities) & set(_OF_PAIRS):
                chunk = max(chunk, H * N**2)  # all heads of an image at once
            for images, heads in maps.parts(chunk=chunk):
                self._add(_TokenMaps(maps.maps(images, heads)), heads)
        self.images = self.images + B

    def _add(self, tokens: _TokenMaps, heads: slice) -> None:
        for name in self.quantities:
            values = self._values(name, tokens).double().sum(dim=0)
            sums = getattr(self, name).clone()
            (sums if name in _OF_PAIRS else sums[heads]).add_(values)
            setattr(self, name, sums)

    def _values(self, name: str, tokens: _TokenMaps) -> Tensor:
        match name:
            case "attention_distance":
                return tokens.distance(_distances(self.grid, self.pitch, tokens.maps.device, tokens.maps.dtype))
            case "attention_entropy":
                return tokens.entropy()
            case "attention_nmi":
                return tokens.nmi()
            case "cls_mass":
                return tokens.cls_mass()
            case "head_cosine":
                return tokens.cosine()
            case _:
                return tokens.js()

    def compute(self) -> dict[str, Tensor]:
        """By name: (H,) for a figure of each head, () for one of the layer."""
        means = {name: getattr(self, name) / self.images for name in self.quantities}
        if "attention_distance" in means:
            std, extent, cv = head_diversity(means["attention_distance"], uniform_distance(self.grid, self.pitch))
            means |= {"head_diversity": std, "head_range": extent, "head_cv": cv}
        return means


class _OneFigure(HeadStatistics):
    """One figure of ``HeadStatistics`` for itself."""

    quantity: str
    figure: str

    def __init__(self, num_heads: int, grid: Grid, pitch: Pitch = (1, 1)) -> None:
        super().__init__(num_heads, grid, pitch, (self.quantity,))

    def compute(self) -> Tensor:  # type: ignore[override]
        """(H,) for a figure of each head, () for one of the layer."""
        return super().compute()[self.figure]


class AttentionDistance(_OneFigure):
    """Mean over images of ``attention_distance``: (H,) px."""

    quantity = figure = "attention_distance"


class AttentionEntropy(_OneFigure):
    """Mean over images of ``attention_entropy``: (H,)."""

    quantity = figure = "attention_entropy"


class AttentionNMI(_OneFigure):
    """Mean over images of ``attention_nmi``: (H,)."""

    quantity = figure = "attention_nmi"


class CLSMass(_OneFigure):
    """Mean over images of ``cls_mass``: (H,)."""

    quantity = figure = "cls_mass"


class HeadCosine(_OneFigure):
    """Mean over images of ``head_cosine``: ()."""

    quantity = figure = "head_cosine"


class HeadJS(_OneFigure):
    """Mean over images of ``head_js``: ()."""

    quantity = figure = "head_js"


class HeadDiversity(_OneFigure):
    """``head_diversity`` of the heads' mean distances over all images, its std: ()."""

    quantity, figure = "attention_distance", "head_diversity"
