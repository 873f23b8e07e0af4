"""The LightningModule around a model: loss, metrics, optimizer. It knows no data set and no folder."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from eit_lab.command import RunError
from eit_lab.config import RecipeConfig
from eit_lab.data.augment import BatchAugment
from eit_lab.data.batch import FILLER, Batch
from eit_lab.learning_rate import learning_rate
from eit_lab.models.image_model import ImageModel
from eit_lab.plan import Plan
from eit_lab.training.ema import WeightAverage
from eit_lab.training.metrics import evaluation_metrics
from eit_lab.training.optim import build_optimizer, group_parameters
from eit_lab.training.ranks import Ranks

_NORMS_KEPT = 10
_SCALER_SKIPS = 50  # in a row, each halving the scale of half precision: from 2^16 down to nothing


@dataclass(frozen=True)
class StepFacts:
    """One optimizer step, over all ranks and micro-batches."""

    loss: float
    """Mean training loss, on the targets as they were trained on."""
    grad_norm: float
    """L2 norm of the whole gradient, before clipping."""
    lr: float
    """Of the head; lower blocks have less with layer decay."""


class NotFiniteError(RunError):
    """The loss or the gradient is not finite; ``facts`` go on record."""

    def __init__(self, message: str, facts: dict[str, Any]) -> None:
        super().__init__(message)
        self.facts = facts


class Classifier(LightningModule):
    """Soft-target cross entropy in training; plain cross entropy, top-1 and top-5 in evaluation, also of averaged weights."""

    def __init__(
        self,
        model: ImageModel,
        recipe: RecipeConfig,
        augment: BatchAugment,
        *,
        ema: WeightAverage | None = None,
        plan: Plan | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.augment = augment
        self.ema = ema
        self.plan, self.ranks = plan, ranks  # of training only
        self._grouping = group_parameters(model, layer_decay=recipe.layer_decay)
        suffixes = ("",) if ema is None else ("", "_ema")
        self.metrics = torch.nn.ModuleDict(
            {part: evaluation_metrics(part, suffixes=suffixes) for part in ("val", "test")}
        )
        self.last_step: StepFacts | None = None
        self.skipped = 0
        """Steps that were skipped because something was not finite."""
        self._scaled_away = 0
        self.test_predictions: list[Tensor] = []
        """Columns (sample index, label, predicted class, loss, predicted by averaged weights) of the last test, this rank's."""
        self._losses: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._norms: deque[float] = deque(maxlen=_NORMS_KEPT)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, C, H, W) -> logits (B, num_classes)."""
        return self.model(images)

    def on_fit_start(self) -> None:
        """The averaged weights live where the weights do; they are no submodule, so Lightning does not move them."""
        if self.ema is not None:
            self.ema.model.to(self.device)

    def on_test_start(self) -> None:
        """As on_fit_start and on_validation_start, for a test."""
        self.on_fit_start()
        self.on_validation_start()

    # -------------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        images, targets = self.augment(batch)
        images = images.to(next(self.model.parameters()).dtype)  # of true half or double precision
        smoothing = (
            0.0 if targets.is_floating_point() else self.recipe.label_smoothing
        )  # soft targets are smoothed already
        logits = self(images)
        targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        weight = self._weight(batch)
        if weight != 1:
            loss = loss * weight
        self._losses.append(loss.detach())
        self._indices.append(batch.index)
        return loss

    def _weight(self, batch: Batch) -> float:
        """1, but in an epoch's last, shorter step what makes its gradient the mean over its images.

        The loss is the mean of a micro-batch; gradients are divided by the number of micro-batches of a whole step, and
        averaged over the ranks. What only fills a rank up counts nothing.
        """
        plan = self.plan
        if plan is None or not plan.tail:
            return 1.0
        place = batch.draw[0, 2].item()
        if place == FILLER:
            return 0.0
        in_tail = place >= (plan.steps_per_epoch - 1) * plan.batch_size
        return len(batch.images) * plan.world_size * plan.accumulate / plan.tail if in_tail else 1.0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are complete: note loss and norm, and refuse or skip a step that is not finite.

        The decision falls on numbers that are the same on every rank. It reads them on the host: one wait a step.
        """
        assert self.ranks is not None
        assert self.plan is not None
        norm = self._gradient_norm()
        loss, grad_norm = self.ranks.mean(torch.stack([self._step_loss().float(), norm.float()])).tolist()
        lr = max(group["lr"] for group in optimizer.param_groups)
        self.last_step = StepFacts(loss, grad_norm, lr)
        self._norms.append(grad_norm)
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # which skips such steps itself
        self._scaled_away = 0 if math.isfinite(grad_norm) else self._scaled_away + 1
        hopeless = not scaled or self._scaled_away > _SCALER_SKIPS
        if not math.isfinite(loss) or (not math.isfinite(grad_norm) and hopeless):
            self._skip_or_stop(optimizer)
        self._losses.clear()
        self._indices.clear()

    def _step_loss(self) -> Tensor:
        assert self.plan is not None
        losses = torch.stack(self._losses)
        return losses.mean() if len(losses) == self.plan.accumulate else losses.sum() / self.plan.accumulate

    def _gradient_norm(self) -> Tensor:
        sharded = self.trainer.strategy.model
        if isinstance(sharded, FullyShardedDataParallel):
            return sharded.clip_grad_norm_(math.inf)  # of all shards; clips nothing
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of the whole gradient, which of a sharded model only its wrapper knows."""
        sharded = self.trainer.strategy.model
        if isinstance(sharded, FullyShardedDataParallel) and gradient_clip_val:
            sharded.clip_grad_norm_(gradient_clip_val)
            return
        self.clip_gradients(
            optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
        )

    def _skip_or_stop(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.ranks is not None
        assert self.last_step is not None
        self.skipped += 1
        ids = [index for indices in self.ranks.gather(torch.cat(self._indices).cpu()) for index in indices.tolist()]
        step = self.trainer.global_step + 1
        facts = {
            "step": step,
            "loss": self.last_step.loss,
            "lr": self.last_step.lr,
            "grad_norms": list(self._norms),
            "sample_ids": ids,
            "skipped": self.skipped,
        }
        what = f"loss {self.last_step.loss}, gradient norm {self.last_step.grad_norm} at step {step}"
        if self.skipped > self.recipe.skip_nonfinite:
            raise NotFiniteError(
                f"training is not finite any more: {what}; its {len(ids)} sample ids and the last norms are in nonfinite.json; "
                f"recipe.skip_nonfinite ({self.recipe.skip_nonfinite}) lets so many steps be skipped",
                facts,
            )
        if self.ranks.is_main:
            print(f"eit_lab: warning: {what}: skipped ({self.skipped} of {self.recipe.skip_nonfinite})", flush=True)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # the optimizer passes over a parameter without a gradient

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, then the average: in this order before any callback saves a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and the learning rate of every optimizer step."""
        assert self.plan is not None
        # NOTE: Lightning refuses to clip for a fused optimizer under any mixed precision, a scaler or not; and with a scaler
        # a fused one scales gradients back inside its step only, so that norms before it would be of scaled ones.
        precision = str(self.trainer.precision)
        fused = precision != "16-mixed" and not (precision.endswith("-mixed") and self.trainer.gradient_clip_val)
        optimizer = build_optimizer(self.model, self.recipe, grouping=self._grouping, fused=fused)
        plan = self.plan

        def factor(step: int) -> float:
            rate = learning_rate(step, self.recipe, steps_per_epoch=plan.steps_per_epoch, total_steps=plan.total_steps)
            return rate / self.recipe.lr

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The averaged weights in a section of their own."""
        checkpoint["skipped"] = self.skipped
        if self.ema is not None:
            checkpoint["ema"] = self.ema.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the averaged weights back."""
        self.skipped = checkpoint["skipped"]
        if self.ema is not None:
            self.ema.load_state_dict(checkpoint["ema"])

    # ------------------------------------------------------------------------------------------------------ evaluation

    def on_validation_start(self) -> None:
        """Statistics of batch norms are one process's own: all evaluate with the main one's."""
        if self.ranks is not None:
            models = [self.model] if self.ema is None else [self.model, self.ema.model]
            self.ranks.copy_from_main(buffer for model in models for buffer in model.buffers())

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Metrics on the held-out slice of train."""
        self._evaluate("val", batch)

    def on_test_epoch_start(self) -> None:
        """Forget the predictions of an earlier test."""
        self.test_predictions.clear()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Metrics on the test set, and each sample's loss and predicted class."""
        counted, results = self._evaluate("test", batch)
        (losses, predicted), averaged = results[0], results[-1][1]
        columns = (batch.index[counted], batch.labels[counted], predicted, losses, averaged)
        self.test_predictions.append(torch.stack([column.double() for column in columns], dim=-1).cpu())

    def _evaluate(self, part: str, batch: Batch) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Count a batch, its filler left out; (losses, predicted classes) of the weights, then of the averaged ones."""
        counted = batch.index != FILLER
        images, labels = self.augment.normalise(batch.images), batch.labels[counted]
        models = [self.model] if self.ema is None else [self.model, self.ema.model]
        results = []
        group: Any = self.metrics[part]
        for model, (weights, metrics) in zip(models, group.items(), strict=True):
            suffix = weights.removeprefix("weights")
            logits = model(images.to(next(model.parameters()).dtype)).float()[counted]
            losses = F.cross_entropy(logits, labels, reduction="none")
            top = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
            hits = top == labels[:, None]
            metrics[f"{part}/loss{suffix}"].update(losses)
            metrics[f"{part}/acc1{suffix}"].update(hits[:, 0])
            metrics[f"{part}/acc5{suffix}"].update(hits.any(dim=-1))
            self.log_dict(dict(metrics.items()), on_step=False, on_epoch=True, logger=False)
            results.append((losses, top[:, 0]))
        return counted, results
