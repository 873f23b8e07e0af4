"""ImageNet in folders, read through torchvision: random resized crop and flip in training, resize and centre crop else.

Where we differ from torchvision's transforms: the draws are a function of (seed, epoch, sample index), not of a worker's
generator, so the same image gets the same crop in the same epoch on any number of workers, ranks and restarts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from eit_lab.config import ImageNetData, as_hw
from eit_lab.data.catalog import describe, imagenet_root
from eit_lab.data.order import Item, held_out, uniform

Batch = tuple[Tensor, Tensor, Tensor]
_CROP_TRIES = 10  # as torchvision's RandomResizedCrop


class FolderImages(Dataset[Batch]):
    """Some images of an ImageFolder, decoded, cropped and normalised one by one."""

    def __init__(
        self, folder: ImageFolder, chosen: NDArray[np.int64], config: ImageNetData, *, augment_seed: int | None
    ) -> None:
        self.folder, self.chosen, self.config, self.augment_seed = folder, chosen, config, augment_seed

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, items: Sequence[Item]) -> Batch:
        """Images (B, 3, H, W) float32, labels (B,), sample indices (B,)."""
        loaded = [self._load(epoch, index) for epoch, index in items]
        images = torch.stack([image for image, _ in loaded])
        return images, torch.tensor([y for _, y in loaded]), torch.tensor([index for _, index in items])

    def _load(self, epoch: int, index: int) -> tuple[Tensor, int]:
        path, label = self.folder.samples[self.chosen[index]]
        image = self.folder.loader(path)
        hw = as_hw(self.config.img_size)
        if self.augment_seed is None:
            image = eval_crop(image, hw, resize_share=self.config.eval_resize_share)
        else:
            image = self._augment(image, hw, epoch, index)
        pixels = F.to_dtype(F.pil_to_tensor(image), torch.float32, scale=True)
        return F.normalize(pixels, list(self.config.mean), list(self.config.std)), label

    def _augment(self, image: Image.Image, hw: tuple[int, int], epoch: int, index: int) -> Image.Image:
        def draw(stream: int) -> float:
            assert self.augment_seed is not None
            return float(uniform(np.array([index]), seed=self.augment_seed, epoch=epoch, stream=stream)[0])

        top, left, height, width = self._crop_box(image.size, draw)
        image = F.resized_crop(image, top, left, height, width, list(hw), InterpolationMode.BICUBIC)
        return F.horizontal_flip(image) if draw(0) < self.config.hflip else image

    def _crop_box(self, size: tuple[int, int], draw: Callable[[int], float]) -> tuple[int, int, int, int]:
        """(top, left, height, width): area share uniform, aspect ratio log-uniform in [3/4, 4/3], as published."""
        width, height = size
        for attempt in range(_CROP_TRIES):
            share, ratio, y, x = (draw(1 + 4 * attempt + k) for k in range(4))
            area = width * height * (self.config.min_crop_share + share * (1 - self.config.min_crop_share))
            aspect = math.exp((2 * ratio - 1) * math.log(4 / 3))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return int(y * (height - h + 1)), int(x * (width - w + 1)), h, w
        h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        return (height - h) // 2, (width - w) // 2, h, w


def eval_crop(image: Image.Image, hw: tuple[int, int], *, resize_share: float) -> Image.Image:
    """Resize, bicubic, so that the crop takes ``resize_share`` of the tighter side; then the centre crop of (h, w).

    For a square crop this is torchvision's Resize(h / resize_share) and CenterCrop(h), pixel for pixel.
    """
    h, w = hw
    if image.height * w <= image.width * h:
        height = round(h / resize_share)
        width = int(height * image.width / image.height)
    else:
        width = round(w / resize_share)
        height = int(width * image.height / image.width)
    return F.center_crop(F.resize(image, [height, width], InterpolationMode.BICUBIC), [h, w])


def load_imagenet(config: ImageNetData, *, seed: int) -> Mapping[Literal["train", "val", "test"], FolderImages]:
    """train, a held-out slice of it as val, and the folder val/ as test."""
    root: Path = imagenet_root(config)
    folder, test = ImageFolder(str(root / "train")), ImageFolder(str(root / "val"))
    train, val = held_out(len(folder), describe(config).num_val, split_seed=config.split_seed)
    return {
        "train": FolderImages(folder, train, config, augment_seed=seed),
        "val": FolderImages(folder, val, config, augment_seed=None),
        "test": FolderImages(test, np.arange(len(test)), config, augment_seed=None),
    }
