"""Effective receptive field: which pixels the centre token's features depend on, over many images.

Sources: Luo et al. 2016 (arXiv:1701.04128); as measured by Ding et al. 2022 (arXiv:2203.06717) and their published script. The
features of the token at (h // 2, w // 2) after the last block, before the final norm, as there. (The sum of the channels after a
LayerNorm with equal weights is a constant: its gradient would be rounding.) Their positive part is summed over channels, the
gradient with respect to the input is taken, its positive part is summed over the colours and over the images.

Where we differ:

- The side of a square is measured on the sums themselves. The published script takes their logarithm first (log10(1 + sum)), which
  makes the sides depend on the scale of the gradient.
- The square is centred on the centre token's own place in the image and not on the image's centre. An even grid has no token there,
  and the tokens of EIT's stem at 224 px are centred at 12 i + 3.5 px.
- A side is a real number: a pixel is a unit square, and a square that covers half of it holds half of its sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, isqrt
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from eit_lab.models.backbone import Backbone
from eit_lab.models.image_model import ImageModel
from eit_lab.models.intermediates import Tap
from eit_lab.models.stem import ConvPatch, EITPatch, Patchify, token_grid

SHARES = (0.2, 0.3, 0.5, 0.99)
"""Shares of the sum that a square must hold, as published."""


class _Last(Tap):
    """Keeps the tokens of the residual stream that came last."""

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        self.x, self.grid = x, grid
        return x


def last_features(model: ImageModel, images: Tensor) -> Tensor | None:
    """Features after the last block, before the final norm where the model lets us, as maps: (B, D, h, w).

    A backbone's and those of timm's models that hand out intermediates are without the final norm. Of another model it is what
    forward_features gives, (B, D, h, w) or tokens (B, N, D) of a square grid. None where it is neither.
    """
    if isinstance(model, Backbone):
        tap = _Last()
        model.forward_features(images, tap=tap)
        return tap.x[:, 1:].transpose(1, 2).unflatten(2, tap.grid)
    if hasattr(model, "forward_intermediates"):
        return cast(Any, model).forward_intermediates(
            images, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True
        )[-1]
    features = model.forward_features(images)
    if features.ndim == 4:
        return features
    if features.ndim != 3:
        return None
    prefix = getattr(model, "num_prefix_tokens", 1)
    side = isqrt(max(0, features.shape[1] - prefix))
    if side == 0 or prefix + side**2 != features.shape[1]:
        return None
    return features[:, prefix:].transpose(1, 2).unflatten(2, (side, side))


def contribution(model: ImageModel, images: Tensor, *, chunk: int = 4) -> Tensor:
    """How much each pixel of normalised images (B, C, H, W) adds to the centre token's features: (B, H, W), float32, >= 0.

    The model is in evaluation mode; its parameters get no gradients. The graph of ``chunk`` images is in memory at once.
    """
    assert not model.training, "the effective receptive field is one of evaluation: call eval() first"
    maps = []
    with torch.inference_mode(mode=False), torch.enable_grad():
        for part in images.split(chunk):
            x = part.detach().clone().requires_grad_()
            features = last_features(model, x)
            assert features is not None, "a model without a grid has no centre token: centre_px gives None"
            centre = features[:, :, features.shape[2] // 2, features.shape[3] // 2]
            (gradient,) = torch.autograd.grad(centre.float().relu().sum(), x)
            maps.append(gradient.float().relu().sum(dim=1))
    return torch.cat(maps)


class EffectiveReceptiveField(Metric):
    """The contributions of pixels summed over images, and the squares around the centre token that hold a share of them."""

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(
        self, img_hw: tuple[int, int], *, centre: tuple[float, float] | None, shares: Sequence[float] = SHARES
    ) -> None:
        """``img_hw`` (H, W) in px; ``centre`` row and column in px (``centre_px``), None: the centroid of what is found.

        None is for ConvNets: padded windows with strides, one after another, put a feature far from its share of the image.
        """
        super().__init__()
        self.centre, self.shares = centre, tuple(shares)
        self.add_state("total", torch.zeros(img_hw, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, contributions: Tensor) -> None:
        """Add the contributions (B, H, W) of B images."""
        self.total = self.total + contributions.double().sum(dim=0)
        self.images = self.images + len(contributions)

    def compute(self) -> dict[str, Tensor]:
        """``map`` (H, W), summing to 1, ``side_px`` (K,) and ``centre_px`` (2,), float64: not numbers where no pixel contributes;
        ``images`` ().
        """
        centre = self.centre or centroid(self.total)
        side = smallest_square(self.total, self.shares, centre=centre)
        at = torch.tensor(centre, dtype=torch.float64, device=side.device)
        return {"map": self.total / self.total.sum(), "side_px": side, "images": self.images, "centre_px": at}

    def result(self) -> dict[str, Any]:
        """The same as plain numbers, the map in at most 64 x 64 cells; None for what is not a number. All ranks must call."""
        found = self.compute()
        side = found["side_px"].tolist()
        some = not any(isnan(s) for s in side)
        return {
            "images": int(found["images"]),
            "map": binned(found["map"]).tolist() if some else None,
            "shares": list(self.shares),
            "side_px": side if some else [None] * len(side),
            "centre_px": found["centre_px"].tolist() if some or self.centre else None,
            "centre_of": "token" if self.centre else "map",
        }


@torch.no_grad()
def centre_px(model: ImageModel, img_hw: tuple[int, int], *, in_chans: int) -> tuple[float, float] | None:
    """Where the centre token of images (H, W) in px sits: row and column in px; whole numbers are the middles of pixels.

    The middle of the window that our stem sees for token (h // 2, w // 2), from its kernels, strides and paddings. In another
    model a token is taken for the middle of its share of the image; None where its last features have no grid.
    """
    if isinstance(model, Backbone):
        h, w = token_grid(model.stem, img_hw, in_chans=in_chans)
        return _window_middle(model.stem, img_hw[0], h // 2), _window_middle(model.stem, img_hw[1], w // 2)
    weight = next(model.parameters())
    maps = last_features(model, weight.new_zeros(1, in_chans, *img_hw))
    if maps is None:
        return None
    row, col = ((n // 2 + 0.5) * side / n - 0.5 for n, side in zip(maps.shape[-2:], img_hw, strict=True))
    return row, col


def _window_middle(stem: nn.Module, side: int, token: int) -> float:
    """The middle in px of what the stem sees for one token, on one axis of ``side`` px."""
    position = float(token)
    for kernel, stride, padding in reversed(_windows(stem, side)):
        position = position * stride + (kernel - 1) / 2 - padding
    return position


def _windows(stem: nn.Module, side: int) -> list[tuple[int, int, int]]:
    """(kernel, stride, padding before the first) of a stem's windows in their order, on one axis of ``side`` px."""
    match stem:
        case Patchify():
            pitch = stem.proj.stride[0]
            return [(pitch, pitch, -side % pitch // 2)]
        case EITPatch():
            conv, pool = stem.conv, stem.pool
            size = int(pool.kernel_size) if isinstance(pool, nn.MaxPool2d) else 1  # type: ignore[arg-type]  # square
            return [(conv.kernel_size[0], conv.stride[0], int(conv.padding[0])), (size, size, 0)]
        case ConvPatch():
            convs = [layer for layer in stem.convs if isinstance(layer, nn.Conv2d)]
            for conv in convs:
                side = (side + 2 * int(conv.padding[0]) - conv.kernel_size[0]) // conv.stride[0] + 1
            rest = stem.proj.stride[0]
            return [(c.kernel_size[0], c.stride[0], int(c.padding[0])) for c in convs] + [
                (rest, rest, -side % rest // 2)
            ]
    raise AssertionError(f"a stem whose windows are not known: {type(stem).__name__}")


def centroid(contributions: Tensor) -> tuple[float, float]:
    """Row and column in px of a map's centre of mass (H, W); not numbers for a map without any contribution."""
    share = contributions.double() / contributions.double().sum()
    row, col = (
        float((share.sum(dim=1 - axis) * torch.arange(n, dtype=torch.float64, device=share.device)).sum())
        for axis, n in enumerate(share.shape)
    )
    return row, col


def smallest_square(contributions: Tensor, shares: Sequence[float] = SHARES, *, centre: tuple[float, float]) -> Tensor:
    """Sides in px of the smallest squares around ``centre`` (row, column in px) that hold these shares of a map (H, W): (K,), float64.

    Pixels are unit squares; a square may reach over the image's border, where there is nothing. To 1e-6 px. Not numbers for a map
    without any contribution.
    """
    contributions = contributions.double()
    H, W = contributions.shape
    total = contributions.sum()
    if not total > 0:
        return total.new_full((len(shares),), torch.nan)
    wanted = torch.tensor(shares, dtype=torch.float64, device=total.device) * total * (1 - 1e-12)
    low = torch.zeros_like(wanted)
    high = torch.full_like(wanted, 1 + 2 * max(centre[0], H - 1 - centre[0], centre[1], W - 1 - centre[1]))
    while bool((high - low).max() > 1e-6):  # the sum grows with the side
        side = (low + high) / 2
        inside = torch.einsum("ky,yx,kx->k", _overlap(side, centre[0], H), contributions, _overlap(side, centre[1], W))
        enough = inside >= wanted
        low, high = torch.where(enough, low, side), torch.where(enough, side, high)
    return high


def _overlap(side: Tensor, centre: float, n: int) -> Tensor:
    """How much of each of n pixels lies within side / 2 (K,) of ``centre``, on one axis: (K, n)."""
    pixel = torch.arange(n, dtype=side.dtype, device=side.device)
    right = torch.minimum(pixel + 0.5, (centre + side / 2)[:, None])
    left = torch.maximum(pixel - 0.5, (centre - side / 2)[:, None])
    return (right - left).clamp_min(0)


def binned(contributions: Tensor, *, max_side: int = 64) -> Tensor:
    """A map (H, W) on at most ``max_side`` x ``max_side`` equal cells, for a picture: the same sum, float64.

    A pixel that cells share is split by area. Sides that need no binning stay.
    """
    contributions = contributions.double()
    rows, cols = (_cells(n, min(n, max_side)).to(contributions.device) for n in contributions.shape)
    return rows @ contributions @ cols.T


def _cells(n: int, num_cells: int) -> Tensor:
    """Share of each of n pixels that falls into each cell (num_cells, n)."""
    edges = torch.arange(num_cells + 1, dtype=torch.float64) * n / num_cells
    pixel = torch.arange(n, dtype=torch.float64)
    right, left = torch.minimum(pixel + 1, edges[1:, None]), torch.maximum(pixel, edges[:-1, None])
    return (right - left).clamp_min(0)
