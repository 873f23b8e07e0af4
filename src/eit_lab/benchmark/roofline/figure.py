"""The picture of a profile: rooflines with the operators on them, and a step's time by group, literal beside ours. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from eit_lab.benchmark.roofline.groups import GROUPS
from eit_lab.benchmark.roofline.record import done, is_literal, measured_s, seconds_of
from eit_lab.benchmark.roofline.tables import columns, precisions
from eit_lab.report.figure import COLOURS, INK, MUTED, PAPER

_WITH_PRODUCTS = ("matrix products", "attention", "convolution branch", "stem convolution")
_PALE = 0.55  # towards white: the second half of the groups
_LARGEST = 420.0  # points^2 of the operator with most time
_DARK = 1.2  # red, green and blue together: below it, numbers are white
_LEAST_SHOWN = 0.035  # of a bar: less has no number in it


def profile_figure(record: Mapping[str, Any]) -> Figure:
    """Above: a roofline for each precision. Below: a bar for each step, by group."""
    shown = [one for one in precisions(record) if done(record, one)]
    bars = [(precision, name, run) for precision in shown for name, run in columns(record, precision)]
    figure = Figure(figsize=(12.8, 5.6 + 0.42 * len(bars)), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(4.4, 1.2 + 0.42 * len(bars))).ravel()
    panels = above.subplots(1, max(1, len(shown)), squeeze=False)[0]
    for axes, precision in zip(panels, shown, strict=False):
        _roofline_panel(axes, record, precision)
    above.legend(handles=_handles(record), loc="outside lower center", ncols=6, columnspacing=1.4)
    _bars_panel(below.subplots(), bars, str(record["model"]), int(record["batch"]))
    below.legend(loc="outside lower center", ncols=6, columnspacing=1.4)
    return figure


def colour_of(group: str) -> Any:
    """Six colours, then the same six paler."""
    place = GROUPS.index(group)
    red, green, blue = to_rgb(COLOURS[place % len(COLOURS)])
    if place < len(COLOURS):
        return red, green, blue
    return tuple(value + (1 - value) * _PALE for value in (red, green, blue))


def _roofline_panel(axes: Axes, record: Mapping[str, Any], precision: str) -> None:
    peaks, runs = record["peaks"], _compared(record, precision)
    operators = [one for one in record["work"][precision] if one["flops"]]
    points = [
        (one["flops"] / one["num_bytes"], one["flops"] / seconds, seconds, one, run)
        for run in runs
        for one in operators
        if (seconds := measured_s(run, one))
    ]
    longest = max((seconds for _, _, seconds, _, _ in points), default=1.0)
    for literal in (False, True):
        for phase, marker in (("forward", "o"), ("backward", "s")):
            some = [point for point in points if is_literal(point[4]) is literal and point[3]["phase"] == phase]
            some.sort(key=lambda point: -point[2])
            edges = [colour_of(point[3]["group"]) for point in some]
            axes.scatter(
                [point[0] for point in some],
                [point[1] / 1e9 for point in some],
                s=[max(9.0, _LARGEST * point[2] / longest) for point in some],
                marker=marker,
                facecolors="none" if literal else edges,
                edgecolors=edges,
                linewidths=1.3,
                alpha=0.85,
                zorder=3,
            )
    low = min((point[0] for point in points), default=1.0) / 8
    high = max((point[0] for point in points), default=1e3) * 3
    peak = peaks["flops"][precision]
    for name, bandwidth, line in (("memory", peaks["memory"], "-"), ("last cache", peaks["cache"], "--")):
        if bandwidth and (name == "memory" or bandwidth > peaks["memory"]):
            corner = peak / bandwidth
            across = [low, min(max(corner, low), high)]
            axes.plot(across, [one * bandwidth / 1e9 for one in across], line, color=INK, linewidth=1.2)
            axes.plot([], [], line, color=INK, linewidth=1.2, label=f"{name}: {bandwidth / 1e9:,.0f} GB/s")
    first = peak / max(peaks["memory"], peaks["cache"] or 0.0)
    roof = f"products: {peak / 1e9:,.0f} GFLOP/s"
    axes.plot([min(max(first, low), high), high], [peak / 1e9] * 2, color=INK, linewidth=2.2, label=roof)
    axes.legend(loc="lower right")
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        scale("log")
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))  # powers would need mathematical text
        axis.set_minor_formatter(NullFormatter())
    lowest = min((point[1] for point in points), default=peak / 1e3)
    highest = max([2.2 * peak, *(1.4 * point[1] for point in points)])
    axes.set_ylim(10 ** math.floor(math.log10(lowest / 1e9)), highest / 1e9)
    axes.set_xlabel("FLOP per byte that must move")
    axes.set_ylabel("GFLOP/s reached")
    axes.set_title(f"{precision}: each operator with products, by shape; area: time", fontsize=10)
    axes.grid(alpha=0.5)


def _compared(record: Mapping[str, Any], precision: str) -> list[Mapping[str, Any]]:
    """The first literal run and the last of ours: more would hide each other."""
    runs = done(record, precision)
    return [run for run in runs if is_literal(run)][:1] + [run for run in runs if not is_literal(run)][-1:]


def _handles(record: Mapping[str, Any]) -> list[Line2D]:
    def dot(label: str, colour: Any, *, marker: str = "o", filled: bool = True) -> Line2D:
        return Line2D(
            [], [], linestyle="", marker=marker, color=colour, markerfacecolor=colour if filled else "none",
            label=label, markersize=7,
        )  # fmt: skip

    peers = dict.fromkeys(run["peer"] for precision in precisions(record) for run in _compared(record, precision))
    told = [dot(group, colour_of(group)) for group in _WITH_PRODUCTS]
    told += [dot("forward", MUTED), dot("backward", MUTED, marker="s")]
    told += [dot(peer, INK, filled=not peer.startswith("literal")) for peer in peers]
    return told


def _bars_panel(axes: Axes, bars: list[tuple[str, str, Mapping[str, Any]]], model: str, batch: int) -> None:
    longest = max((run["seconds"] for _, _, run in bars), default=1.0)
    left = [0.0] * len(bars)
    for group in GROUPS:
        widths = [1e3 * seconds_of(run, group, None) for _, _, run in bars]
        axes.barh(range(len(bars)), widths, left=left, color=colour_of(group), height=0.72, label=group)
        for place, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width > 1e3 * _LEAST_SHOWN * longest:
                shown = INK if sum(colour_of(group)) > _DARK else PAPER
                axes.text(start + width / 2, place, f"{width:,.0f}", ha="center", va="center", fontsize=8, color=shown)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end in enumerate(left):
        axes.text(end, place, f"  {end:,.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [f"{name}\n{precision}" for precision, name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.07e3 * longest)
    axes.set_xlabel("ms of a training step")
    axes.set_title(f"{model}, batch {batch}: where the time goes", fontsize=10)
    axes.grid(axis="x", alpha=0.5)
