"""The picture of the record: what a step is made of, how far more GPUs pay, and how to share them out in a sweep. No torch."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eit_lab.benchmark.scaling.model import PAYS
from eit_lab.benchmark.scaling.results import SWEEP_GPUS, SWEEP_RUNS, Results
from eit_lab.report.figure import COLOURS, INK, MUTED

_PARTS = {
    "compute": "forward and backward",
    "stragglers": "the slowest rank",
    "exposed": "all-reduce, exposed",
    "agreements": "agreements of the hosts",
    "update": "optimizer, Python",
    "loader_wait": "waiting for images",
}
_PART_COLOURS = (0, 5, 4, 1, 2, 3)
_MODEL_COLOURS = (5, 0, 2, 4)
_CUT_MS = 22.0  # of the axis: beyond it there is one colour only


def scaling_figure(results: Results) -> Figure:
    """Above: a step by part, a panel a model. Below: efficiency by GPUs, and hours of a sweep by GPUs of a run."""
    figure = Figure(figsize=(12.8, 7.4), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.1, 1)).ravel()
    panels = above.subplots(1, len(results.workloads), sharey=True, squeeze=False)[0]
    for axes, workload in zip(panels, results.workloads, strict=True):
        _step_panel(axes, results, workload.model)
    panels[0].set_ylabel("ms of a step")
    handles, labels = panels[0].get_legend_handles_labels()
    above.legend(
        handles, labels, loc="outside upper center", ncols=len(_PARTS) + 2, columnspacing=1.3, handlelength=1.5
    )
    left, right = below.subplots(1, 2)
    _efficiency_panel(left, results)
    _sweep_panel(right, results)
    for axes in (*panels, left, right):
        axes.grid(axis="y")
    return figure


def _step_panel(axes: Axes, results: Results, model: str) -> None:
    rows = results.of(model, "strong")
    places = range(len(rows))
    floor = [0.0] * len(rows)
    for colour, (part, label) in zip(_PART_COLOURS, _PARTS.items(), strict=True):
        heights = [1e3 * row.step.parts[part] for row in rows]
        axes.bar(places, heights, bottom=floor, color=COLOURS[colour], width=0.72, label=label)
        floor = [low + height for low, height in zip(floor, heights, strict=True)]
    simulated = [1e3 * row.simulated_s for row in rows]
    shown = [(place, height) for place, height in zip(places, simulated, strict=True) if height <= _CUT_MS]
    at, heights = [place for place, _ in shown], [height for _, height in shown]
    axes.plot(at, heights, "_", color=INK, markersize=13, markeredgewidth=1.4, label="simulated")
    for place, height in zip(places, floor, strict=True):
        if height > _CUT_MS:
            axes.annotate(
                f"{height:.0f}", (place, _CUT_MS), ha="center", va="bottom", fontsize=9, annotation_clip=False
            )
    stop = results.scenarios["as above"][model].pays_to
    last = [row.step.gpus for row in rows if row.step.gpus <= stop]
    if last:
        axes.axvline(len(last) - 0.5, color=MUTED, linestyle=":", linewidth=1.4, label="pays up to here")
    axes.set_ylim(0, _CUT_MS)
    axes.set_xticks(list(places), [f"{row.step.gpus}\n{row.step.images}" for row in rows], fontsize=9)
    axes.set_xlabel("GPUs, images each")
    axes.set_title(f"{model}, batch {rows[0].step.gpus * rows[0].step.images}", fontsize=10, pad=12)


def _efficiency_panel(axes: Axes, results: Results) -> None:
    for colour, workload in zip(_MODEL_COLOURS, results.workloads, strict=False):
        rows = results.of(workload.model, "strong")
        gpus = [row.step.gpus for row in rows]
        axes.plot(
            gpus,
            [100 * row.efficiency for row in rows],
            "o-",
            color=COLOURS[colour],
            label=workload.model,
            markersize=4,
        )
        agreeing = [100 * row.efficiency_agreeing for row in rows]
        axes.plot(gpus, agreeing, "--", color=COLOURS[colour], linewidth=1.1)
    axes.axhline(100 * PAYS, color=MUTED, linestyle=":", linewidth=1.2)
    axes.text(results.gpus[-1], 100 * PAYS + 1.5, "pays", ha="right", fontsize=9, color=MUTED)
    axes.plot([], [], "--", color=MUTED, linewidth=1.1, label="two agreements a step")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(results.gpus), [str(num) for num in results.gpus])
    axes.set_xlabel("GPUs (the recipe refuses those that would have fewer than two images)")
    axes.set_ylabel("efficiency, % of one machine")
    axes.set_ylim(0, 104)
    axes.set_title("the recipe's batch, shared by more and more GPUs", fontsize=10)
    axes.legend()


def _sweep_panel(axes: Axes, results: Results) -> None:
    runs = SWEEP_RUNS[0]
    for colour, workload in zip(_MODEL_COLOURS, results.workloads, strict=False):
        widths = results.sweeps[workload.model][runs]
        gpus = [width.gpus for width in widths]
        axes.plot(
            gpus, [width.all_hours for width in widths], "o-", color=COLOURS[colour], label=workload.model, markersize=4
        )
        axes.plot(gpus, [width.run_hours for width in widths], ":", color=COLOURS[colour], linewidth=1.2)
    axes.plot([], [], ":", color=MUTED, linewidth=1.2, label="one of them")
    axes.set_xscale("log", base=2)
    ticks = sorted({width.gpus for model in results.sweeps.values() for width in model[runs]})
    axes.set_xticks(ticks, [str(num) for num in ticks])
    axes.set_ylim(0)
    axes.set_xlabel("GPUs of a run")
    axes.set_ylabel("hours")
    axes.set_title(f"{runs} runs of 300 epochs on {SWEEP_GPUS} GPUs: until all have ended", fontsize=10)
    axes.legend()
