"""What is measured, drawn: every seed a dot, differences by seed, and the metric along a numeric factor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eit_lab.report.arms import Arm
from eit_lab.report.comparison import Comparison, Contrast
from eit_lab.report.figure import INK, MUTED, PAPER, colour, line, marker, panel, shorten
from eit_lab.report.metric import Metric, number
from eit_lab.report.stats import Estimate

ROWS = 40
"""Most arms, or comparisons, of one figure; the tables have all."""
_ROW_INCHES = 0.42
_LINES_ACROSS = 4
_DOTS_UP, _MEAN_DOWN = 0.17, 0.15


def accuracy_figure(arms: Sequence[Arm], metric: Metric) -> Figure:
    """A row an arm: every seed a dot, below them mean and 95% interval."""
    shown = arms[:ROWS]
    rows = [(arm.label, arm.values(metric), arm.estimate(metric)) for arm in shown]
    figure, axes = _rows([label for label, _, _ in rows])
    bounds = (0.0, 100.0) if metric.unit == "%" else (-math.inf, math.inf)
    low, high = _range([v for _, values, _ in rows for v in values], [found for _, _, found in rows], bounds=bounds)
    axes.set_xlim(low, high)
    for place, (_, values, found) in enumerate(rows):
        _row(axes, place, values, found, of=place)
    axes.set_xlabel(metric.title)
    return figure


def difference_figure(planned: Sequence[Contrast], arms: Sequence[Arm]) -> Figure | None:
    """A row a comparison: the difference in every seed a dot, below them mean and 95% interval; None without any.

    A difference of differences is of no one arm: its marks are those of the place after the last arm.
    """
    shown = [one for one in planned if one.estimate is not None][:ROWS]
    if not shown:
        return None
    of = {id(arm): place for place, arm in enumerate(arms)}
    against = {one.against.label if isinstance(one, Comparison) else None for one in shown}
    base = against.pop() if len(against) == 1 else None
    figure, axes = _rows([one.arm.label if base and isinstance(one, Comparison) else one.name for one in shown])
    found = [one.estimate for one in shown if one.estimate is not None]
    low, high = _range([0.0, *(d for one in shown for d in one.differences)], found)
    axes.set_xlim(low, high)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    for place, (one, estimate) in enumerate(zip(shown, found, strict=True)):
        _row(axes, place, one.differences, estimate, of=of[id(one.arm)] if isinstance(one, Comparison) else len(arms))
    metric = shown[0].metric
    unit = f" ({metric.difference_unit})" if metric.difference_unit else ""
    axes.set_xlabel(f"difference{f' from {shorten(base)}' if base else ''} in {metric.name}{unit}")
    return figure


def _rows(labels: Sequence[str]) -> tuple[Figure, Axes]:
    figure, axes = panel(height=0.75 + _ROW_INCHES * max(len(labels), 2))
    axes.set_ylim(len(labels) - 0.45, -0.55)
    if all(len(label) <= 17 for label in labels):
        axes.set_yticks(range(len(labels)), labels)
    else:  # long names stand above their row, and the picture keeps its width
        figure.set_figheight(0.75 + (_ROW_INCHES + 0.16) * max(len(labels), 2))
        axes.set_ylim(len(labels) - 0.45, -0.8)
        axes.set_yticks([])
        for place, label in enumerate(labels):
            axes.annotate(
                shorten(label, to=58), (0, place - 0.36), xycoords=("axes fraction", "data"), xytext=(3, 0),
                textcoords="offset points", va="bottom", fontsize=8,
                zorder=5, bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    for place in range(1, len(labels)):
        axes.axhline(place - (0.5 if axes.get_yticks().size else 0.64), color=MUTED, alpha=0.18, linewidth=0.6)
    return figure, axes


def _row(axes: Axes, place: int, values: Sequence[float], found: Estimate, *, of: int) -> None:
    """Dots above the row's middle, a little apart where they would hide each other; the interval below it."""
    apart = 0.055
    heights = [place - _DOTS_UP + apart * ((rank % 3) - 1) for rank in range(len(values))]
    axes.scatter(
        sorted(values),
        heights,
        s=20,
        color=colour(of),
        marker=marker(of),
        alpha=0.8,
        linewidths=0.5,
        edgecolors=PAPER,
        zorder=3,
    )
    y = place + _MEAN_DOWN
    axes.plot(
        found.mean,
        y,
        marker=marker(of),
        color=colour(of),
        markersize=6.5,
        markeredgecolor=PAPER,
        markeredgewidth=0.5,
        zorder=4,
    )
    if found.n < 2:
        return
    low, high = axes.get_xlim()
    axes.plot(
        [max(found.low, low), min(found.high, high)],
        [y, y],
        color=colour(of),
        linewidth=1.8,
        zorder=3,
        solid_capstyle="butt",
    )
    for end, edge, arrow in ((found.low, low, "<"), (found.high, high, ">")):
        if low <= end <= high:
            axes.plot(end, y, marker="|", color=colour(of), markersize=8, markeredgewidth=1.6, zorder=3)
        else:
            axes.plot(edge, y, marker=arrow, color=colour(of), clip_on=False, zorder=5, markersize=6, markeredgewidth=0)


def is_cut(figure: Figure, found: Iterable[Estimate | None]) -> bool:
    """Whether some interval goes on beyond a figure of rows."""
    low, high = figure.axes[0].get_xlim()
    return any(one.low < low or one.high > high for one in found if one is not None and one.n > 1)


def _range(
    values: Sequence[float], found: Sequence[Estimate], *, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float]:
    """Room for every dot, and for the intervals as far as they do not make the dots small."""
    low, high = min(values), max(values)
    width = (high - low) or max(abs(high), 1.0) * 0.02
    ends = [end for one in found if one.n > 1 for end in (one.low, one.high)]
    low, high = (
        min([low, *(max(end, low - 0.8 * width) for end in ends)]),
        max([high, *(min(end, high + 0.8 * width) for end in ends)]),
    )
    pad = 0.06 * ((high - low) or width)
    return max(low - pad, bounds[0]), min(high + pad, bounds[1])


# ---------------------------------------------------------------------------------------------------------- numeric factor


def numeric_factor(arms: Sequence[Arm]) -> str | None:
    """The key in which arms differ by a number, three values or more; None where there is none, or more than one.

    Arms without a number there, such as a stem that has no depth, do not count; they are drawn as lines across.
    """
    keys = list(dict.fromkeys(key for arm in arms for key in arm.point))
    found = []
    for key in keys:
        having = [arm for arm in arms if number(arm.point.get(key)) is not None]
        others = [other for other in keys if other != key and _is_numeric(having, other)]
        if len({arm.point[key] for arm in having}) > 2 and not others:
            found.append(key)
    return found[0] if len(found) == 1 else None


def _is_numeric(arms: Sequence[Arm], key: str) -> bool:
    return len({number(arm.point.get(key)) for arm in arms} - {None}) > 1


def factor_figure(arms: Sequence[Arm], metric: Metric, key: str) -> Figure:
    """The metric against a key, every seed a dot, mean and 95% interval; a line for each value of what else differs."""
    figure, axes = panel(height=3.4)
    having = [arm for arm in arms if number(arm.point.get(key)) is not None]
    varied = [name for name in having[0].point if name != key and len({repr(arm.point[name]) for arm in having}) > 1]
    series: dict[str, list[Arm]] = {}
    for arm in having:
        rest = ", ".join(f"{name.rpartition('.')[2]}={arm.point[name]}" for name in varied)
        series.setdefault(rest, []).append(arm)
    span = max(arm.point[key] for arm in having) - min(arm.point[key] for arm in having)
    all_values = [v for arm in arms for v in arm.values(metric)]
    bounds = (0.0, 100.0) if metric.unit == "%" else (-math.inf, math.inf)
    axes.set_ylim(*_range(all_values, [arm.estimate(metric) for arm in arms], bounds=bounds))
    without = [arm for arm in arms if arm not in having][:_LINES_ACROSS]
    for place, arm in enumerate(without, start=len(series)):
        mean = arm.estimate(metric).mean
        axes.axhline(
            mean, color=colour(place), linestyle="--", linewidth=1.2, label=shorten(arm.label, to=44), zorder=1
        )
    for place, (rest, members) in enumerate(series.items()):
        members = sorted(members, key=lambda arm: arm.point[key])
        shift = span * 0.012 * (place - (len(series) - 1) / 2)
        x = [arm.point[key] + shift for arm in members]
        found = [arm.estimate(metric) for arm in members]
        axes.plot(
            x,
            [f.mean for f in found],
            color=colour(place),
            linestyle=line(place),
            marker=marker(place),
            markersize=5,
            label=shorten(rest or "mean", to=44),
            zorder=3,
        )
        several = [(at, f.low, f.high) for at, f in zip(x, found, strict=True) if f.n > 1]
        if several:
            axes.vlines(*zip(*several, strict=True), color=colour(place), linewidth=1.2, alpha=0.7)
        seeds = [(at, value) for at, arm in zip(x, members, strict=True) for value in arm.values(metric)]
        places, values = zip(*seeds, strict=True)
        axes.scatter(places, values, s=14, color=colour(place), alpha=0.55, linewidths=0, zorder=2)
    axes.set_xlabel(key)
    axes.set_ylabel(metric.title)
    axes.grid(axis="y")
    if len(series) + len(without) > 1:
        longest = max(map(len, [*series, *(arm.label for arm in without)]))
        figure.legend(loc="outside lower center", ncols=1 if longest > 24 else 2)
    return figure
