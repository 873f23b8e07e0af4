"""Weights from files on images: on one part of a run's own data set, or on a variant. Nothing is written.

The batches are the same on any number of devices, and what is counted is whole numbers, so the result is the same to the last
digit. A run's own test goes through the same LightningModule as in training.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torchmetrics import Metric

from eit_lab.command import RunError
from eit_lab.config import Config, ConfigError
from eit_lab.data.augment import BatchAugment
from eit_lab.data.batch import FILLER, Batch
from eit_lab.data.folders import VariantImages
from eit_lab.data.module import ImageData
from eit_lab.data.variants import Variant
from eit_lab.memory import keep_memory
from eit_lab.models.build import build_model
from eit_lab.models.checkpoints import Weights, load_weights
from eit_lab.models.image_model import ImageModel
from eit_lab.training.compiling import compilation_of_run, compile_model
from eit_lab.training.ema import WeightAverage
from eit_lab.training.module import Classifier
from eit_lab.training.trainer import build_trainer, quiet_lightning

_LINE_EVERY_S = 60.0


def evaluate(
    config: Config, files: Sequence[Path], *, num_classes: int, part: str, weights: Sequence[Weights]
) -> dict[str, float]:
    """{part/loss, part/acc1, part/acc5} of the mean of checkpoint files on "test" or "val"; accuracies in [0, 1].

    The names of averaged weights (EMA) end in _ema. Raw and averaged ones together are one pass over the images.
    """
    model = _build(config, files, num_classes=num_classes, weights=weights[0])
    ema = None
    if len(weights) > 1:
        ema = WeightAverage(model, decay=0.0)
        load_weights(cast("ImageModel", ema.model), files, weights=weights[1])
    classifier = Classifier(model, config.recipe, _normaliser(config, num_classes), ema=ema)
    with evaluation_trainer(config) as trainer:
        compile_model(model, compilation_of_run(config, files, device=trainer.strategy.root_device))
        run = trainer.test if part == "test" else trainer.validate
        data = ImageData(config)
        run(classifier, datamodule=data, verbose=False)
        if data.unread.texts:
            print(f"left out: {len(data.unread.texts)} images that could not be read", flush=True)
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(f"{part}/")}
    suffix = "_ema" if tuple(weights) == ("ema",) else ""
    return {f"{name}{suffix}": value for name, value in metrics.items()}


def evaluate_variant(
    config: Config, files: Sequence[Path], variant: Variant, *, num_classes: int, weights: Weights
) -> NDArray[np.int64]:
    """(G, 3) whole numbers for the groups of a variant: images, right at top 1, right among the top 5."""
    model = _build(config, files, num_classes=num_classes, weights=weights)
    test = VariantTest(model, variant, _normaliser(config, num_classes))
    with evaluation_trainer(config) as trainer:
        compile_model(model, compilation_of_run(config, files, device=trainer.strategy.root_device))
        trainer.test(test, datamodule=VariantData(config, variant), verbose=False)
    return test.counts.numpy()


class VariantData(ImageData):
    """Loaders of a variant as the test set, in the fixed batches of every evaluation."""

    def __init__(self, config: Config, variant: Variant) -> None:
        super().__init__(config)
        self._variant = variant

    def setup(self, stage: str) -> None:
        """Nothing is read yet: the variant has its file names already."""
        images: Any = VariantImages(self._variant, self.config.data)
        self._parts = {"test": images}


class VariantTest(LightningModule):
    """Counts a model's hits on a variant, its answers restricted to the variant's classes."""

    def __init__(self, model: ImageModel, variant: Variant, augment: BatchAugment) -> None:
        super().__init__()
        self.model, self.augment = model, augment
        self.tally = Tally(len(variant.groups))
        targets, group = torch.from_numpy(variant.targets), torch.from_numpy(variant.group)
        forbidden = torch.zeros(model.num_classes, dtype=torch.bool)
        if variant.classes is not None:
            forbidden[:] = True
            forbidden[torch.from_numpy(variant.classes)] = False
        for name, value in (("targets", targets), ("group", group), ("forbidden", forbidden)):
            self.register_buffer(name, value, persistent=False)
        self.num_answers = int((~forbidden).sum())
        self.counts = torch.zeros(0)
        """(G, 3), see Tally; over all ranks, after the test."""

    def logits(self, images: Tensor) -> Tensor:
        """uint8 images (B, C, H, W) -> logits (B, num_classes), -inf for classes that the variant does not have."""
        logits: Tensor = self.model(self.augment.normalise(images)).float()
        return logits.masked_fill(self.get_buffer("forbidden"), -torch.inf)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Count a batch, its filler left out."""
        counted = batch.index != FILLER
        index = batch.index[counted]
        top = self.logits(batch.images)[counted].topk(min(5, self.num_answers), dim=-1).indices
        hits = (top[:, :, None] == self.get_buffer("targets")[index][:, None, :]).any(dim=-1)  # (B, 5)
        self.tally.update(self.get_buffer("group")[index], hits)

    def on_test_epoch_end(self) -> None:
        """Add up over the ranks here: afterwards Lightning takes everything off the device that ranks talk over."""
        self.counts = self.tally.compute().cpu()


class Tally(Metric):
    """(G, 3) whole numbers: images, right at top 1, right among the top 5."""

    full_state_update = False
    counts: Tensor

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros((num_groups, 3), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, group: Tensor, hits: Tensor) -> None:
        """Add B images: their groups (B,), and whether each of their answers (B, up to 5) is right."""
        rows = torch.stack([torch.ones_like(hits[:, 0]), hits[:, 0], hits.any(dim=-1)], dim=-1).long()
        self.counts.index_add_(0, group, rows)

    def compute(self) -> Tensor:
        """The counts over all ranks."""
        return self.counts


def _build(config: Config, files: Sequence[Path], *, num_classes: int, weights: Weights) -> ImageModel:
    quiet_lightning()
    keep_memory()
    seed_everything(config.seed, workers=True, verbose=False)
    model = build_model(
        config.model, num_classes=num_classes, img_size=config.data.img_size, in_chans=config.data.in_chans
    )
    load_weights(model, files, weights=weights)
    return model


def _normaliser(config: Config, num_classes: int) -> BatchAugment:
    return BatchAugment(config.data, config.recipe, num_classes=num_classes, seed=config.seed)


@contextmanager
def evaluation_trainer(config: Config, *, bar: EvaluationBar | None = None) -> Iterator[Trainer]:
    """A Trainer for passes over images, with a progress bar. What a loader's process meets is one line."""
    callbacks: list[Callback] = [bar or EvaluationBar()] if config.trainer.progress_bar else []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            yield build_trainer(config, folder=Path(scratch), callbacks=callbacks, logger=[])
        except (RunError, ConfigError) as error:
            # One that a worker process met carries that process's traceback; its last line says what it is.
            last = str(error).strip().splitlines()[-1]
            raise type(error)(last.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")) from None
        finally:
            if dist.is_initialized():  # NOTE: else its threads may abort a process that ends
                dist.destroy_process_group()


class EvaluationBar(Callback):
    """A bar with the time left; off a terminal, a line a minute. On stderr, so that the result alone is on stdout."""

    def __init__(self, *, name: str | None = None) -> None:
        """``name``: what the bar says is done; else the part of the data set."""
        self.name = name
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._done = self._total = 0
        self._began = self._said = 0.0

    def _start(self, trainer: Trainer, name: str, batches: Sequence[int | float]) -> None:
        if not trainer.is_global_zero:
            return
        self._done, self._total = 0, int(sum(batches))
        self._began = self._said = time.monotonic()
        if self.console.is_terminal:
            columns = (
                TextColumn(self.name or name),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("batches"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self.console)
            self._task = self._bar.add_task("", total=self._total)
            self._bar.start()

    def _advance(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        self._done += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif now - self._said > _LINE_EVERY_S:
            self._said = now
            left = time.strftime("%H:%M:%S", time.gmtime((now - self._began) / self._done * (self._total - self._done)))
            self.console.print(f"{self._done} of {self._total} batches  left {left}", highlight=False)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the bar up."""
        self._start(trainer, "test", trainer.num_test_batches)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the bar up."""
        self._start(trainer, "val", trainer.num_val_batches)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Move the bar."""
        self._advance(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Move the bar."""
        self._advance(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the bar down, however the evaluation ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
