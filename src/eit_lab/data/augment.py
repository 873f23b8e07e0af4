"""What is done to a whole micro-batch on its device: normalising, random erasing (arXiv:1708.04896), mixup (arXiv:1710.09412)
and CutMix (arXiv:1905.04899), as timm has them in the published runs.

Where we differ from timm: images are mixed with their neighbour in the epoch's order, not with the mirrored place of the
process's batch, and ``recipe.mixup_group`` images of a step share one draw, so that nothing depends on how a global batch is
cut over ranks and micro-batches. Every random number is a hash of the counters that travel with the batch (seed, epoch,
sample index, copy, place), the noise too: it is the same on every device, but for rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv
from torch import Tensor

from eit_lab.config import DataConfig, RecipeConfig
from eit_lab.data.batch import Batch
from eit_lab.data.order import hashed, uniform

# timm's RandomErasing: share of the image's area, height over width, attempts to find a box that fits.
_ERASED_SHARE, _ERASED_ASPECT, _ERASE_TRIES = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
# Streams of the draws; those of the images themselves are below 100 (small.py, imagenet.py, rand_augment.py).
_ERASE_STREAM, _NOISE_STREAM, _BOX_STREAM, _MIX_STREAM = 100, 101, 110, 200


class Boxes(NamedTuple):
    """Rectangles of pixels, half open, one of each of (B,) int64; bottom == top where there is none."""

    top: NDArray[np.int64]
    bottom: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]

    def mask(self, hw: tuple[int, int], device: torch.device) -> Tensor:
        """(B, 1, h, w) bool: what is inside."""
        edges = _on(device, np.stack(self))[:, :, None]
        y, x = (torch.arange(size, device=device) for size in hw)
        rows, cols = (y >= edges[0]) & (y < edges[1]), (x >= edges[2]) & (x < edges[3])
        return (rows[:, :, None] & cols[:, None, :])[:, None]


class Mixing(NamedTuple):
    """How each of B images is mixed with its neighbour."""

    share: NDArray[np.float64]
    """(B,) share of the image's own label; the rest is its neighbour's."""
    cut: NDArray[np.bool_]
    """(B,) whether by CutMix; else by mixup."""
    boxes: Boxes
    """What CutMix takes from the neighbour."""


class BatchAugment:
    """Batches of training as the network gets them; their images and labels may be on any device.

    It holds no parameters and follows the batch's device. NOTE: leave ``index`` and ``draw`` of a batch on the host: reading
    them from the device would wait for all its work.
    """

    def __init__(self, data: DataConfig, recipe: RecipeConfig, *, num_classes: int, seed: int) -> None:
        self.recipe, self.num_classes, self.seed = recipe, num_classes, seed
        scale = 1 / 255
        self._mean = torch.tensor(data.mean).view(-1, 1, 1) / scale
        self._std = torch.tensor(data.std).view(-1, 1, 1) / scale

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32; for evaluation this is all there is to do."""
        if self._mean.device != images.device:
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return (images.float() - self._mean) / self._std

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) float32, normalised, erased and mixed; and what the loss compares with.

        That is the labels (B,) int64 when nothing is mixed, and the loss then smooths them itself; else soft targets
        (B, num_classes) float32 with label smoothing in them.
        """
        images = self.normalise(batch.images)
        index = batch.index.cpu().numpy()
        epoch, copy, place = batch.draw.cpu().numpy().T
        if self.recipe.random_erasing_prob > 0:
            images = self._erase(images, index, epoch=epoch, copy=copy)
        if not self.recipe.mixes:
            return images, batch.labels
        mixing = self.mixing(epoch, place, images.shape[-2:])
        return self._mix(images, mixing), self._mix_targets(batch.labels, mixing)

    # --------------------------------------------------------------------------------------------------------- erasing

    def erased_boxes(
        self, index: NDArray[np.int64], *, epoch: NDArray[np.int64], copy: NDArray[np.int64], hw: tuple[int, int]
    ) -> Boxes:
        """What is erased of each image of (h, w); an empty box for most."""

        def draw(stream: int) -> NDArray[np.float64]:
            return uniform(index, seed=self.seed, epoch=epoch, copy=copy, stream=stream)

        boxes = Boxes(*np.zeros((4, len(index)), dtype=np.int64))
        waiting = draw(_ERASE_STREAM) < self.recipe.random_erasing_prob
        for attempt in range(_ERASE_TRIES):
            if not waiting.any():
                break
            share, aspect, y, x = (draw(_BOX_STREAM + 4 * attempt + k) for k in range(4))
            area = (_ERASED_SHARE[0] + share * (_ERASED_SHARE[1] - _ERASED_SHARE[0])) * hw[0] * hw[1]
            low, high = np.log(_ERASED_ASPECT)
            ratio = np.exp(low + aspect * (high - low))
            height, width = (np.rint(np.sqrt(side)).astype(np.int64) for side in (area * ratio, area / ratio))
            fits = waiting & (height < hw[0]) & (width < hw[1])
            top, left = (y * (hw[0] - height + 1)).astype(np.int64), (x * (hw[1] - width + 1)).astype(np.int64)
            for edge, value in zip(boxes, (top, top + height, left, left + width), strict=True):
                edge[fits] = value[fits]
            waiting &= ~fits
        return boxes

    def _erase(
        self, images: Tensor, index: NDArray[np.int64], *, epoch: NDArray[np.int64], copy: NDArray[np.int64]
    ) -> Tensor:
        hw = (images.shape[-2], images.shape[-1])
        boxes = self.erased_boxes(index, epoch=epoch, copy=copy, hw=hw)
        (chosen,) = np.nonzero(boxes.bottom > boxes.top)
        if not len(chosen):
            return images
        keys = hashed(index[chosen], seed=self.seed, epoch=epoch[chosen], copy=copy[chosen], stream=_NOISE_STREAM)
        # NOTE: a copy that blocks would wait for all that the device still has to do.
        noise = _normal(_on(images.device, keys.view(np.int32).reshape(-1, 2)), images[0].numel())
        mask = Boxes(*(edge[chosen] for edge in boxes)).mask(hw, images.device)
        where = _on(images.device, chosen)
        images[where] = torch.where(mask, noise.view(-1, *images.shape[1:]), images[where])
        return images

    # ---------------------------------------------------------------------------------------------------------- mixing

    def mixing(self, epoch: NDArray[np.int64], place: NDArray[np.int64], hw: tuple[int, int] | torch.Size) -> Mixing:
        """The draws of the images at these places; all places of a group, and both of a pair, have the same."""
        recipe, batch_size = self.recipe, self.recipe.batch_size
        groups = -(-batch_size // recipe.mixup_group)
        group = place // batch_size * groups + place % batch_size // recipe.mixup_group

        def draw(stream: int) -> NDArray[np.float64]:
            return uniform(group, seed=self.seed, epoch=epoch, stream=_MIX_STREAM + stream)

        mixed = draw(0) < recipe.mixup_prob
        both = recipe.mixup_alpha > 0 and recipe.cutmix_alpha > 0
        cut = draw(1) < recipe.mixup_switch_prob if both else np.full(len(place), recipe.cutmix_alpha > 0)
        alpha = np.where(cut, recipe.cutmix_alpha, recipe.mixup_alpha)
        drawn = draw(2)
        share = np.where(mixed, betaincinv(alpha, alpha, drawn), 1.0)
        boxes = Boxes(*_cut(draw(3), share, hw[0]), *_cut(draw(4), share, hw[1]))
        area = (boxes.bottom - boxes.top) * (boxes.right - boxes.left)
        return Mixing(np.where(cut, 1 - area / (hw[0] * hw[1]), share), cut, boxes)

    def _mix(self, images: Tensor, mixing: Mixing) -> Tensor:
        """Both kinds in one: each pixel a weighted mean, the weights 0 and 1 for CutMix."""
        inside = mixing.boxes.mask((images.shape[-2], images.shape[-1]), images.device)
        cut, share = (_column(values, images.device)[:, None, None] for values in (mixing.cut, mixing.share))
        weight = torch.where(cut > 0, 1 - inside.float(), share)
        return images * weight + _swapped(images) * (1 - weight)

    def _mix_targets(self, labels: Tensor, mixing: Mixing) -> Tensor:
        smoothing = self.recipe.label_smoothing
        off = smoothing / self.num_classes
        own = torch.full((len(labels), self.num_classes), off, device=labels.device)
        own.scatter_(1, labels[:, None], 1 - smoothing + off)
        share = _column(mixing.share, labels.device)
        return own * share + _swapped(own) * (1 - share)


def _cut(
    centre: NDArray[np.float64], share: NDArray[np.float64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first, end) of CutMix's box along a side of ``size`` px, its centre drawn by ``centre``; clipped at the border."""
    length = (size * np.sqrt(1 - share)).astype(np.int64)
    middle = (centre * size).astype(np.int64)
    return np.clip(middle - length // 2, 0, size), np.clip(middle + (length + 1) // 2, 0, size)


def _column(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return _on(device, values.astype(np.float32))[:, None]


def _on(device: torch.device, values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


def _swapped(values: Tensor) -> Tensor:
    """(B, ...) with the two of each pair in each other's place; one without a partner (an epoch's last) stays in its own."""
    if len(values) % 2:
        return torch.cat([_swapped(values[:-1]), values[-1:]])
    return values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _normal(keys: Tensor, count: int) -> Tensor:
    """(B, count) standard normal numbers: Box and Muller's transform of a stateless hash of (key, position).

    ``keys`` (B, 2) int32. NOTE: not torch.randn with a generator for each image, though that is quicker on CPU (2.5 ms
    against 63 ms for 32 images of 224 px): on a GPU its numbers depend on the kind of GPU, and it takes a launch an image.
    """
    position = _hash(torch.arange((count + 1) // 2, dtype=torch.int32, device=keys.device))
    first, second = (((_hash(position ^ keys[:, k, None]) >> 8) & 0xFFFFFF).float() * 2**-24 for k in (0, 1))
    radius, angle = (-2 * (first + 2**-25).log()).sqrt(), second * (2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def _hash(values: Tensor) -> Tensor:
    """32 well-mixed bits of int32 values: xors with the bits above, and odd factors, as in murmur's finaliser.

    The right shift of int32 repeats the sign, so each is masked.
    """
    values = (values ^ ((values >> 16) & 0xFFFF)) * 0x7FEB352D
    values = (values ^ ((values >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return values ^ ((values >> 16) & 0xFFFF)
