"""Small data sets, held in memory: digits, MNIST's 5,000, Fashion-MNIST, CIFAR-10, CIFAR-100, synthetic images of any size.

A whole batch is cropped and flipped at once, so there is nothing here for a worker process to do; RandAugment or colour
jitter, where the recipe asks for it, goes image by image.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from eit_lab.config import ConfigError, DigitsData, Mnist5kData, RecipeConfig, SyntheticData, TorchvisionData, as_hw
from eit_lab.data.batch import FILLER, Batch
from eit_lab.data.catalog import describe, mnist_5k_file, small_files
from eit_lab.data.order import Item, held_out, uniform
from eit_lab.data.rand_augment import ImageAugment, build_image_augment

SmallData = DigitsData | Mnist5kData | TorchvisionData | SyntheticData

_LARGEST_RESIZED = 2**30  # bytes of a data set that is resized as a whole, and so only once
_RESIZED_AT_ONCE = 1024
_SPLIT_STREAM = 7  # of the test set of the digits and of MNIST's 5,000, which is the same for every split_seed


class InMemoryImages(Dataset[Batch]):
    """uint8 images (N, C, H, W) and labels (N,), served a batch at a time; augmented where there is an ``augment_seed``."""

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        config: SmallData,
        *,
        augment_seed: int | None = None,
        image_augment: ImageAugment | None = None,
    ) -> None:
        self.images, self.labels, self.config = images, labels, config
        self.augment_seed, self.image_augment = augment_seed, image_augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, items: Sequence[Item]) -> Batch:
        """The batch of these samples; augmented by (seed, epoch, index, copy) when this is a training set."""
        epoch, index, copy, place = np.array(items, dtype=np.int64).T
        images, labels = fit_size(self.images[index], self.config), self.labels[index]
        if self.augment_seed is not None:
            images = self._augment(images, index, epoch=epoch, copy=copy)
        filler = torch.from_numpy(index == FILLER)  # which -1 made the last image so far
        if filler.any():
            images[filler], labels[filler] = 0, 0
        return Batch(images, labels, torch.from_numpy(index), torch.from_numpy(np.stack([epoch, copy, place], axis=1)))

    def _augment(
        self, images: Tensor, index: NDArray[np.int64], *, epoch: NDArray[np.int64], copy: NDArray[np.int64]
    ) -> Tensor:
        def draw(stream: int) -> Tensor:
            assert self.augment_seed is not None
            return torch.from_numpy(uniform(index, seed=self.augment_seed, epoch=epoch, copy=copy, stream=stream))

        if pad := self.config.crop_padding:
            images = _crop(F.pad(images, (pad, pad, pad, pad)), draw(0), draw(1), images.shape[-2:])
        if self.config.hflip:
            flipped = draw(2) < self.config.hflip
            images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
        if self.image_augment is not None:
            images = self.image_augment.on_pixels(images, index, epoch=epoch, copy=copy)
        return images


def _crop(images: Tensor, y: Tensor, x: Tensor, hw: torch.Size) -> Tensor:
    """A crop of (h, w) from each of (B, C, H, W), its place drawn by y and x in [0, 1)."""
    rows = (y * (images.shape[-2] - hw[0] + 1)).long()[:, None] + torch.arange(hw[0])
    cols = (x * (images.shape[-1] - hw[1] + 1)).long()[:, None] + torch.arange(hw[1])
    batch, chans = torch.arange(images.shape[0]), torch.arange(images.shape[1])
    return images[batch[:, None, None, None], chans[None, :, None, None], rows[:, None, :, None], cols[:, None, None]]


def load_small(
    config: SmallData, recipe: RecipeConfig, *, seed: int
) -> Mapping[Literal["train", "val", "test"], InMemoryImages]:
    """The three parts of a small data set; ``seed`` draws the augmentation of train, which ``recipe`` chooses."""
    image_augment = build_image_augment(config, recipe, seed=seed)
    (images, labels), (test_images, test_labels) = _read(config)
    images, test_images = (
        _fit(images, config),
        _fit(test_images, config),
    )  # what is large stays as it is, until asked for
    facts = describe(config)
    train, val = held_out(len(images), facts.num_val, split_seed=config.split_seed, num_train=facts.num_train)
    return {
        "train": InMemoryImages(images[train], labels[train], config, augment_seed=seed, image_augment=image_augment),
        "val": InMemoryImages(images[val], labels[val], config),
        "test": InMemoryImages(test_images, test_labels, config),
    }


Split = tuple[Tensor, Tensor]  # uint8 images (N, C, H, W), int64 labels (N,)


def _read(config: SmallData) -> tuple[Split, Split]:
    match config:
        case DigitsData():
            return _read_digits(config)
        case Mnist5kData():
            return _read_mnist_5k(config)
        case TorchvisionData():
            return _read_torchvision(config)
        case SyntheticData():
            return _synthesise(config, config.num_samples, 0), _synthesise(config, max(1, config.num_samples // 4), 1)


def _read_digits(config: DigitsData) -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    data, target = load_digits(return_X_y=True)
    images = torch.from_numpy((data * (255 / 16)).round().astype(np.uint8)).view(-1, 1, 8, 8)  # 17 grey levels
    labels = torch.from_numpy(target.astype(np.int64))
    return _split(images, labels, config)


def _read_mnist_5k(config: Mnist5kData) -> tuple[Split, Split]:
    with gzip.open(mnist_5k_file()) as file:  # 784 pixels and the label a line
        table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
    return _split(table[:, :-1].view(-1, 1, 28, 28), table[:, -1].long(), config)


def _split(images: Tensor, labels: Tensor, config: DigitsData | Mnist5kData) -> tuple[Split, Split]:
    """A test set drawn from images that come without one."""
    train, test = held_out(len(images), describe(config).num_test, split_seed=_SPLIT_STREAM)
    return (images[train], labels[train]), (images[test], labels[test])


def _read_torchvision(config: TorchvisionData) -> tuple[Split, Split]:
    files = small_files(config)
    if config.dataset == "fashion_mnist":
        images, labels, test_images, test_labels = (_read_idx(file) for file in files)
        return (images[:, None], labels.long()), (test_images[:, None], test_labels.long())
    dataset = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[config.dataset]
    try:
        train, test = (dataset(files[0].parents[1], train=part) for part in (True, False))
    except RuntimeError as error:
        raise ConfigError(f"data.root: {files[0].parent} is damaged or incomplete: {error}") from None
    return _from_torchvision(train), _from_torchvision(test)


def _from_torchvision(dataset: torchvision.datasets.CIFAR10) -> Split:
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


def _read_idx(path: Path) -> Tensor:
    """A file in the IDX format of MNIST, plain or gzipped: big-endian magic 0x08 and sizes, then uint8 values."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if content[:3] != b"\x00\x00\x08":
        raise ConfigError(f"data.root: {path} is not an IDX file of bytes")
    shape = np.frombuffer(content, dtype=">u4", count=content[3], offset=4).astype(int)
    values = np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * content[3])
    if values.size != shape.prod():
        raise ConfigError(f"data.root: {path} is damaged: it should hold {shape.prod()} bytes, found {values.size}")
    return torch.from_numpy(values.reshape(shape).copy())


def _synthesise(config: SyntheticData, num_samples: int, part: int) -> Split:
    """Noise around one fixed pattern a class."""
    h, w = as_hw(config.img_size)
    patterns = np.random.Generator(np.random.Philox(key=11)).integers(
        64, 192, (config.num_classes, config.in_chans, h, w)
    )
    noise = np.random.Generator(np.random.Philox(key=12 + part))
    labels = np.arange(num_samples) % config.num_classes
    images = patterns[labels] + noise.integers(-48, 49, (num_samples, config.in_chans, h, w))
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def _fit(images: Tensor, config: SmallData) -> Tensor:
    """Images in the configured size, all at once where they then still fit into memory."""
    if images.shape[1] not in (1, config.in_chans):
        raise ConfigError(f"data.in_chans must be {images.shape[1]} for {config.name}, got {config.in_chans}")
    h, w = as_hw(config.img_size)
    if len(images) * config.in_chans * h * w > _LARGEST_RESIZED:
        return images
    return torch.cat([fit_size(part, config) for part in images.split(_RESIZED_AT_ONCE)])


def fit_size(images: Tensor, config: SmallData) -> Tensor:
    """(B, c, h, w) uint8 -> (B, in_chans, H, W) uint8: grey ones repeated, others resized, bicubic. Image by image."""
    if images.shape[1] == 1 and config.in_chans > 1:
        images = images.expand(-1, config.in_chans, -1, -1)
    if tuple(images.shape[-2:]) != as_hw(config.img_size):
        resized = F.interpolate(images.float(), as_hw(config.img_size), mode="bicubic", antialias=True)
        images = resized.round_().clamp_(0, 255).to(torch.uint8)
    return images.contiguous()


def download(config: TorchvisionData) -> None:
    """Fetch the files into data.root, through torchvision, where they are not there yet."""
    if not config.download or config.root is None:
        return
    try:
        small_files(config)
    except ConfigError:
        dataset = {
            "fashion_mnist": torchvision.datasets.FashionMNIST,
            "cifar10": torchvision.datasets.CIFAR10,
            "cifar100": torchvision.datasets.CIFAR100,
        }[config.dataset]
        dataset(config.root, download=True)
