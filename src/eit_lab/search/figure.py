"""The picture of a search: the value of every trial in turn, and against each searched key. An arm has a colour and a mark."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

from eit_lab.search.request import Request
from eit_lab.search.space import Axis
from eit_lab.search.study import ArmStudy

matplotlib.use("Agg")
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eit_lab.report.figure import colour, line, marker

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_COLUMNS = 3
_PANEL_IN = (3.6, 2.9)  # width and height of a panel in inches
_DONE: dict[str, Any] = {"s": 18, "alpha": 0.75, "linewidths": 0}
_CUT: dict[str, Any] = {"s": 16, "alpha": 0.5, "linewidths": 1, "marker": "x"}
_ASIDE, _ALL_ASIDE = (
    0.12,
    0.7,
)  # of the step from choice to choice: between two arms at the same one, and all of them at most
_LONG_NAMES = 12  # characters of all choices together that fit below a panel without turning them


def save_search_figure(request: Request, studies: Sequence[ArmStudy], stem: Path) -> None:
    """STEM.png and STEM.svg."""
    figure = search_figure(request, studies)
    figure.savefig(stem.with_suffix(".png"), dpi=160)
    figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def search_figure(request: Request, studies: Sequence[ArmStudy]) -> Figure:
    """First panel: values by trial, the best so far as a line. Then a panel for each key. Arms are colours."""
    count = 1 + len(request.space.axes)
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(_PANEL_IN[0] * columns, _PANEL_IN[1] * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    for place, study in enumerate(studies):
        aside = min(_ASIDE, _ALL_ASIDE / len(studies)) * (place - (len(studies) - 1) / 2)
        _by_trial(panels[0], request, study, place)
        for axis, panel in zip(request.space.axes, panels[1:], strict=False):
            _by_value(panel, axis, study.trials(), place, aside=aside)
    objective = request.options.objective
    panels[0].set_xlabel("trial")
    panels[0].set_ylabel(objective)
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    for axis, panel in zip(request.space.axes, panels[1:], strict=False):
        _label(panel, axis)
    for panel in panels[:count]:
        panel.grid(axis="y", alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    if any(t.state.name == "PRUNED" and t.value is not None for study in studies for t in study.trials()):
        handles.append(Line2D([], [], color="0.4", linestyle="", marker="x", markersize=4))
        labels.append("stopped early or diverged, at its last epoch")
    if labels:
        _legend(figure, handles, labels)
    return figure


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Above the panels, in as few rows as the figure is wide enough for."""
    for columns in range(len(labels), 0, -1):
        title = "lines: best so far" if len(labels) > 1 else None
        legend = figure.legend(
            handles, labels, title=title, frameon=False, fontsize=9, loc="outside upper left", ncols=columns,
            alignment="left", title_fontsize=9,
        )  # fmt: skip
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _by_trial(panel: Axes, request: Request, study: ArmStudy, place: int) -> None:
    done = [(t.number + 1, t.value) for t in study.trials() if t.state.name == "COMPLETE" and t.value is not None]
    look: dict[str, Any] = {"color": colour(place), "linestyle": line(place), "lw": 1.2}
    if done:
        numbers, values = zip(*done, strict=True)
        better = max if request.options.maximize else min
        panel.scatter(numbers, values, color=colour(place), marker=marker(place), **_DONE)
        panel.step(numbers, list(itertools.accumulate(values, better)), where="post", **look)
        label = study.arm.label or "best so far"
        panel.plot([], [], marker=marker(place), markersize=4, markeredgewidth=0, label=label, **look)
    cut = [(t.number + 1, t.value) for t in study.trials() if t.state.name == "PRUNED" and t.value is not None]
    if cut:
        panel.scatter(*zip(*cut, strict=True), color=colour(place), **_CUT)


def _by_value(panel: Axes, axis: Axis, trials: Sequence[FrozenTrial], place: int, *, aside: float) -> None:
    done = {**_DONE, "marker": marker(place)}
    for state, style in (("PRUNED", _CUT), ("COMPLETE", done)):  # those that count on top
        found = [
            (_place(axis, t, aside=aside), t.value) for t in trials if t.state.name == state and t.value is not None
        ]
        if found:
            panel.scatter(*zip(*found, strict=True), color=colour(place), **style)


def _place(axis: Axis, trial: FrozenTrial, *, aside: float) -> float:
    value = trial.params[axis.key]
    return axis.choices.index(str(value)) + aside if axis.kind == "choice" else float(value)


def _label(panel: Axes, axis: Axis) -> None:
    panel.set_xlabel(axis.key)
    if axis.kind == "choice":
        long = sum(map(len, axis.choices)) > _LONG_NAMES * 2
        panel.set_xticks(range(len(axis.choices)), list(axis.choices), rotation=30 if long else 0)
        panel.set_xlim(-0.5, len(axis.choices) - 0.5)
    elif axis.log:
        panel.set_xscale("log")
