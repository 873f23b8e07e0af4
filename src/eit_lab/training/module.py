"""The LightningModule around a model: loss, metrics, optimizer. It knows no data set and no folder.

The host reads nothing of a step before it has enqueued the next one, so that a GPU never waits for Python: a step whose gradient is
not finite is passed over by the optimizer on the device itself, and told about a step later. A CPU, and an optimizer that cannot
do that (with a gradient scaler, which waits by itself), is read at once, by the same code.
"""

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
    """One optimizer step, over all micro-batches."""

    step: int
    """Counted from 1."""
    loss: float
    """Mean training loss, on the targets as they were trained on, of this rank's images."""
    grad_norm: float
    """L2 norm of the whole gradient, of all ranks, before clipping."""
    lr: float
    """Of the head; lower blocks have less with layer decay."""


class _Reading:
    """Loss and norm of a step that is enqueued, on their way to the host."""

    def __init__(self, step: int, lr: float, values: Tensor, indices: list[Tensor]) -> None:
        """``values``: (2,) loss and norm, float32; ``indices``: sample ids by micro-batch, on the host."""
        self.step, self.lr, self.indices = step, lr, indices
        self._values = values.to("cpu", non_blocking=True)  # of a GPU: into pinned memory
        self._copied = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(values.device))

    def take(self) -> StepFacts:
        """Wait until the step has ended on the device."""
        if self._copied is not None:
            self._copied.synchronize()
        loss, grad_norm = self._values.tolist()
        return StepFacts(self.step, loss, grad_norm, self.lr)


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
        """The last one that the host knows of: on a GPU the one before the last; ``settle`` reads on."""
        self.mean_loss: float | None = None
        """Over all ranks, of the last step for which it is known: with several ranks a logged one."""
        self.skipped = 0
        """Steps that were skipped because something was not finite."""
        self._scaled_away = 0
        self.test_predictions: list[Tensor] = []
        """Columns (sample index, label, predicted class, loss, predicted by averaged weights) of the last test, this rank's."""
        self._losses: list[Tensor] = []
        self._indices: list[Tensor] = []
        self._norms: deque[float] = deque(maxlen=_NORMS_KEPT)
        self._readings: deque[_Reading] = deque()
        self._norm: Tensor | None = None  # of the gradient that is about to be clipped

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
        # Times 1; where the loss is not finite, the gradient is not a number either, and every rank sees it in the norm.
        return loss * (1 + 0 * loss.detach())

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
        """Gradients are complete: note loss and norm, and have the optimizer pass over a step that is not finite.

        The decision falls on the norm, which is the same on every rank.
        """
        assert self.ranks is not None
        self._norm = self._gradient_norm()
        norm = self._norm.float()
        lr = max(group["lr"] for group in optimizer.param_groups)
        values = torch.stack([self._step_loss().float(), norm])
        step = self.trainer.global_step + 1
        self._readings.append(_Reading(step, lr, values, list(self._indices)))
        self._losses.clear()
        self._indices.clear()
        skips = bool(optimizer.param_groups[0]["fused"])
        if skips:
            # torch's own mark of a step to be passed over, as its gradient scaler sets it; a fused optimizer reads it on the device
            setattr(optimizer, "found_inf", (~norm.isfinite()).float())  # noqa: B010 - of no declared type
        before = self.skipped
        self.settle(but=self.steps_ahead if skips else 0)
        if not skips and self.skipped > before:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # the optimizer passes over a parameter without a gradient

    @property
    def steps_ahead(self) -> int:
        """Steps that the host enqueues before it reads what became of one: it would wait for a GPU."""
        return 1 if self.device.type == "cuda" else 0

    def settle(self, *, but: int = 0) -> None:
        """Read what the last steps were, all but so many, and tell of those that were not finite. All ranks must call.

        Raises NotFiniteError where there were more of them than the recipe lets pass.
        """
        while len(self._readings) > but:
            self._judge(self._readings.popleft())

    def _judge(self, reading: _Reading) -> None:
        assert self.ranks is not None
        facts = reading.take()
        scaled = getattr(self.trainer.precision_plugin, "scaler", None) is not None  # which skips such steps itself
        loss, grad_norm = facts.loss, facts.grad_norm
        if scaled:  # a norm that is not finite tells nothing of the loss: the scale may have been too large
            loss = float(self.ranks.ask_all(loss).take().mean())
        self.last_step = facts
        if self.ranks.world_size == 1:
            self.mean_loss = loss
        self._norms.append(grad_norm)
        self._scaled_away = 0 if math.isfinite(grad_norm) else self._scaled_away + 1
        hopeless = not scaled or self._scaled_away > _SCALER_SKIPS
        if not math.isfinite(loss) or (not math.isfinite(grad_norm) and hopeless):
            self._skip_or_stop(facts, reading.indices)

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
        """Clip by the norm of the whole gradient, known already: on the device, without a wait, a sharded model's by its shards.

        Where we differ: Lightning works the norm out once more, and refuses a fused optimizer under mixed precision, for with a
        gradient scaler its gradients would still be scaled here. Ours is fused only where there is no scaler.
        """
        assert gradient_clip_algorithm in (None, "norm"), "the trainer is never told another one"
        if gradient_clip_val:
            assert self._norm is not None
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self._norm)

    def _skip_or_stop(self, step: StepFacts, indices: list[Tensor]) -> None:
        assert self.ranks is not None
        self.skipped += 1
        loss = float(self.ranks.ask_all(step.loss).take().mean())
        ids = [index for indices in self.ranks.gather(torch.cat(indices).cpu()) for index in indices.tolist()]
        facts = {
            "step": step.step,
            "loss": loss,
            "lr": step.lr,
            "grad_norms": list(self._norms),
            "sample_ids": ids,
            "skipped": self.skipped,
        }
        what = f"loss {loss}, gradient norm {step.grad_norm} at step {step.step}"
        if self.skipped > self.recipe.skip_nonfinite:
            raise NotFiniteError(
                f"training is not finite any more: {what}; its {len(ids)} sample ids and the last norms are in nonfinite.json; "
                f"recipe.skip_nonfinite ({self.recipe.skip_nonfinite}) lets so many steps be skipped",
                facts,
            )
        if self.ranks.is_main:
            print(f"eit_lab: warning: {what}: skipped ({self.skipped} of {self.recipe.skip_nonfinite})", flush=True)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The step, then the average: in this order before any callback saves a checkpoint."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.model)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, and the learning rate of every optimizer step."""
        assert self.plan is not None
        # NOTE: with a scaler a fused one scales gradients back inside its step only: norms before it would be of scaled ones.
        fused = str(self.trainer.precision) != "16-mixed"
        optimizer = build_optimizer(self.model, self.recipe, grouping=self._grouping, fused=fused)
        plan = self.plan

        def factor(step: int) -> float:
            rate = learning_rate(step, self.recipe, steps_per_epoch=plan.steps_per_epoch, total_steps=plan.total_steps)
            return rate / self.recipe.lr

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The averaged weights in a section of their own. Raises NotFiniteError: what follows too many bad steps is not saved."""
        self.settle()
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
        self.settle()
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
