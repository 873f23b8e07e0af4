"""Metrics of evaluation that do not depend on the order, the batches or the number of processes, to the last digit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

_UNITS = 2**30
"""Losses are summed as whole numbers of 2^-30: whole numbers add up to the same sum in any order."""


class ExactMean(Metric):
    """Mean of per-sample values >= 0, in float64. Not finite as soon as one value is not."""

    full_state_update = False
    total: Tensor
    broken: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "broken", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, values: Tensor) -> None:
        """Add the values (B,) of some samples; true counts as 1."""
        values = values.float()
        finite = values.isfinite()
        self.total += (values.where(finite, 0).double() * _UNITS).round().long().sum()
        self.broken += (~finite).sum()
        self.count += values.numel()

    def compute(self) -> Tensor:
        """The mean; inf when a value was not finite."""
        mean = self.total.double() / _UNITS / self.count
        return torch.where(self.broken > 0, torch.inf, mean).float()


def evaluation_metrics(part: str, *, suffixes: tuple[str, ...]) -> nn.ModuleDict:
    """Per suffix ("" the weights, "_ema" the averaged ones) the means part/loss, part/acc1, part/acc5, so named."""
    return nn.ModuleDict(
        {
            f"weights{suffix}": MetricCollection(
                {f"{part}/{name}{suffix}": ExactMean() for name in ("loss", "acc1", "acc5")}, compute_groups=False
            )
            for suffix in suffixes
        }
    )
