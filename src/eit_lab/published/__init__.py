"""The published ImageNet-1K runs of arXiv:2203.07116: their curves, from the authors' training logs, and global batches.

``{mini,tiny,base,large}.csv`` hold one row an epoch: epoch, train_loss (on soft targets), test_loss (plain cross entropy),
test_acc1 and test_acc5 in percent on the 50,000 validation images, train_lr. Their final numbers are the best of these rows.
``imagenet_models.csv`` has the models of the ImageNet figure in the authors' repository, as read off that figure. No torch.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

GLOBAL_BATCH = {"mini": 1024, "tiny": 1024, "base": 512, "large": 512}


@dataclass(frozen=True)
class Epoch:
    """One row of a published log; accuracies in [0, 1]."""

    epoch: int
    train_loss: float
    test_loss: float
    test_acc1: float
    test_acc5: float
    train_lr: float


@cache
def curve(name: str) -> tuple[Epoch, ...]:
    """The 300 epochs of a published run: mini, tiny, base or large. Raises KeyError for another name."""
    if name not in GLOBAL_BATCH:
        raise KeyError(name)
    with files(__name__).joinpath(f"{name}.csv").open() as handle:
        return tuple(
            Epoch(
                epoch=int(row["epoch"]),
                train_loss=float(row["train_loss"]),
                test_loss=float(row["test_loss"]),
                test_acc1=float(row["test_acc1"]) / 100,
                test_acc5=float(row["test_acc5"]) / 100,
                train_lr=float(row["train_lr"]),
            )
            for row in csv.DictReader(handle)
        )


@dataclass(frozen=True)
class Model:
    """A published ImageNet-1K model: parameters in millions, top-1 in percent, both read off a figure."""

    name: str
    params_m: float
    top1: float
    pyramid: bool
    """Whether its token grid shrinks with depth."""

    @property
    def family(self) -> str:
        """Its name without the size."""
        return re.sub(r"-(\d+|Mini|Tiny|Base|Large)$", "", self.name)


@cache
def models() -> tuple[Model, ...]:
    """The models of the authors' ImageNet figure, the published EIT among them."""
    with files(__name__).joinpath("imagenet_models.csv").open() as handle:
        rows = csv.DictReader(line for line in handle if not line.startswith("#"))
        return tuple(
            Model(row["model"], float(row["params_m"]), float(row["top1"]), row["pyramid"] == "1") for row in rows
        )
