"""The LightningDataModule of every data set: global batches in, one rank's loaders out."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from eit_lab.config import Config, ImageNetData, micro_batches
from eit_lab.data.batch import Batch
from eit_lab.data.imagenet import StreamedImages, load_imagenet
from eit_lab.data.order import EvalBatches, TrainBatches
from eit_lab.data.prefetch import Prefetcher
from eit_lab.data.small import InMemoryImages, load_small
from eit_lab.data.unread import Unread
from eit_lab.processes import count_cores, end_with_parent

Part = Literal["train", "val", "test"]


class ImageData(LightningDataModule):
    """Loaders of Batch. ``start``: (epoch, micro-batches of it that were taken already), where a run is resumed."""

    def __init__(
        self,
        config: Config,
        *,
        start: tuple[int, int] = (0, 0),
        place: tuple[int, int] | None = None,
        folder: Path | None = None,
    ) -> None:
        """``place``: (rank, world size), else the trainer's; ``folder``: of the run, where unreadable images are noted."""
        super().__init__()
        self.config, self.start, self.place = config, start, place
        limit = config.data.max_unread if isinstance(config.data, ImageNetData) else 0
        self.unread = Unread(limit, path=None if folder is None else folder / "unread.jsonl")
        self._prefetcher: Prefetcher | None = None
        self._wanted: tuple[int, int] | None = None
        self._parts: Mapping[Part, InMemoryImages | StreamedImages] = {}

    def setup(self, stage: str) -> None:
        """Read the data set, or its file lists."""
        if not self._parts:
            data, recipe, seed = self.config.data, self.config.recipe, self.config.seed
            self._parts = (
                load_imagenet(data, recipe, seed=seed)
                if isinstance(data, ImageNetData)
                else load_small(data, recipe, seed=seed)
            )

    def part(self, name: Part) -> InMemoryImages | StreamedImages:
        """One part of the data set, read already."""
        return self._parts[name]

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in label order; None for small data sets, whose labels are numbers."""
        train = self._parts["train"]
        return list(train.class_names) if isinstance(train, StreamedImages) else None

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the data set, a line each."""
        train = self._parts["train"]
        return train.notes if isinstance(train, StreamedImages) else ()

    def train_batches(self) -> TrainBatches:
        """This rank's micro-batches of the global batches."""
        rank, world_size = self._place()
        _, accumulate = micro_batches(self.config, world_size=world_size)
        recipe, train = self.config.recipe, self._parts["train"]
        return TrainBatches(
            len(train),
            batch_size=recipe.batch_size,
            accumulate=accumulate,
            rank=rank,
            world_size=world_size,
            seed=self.config.seed,
            repeat=recipe.repeated_augment,
            keep_tail=recipe.last_batch == "keep",
            pair=recipe.mixes,
            windows=train.windows if isinstance(train, StreamedImages) else None,
            on_window=self._fetch_ahead,
            start=self.start,
            repeat_first_epoch=self.config.trainer.overfit_batches > 0,
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        """The images of ``train_batches``."""
        return self._loader("train", self.train_batches())

    def _fetch_ahead(self, epoch: int, window: int) -> None:
        """Have the files of a window and the next one fetched, by one process of each machine."""
        train = self._parts["train"]
        if not isinstance(train, StreamedImages) or (self.trainer is not None and self.trainer.local_rank != 0):
            return
        if self._prefetcher is None:
            self._prefetcher = train.prefetcher()
            self._wanted = None
        if self._prefetcher is None or self._wanted == (epoch, window):
            return
        self._wanted = epoch, window
        self._prefetcher.want(train.files_ahead(seed=self.config.seed, epoch=epoch, window=window))

    def teardown(self, stage: str) -> None:
        """Stop what fetches files ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def val_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the held-out slice of train."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the test set."""
        return self._eval_loader("test")

    def some_of(self, name: Part, chosen: NDArray[np.int64], *, batch_size: int) -> DataLoader[Batch]:
        """This rank's share of the samples of a part that ``chosen`` names, in its order, not augmented."""
        rank, world_size = self._place()
        batches = EvalBatches(len(chosen), batch_size=batch_size, rank=rank, world_size=world_size, order=chosen)
        return self._loader(name, batches)

    def _eval_loader(self, name: Part) -> DataLoader[Batch]:
        rank, world_size = self._place()
        trainer, part = self.config.trainer, self._parts[name]
        num_samples = len(part)
        limit = trainer.limit_val_batches if name == "val" else trainer.limit_test_batches
        batches = -(-num_samples // trainer.eval_batch_size)
        kept = limit if isinstance(limit, int) else max(1, int(batches * limit))  # in all, not of each rank
        num_samples = min(num_samples, kept * trainer.eval_batch_size)
        return self._loader(
            name,
            EvalBatches(
                num_samples,
                batch_size=trainer.eval_batch_size,
                rank=rank,
                world_size=world_size,
                order=part.file_order if isinstance(part, StreamedImages) else None,
            ),
        )

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """To the device; in training all but index and draw, which the host reads: asking the device for them would wait."""
        if batch.unread:
            self.unread.note(reason for _, reason in batch.unread)
            if self._place()[0] == 0:
                self.unread.report()
        images, labels, index, draw = (tensor.to(device, non_blocking=True) for tensor in batch[:4])
        moved = Batch(images, labels, index, draw)
        training = self.trainer is not None and self.trainer.training
        return moved._replace(index=batch.index, draw=batch.draw) if training else moved

    def _loader(self, name: Part, sampler: Any) -> DataLoader[Batch]:
        num_workers = min(self._num_workers(), len(sampler))  # one without a batch would only cost memory
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
        return max(1, count_cores() // local)

    def _place(self) -> tuple[int, int]:
        if self.place is not None:
            return self.place
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)


def _end_workers() -> None:
    """Workers that still wait when the process ends, as after an error whose traceback holds their loader.

    NOTE: multiprocessing would send them SIGTERM, which they leave to their parent, and wait for ever; and torch would tell of
    each that is killed.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


atexit.register(_end_workers)


def _leave_signals_to_the_parent(_: int) -> None:
    """A scheduler signals every process of a job. A worker that ends on it would end a training that is about to save.

    NOTE: torch installs a handler of its own in a worker, in C, after ours were inherited.
    """
    end_with_parent()
    for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
