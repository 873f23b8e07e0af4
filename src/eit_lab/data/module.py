"""The LightningDataModule of every data set: global batches in, one rank's loaders out."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from eit_lab.config import Config, ImageNetData, micro_batches
from eit_lab.data.batch import Batch
from eit_lab.data.imagenet import FolderImages, load_imagenet
from eit_lab.data.order import EvalBatches, TrainBatches
from eit_lab.data.small import InMemoryImages, load_small

Part = Literal["train", "val", "test"]


class ImageData(LightningDataModule):
    """Loaders of Batch. ``start``: (epoch, micro-batches of it that were taken already), where a run is resumed."""

    def __init__(self, config: Config, *, start: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.config, self.start = config, start
        self._parts: Mapping[Part, InMemoryImages | FolderImages] = {}

    def setup(self, stage: str) -> None:
        """Read the data set, or its file lists."""
        if not self._parts:
            data, recipe, seed = self.config.data, self.config.recipe, self.config.seed
            self._parts = (
                load_imagenet(data, recipe, seed=seed)
                if isinstance(data, ImageNetData)
                else load_small(data, recipe, seed=seed)
            )

    def part(self, name: Part) -> InMemoryImages | FolderImages:
        """One part of the data set, read already."""
        return self._parts[name]

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in label order: an image folder's; None for the others, whose labels are numbers."""
        train = self._parts["train"]
        return list(train.folder.classes) if isinstance(train, FolderImages) else None

    def train_dataloader(self) -> DataLoader[Batch]:
        """This rank's micro-batches of the global batches."""
        rank, world_size = self._place()
        _, accumulate = micro_batches(self.config, world_size=world_size)
        sampler = TrainBatches(
            len(self._parts["train"]),
            batch_size=self.config.recipe.batch_size,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            seed=self.config.seed,
            repeat=self.config.recipe.repeated_augment,
            start=self.start,
            repeat_first_epoch=self.config.trainer.overfit_batches > 0,
        )
        return self._loader("train", sampler)

    def val_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the held-out slice of train."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the test set."""
        return self._eval_loader("test")

    def _eval_loader(self, name: Part) -> DataLoader[Batch]:
        rank, world_size = self._place()
        trainer, num_samples = self.config.trainer, len(self._parts[name])
        limit = trainer.limit_val_batches if name == "val" else trainer.limit_test_batches
        batches = -(-num_samples // trainer.eval_batch_size)
        kept = limit if isinstance(limit, int) else max(1, int(batches * limit))  # in all, not of each rank
        num_samples = min(num_samples, kept * trainer.eval_batch_size)
        return self._loader(
            name, EvalBatches(num_samples, batch_size=trainer.eval_batch_size, rank=rank, world_size=world_size)
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """To the device; in training all but index and draw, which the host reads: asking the device for them would wait."""
        moved = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))
        training = self.trainer is not None and self.trainer.training
        return moved._replace(index=batch.index, draw=batch.draw) if training else moved

    def _loader(self, name: Part, sampler: Any) -> DataLoader[Batch]:
        num_workers = self._num_workers()
        # A whole batch is one item of the data set (batch_size=None), and our batches are the sampler. NOTE: as a
        # batch_sampler they would never be told the epoch: Lightning tells the sampler only.
        return DataLoader(
            self._parts[name],
            sampler=sampler,
            batch_size=None,
            num_workers=num_workers,
            worker_init_fn=_leave_signals_to_the_parent,
            persistent_workers=num_workers > 0,
            # NOTE: else each start of an epoch would draw a seed for the workers from torch's global generator.
            generator=torch.Generator().manual_seed(self.config.seed),
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
        )

    def _num_workers(self) -> int:
        if self.config.data.num_workers is not None:
            return self.config.data.num_workers
        if not isinstance(self.config.data, ImageNetData):
            return 0  # in memory: a batch takes less than handing it over would
        local = self.trainer.num_devices if self.trainer is not None else 1
        return max(1, len(os.sched_getaffinity(0)) // local)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _leave_signals_to_the_parent(_: int) -> None:
    """A scheduler signals every process of a job. A worker that ends on it would end a training that is about to save.

    NOTE: torch installs a handler of its own in a worker, in C, after ours were inherited.
    """
    for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
