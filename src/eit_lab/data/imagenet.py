"""ImageNet and what is laid out like it, wherever it lies (layouts/): batches of bytes, cropped and augmented by the worker.

Where we differ from torchvision's transforms: the draws are a function of (seed, epoch, sample index, copy), not of a
worker's generator, so the same image gets the same crop in the same epoch on any number of workers, ranks and restarts,
and from a folder the same as from shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from eit_lab.command import RunError
from eit_lab.config import ConfigError, ImageNetData, RecipeConfig, as_hw
from eit_lab.data.batch import FILLER, Batch
from eit_lab.data.catalog import describe
from eit_lab.data.crops import CROP_STREAMS, FastCrops, PilCrops
from eit_lab.data.decode import DecodeError
from eit_lab.data.order import Item, Windows, held_out, uniform
from eit_lab.data.prefetch import Prefetcher, Wanted
from eit_lab.data.rand_augment import ImageAugment, build_image_augment
from eit_lab.data.rand_ops import hold_one_thread
from eit_lab.data.reading import SampleError, SampleReader
from eit_lab.data.roots import notes, open_data

_FLIP_STREAM = 0
_STAND_INS = 8
_DRAWN = 1 + 3 * len(CROP_STREAMS)  # of the flip and three attempts at a crop, which are enough for nearly all


class StreamedImages(Dataset[Batch]):
    """Some samples of a split, decoded and cropped a batch at a time; augmented where there is an ``augment_seed``."""

    def __init__(
        self,
        reader: SampleReader,
        chosen: NDArray[np.int64],
        config: ImageNetData,
        *,
        class_names: Sequence[str],
        notes: Sequence[str] = (),
        windows: Windows | None = None,
        file_order: NDArray[np.int64] | None = None,
        augment_seed: int | None = None,
        image_augment: ImageAugment | None = None,
    ) -> None:
        self.reader, self.chosen, self.config = reader, chosen, config
        self.class_names, self.notes = tuple(class_names), tuple(notes)
        self.windows = windows
        """How the order of training goes through the files, where they are fetched whole; else None."""
        self.file_order = file_order
        """Indices in the order of the files, for evaluation, where they are fetched whole; else None."""
        self.augment_seed, self.image_augment = augment_seed, image_augment
        hold_one_thread()  # before workers are forked
        crops = PilCrops if config.decode == "pil" else FastCrops
        self._crops = crops(min_share=config.min_crop_share, resize_share=config.eval_resize_share)

    def __len__(self) -> int:
        return len(self.chosen)

    def prefetcher(self) -> Prefetcher | None:
        """What fetches files before they are needed, where they are fetched at all."""
        files = self.reader.files
        # All of the cache: it is asked for two windows, which it was found to hold (roots.py).
        return None if files is None else Prefetcher(files, ahead_bytes=files.limit_bytes)

    def files_ahead(self, *, seed: int, epoch: int, window: int) -> list[Wanted]:
        """The files of a window of training and of the next one, in the order in which they are needed."""
        assert self.windows is not None
        files, windows = self.windows.files_in_turn(seed=seed, epoch=epoch)
        ahead = files[(windows == window) | (windows == window + 1)]
        if window == windows[-1]:
            files, windows = self.windows.files_in_turn(seed=seed, epoch=epoch + 1)
            ahead = np.concatenate([ahead, files[windows == 0]])
        return [self.reader.wanted(container) for container in dict.fromkeys(ahead.tolist())]

    def name(self, index: int) -> str:
        """Where a sample lies, for people."""
        return self.reader.name(int(self.chosen[index]))

    def __getitem__(self, items: Sequence[Item]) -> Batch:
        """The batch of these samples; augmented by (seed, epoch, index, copy) when this is a training set.

        What cannot be read is in ``unread``. In training the next sample of the batch that can be stands in its place, in
        evaluation a blank FILLER. Raises RunError where none of the batch can be read.
        """
        h, w = as_hw(self.config.img_size)
        images = _new_batch(len(items), h, w)
        rows = np.array(items, dtype=np.int64)
        epoch, index, copy, _ = rows.T
        draws = self._draws(index, epoch, copy)
        unread: dict[int, str] = {}
        for place, item in enumerate(items):
            target = images[place]
            if item[1] == FILLER:
                target.zero_()
                continue
            try:
                self._load(target, item, None if draws is None else draws[place])
            except (SampleError, DecodeError) as error:
                unread[place] = self._reason(item[1], error)
        report = [(items[place][1], reason) for place, reason in unread.items()]
        labels = self.reader.index.label[self.chosen[index]].astype(np.int64)
        labels[index == FILLER] = 0
        if unread:
            self._fill_in(sorted(unread), images, labels, rows)
        epoch, index, copy, order_place = rows.T
        return Batch(
            images,
            torch.from_numpy(labels),
            torch.from_numpy(index.copy()),
            torch.from_numpy(np.stack([epoch, copy, order_place], axis=1)),
            report,
        )

    def _draws(
        self, index: NDArray[np.int64], epoch: NDArray[np.int64], copy: NDArray[np.int64]
    ) -> list[list[float]] | None:
        """Numbers of the first streams for each sample: one at a time they would cost a tenth of its decoding."""
        if self.augment_seed is None:
            return None
        streams = [
            uniform(index, seed=self.augment_seed, epoch=epoch, copy=copy, stream=stream) for stream in range(_DRAWN)
        ]
        drawn: list[list[float]] = np.stack(streams, axis=1).tolist()
        return drawn

    def _load(self, target: Tensor, item: Item, drawn: list[float] | None) -> None:
        """One sample into its place, in timm's order: crop, flip, RandAugment or colour jitter."""
        epoch, index, copy, _ = item
        sample = self.reader.read(int(self.chosen[index]))
        if drawn is None:
            self._crops.evaluate(sample, target)
            return

        def draw(stream: int) -> float:
            if stream < _DRAWN:
                return drawn[stream]
            assert self.augment_seed is not None
            return float(uniform(np.array([index]), seed=self.augment_seed, epoch=epoch, copy=copy, stream=stream)[0])

        self._crops.train(sample, target, draw, flip=drawn[_FLIP_STREAM] < self.config.hflip)
        if self.image_augment is not None:
            pixels = target.permute(1, 2, 0).numpy()
            pixels[:] = self.image_augment.augment(pixels, index, epoch=epoch, copy=copy)

    def _reason(self, index: int, error: SampleError | DecodeError) -> str:
        return str(error) if isinstance(error, SampleError) else f"{self.name(index)}: cannot be decoded: {error}"

    def _fill_in(self, bad: Sequence[int], images: Tensor, labels: NDArray[np.int64], rows: NDArray[np.int64]) -> None:
        good = [place for place in range(len(rows)) if place not in set(bad)]
        for place in bad:
            if self.augment_seed is None:
                images[place].zero_()
                labels[place], rows[place, 1] = 0, FILLER
                continue
            if not good:
                self._stand_in(images[place], rows[place])
                labels[place] = self.reader.index.label[self.chosen[rows[place, 1]]]
                good = [place]
                continue
            other = next((p for p in good if p > place), good[0])
            images[place] = images[other]
            labels[place] = labels[other]
            rows[place, :3] = rows[other, :3]

    def _stand_in(self, target: Tensor, row: NDArray[np.int64]) -> None:
        """Another sample where none of a batch could be read; a function of the index alone."""
        epoch, index, copy, place = row.tolist()
        reason = ""
        for other in range(index + 1, index + 1 + _STAND_INS):
            row[1] = other % len(self)
            drawn = self._draws(row[1:2], row[0:1], row[2:3])
            try:
                self._load(target, (epoch, int(row[1]), copy, place), None if drawn is None else drawn[0])
            except (SampleError, DecodeError) as error:
                reason = self._reason(int(row[1]), error)
            else:
                return
        raise RunError(f"{self.name(index)} cannot be read, nor the {_STAND_INS} images after it; the last: {reason}")


def _new_batch(count: int, h: int, w: int) -> Tensor:
    """(B, 3, h, w) uint8 that lies as (B, h, w, 3); in a worker where the training process can read it without a copy."""
    size = count * h * w * 3
    if get_worker_info() is None:
        flat = torch.empty(size, dtype=torch.uint8)
    else:
        flat = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
    return flat.view(count, h, w, 3).permute(0, 3, 1, 2)


def load_imagenet(
    config: ImageNetData, recipe: RecipeConfig, *, seed: int
) -> Mapping[Literal["train", "val", "test"], StreamedImages]:
    """train, a held-out slice of it as val, and the split val as test; ``recipe`` chooses the augmentation of train."""
    if config.in_chans != 3:
        raise ConfigError(f"data.in_chans must be 3 for {config.name}, got {config.in_chans}; nearest: 3")
    root = open_data(config)
    train_reader, test_reader = root.reader("train"), root.reader("val")
    file = train_reader.index.container.astype(np.int64) if root.windowed else None
    facts = describe(config)
    train, val = held_out(
        len(train_reader), facts.num_val, split_seed=config.split_seed, num_train=facts.num_train, file=file
    )
    windows = None if file is None else Windows(file[train], config.shuffle_window)
    test = np.arange(len(test_reader))
    image_augment = build_image_augment(config, recipe, seed=seed, exact=config.decode == "pil")
    names = root.listing.class_names
    return {
        "train": StreamedImages(
            train_reader,
            train,
            config,
            class_names=names,
            notes=notes(config, root),
            windows=windows,
            augment_seed=seed,
            image_augment=image_augment,
        ),
        "val": StreamedImages(train_reader, val, config, class_names=names, file_order=root.file_order("train", val)),
        "test": StreamedImages(test_reader, test, config, class_names=names, file_order=root.file_order("val", test)),
    }
