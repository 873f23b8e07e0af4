"""An analysis of one model: its passes over a fixed order of images, each a LightningModule, so that it runs on any devices.

Three passes, since they cost so differently: ``inside`` (every image once, all that a forward pass shows, and the model before
training beside it), ``filters`` (an image many times, a condition each) and ``receptive field`` (with gradients). The batches are
the same on any number of devices, and what they add up is float64 sums over images: so are the figures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, seed_everything
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from eit_lab.analysis.filters import FilteredAccuracy, FilterSettings, filter_batch, filter_settings
from eit_lab.analysis.pictures import take_pictures
from eit_lab.analysis.profile import Profile
from eit_lab.analysis.receptive_field import EffectiveReceptiveField, centre_px, contribution
from eit_lab.config import Config, ImageSize, as_hw
from eit_lab.data.augment import BatchAugment
from eit_lab.data.batch import FILLER, Batch
from eit_lab.data.module import ImageData, Part
from eit_lab.data.order import fixed_order
from eit_lab.memory import keep_memory
from eit_lab.models.build import build_model
from eit_lab.models.checkpoints import Weights, load_weights
from eit_lab.models.image_model import ImageModel
from eit_lab.training.evaluate import EvaluationBar, evaluation_trainer
from eit_lab.training.metrics import ExactMean
from eit_lab.training.trainer import device_name, quiet_lightning


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to look at, and on how many images; 0: not at all."""

    part: Part
    images: int | None
    """None: all of the part."""
    untrained_images: int
    filter_images: int
    filter_layers: tuple[str, ...] | None
    """Points whose tokens are filtered; None: the stem and the middle of the depth."""
    field_images: int
    pictures: int
    similarity: bool
    batch_size: int
    """Images of one forward pass, a multiple of the group of images that similarity is made of."""


@dataclass(frozen=True)
class Analysis:
    """What came out: numbers for analysis.json, arrays for the page of images, Gram matrices to compare models by."""

    numbers: dict[str, Any]
    pictures: dict[str, NDArray[Any]] | None
    grams: NDArray[np.float32] | None
    """(groups, points, n, n), centred, of the first images in their fixed order."""


class FixedOrder(ImageData):
    """The first images of a part in the fixed order of analyses, as the test set."""

    def __init__(self, config: Config, part: Part, *, batch_size: int) -> None:
        super().__init__(config)
        self._part, self._batch_size = part, batch_size
        self.num_images = 0

    def first(self, count: int) -> NDArray[np.int64]:
        """The first ``count`` samples of the order."""
        return fixed_order(len(self._parts[self._part]), seed=self.config.data.split_seed)[:count]

    def test_dataloader(self) -> DataLoader[Batch]:
        """This rank's share of the first ``num_images``."""
        return self.some_of(self._part, self.first(self.num_images), batch_size=self._batch_size)


class _Pass(LightningModule):
    """One pass over the images: hands on those that count, normalised."""

    def __init__(self, model: ImageModel, augment: BatchAugment, request: Request) -> None:
        super().__init__()
        self.model, self.augment, self.batch_size = model, augment, request.batch_size
        self.found: dict[str, Any] = {}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one batch."""
        counted = batch.index != FILLER
        if counted.any():
            images = self.augment.normalise(batch.images[counted]).to(next(self.model.parameters()).dtype)
            self.take(
                images, batch.labels[counted], batch.index[counted], self._first(batch_idx), counted.nonzero()[:, 0]
            )
        elif batch_idx == 0:
            self.take_none(self.augment.normalise(batch.images).to(next(self.model.parameters()).dtype))

    def _first(self, batch_idx: int) -> int:
        return (batch_idx * self.trainer.world_size + self.trainer.global_rank) * self.batch_size

    def take_none(self, blank: Tensor) -> None:
        """No image is this rank's, only a blank one (1, C, H, W)."""

    def on_test_epoch_end(self) -> None:
        """Add up over the ranks here: afterwards Lightning takes everything off the device that ranks talk over."""
        self.found = self.result()

    def result(self) -> dict[str, Any]:
        """The figures of the pass, over all ranks."""
        raise NotImplementedError

    def take(self, images: Tensor, labels: Tensor, index: Tensor, first: int, kept: Tensor) -> None:
        """Images (B, C, H, W), labels and indices (B,) of a batch that begins with number ``first`` of the order.

        ``kept`` (B,): their places in the batch, of which what could not be read is left out.
        """
        raise NotImplementedError


class InsidePass(_Pass):
    """What a forward pass shows, of the model and of the same one before training."""

    def __init__(
        self,
        model: ImageModel,
        augment: BatchAugment,
        request: Request,
        img_size: ImageSize,
        untrained: ImageModel | None,
    ) -> None:
        super().__init__(model, augment, request)
        self.profile = Profile(model, img_size, similarity=request.similarity, rollout=True)
        self.untrained_model = untrained
        self.untrained = None if untrained is None else Profile(untrained, img_size)
        self.untrained_images = request.untrained_images
        self.hits = ExactMean()
        self.grams: NDArray[np.float32] | None = None

    def take(self, images: Tensor, labels: Tensor, index: Tensor, first: int, kept: Tensor) -> None:
        """One forward pass, and one of the untrained model for the first images."""
        logits = self.profile.update(images, first=first, kept=kept)
        self.hits.update(logits.argmax(dim=-1) == labels)
        if self.untrained is not None:
            some = images[kept < self.untrained_images - first]
            if len(some):
                self.untrained.update(some, first=first)
            elif not self.untrained.points:  # all of them are other ranks'
                _make_sums(self.untrained, images[:1])

    def take_none(self, blank: Tensor) -> None:
        """Take part in the sums."""
        for profile in (self.profile, self.untrained):
            if profile is not None:
                _make_sums(profile, blank)

    def result(self) -> dict[str, Any]:
        """All that a forward pass shows."""
        untrained = None if self.untrained is None else self.untrained.result()
        self.grams = self.profile.grams()
        with self.hits.sync_context():
            num_images = int(self.hits.count)
        acc1 = float(self.hits.compute())
        return self.profile.result() | {"untrained": untrained, "acc1": acc1, "images": num_images}


def _make_sums(profile: Profile, image: Tensor) -> None:
    """A profile makes its sums as it sees a model, and all ranks must have them to add them up."""
    profile.update(image)
    profile.reset()


class FilterPass(_Pass):
    """Accuracy under every filter."""

    def __init__(self, model: ImageModel, augment: BatchAugment, request: Request, settings: FilterSettings) -> None:
        super().__init__(model, augment, request)
        self.settings = settings
        self.accuracy = FilteredAccuracy(self.settings)

    def take(self, images: Tensor, labels: Tensor, index: Tensor, first: int, kept: Tensor) -> None:
        """Every condition of these images."""
        filter_batch(self.model, images, labels, settings=self.settings, metric=self.accuracy, index=index)

    def result(self) -> dict[str, Any]:
        """Accuracy by condition."""
        return {"filters": self.accuracy.result()}


class FieldPass(_Pass):
    """The effective receptive field."""

    def __init__(
        self,
        model: ImageModel,
        augment: BatchAugment,
        request: Request,
        img_hw: tuple[int, int],
        centre: tuple[float, float] | None,
    ) -> None:
        super().__init__(model, augment, request)
        self.field = EffectiveReceptiveField(img_hw, centre=centre)

    def take(self, images: Tensor, labels: Tensor, index: Tensor, first: int, kept: Tensor) -> None:
        """The gradients with respect to these images."""
        self.field.update(contribution(self.model, images))

    def result(self) -> dict[str, Any]:
        """The map, and the squares that hold a share of it."""
        return {"receptive_field": self.field.result()}


def analyse(
    config: Config,
    files: Sequence[Path],
    *,
    num_classes: int,
    weights: Weights,
    request: Request,
    class_names: Sequence[str] | None = None,
) -> Analysis:
    """Analyse the mean of checkpoint files; without files, the model with its weights drawn anew. All ranks must call."""
    quiet_lightning()
    keep_memory()
    began = time.perf_counter()
    model = _build(config, num_classes=num_classes)
    untrained = None
    if files:
        load_weights(model, files, weights=weights)
        untrained = _build(config, num_classes=num_classes) if request.untrained_images else None
    augment = BatchAugment(config.data, config.recipe, num_classes=num_classes, seed=config.seed)
    data = FixedOrder(config, request.part, batch_size=request.batch_size)
    data.setup("test")
    num_images = min(request.images or len(data.part(request.part)), len(data.part(request.part)))
    img_hw = as_hw(config.data.img_size)
    settings = filter_settings(
        model, img_hw=img_hw, layers=request.filter_layers
    )  # what is wrong is said before the work
    bar = EvaluationBar()
    with evaluation_trainer(config, bar=bar) as trainer:

        def run(one: _Pass, *, name: str, count: int) -> dict[str, Any]:
            bar.name, data.num_images = name, min(count, num_images)
            trainer.test(one, datamodule=data, verbose=False)
            return one.found

        inside = InsidePass(model, augment, request, config.data.img_size, untrained)
        numbers = run(inside, name="inside", count=num_images)
        num_read = numbers.pop("images")
        acc1 = numbers.pop("acc1") if files else None
        if request.filter_images and files:
            filters = FilterPass(model, augment, request, settings)
            numbers |= run(filters, name="filters", count=request.filter_images)
        centre = centre_px(model, img_hw, in_chans=config.data.in_chans) if request.field_images else None
        if centre is not None:
            known = inside.profile.layout.grid is not None  # else features of a ConvNet or a pyramid
            field = FieldPass(model, augment, request, img_hw, centre if known else None)
            numbers |= run(field, name="receptive field", count=request.field_images)
        where = device_name(trainer.strategy.root_device)
        precision = str(trainer.precision)
    numbers |= {
        "schema": 1,
        "model": config.model.name,
        "weights": weights if files else "untrained",
        "seed": config.seed,
        "data": {
            "name": config.data.name,
            "part": request.part,
            "order": [len(data.part(request.part)), config.data.split_seed],
            "images": num_read,
            "img_size": list(inside.profile.img_hw),
            "num_classes": num_classes,
            "acc1": acc1,
        },
        "device": where,
        "precision": precision,
    }
    pictures = None
    if request.pictures and trainer.is_global_zero:
        shown = data.first(min(request.pictures, num_images))
        batch = data.part(request.part)[[(0, int(index), 0, 0) for index in shown]]
        read = batch.index != FILLER
        if read.any():
            images, labels, index, draw = (tensor[read] for tensor in batch[:4])
            batch = Batch(images, labels, index, draw)
            pictures = take_pictures(model, batch, augment, class_names=class_names)
    numbers["seconds"] = round(time.perf_counter() - began, 3)
    return Analysis(numbers, pictures, inside.grams)


def _build(config: Config, *, num_classes: int) -> ImageModel:
    """The model as a training of this config has it before its first step."""
    seed_everything(config.seed, workers=True, verbose=False)
    model = build_model(
        config.model, num_classes=num_classes, img_size=config.data.img_size, in_chans=config.data.in_chans
    )
    return model.eval()
