"""Pareto fronts: the metric against what it costs, with the published models of the paper's ImageNet figure beside ours."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from eit_lab import published
from eit_lab.report.arms import Arm
from eit_lab.report.figure import INK, MUTED, PAPER, colour, marker, panel, shorten
from eit_lab.report.made_on import device
from eit_lab.report.metric import Metric, number
from eit_lab.units import prefix_of

AXES = {"params": "parameters", "macs": "MACs of a forward pass", "speed": "training images/s"}
_NAMED = 12
_NAME_POINTS = 7.0


def costs(arms: Sequence[Arm]) -> dict[str, dict[str, float]]:
    """Axis -> arm's label -> its cost; an axis is there where all arms have it, speed where all ran on the same devices."""
    found: dict[str, dict[str, float]] = {}
    for axis in ("params", "macs"):
        known = {arm.label: value for arm in arms if (value := number(arm.fact("cost", axis)))}
        if len(known) == len(arms):
            found[axis] = known
    speeds = {arm.label: speed for arm in arms if (speed := images_per_s(arm))}
    places = {device(run) for arm in arms for run in arm.runs.values()}
    if len(speeds) == len(arms) and len(places) == 1:
        found["speed"] = speeds
    return found


def images_per_s(arm: Arm) -> float | None:
    """Training images per second, mean over seeds; None where it is not known, or the devices were not the same."""
    known = [speed for run in arm.runs.values() if (speed := number(run.record.get("img_per_s")))]
    return mean(known) if known and len({device(run) for run in arm.runs.values()}) == 1 else None


def front(points: Sequence[tuple[float, float]], *, less_is_better: bool, higher_is_better: bool) -> list[int]:
    """The places of the points that no other point beats in one and equals in the other, by cost."""

    def ahead(a: tuple[float, float], b: tuple[float, float]) -> bool:
        cost = (a[0] <= b[0]) if less_is_better else (a[0] >= b[0])
        value = (a[1] >= b[1]) if higher_is_better else (a[1] <= b[1])
        return cost and value and a != b

    kept = [n for n, point in enumerate(points) if not any(ahead(other, point) for other in points)]
    return sorted(kept, key=points.__getitem__)


def is_imagenet(arms: Sequence[Arm]) -> bool:
    """Whether all runs are of ImageNet itself, not of what is laid out like it."""
    return all(arm.config.get("data.kind") == "imagenet" and arm.config.get("data.name") == "imagenet" for arm in arms)


def pareto_figure(arms: Sequence[Arm], metric: Metric, axis: str, cost: dict[str, float]) -> Figure:
    """Mean over seeds with its standard deviation against one cost; the line joins the arms that no other one beats."""
    reference = published.models() if axis == "params" and metric.key == "test/acc1" and is_imagenet(arms) else ()
    figure, axes = panel(width=5.8, height=4.6) if reference else panel(height=3.4)
    scale, prefix = (1e6, "M") if reference else prefix_of(max(cost.values())) if axis != "speed" else (1.0, "")
    points = [(cost[arm.label] / scale, arm.estimate(metric).mean) for arm in arms]
    best = front(points, less_is_better=axis != "speed", higher_is_better=metric.higher_is_better is not False)
    named = _draw_published(axes, reference)
    axes.plot([points[n][0] for n in best], [points[n][1] for n in best], color=INK, linewidth=1, alpha=0.55, zorder=2)
    for place, (arm, (x, y)) in enumerate(zip(arms, points, strict=True)):
        found = arm.estimate(metric)
        if found.n > 1:
            axes.errorbar(x, y, yerr=found.std, color=colour(place), linewidth=1.3, zorder=3)
        filled = place in best
        axes.plot(
            x, y, marker=marker(place), markersize=7, linestyle="none", zorder=4, markeredgewidth=1.2,
            color=colour(place) if filled else PAPER, markeredgecolor=colour(place),
            label=shorten(arm.label, to=44) if len(arms) <= _NAMED else None,
        )  # fmt: skip
    if max(x for x, _ in points) > 4 * min(x for x, _ in points) or reference:
        axes.set_xscale("log")
        for which in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            which(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else ""))
    else:
        axes.locator_params(axis="x", nbins=6)
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel(AXES[axis] + (f" ({prefix})" if prefix else ""))
    axes.set_ylabel(metric.title)
    axes.grid(axis="both")
    if len(arms) <= _NAMED:
        longest = max(len(arm.label) for arm in arms)
        figure.legend(loc="outside lower center", ncols=1 if longest > 24 else 2 if longest > 14 else 3)
    if named:
        _name_families(figure, axes, named, points)
    return figure


def _draw_published(axes: Axes, models: Sequence[published.Model]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Published models in grey, a family joined by a line; returns families with their points, largest model first."""
    families: dict[str, list[published.Model]] = {}
    for model in models:
        families.setdefault(model.family, []).append(model)
    named = []
    for family, members in families.items():
        points = sorted((model.params_m, model.top1) for model in members)
        shade = INK if family == "EIT" else MUTED
        axes.plot(
            *zip(*points, strict=True), color=shade, linewidth=0.8, alpha=0.7, markersize=4, zorder=1,
            marker="s" if members[0].pyramid else "o", markerfacecolor=PAPER,
        )  # fmt: skip
        named.append((f"{family} (published)" if family == "EIT" else family, points[::-1]))
    return named


def _name_families(
    figure: Figure,
    axes: Axes,
    named: Sequence[tuple[str, list[tuple[float, float]]]],
    taken: Sequence[tuple[float, float]],
) -> None:
    """Each family's name beside one of its points, where it hides neither another name nor a mark of ours."""
    figure.draw_without_rendering()  # places are known after the layout only
    to_px = axes.transData.transform
    scale = figure.dpi / 72
    height = 1.25 * _NAME_POINTS * scale
    room = axes.get_window_extent()
    marks = [to_px(point) for point in taken] + [to_px(point) for _, points in named for point in points]
    boxes: list[tuple[float, float, float, float]] = []
    for name, points in named:
        width = 0.62 * _NAME_POINTS * scale * len(name)
        best: tuple[float, tuple[float, float], tuple[float, float]] | None = None
        for point in points:
            x, y = to_px(point)
            for dx, dy in (
                (6, -height / 2),
                (-6 - width, -height / 2),
                (-width / 2, 5),
                (-width / 2, -5 - height),
                (5, 5),
                (5, -5 - height),
            ):
                box = (x + dx, y + dy, x + dx + width, y + dy + height)
                hidden = sum(box[0] < mx < box[2] and box[1] < my < box[3] for mx, my in marks)
                overlap = sum(_overlap(box, other) for other in boxes)
                outside = 10 * (box[0] < room.x0 or box[2] > room.x1 or box[1] < room.y0 or box[3] > room.y1)
                cost = hidden + overlap / height**2 + outside
                if best is None or cost < best[0] - 1e-9:
                    best = cost, point, (dx / scale, (dy + height * 0.25) / scale)
                    chosen = box
        assert best is not None, "a family has a model"
        boxes.append(chosen)
        axes.annotate(
            name, best[1], xytext=best[2], textcoords="offset points", fontsize=_NAME_POINTS,
            color=INK if "published" in name else MUTED,
        )  # fmt: skip


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    """Area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
