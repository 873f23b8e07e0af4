"""A run's top-1 beside the published one at the same epochs: curve.png and curve.svg in the run folder, drawn anew after
each validation.

The published numbers are on ImageNet's 50,000 validation images; a run validates on its held-out slice of train, and tests
on those images once, at the end.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from eit_lab import published
from eit_lab.training.metrics_file import MetricsFile


class PublishedCurve(Callback):
    """Draws after each validation, from metrics.csv as it is then."""

    def __init__(self, folder: Path, reference: str, *, name: str) -> None:
        self.folder, self.reference, self.name = folder, reference, name

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, in the main process."""
        if trainer.state.fn != TrainerFn.FITTING or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.flush()
                draw(self.folder, self.reference, name=self.name)


def draw(folder: Path, reference: str, *, name: str, test_acc1: float | None = None) -> Path | None:
    """Draw the curves of a run folder; returns the PNG's path, None before the first validation."""
    from matplotlib.figure import Figure

    with (folder / "metrics.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row.get("val/acc1")]
    if not rows:
        return None
    curve = published.curve(reference)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([e.epoch + 1 for e in curve], [100 * e.test_acc1 for e in curve], color="0.6", lw=1.5,
              label=f"eit_{reference} as published (ImageNet val)")  # fmt: skip
    for key, style, label in (("val/acc1", "-", ""), ("val/acc1_ema", "--", ", averaged weights")):
        points = [(int(row["epoch"]) + 1, 100 * float(row[key])) for row in rows if row.get(key)]
        if points:
            axes.plot(*zip(*points, strict=True), style, color="#1f77b4", lw=1.8, marker="." if len(points) < 40 else None,
                      label=f"{name}{label} (held out of train)")  # fmt: skip
    last = rows[-1]
    epoch = int(last["epoch"])
    title = f"{name}, epoch {epoch + 1}: {100 * float(last['val/acc1']):.2f}%"
    if epoch < len(curve):
        gap = 100 * (float(last["val/acc1"]) - curve[epoch].test_acc1)
        title += f", {gap:+.2f} points from the published epoch"
    if test_acc1 is not None:
        axes.axhline(100 * test_acc1, color="#d62728", lw=1, ls=":", label=f"{name}, test: {100 * test_acc1:.2f}%")
    axes.set(xlabel="epoch", ylabel="top-1 accuracy (%)", title=title, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", framealpha=1, edgecolor="none")
    for suffix in ("png", "svg"):
        save: dict[str, Any] = {"dpi": 150} if suffix == "png" else {}
        figure.savefig(folder / f"curve.{suffix}", **save)
    return folder / "curve.png"
