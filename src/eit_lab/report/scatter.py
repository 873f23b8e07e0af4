"""Accuracy against a figure of the inside of the network: a mark a run, a larger one for the mean of an arm."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from matplotlib.figure import Figure

from eit_lab.report.analyses import QUANTITIES, Analyses, ArmAnalyses
from eit_lab.report.figure import MUTED, PAPER, colour, marker, panel, shorten
from eit_lab.report.interpretation import values_of
from eit_lab.report.metric import Metric

_LETTERS = 52
"""Of a legend's line, marks and gaps counted as four."""


def scatter_figure(analyses: Analyses, metric: Metric, key: str, *, places: Mapping[str, int]) -> Figure | None:
    """Runs of some arms in their colours, all others in grey; None where no run has the quantity.

    ``places``: label of an arm -> its place among those that are drawn, as many as people can tell apart.
    """
    rows: list[tuple[ArmAnalyses, list[float], list[float]]] = []
    for one in analyses.arms:
        x_of, y_of = one.values(key), values_of(one, metric)
        seeds = [seed for seed in x_of if seed in y_of]
        if seeds:
            rows.append((one, [x_of[seed] for seed in seeds], [y_of[seed] for seed in seeds]))
    if not rows:
        return None
    figure, axes = panel(height=3.5)
    grey = [(x, y) for one, x, y in rows if one.arm.label not in places]
    if grey:
        flat = ([v for x, _ in grey for v in x], [v for _, y in grey for v in y])
        axes.scatter(*flat, s=14, color=MUTED, alpha=0.45, linewidths=0, zorder=2, label=f"{len(grey)} other arms")
    for one, x, y in rows:
        if one.arm.label not in places:
            continue
        place = places[one.arm.label]
        ink, mark = colour(place), marker(place)
        axes.scatter(x, y, s=22, color=ink, marker=mark, alpha=0.75, linewidths=0.5, edgecolors=PAPER, zorder=3)
        axes.scatter(  # hollow, so that no run hides behind a mean
            [fmean(x)], [fmean(y)], s=90, facecolors="none", marker=mark, linewidths=1.6, edgecolors=ink, zorder=4,
            label=shorten(one.arm.label, to=44),
        )  # fmt: skip
    axes.set_xlabel(QUANTITIES[key].title)
    axes.set_ylabel(metric.title)
    axes.margins(0.08)
    axes.grid()
    labels = [shorten(one.arm.label, to=44) for one, _, _ in rows if one.arm.label in places]
    longest = max(map(len, labels), default=0)
    in_one_row = sum(len(label) + 4 for label in labels) <= _LETTERS
    figure.legend(
        loc="outside lower center", ncols=len(labels) if in_one_row else 1 if longest > 24 else 2 if longest > 14 else 3,
        markerscale=0.7, handletextpad=0.3, columnspacing=1.2,
    )  # fmt: skip
    return figure
