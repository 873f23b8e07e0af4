"""A few images with what a model makes of each: spectra, rollout, attention by layer, head and query, as arrays for a page.

Attention of all tokens on all tokens would be hundreds of megabytes an image; kept are the rows of CLS and of a lattice of
tokens, as many as fit ``BYTES`` an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eit_lab.analysis.layout import Layout, forward, layout_of
from eit_lab.analysis.rollout import Rollout
from eit_lab.data.augment import BatchAugment
from eit_lab.data.batch import Batch
from eit_lab.models.image_model import ImageModel
from eit_lab.models.intermediates import AttentionMaps, ConvolutionTaps, Tap

BYTES = 750_000
"""Of attention, an image."""
_AT_ONCE = 4  # images of one forward pass
_EPS = 1e-6  # as in the relative log amplitude


def take_pictures(
    model: ImageModel, batch: Batch, augment: BatchAugment, *, class_names: Sequence[str] | None = None
) -> dict[str, NDArray[Any]]:
    """Arrays of K images. Attention has L = 0 layers where the model hands out none.

    images (K, H, W, C) uint8, index, label, predicted (K,), class_names; input_spectrum (K, H, W) and token_spectrum
    (K, P, h, w) float16: mean over channels of log(1e-6 + |FFT2|), DC in the middle, points with a grid of their own left out;
    rollout (K, h, w) float16: the CLS row; queries (Q,): 0 is CLS, else 1 + place on the grid; attention (K, L, H, Q, h w) uint8: 255 A /
    attention_max (K, L, H, Q) float16; cls_mass (K, L, H, Q) float16; layers, head_width (L,); points (P,), grid (2,), pitch (2,) px.
    """
    device = next(model.parameters()).device
    layout = layout_of(model, img_hw=(batch.images.shape[-2], batch.images.shape[-1]))
    queries = torch.tensor(_queries(layout), device=device)
    parts = []
    with torch.inference_mode():
        for first in range(0, len(batch.images), _AT_ONCE):
            pixels = augment.normalise(batch.images[first : first + _AT_ONCE].to(device))
            images = pixels.to(next(model.parameters()).dtype)
            camera = _Camera(layout, queries)
            predicted = forward(model, images, tap=camera).argmax(dim=-1)
            parts.append(camera.arrays() | {"predicted": predicted, "input_spectrum": _spectrum(images)})
    arrays = {key: torch.cat([part[key] for part in parts]).cpu().numpy() for key in parts[0]}
    layers = camera.layers
    return arrays | {
        "images": batch.images.permute(0, 2, 3, 1).numpy(),
        "index": batch.index.numpy(),
        "label": batch.labels.numpy(),
        "class_names": np.array(list(class_names or ()), dtype=np.str_),
        "queries": queries.cpu().numpy(),
        "layers": np.array(layers, dtype=np.int64),
        "head_width": np.array([camera.head_width[layer] for layer in layers], dtype=np.int64),
        "points": np.array(camera.points, dtype=np.str_),
        "grid": np.array(layout.grid or (0, 0), dtype=np.int64),
        "pitch": np.array(layout.pitch or (0, 0), dtype=np.float64),
    }


class _Camera(Tap):
    """Keeps what the page shows of one small batch."""

    def __init__(self, layout: Layout, queries: Tensor) -> None:
        self.layout, self.queries = layout, queries
        self.points: list[str] = []
        self.layers: list[int] = []
        self.head_width: dict[int, int] = {}
        self._spectra: list[Tensor] = []
        self._attention: list[tuple[Tensor, Tensor, Tensor]] = []
        self._rollout = Rollout(layout.splits) if layout.has_heads else None
        self._num_images = 0

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        self._see(name, x[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2))
        return x

    def maps(self, name: str, x: Tensor) -> None:
        self._see(name, x)

    def _see(self, name: str, x: Tensor) -> None:
        self._num_images = len(x)
        if self.layout.grid == tuple(x.shape[-2:]):
            self.points.append(name)
            self._spectra.append(_spectrum(x))

    def attention(self, layer: int, maps: AttentionMaps) -> None:
        rows = maps.maps(queries=self.queries)  # (B, H, Q, N)
        tokens = rows[..., 1:]
        most = tokens.amax(dim=-1)
        shades = tokens / most[..., None].clamp_min(torch.finfo(torch.float32).tiny)
        self.layers.append(layer)
        self.head_width[layer] = maps.head_dim
        self._attention.append(((255 * shades).round().to(torch.uint8), most.half(), rows[..., 0].half()))
        if self._rollout is not None:
            self._rollout.attention(layer, maps)

    def convolution(self, layer: int, taps: ConvolutionTaps) -> None:
        if self._rollout is not None:
            self._rollout.convolution(layer, taps)

    def arrays(self) -> dict[str, Tensor]:
        """(K, ...) of everything."""
        B, device = self._num_images, self.queries.device
        h, w = self.layout.grid or (0, 0)
        shapes = {"attention": (B, 0, 0, 0, h * w), "attention_max": (B, 0, 0, 0), "cls_mass": (B, 0, 0, 0)}
        found = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        for name, part in zip(shapes, zip(*self._attention, strict=True), strict=False):
            found[name] = torch.stack(part, dim=1)
        rolled = torch.zeros(B, 0, 0, device=device)
        if self._rollout is not None:
            rolled = self._rollout.finish(B)[:, 1:].unflatten(1, (h, w))
        spectra = torch.stack(self._spectra, dim=1) if self._spectra else torch.zeros(B, 0, h, w, device=device)
        return found | {"rollout": rolled.half(), "token_spectrum": spectra}


def _spectrum(x: Tensor) -> Tensor:
    """Maps (B, C, h, w) -> mean over channels of log(1e-6 + |FFT2|) (B, h, w) in half precision, DC in the middle."""
    amplitude = torch.fft.fft2(x.float()).abs()
    return torch.fft.fftshift(torch.log(amplitude + _EPS).mean(dim=1), dim=(-2, -1)).half()


def _queries(layout: Layout) -> list[int]:
    """CLS, and all tokens or a lattice of them."""
    if not layout.has_heads:
        return [0]
    assert layout.grid is not None
    (h, w), maps = layout.grid, layout.num_heads * len(layout.head_width)
    if maps * (1 + h * w) * h * w <= BYTES:
        return list(range(1 + h * w))
    side = max(1, int(max(0, BYTES // (maps * h * w) - 1) ** 0.5))
    rows, cols = ([int((i + 0.5) * n / min(side, n)) for i in range(min(side, n))] for n in (h, w))
    return [0, *(1 + row * w + col for row in rows for col in cols)]
