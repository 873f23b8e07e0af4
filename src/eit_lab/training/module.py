"""The LightningModule around the backbone: loss, metrics, optimizer. It knows no data set and no folder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from eit_lab.config import RecipeConfig
from eit_lab.data.module import Batch
from eit_lab.models.backbone import Backbone
from eit_lab.training.optim import build_optimizer, learning_rate


class Classifier(LightningModule):
    """Cross entropy on smoothed labels in training; plain cross entropy, top-1 and top-5 in evaluation."""

    def __init__(self, model: Backbone, recipe: RecipeConfig) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.metrics = nn.ModuleDict({part: _metrics(part, model.num_classes) for part in ("val", "test")})
        self.test_predictions: list[Tensor] = []
        """Columns (sample index, label, predicted class) of the last test, this rank's share."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> logits (B, num_classes)."""
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        images, labels, _ = batch
        loss = F.cross_entropy(self(images), labels, label_smoothing=self.recipe.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Metrics on the held-out slice of train."""
        self._evaluate("val", batch)

    def on_test_epoch_start(self) -> None:
        """Forget the predictions of an earlier test."""
        self.test_predictions.clear()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Metrics on the test set, and each sample's predicted class."""
        predicted = self._evaluate("test", batch).argmax(dim=-1)
        self.test_predictions.append(torch.stack([batch[2], batch[1], predicted], dim=-1).cpu())

    def _evaluate(self, part: str, batch: Batch) -> Tensor:
        images, labels, _ = batch
        logits = self(images).float()
        metrics: Any = self.metrics[part]
        metrics[f"{part}/loss"].update(F.cross_entropy(logits, labels), weight=len(labels))
        for name in (f"{part}/acc1", f"{part}/acc5"):
            metrics[name].update(logits, labels)
        self.log_dict(dict(metrics.items()), on_step=False, on_epoch=True)
        return logits

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and the learning rate of every optimizer step."""
        # NOTE: Lightning refuses to clip for a fused optimizer under any mixed precision, a scaler or not.
        mixed = str(self.trainer.precision).endswith("-mixed")
        optimizer = build_optimizer(self.model, self.recipe, fused=not (mixed and self.trainer.gradient_clip_val))
        total = int(self.trainer.estimated_stepping_batches)
        per_epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches

        def factor(step: int) -> float:
            rate = learning_rate(step, self.recipe, steps_per_epoch=per_epoch, total_steps=total)
            return rate / self.recipe.lr

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _metrics(part: str, num_classes: int) -> MetricCollection:
    def accuracy(top_k: int) -> MulticlassAccuracy:
        return MulticlassAccuracy(num_classes, top_k=min(top_k, num_classes), average="micro")

    return MetricCollection(
        {f"{part}/loss": MeanMetric(), f"{part}/acc1": accuracy(1), f"{part}/acc5": accuracy(5)}, compute_groups=False
    )
