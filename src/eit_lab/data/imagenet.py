"""ImageNet in folders, read through torchvision: random resized crop, flip and RandAugment in training, resize and centre
crop else.

Where we differ from torchvision's transforms: the draws are a function of (seed, epoch, sample index, copy), not of a
worker's generator, so the same image gets the same crop in the same epoch on any number of workers, ranks and restarts.
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

from eit_lab.command import RunError
from eit_lab.config import ConfigError, ImageNetData, RecipeConfig, as_hw
from eit_lab.data.batch import FILLER, Batch
from eit_lab.data.catalog import describe, imagenet_root
from eit_lab.data.order import Item, held_out, uniform
from eit_lab.data.rand_augment import ImageAugment, build_image_augment, global_states_kept

_CROP_TRIES = 10  # as torchvision's RandomResizedCrop


class FolderImages(Dataset[Batch]):
    """Some images of an ImageFolder, decoded and cropped one by one; augmented where there is an ``augment_seed``."""

    def __init__(
        self,
        folder: ImageFolder,
        chosen: NDArray[np.int64],
        config: ImageNetData,
        *,
        augment_seed: int | None = None,
        image_augment: ImageAugment | None = None,
    ) -> None:
        self.folder, self.chosen, self.config = folder, chosen, config
        self.augment_seed, self.image_augment = augment_seed, image_augment

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, items: Sequence[Item]) -> Batch:
        """The batch of these samples; augmented by (seed, epoch, index, copy) when this is a training set."""
        with global_states_kept():
            loaded = [self._load(epoch, index, copy) for epoch, index, copy, _ in items]
        return Batch(
            torch.stack([image for image, _ in loaded]),
            torch.tensor([label for _, label in loaded]),
            torch.tensor([index for _, index, _, _ in items]),
            torch.tensor([(epoch, copy, place) for epoch, _, copy, place in items]),
        )

    def _load(self, epoch: int, index: int, copy: int) -> tuple[Tensor, int]:
        hw = as_hw(self.config.img_size)
        if index == FILLER:
            return torch.zeros((self.config.in_chans, *hw), dtype=torch.uint8), 0
        path, label = self.folder.samples[self.chosen[index]]
        try:
            image = self.folder.loader(path)
        except OSError as error:
            raise RunError(f"data.root: {path} cannot be read: {error.strerror or error}") from None
        if self.augment_seed is None:
            image = eval_crop(image, hw, resize_share=self.config.eval_resize_share)
        else:
            image = self._augment(image, hw, epoch, index, copy)
        return F.pil_to_tensor(image), label

    def _augment(self, image: Image.Image, hw: tuple[int, int], epoch: int, index: int, copy: int) -> Image.Image:
        """In timm's order: crop, flip, RandAugment or colour jitter."""

        def draw(stream: int) -> float:
            assert self.augment_seed is not None
            return float(uniform(np.array([index]), seed=self.augment_seed, epoch=epoch, copy=copy, stream=stream)[0])

        top, left, height, width = self._crop_box(image.size, draw)
        image = F.resized_crop(image, top, left, height, width, list(hw), InterpolationMode.BICUBIC)
        image = F.horizontal_flip(image) if draw(0) < self.config.hflip else image
        return image if self.image_augment is None else self.image_augment(image, index, epoch=epoch, copy=copy)

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


def load_imagenet(
    config: ImageNetData, recipe: RecipeConfig, *, seed: int
) -> Mapping[Literal["train", "val", "test"], FolderImages]:
    """train, a held-out slice of it as val, and the folder val/ as test; ``recipe`` chooses the augmentation of train."""
    if config.in_chans != 3:
        raise ConfigError(f"data.in_chans must be 3 for {config.name}, got {config.in_chans}; nearest: 3")
    root: Path = imagenet_root(config)
    folder, test = ImageFolder(str(root / "train")), ImageFolder(str(root / "val"))
    train, val = held_out(len(folder), describe(config).num_val, split_seed=config.split_seed)
    image_augment = build_image_augment(config, recipe, seed=seed)
    return {
        "train": FolderImages(folder, train, config, augment_seed=seed, image_augment=image_augment),
        "val": FolderImages(folder, val, config),
        "test": FolderImages(test, np.arange(len(test)), config),
    }
