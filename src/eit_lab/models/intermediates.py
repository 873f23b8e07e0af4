"""What a backbone hands out of a forward pass on request: tokens of the residual stream, branch outputs, attention maps.

A ``Tap`` is called while the pass makes each of them, so that whoever wants one number of every layer never holds more than one
layer. Without a tap the forward pass does not know of any of this. Attention maps are not what the pass computes: a fused
kernel never has them. ``AttentionMaps`` keeps query and key, and writes out as much of softmax(q k^T / sqrt(d)) as is asked for,
in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CHUNK = 2**20
"""Elements of the attention maps that are written out at once: 4 MB, which stays in a core's cache."""


class Tap:
    """Gets the intermediates of a forward pass in their order; this one takes none of them.

    Layer ``l`` counts from 0. A method that returns tokens may return others of the same shape: the pass goes on with them.
    """

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The residual stream (B, 1 + h w, D), CLS first, after ``stem``, ``blocks.l.mixer`` or ``blocks.l.mlp``."""
        return x

    def maps(self, name: str, x: Tensor) -> None:
        """Features (B, C, h, w) of a model of timm that has no such tokens, each at its own grid; to be read, not changed.

        ``name`` is timm's own (``layer1``, ``stages.0``), or as in ``tokens`` for a transformer without CLS.
        """

    def branch(self, name: str, x: Tensor) -> None:
        """Output of one branch of a mixer (B, 1 + h w, c): ``blocks.l.conv`` or ``blocks.l.attn``."""

    def attention(self, layer: int, maps: AttentionMaps) -> None:
        """The attention maps of a layer that has any."""

    def convolution(self, layer: int, taps: ConvolutionTaps) -> None:
        """What the convolution of a layer that has one weighs its neighbours with."""


class AttentionMaps:
    """softmax(q k^T / sqrt(d)) of one layer, (B, H, N, N) in float32, written out in parts as they are asked for."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        """Query and key (B, H, N, d), N with CLS first."""
        self._read = lambda: (q, k)

    @classmethod
    def of_packed(cls, qkv: Tensor) -> AttentionMaps:
        """Query, key and value as one product makes them, (B, N, 3, H, d); taken apart where a map is asked for."""
        maps = cls(qkv, qkv)
        maps._read = lambda: (qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2))
        return maps

    @property
    def q(self) -> Tensor:
        """Queries (B, H, N, d)."""
        return self._read()[0]

    @property
    def k(self) -> Tensor:
        """Keys (B, H, N, d)."""
        return self._read()[1]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, N)."""
        B, H, N, _ = self.q.shape
        return B, H, N, N

    @property
    def head_dim(self) -> int:
        """Width d of a head."""
        return self.q.shape[-1]

    def logits(
        self, images: slice = slice(None), heads: slice = slice(None), queries: slice | Tensor = slice(None)
    ) -> Tensor:
        """Products q k^T / sqrt(d) of some images, heads and query tokens (by number): (b, h, n, N), float32."""
        q, k = self.q[images, heads][:, :, queries].float(), self.k[images, heads].float()
        with torch.autocast(q.device.type, enabled=False):
            return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)

    def maps(
        self, images: slice = slice(None), heads: slice = slice(None), queries: slice | Tensor = slice(None)
    ) -> Tensor:
        """The maps of some images, heads and query tokens: (b, h, n, N), float32, rows summing to 1."""
        return self.logits(images, heads, queries).softmax(dim=-1)

    def parts(self, *, chunk: int = CHUNK) -> Iterator[tuple[slice, slice]]:
        """Slices of images and heads that cover all maps, each of ``chunk`` elements at most (one map at least)."""
        B, H, N, _ = self.shape
        num_maps = max(1, chunk // N**2)
        images, heads = max(1, num_maps // H), min(H, num_maps)
        for first in range(0, B, images):
            for head in range(0, H, heads):
                yield slice(first, min(B, first + images)), slice(head, min(H, head + heads))


class ConvolutionTaps:
    """What a convolution branch weighs the neighbours of each token with: the mean of |kernel| over its channels."""

    def __init__(self, taps: Callable[[], Tensor], grid: tuple[int, int], *, keeps_cls: bool = True) -> None:
        """``taps()`` -> (B or 1, h w or 1, k k), rows of a kernel one after the other; whether CLS comes out as it was."""
        self._taps, self.grid, self.keeps_cls = taps, grid, keeps_cls

    def taps(self) -> Tensor:
        """(B or 1, h w, k k), float32, no gradient; what a kernel reaches outside the grid is in it."""
        taps = self._taps().detach().float()
        return taps.expand(-1, self.grid[0] * self.grid[1], -1)

    def matrix(self) -> Tensor:
        """The convolution as a matrix over tokens (B or 1, N, N), rows divided by their sum; CLS sees itself only, or nothing."""
        (h, w), taps = self.grid, self.taps()
        k = round(taps.shape[-1] ** 0.5)
        rows, cols = (x.flatten() for x in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
        dy, dx = (x.flatten() - k // 2 for x in torch.meshgrid(torch.arange(k), torch.arange(k), indexing="ij"))
        to_row, to_col = rows[:, None] + dy, cols[:, None] + dx  # (h w, k k)
        inside = (to_row >= 0) & (to_row < h) & (to_col >= 0) & (to_col < w)
        target = torch.where(inside, 1 + to_row * w + to_col, 0).to(taps.device)  # outside: onto CLS's column, by 0
        matrix = taps.new_zeros(taps.shape[0], 1 + h * w, 1 + h * w)
        weights = taps * inside.to(taps.device)
        matrix[:, 1:].scatter_add_(-1, target.expand(taps.shape[0], -1, -1), weights)
        matrix[:, 0, 0] = float(self.keeps_cls)
        return matrix / matrix.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
