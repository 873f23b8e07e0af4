"""Learning curves: validation over epochs, over what training cost in multiply-accumulates, and over wall clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from eit_lab.report.arms import Arm
from eit_lab.report.figure import colour, line, panel, shorten
from eit_lab.report.metric import Metric, metric_of, number
from eit_lab.units import prefix_of

TRAINING_MACS = 3
"""MACs of training one image over those of a forward pass: the backward pass makes two products for each one of the forward."""
SHOWN = 10
"""Most arms of one figure: more curves cannot be told apart."""
CLIMB = 0.4
"""The share of training, in which all arms look alike, that does not set the vertical range."""
AXES = {"epochs": "epochs", "macs": "training MACs of one run", "hours": "training time of one run"}


@dataclass(frozen=True)
class ArmCurve:
    """One arm's validation metric, mean and range over its seeds, at the validations that all seeds have."""

    label: str
    x: dict[str, list[float]]
    """By axis: ``epochs``, ``macs``, ``hours``; without the axes that were not recorded."""
    mean: list[float]
    low: list[float]
    high: list[float]
    seeds: int


def validation_metric(metric: Metric) -> Metric:
    """What validations log for a metric of the test set."""
    return metric_of(metric.key.replace("test/", "val/", 1))


def arm_curve(arm: Arm, metric: Metric) -> ArmCurve | None:
    """The curve of an arm; None where its runs have none."""
    runs: list[dict[float, tuple[float, float, float]]] = []
    for seed in arm.seeds:
        curve = arm.runs[seed].curve
        values, epochs = curve.get(metric.key), curve.get("epoch")
        if values and epochs:
            images, hours = (curve.get(name) or [None] * len(epochs) for name in ("images", "perf/hours"))
            rows = zip(epochs, values, images, hours, strict=True)
            runs.append({e: (v, _or_nan(n), _or_nan(h)) for e, v, n, h in rows if e is not None and v is not None})
    common = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
    if not common:
        return None
    at = [[run[epoch] for run in runs] for epoch in common]
    accuracy = [[metric.scale * value for value, _, _ in row] for row in at]
    x = {"epochs": [epoch + 1 for epoch in common], "hours": [fmean(hours for _, _, hours in row) for row in at]}
    macs = number(arm.fact("cost", "macs"))
    if macs is not None:
        x["macs"] = [TRAINING_MACS * macs * fmean(images for _, images, _ in row) for row in at]
    known = {axis: numbers for axis, numbers in x.items() if not any(map(math.isnan, numbers))}
    return ArmCurve(
        arm.label, known, list(map(fmean, accuracy)), list(map(min, accuracy)), list(map(max, accuracy)), len(runs)
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _unit(axis: str, largest: float) -> tuple[float, str]:
    """(what a number is divided by, the unit it is then in), so that the numbers along an axis are short."""
    if axis == "hours":
        return (1.0, "hours") if largest >= 1 else (1 / 60, "minutes") if largest >= 1 / 60 else (1 / 3600, "seconds")
    return prefix_of(largest) if axis == "macs" else (1.0, "")


def curve_figure(curves: Sequence[tuple[int, ArmCurve]], metric: Metric, axis: str) -> Figure | None:
    """Mean and range over seeds along one axis; the numbers are the arms' places. None where no run recorded that axis."""
    shown = [(place, curve) for place, curve in curves if axis in curve.x]
    if not shown:
        return None
    figure, axes = panel(height=3.3)
    scale, unit = _unit(axis, max(curve.x[axis][-1] for _, curve in shown))
    for place, curve in shown:
        x = [value / scale for value in curve.x[axis]]
        alone = "o" if len(x) == 1 else None
        axes.plot(
            x, curve.mean, color=colour(place), linestyle=line(place), marker=alone, label=shorten(curve.label, to=44)
        )
        if curve.seeds > 1:
            axes.fill_between(x, curve.low, curve.high, color=colour(place), alpha=0.16, linewidth=0)
    late = [v for _, c in shown for v in c.low[int(CLIMB * len(c.low)) :]]
    top = max(v for _, c in shown for v in c.high)
    if metric.higher_is_better and min(late) < top:
        axes.set_ylim(min(late) - 0.04 * (top - min(late)), top + 0.05 * (top - min(late)))
    axes.set_xlim(left=0)
    axes.set_xlabel(AXES[axis] + (f" ({unit})" if unit else ""))
    axes.locator_params(axis="x", nbins=7)
    axes.set_ylabel(metric.title)
    axes.grid(axis="y")
    longest = max(len(curve.label) for _, curve in shown)
    figure.legend(loc="outside lower center", ncols=1 if longest > 24 else 2 if longest > 14 else 3)
    return figure
