"""The first picture of an ablation: top-1 of every seed with its interval, and the learning curves."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import matplotlib

from eit_lab.report.arms import Arm, estimate

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")


def accuracy_figure(arms: Sequence[Arm]) -> Figure:
    """Left: test top-1 by arm, every seed a dot, mean and 95% interval. Right: validation top-1 by epoch, mean over seeds."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    ends: list[float] = []
    for place, arm in enumerate(arms):
        colour = COLOURS[place % len(COLOURS)]
        values = arm.accuracies
        spread = estimate(values)
        beside = [place - 0.12 - 0.26 * (i + 0.5) / len(values) for i in range(len(values))]  # equal values stay apart
        left.scatter(beside, values, s=18, color=colour, alpha=0.75, linewidths=0)
        if spread.n > 1:
            left.errorbar(place + 0.08, spread.mean, yerr=spread.half_width, fmt="o", color=colour, capsize=4, ms=6)
        curves = [curve for run in arm.runs.values() if (curve := _validation_curve(run["folder"]))]
        if curves:
            epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
            means = [mean(c[e] for c in curves) for e in epochs]
            ends += means[-1:]
            right.plot([e + 1 for e in epochs], means, color=colour, label=arm.label)
            low, high = ([pick(c[e] for c in curves) for e in epochs] for pick in (min, max))
            right.fill_between([e + 1 for e in epochs], low, high, color=colour, alpha=0.15, linewidth=0)
    left.set_xticks(range(len(arms)), [arm.label for arm in arms], rotation=0 if len(arms) <= 4 else 30, ha="center")
    left.set_xlim(-0.5, len(arms) - 0.5)
    left.set_ylabel("test top-1 (%)")
    left.set_title("each seed, mean and 95% interval", fontsize=10)
    right.set_xlabel("epoch")
    right.set_ylabel("validation top-1 (%)")
    right.set_title("mean and range over seeds, held-out slice of train", fontsize=10)
    if ends:
        right.legend(frameon=False, fontsize=9, loc="lower right")
    _zoom(right, ends)
    for axes in (left, right):
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def save_figure(figure: Figure, stem: Path) -> None:
    """STEM.png and STEM.svg."""
    figure.savefig(stem.with_suffix(".png"), dpi=160)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def _zoom(axes: Axes, ends: Sequence[float]) -> None:
    """Leave out the first climb, where all arms look alike, when the curves end well above it."""
    if ends and min(ends) > 60:
        axes.set_ylim(min(ends) - 20, 101)


def _validation_curve(folder: str) -> dict[int, float]:
    path = Path(folder) / "metrics.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as handle:
        return {
            int(row["epoch"]): 100 * float(row["val/acc1"]) for row in csv.DictReader(handle) if row.get("val/acc1")
        }
