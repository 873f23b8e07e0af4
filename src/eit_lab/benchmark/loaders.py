"""Who is compared: torchvision's ImageFolder, timm's DeiT transform, and eit_lab's loader on files and on shards.

Each in the words of its own documentation. Torchvision and timm hand over normalised float batches (erased ones, with timm's
DeiT recipe); ours are uint8, and normalising, erasing, mixup and CutMix happen on the device, in batch (data/augment.py). timm
does mixup outside the loader too. ``batch_augment_ms`` is what that takes on a CPU core, where there is no other device.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from timm.data.transforms_factory import create_transform
from torchvision import transforms
from torchvision.datasets import ImageFolder

from eit_lab.benchmark.crop_limit import CropLimit
from eit_lab.benchmark.turns import on_cores
from eit_lab.compose import compose_one
from eit_lab.config import Config, ImageNetData
from eit_lab.data.augment import BatchAugment
from eit_lab.data.batch import Batch
from eit_lab.data.crops import Box, random_box
from eit_lab.data.imagenet import StreamedImages, load_imagenet
from eit_lab.data.order import uniform

IMG_SIZE = 224
FULL_RECIPE = "eit300"  # DeiT's augmentation (arXiv:2012.12877, table 9), as deit300 has it
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def config_of(root: Path, *, recipe: str, batch_size: int, cache: Path, workers: int = 1) -> Config:
    """The config of a training on ``root``."""
    config = compose_one(
        ["model=eit_base", "data=imagenet", f"recipe={recipe}", f"recipe.batch_size={batch_size}", "logger=none",
         "trainer.accelerator=cpu"]
    )  # fmt: skip
    assert isinstance(config.data, ImageNetData)
    data = dataclasses.replace(config.data, root=str(root), cache_dir=str(cache), num_workers=workers)
    return dataclasses.replace(config, data=data)


def ours(config: Config) -> StreamedImages:
    """The training set as a run has it."""
    assert isinstance(config.data, ImageNetData)
    return load_imagenet(config.data, config.recipe, seed=config.seed)["train"]


def torchvision_folder(root: Path) -> ImageFolder:
    """Torchvision's reference: RandomResizedCrop, flip, ToTensor, Normalize, on PIL images."""
    return ImageFolder(
        str(root / "train"),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(IMG_SIZE, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(_MEAN, _STD),
            ]
        ),
    )


class TimmFolder(ImageFolder):  # type: ignore[misc]  # torchvision has no types
    """timm's create_transform with DeiT's words, on ImageFolder; it normalises and erases in the worker."""

    def __init__(self, root: Path) -> None:
        super().__init__(
            str(root / "train"),
            create_transform(
                input_size=IMG_SIZE,
                is_training=True,
                auto_augment="rand-m9-mstd0.5-inc1",
                interpolation="bicubic",
                re_prob=0.25,
                re_mode="pixel",
                re_count=1,
                mean=_MEAN,
                std=_STD,
            ),
        )

    def __getitem__(self, index: int) -> Any:
        # NOTE: timm 1.0 asks posterize for 0 bits once in a thousand images, which Pillow 13 refuses: drawn anew then.
        for _ in range(10):
            try:
                return super().__getitem__(index)
            except ValueError:
                continue
        return super().__getitem__(index)


# ----------------------------------------------------------------------------------------------- without a loader, one core


class DecodeAndCrop:
    """Our data set in this process, without a loader: checksum, slice, decode, resize and flip into a batch."""

    def __init__(self, images: StreamedImages, *, batch_size: int, num: int) -> None:
        """``images`` of shards, augmented by crop and flip only; the first ``num`` of them."""
        self.images, self.batch_size = images, batch_size
        self.num = min(num, len(images))

    def boxes(self) -> NDArray[np.int32]:
        """(num, 4): top, left, height, width of each crop that a turn takes."""
        index, seed = self.images.reader.index, self.images.augment_seed
        assert seed is not None

        def box(place: int) -> Box:
            def draw(stream: int) -> float:
                return float(uniform(np.array([place]), seed=seed, epoch=0, stream=stream)[0])

            sample = int(self.images.chosen[place])
            size = int(index.width[sample]), int(index.height[sample])
            return random_box(size, draw, min_share=self.images.config.min_crop_share)

        return np.array([box(place) for place in range(self.num)], dtype=np.int32)

    def files(self, root: Path) -> list[bytes]:
        """The files in the folder ``root`` that the shards were made of, in the order of a turn."""
        keys = [self.images.reader.index.key(int(sample)) for sample in self.images.chosen[: self.num]]
        return [(root / "train" / key).read_bytes() for key in keys]

    def __call__(self) -> float:
        """A turn; images per second."""
        began = time.perf_counter()
        for first in range(0, self.num, self.batch_size):
            places = range(first, min(first + self.batch_size, self.num))
            self.images[[(0, place, 0, place) for place in places]]
        return self.num / (time.perf_counter() - began)


def at_once(limit: CropLimit, images: Sequence[bytes], boxes: NDArray[np.int32], chosen: Sequence[int]) -> float:
    """libjpeg-turbo's rate on several cores at once: what the machine gives for the second one."""
    from concurrent.futures import ThreadPoolExecutor

    def on_core(core: int) -> float:
        with on_cores([core]):
            return len(images) / limit.run(images, boxes)[0]

    with ThreadPoolExecutor(len(chosen)) as pool:
        return sum(pool.map(on_core, chosen))


def batch_augment_ms(config: Config, batch: Batch, *, num_classes: int = 1000, repetitions: int = 5) -> float:
    """Milliseconds an image that normalising, erasing and mixing take on this CPU, one thread."""
    augment = BatchAugment(config.data, config.recipe, num_classes=num_classes, seed=0)
    times = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        augment(batch)
        times.append(time.perf_counter() - began)
    return 1000 * median(times[1:]) / len(batch.images)
