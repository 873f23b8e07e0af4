"""Crops of ImageNet's recipes, from the bytes of an image file to pixels of the network's size: random resized crop and flip
in training, resize and centre crop in evaluation. Two ways, chosen by ``data.decode``:

fast: decodes only what a crop needs, resizes once, antialiased and bicubic, into the place of the image in its batch.
pil: torchvision's own functions on PIL images, as in the published runs, pixel for pixel.

In evaluation their pixels differ by rounding alone, 2 levels of 256 at most; in training a crop that grows in one direction and
shrinks in the other may differ by more, as Pillow 13 goes through the two in another order (tests/test_streaming.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from eit_lab.data.decode import Decoder, Pixels
from eit_lab.data.reading import Sample

Box = tuple[int, int, int, int]
"""(top, left, height, width), px."""
Draw = Callable[[int], float]
"""A number in [0, 1) for each stream."""

CROP_STREAMS = range(1, 5)
"""The first attempt's share, aspect, top and left; further attempts take the streams after them. 0 is the flip's."""
_KEPT = 1 << 26  # bytes of the largest crop whose memory is kept for the next one
_CROP_TRIES = 10  # as torchvision's RandomResizedCrop
_bicubic = torch.ops.aten._upsample_bicubic2d_aa  # what F.resize calls; its ``out`` form writes into the batch


def random_box(size: tuple[int, int], draw: Draw, *, min_share: float) -> Box:
    """A crop of an image of (width, height): area share uniform, aspect ratio log-uniform in [3/4, 4/3], as published."""
    width, height = size
    for attempt in range(_CROP_TRIES):
        share, ratio, y, x = (draw(stream + 4 * attempt) for stream in CROP_STREAMS)
        area = width * height * (min_share + share * (1 - min_share))
        aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def eval_size(size: tuple[int, int], hw: tuple[int, int], *, resize_share: float) -> tuple[int, int]:
    """(height, width) to which an image of (width, height) is resized, so that the crop takes ``resize_share`` of it."""
    width, height = size
    h, w = hw
    if height * w <= width * h:
        resized = round(h / resize_share)
        return resized, int(resized * width / height)
    resized = round(w / resize_share)
    return int(resized * height / width), resized


def eval_crop(image: Image.Image, hw: tuple[int, int], *, resize_share: float) -> Image.Image:
    """Resize, bicubic, so that the crop takes ``resize_share`` of the tighter side; then the centre crop of (h, w).

    For a square crop this is torchvision's Resize(h / resize_share) and CenterCrop(h), pixel for pixel.
    """
    resized = eval_size(image.size, hw, resize_share=resize_share)
    return F.center_crop(F.resize(image, list(resized), InterpolationMode.BICUBIC), list(hw))


def resize_into(target: Tensor, pixels: Pixels) -> None:
    """Resize (H, W, 3) pixels, antialiased and bicubic, into ``target``, (3, h, w) uint8 that lies as (h, w, 3).

    They should lie without gaps: else torch copies them, into new memory each time.
    """
    source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if source.shape[-2:] == target.shape[-2:]:
        target.copy_(source[0])
        return
    _bicubic.out(source, list(target.shape[-2:]), False, None, None, out=target[None])


class FastCrops:
    """Crops through simplejpeg and one resize; holds the decoder's buffer, so each process needs one of its own."""

    def __init__(self, *, min_share: float, resize_share: float) -> None:
        self.min_share, self.resize_share = min_share, resize_share
        self._decoder = Decoder()
        self._room = np.empty(0, dtype=np.uint8)

    def train(self, sample: Sample, target: Tensor, draw: Draw, *, flip: bool) -> None:
        """A random crop of a sample into ``target``, (3, h, w) that lies as (h, w, 3). Raises DecodeError."""
        if sample.segments is not None:
            size = sample.segments.width, sample.segments.height
            box = random_box(size, draw, min_share=self.min_share)
            crop = self._decoder.crop(sample.data, sample.segments, box=box)
        else:
            pixels = self._decoder.decode(sample.data)
            box = random_box((pixels.shape[1], pixels.shape[0]), draw, min_share=self.min_share)
            crop = pixels[box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
        resize_into(target, self._without_gaps(crop))
        if flip:
            pixels = target.permute(1, 2, 0).numpy()
            cv2.flip(pixels, 1, pixels)

    def _without_gaps(self, crop: Pixels) -> Pixels:
        if crop.size > _KEPT:
            return np.ascontiguousarray(crop)
        if crop.size > self._room.size:
            self._room = np.empty(crop.size, dtype=np.uint8)
        whole = self._room[: crop.size].reshape(crop.shape)
        np.copyto(whole, crop)
        return whole

    def evaluate(self, sample: Sample, target: Tensor) -> None:
        """The centre crop of a sample, resized, into ``target``. Raises DecodeError."""
        pixels = self._decoder.decode(sample.data)
        hw = (target.shape[-2], target.shape[-1])
        height, width = eval_size((pixels.shape[1], pixels.shape[0]), hw, resize_share=self.resize_share)
        resized = torch.empty((height, width, 3), dtype=torch.uint8).permute(2, 0, 1)
        resize_into(resized, pixels)
        target.copy_(F.center_crop(resized, list(hw)))


class PilCrops:
    """The same through PIL and torchvision, as the published runs had them. Decoding stays strict; its pixels are PIL's."""

    def __init__(self, *, min_share: float, resize_share: float) -> None:
        self.min_share, self.resize_share = min_share, resize_share
        self._decoder = Decoder()

    def train(self, sample: Sample, target: Tensor, draw: Draw, *, flip: bool) -> None:
        """As FastCrops.train."""
        image = Image.fromarray(self._decoder.decode(sample.data))
        box = random_box(image.size, draw, min_share=self.min_share)
        image = F.resized_crop(image, *box, list(target.shape[-2:]), InterpolationMode.BICUBIC)
        target.copy_(F.pil_to_tensor(F.horizontal_flip(image) if flip else image))

    def evaluate(self, sample: Sample, target: Tensor) -> None:
        """As FastCrops.evaluate."""
        image = Image.fromarray(self._decoder.decode(sample.data))
        h, w = target.shape[-2:]
        target.copy_(F.pil_to_tensor(eval_crop(image, (h, w), resize_share=self.resize_share)))
