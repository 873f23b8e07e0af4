"""Attention rollout: what of each token reaches CLS through all layers, taking the residual connections as half of each.

Source: Abnar & Zuidema 2020 (arXiv:2005.00928): R_l = rownorm(A/2 + I/2) R_{l-1}, A the mean over heads, R_0 = I; the row of
CLS in the last R.

Where we differ: a split mixer moves tokens by attention in ``a`` of its D channels and by convolution in the other ``c``, so A is
replaced by (a / D) A + (c / D) |convolution as a matrix| with rows summing to 1; CLS sees itself only in the convolution. Where
model.ib.cls=zero it sees nothing there, and its row sums to a / D before the residual is added and rows are made to sum to 1. This
extension is our own. It leaves out what the published rollout leaves out too: values, projections and the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eit_lab.analysis.means import ImageMean, full_precision
from eit_lab.models.intermediates import AttentionMaps, ConvolutionTaps, Tap
from eit_lab.schedule import LayerSplit

LIMIT = 2**28
"""Bytes of layers' matrices that a rollout keeps before it multiplies them: 256 MB."""


def mean_over_heads(maps: AttentionMaps) -> Tensor:
    """(B, N, N), float32, rows summing to 1; no more than a part of the maps is written out at once."""
    B, H, N, _ = maps.shape
    mean = torch.zeros(
        B, N, N, dtype=torch.float32, device=maps.q.device
    )  # a pass in half precision has another default
    with full_precision(mean):
        for images, heads in maps.parts():
            mean[images] += maps.maps(images, heads).sum(dim=1)
    return mean / H


def mixer_matrix(attention: Tensor | None, convolution: Tensor | None, *, attn_dim: int, conv_dim: int) -> Tensor:
    """What a mixer does to tokens, as a matrix with rows summing to 1: (a / D) A + (c / D) convolution.

    That of CLS sums to a / D where the convolution gives it nothing.

    ``attention`` (B, N, N), the mean over heads; ``convolution`` (B or 1, N, N); None for a branch without channels.
    """
    assert (attention is not None) == (attn_dim > 0), f"attention maps belong to attn_dim > 0, which is {attn_dim}"
    assert (convolution is not None) == (conv_dim > 0), f"a convolution belongs to conv_dim > 0, which is {conv_dim}"
    D = attn_dim + conv_dim
    if attention is None or convolution is None:
        only = attention if attention is not None else convolution
        assert only is not None, "a mixer has channels"
        return only
    return attention * (attn_dim / D) + convolution * (conv_dim / D)


def with_residual(mixer: Tensor) -> Tensor:
    """rownorm(A/2 + I/2) of mixers A (B or 1, N, N): the same shape."""
    A = mixer / 2
    A.diagonal(dim1=-2, dim2=-1).add_(0.5)
    return A / A.sum(dim=-1, keepdim=True)


def rollout_step(rollout: Tensor, mixer: Tensor) -> Tensor:
    """R_l = rownorm(A/2 + I/2) R_{l-1} for R_{l-1} and A (B or 1, N, N): (B or 1, N, N)."""
    return with_residual(mixer) @ rollout


class Rollout(Tap):
    """The rollout of one forward pass after another: a tap of its own, or called by one for each layer.

    Only the row of CLS is asked for, so the layers' matrices are kept, and one row goes through them from the last to the first:
    N times less work than the product of all. More than ``LIMIT`` bytes of them become their product.
    """

    def __init__(self, splits: Sequence[LayerSplit]) -> None:
        """``splits``: channels of each layer's branches (``model.config.layer_splits()``)."""
        self.splits = tuple(splits)
        self._start()

    def _start(self) -> None:
        self._matrices: list[Tensor] = []  # each one layer, or the product of the layers so far; first layer first
        self._attention: Tensor | None = None
        self._convolution: Tensor | None = None
        self._layer = 0

    @torch.no_grad()
    def attention(self, layer: int, maps: AttentionMaps) -> None:
        """Take the attention maps of a layer."""
        self._attention = mean_over_heads(maps)
        self._complete(layer)

    @torch.no_grad()
    def convolution(self, layer: int, taps: ConvolutionTaps) -> None:
        """Take the convolution of a layer."""
        self._convolution = taps.matrix()
        self._complete(layer)

    def _complete(self, layer: int) -> None:
        """Close the layer once its last branch is there."""
        assert layer == self._layer, f"layer {layer} came where layer {self._layer} was due; finish() ends a pass"
        conv_dim, attn_dim = self.splits[layer]
        if (attn_dim and self._attention is None) or (conv_dim and self._convolution is None):
            return
        mixer = mixer_matrix(self._attention, self._convolution, attn_dim=attn_dim, conv_dim=conv_dim)
        self._matrices.append(with_residual(mixer))
        self._attention = self._convolution = None
        self._layer += 1
        if len(self._matrices) > 1 and sum(m.numel() * m.element_size() for m in self._matrices) > LIMIT:
            product, *rest = self._matrices
            with full_precision(product):
                for matrix in rest:
                    product = matrix @ product
            self._matrices = [product]

    @torch.no_grad()
    def finish(self, num_images: int) -> Tensor:
        """The row of CLS after the last layer for the ``num_images`` images of the pass: (B, N), float32, summing to 1.

        Its first entry is CLS itself. The next pass starts anew.
        """
        assert self._layer == len(self.splits), f"the pass ended after layer {self._layer} of {len(self.splits)}"
        row = self._matrices[0].new_zeros(1, 1, self._matrices[0].shape[-1])
        row[..., 0] = 1
        with full_precision(row):
            for matrix in reversed(self._matrices):
                row = row @ matrix
        self._start()
        return row[:, 0].expand(num_images, -1)


class RolloutMap(ImageMean):
    """Mean over images of the row of CLS on the token grid: (h, w)."""

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__(grid)
        self.grid = grid

    def update(self, rows: Tensor) -> None:
        """Add the rows of CLS (B, 1 + h w)."""
        self.add(rows[:, 1:].unflatten(1, self.grid))

    def compute(self) -> Tensor:
        """(h, w), float64: shares of all tokens. What is missing to a sum of 1 is CLS's own, left out."""
        return self.mean()
