"""The panels that compare arms: each draws one thing of all arms on the axes it is given.

A line is the mean over seeds, its band reaches from the smallest to the largest seed, a dashed line of the same colour is the mean
of the untrained models. Depth is a layer's number where all arms have as many layers, else its share of the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from eit_lab.report.figure import INK, MUTED, colour, line, marker, shorten
from eit_lab.report.inside.checked import FloatArray
from eit_lab.report.inside.maps import draw_matrix
from eit_lab.report.inside.numbers import ArmInside, Axis, Between, Curves, Frequency, Heads, Inside, PerHead
from eit_lab.report.inside.panels import (
    KINDS,
    accuracy_axis,
    cutoff_name,
    dots,
    filtered_layers,
    from_zero,
    layer_axis,
    layer_means,
    radius_axis,
    reference_line,
    share_accuracy_axis,
    uniform_line,
)
from eit_lab.report.inside.paper import REFERENCE, dress, layer_ticks, sample

_HALF = 0.5
_MARKED = 16
"""Most layers that are marked one by one."""


class Draw(Protocol):
    """Draws arms on the axes of one panel."""

    def __call__(self, axes: Sequence[Axes], shown: Sequence[Shown], *, alone: bool) -> None: ...


@dataclass(frozen=True)
class Shown:
    """An arm with the look it has in every figure."""

    arm: ArmInside
    place: int
    muted: bool = False
    """Only its mean, in grey: what another arm is held against."""

    @property
    def name(self) -> str:
        """Short enough for a legend."""
        return shorten(self.arm.label, to=34)

    @property
    def key(self) -> Line2D:
        """Its entry of a legend."""
        return sample(self.name, color=colour(self.place), linestyle=line(self.place), marker=marker(self.place), markeredgewidth=0)  # fmt: skip


def any_has(shown: Sequence[Shown], has: Callable[[Inside], bool]) -> bool:
    """Whether some seed of some arm has a part."""
    return any(has(inside) for one in shown for inside in one.arm.insides)


def has_untrained(shown: Sequence[Shown]) -> bool:
    """Whether there is a reference line."""
    return any_has(shown, lambda inside: inside.untrained is not None)


def same_depth(shown: Sequence[Shown]) -> bool:
    """Whether layers can be counted on one axis."""
    return len({(one.arm.first.layers, one.arm.first.axis.is_layers) for one in shown}) == 1


def _depth_axis(axes: Axes, shown: Sequence[Shown], *, first: int) -> None:
    """Layers from ``first``, or shares of the depth."""
    if not same_depth(shown):
        axes.set_xlim(-0.04, 1.04)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        axes.set_xlabel("share of the depth")
        return
    axis = shown[0].arm.first.axis
    layers = first == 1 or axis.is_layers
    last = max(shown[0].arm.first.layers, 1) if layers else int(axis.last)
    layer_ticks(axes, first if layers else 0, last)
    pad = 0.03 * last + 0.15
    axes.set_xlim(first - pad, last + pad)
    axes.set_xlabel("layer" if layers else "point, in the model's order")


def _band(
    axes: Axes, one: Shown, x: FloatArray, values: FloatArray | None, *, before: FloatArray | None = None
) -> None:
    """Mean and range over seeds of values (seeds, x), and the mean of the untrained models."""
    if one.muted:
        if values is not None:
            axes.plot(x, values.mean(axis=0), color=MUTED, linewidth=1.0, zorder=2.2)
        return
    shade = colour(one.place)
    if before is not None:
        look = {**REFERENCE, "color": shade, "alpha": 0.8}
        axes.plot(x, before.mean(axis=0), marker="_" if len(x) == 1 else None, markersize=9, **look)
    if values is None:
        return
    values = np.where(np.isfinite(values), values, np.nan)
    low, high = values.min(axis=0), values.max(axis=0)
    if len(values) > 1 and len(x) > 1:
        axes.fill_between(x, low, high, color=shade, alpha=0.2, linewidth=0, zorder=2)
    elif len(values) > 1:
        axes.vlines(x, low, high, color=shade, alpha=0.4, linewidth=3)
    mark = marker(one.place) if len(x) <= _MARKED else None
    axes.plot(
        x, values.mean(axis=0), color=shade, linestyle=line(one.place), marker=mark, markeredgewidth=0, zorder=2.5
    )


def draw_apart(axes: Sequence[Axes], shown: Sequence[Shown], *, alone: bool, draw: Draw, across: int) -> None:
    """What ``draw`` draws of all arms in one plot, in a plot an arm, ``across`` in a row; the mean of the first in grey in each."""
    for place, (plot, one) in enumerate(zip(axes, shown, strict=True)):
        draw([plot], [one, replace(shown[0], muted=True)] if place else [one], alone=alone)
        dress(plot, shorten(one.arm.label, to=44 // across))
        plot.tick_params(labelleft=place % across == 0)
        if place + across < len(axes):
            plot.set_xlabel("")
    low, high = min(plot.get_ylim()[0] for plot in axes), max(plot.get_ylim()[1] for plot in axes)
    for plot in axes:
        plot.set_ylim(low, high)
        plot.locator_params(axis="y", nbins=4)


# --------------------------------------------------------------------------------------------------------------- frequency


def nearest_cutoff(shown: Sequence[Shown]) -> float:
    """1/2, or the one nearest to it that was measured."""
    found = [cutoff for one in shown for inside in one.arm.insides if inside.frequency for cutoff in inside.frequency.cutoffs]  # fmt: skip
    return min(found, key=lambda cutoff: abs(cutoff - _HALF), default=_HALF)


def draw_hfd_share(axes: Sequence[Axes], shown: Sequence[Shown], *, alone: bool) -> None:
    """HFD share at one cutoff, after the stem and after each layer."""
    cutoff = nearest_cutoff(shown)

    def share(frequency: Frequency) -> FloatArray | None:
        if frequency.hfd_share is None or cutoff not in frequency.cutoffs:
            return None
        return np.asarray(frequency.hfd_share[frequency.cutoffs.index(cutoff)])

    _stream(axes[0], shown, share)
    from_zero(axes[0])
    dress(axes[0], f"HFD share, {cutoff_name(cutoff)}")


def draw_log_amplitude(axes: Sequence[Axes], shown: Sequence[Shown], *, alone: bool) -> None:
    """Log amplitude of the highest frequency on the diagonal minus that of DC, after the stem and after each layer."""
    _stream(axes[0], shown, lambda found: np.array([one[-1] for one in found.log_amplitude]) if found.log_amplitude else None)  # fmt: skip
    dress(axes[0], "Δ log amplitude")


def _stream(axes: Axes, shown: Sequence[Shown], value: Callable[[Frequency], FloatArray | None]) -> None:
    """A value (P,) of the residual stream at the outputs of the stem and of the blocks."""
    for one in shown:
        axis = one.arm.first.axis
        x = axis.depth[axis.outputs] / (1 if same_depth(shown) else axis.last)

        def taken(frequency: Frequency | None, outputs: list[int] = axis.outputs) -> FloatArray | None:
            found = None if frequency is None else value(frequency)
            return None if found is None else found[outputs]

        values = one.arm.over_seeds(lambda inside, taken=taken: taken(inside.frequency))  # type: ignore[misc]
        before = one.arm.over_seeds(lambda inside, taken=taken: taken(inside.untrained.frequency) if inside.untrained else None)  # type: ignore[misc]  # fmt: skip
        _band(axes, one, x, values, before=before)
    _depth_axis(axes, shown, first=0)


# ------------------------------------------------------------------------------------------------------------------- heads


def draw_head_diversity(axes: Sequence[Axes], shown: Sequence[Shown], *, alone: bool) -> None:
    """Head Diversity by layer."""
    for one in shown:
        layers = one.arm.first.layers
        x = np.arange(1.0, layers + 1) / (1 if same_depth(shown) else layers)
        values = one.arm.over_seeds(lambda inside: inside.heads.head_diversity if inside.heads else None)
        before = one.arm.over_seeds(lambda inside: fresh.head_diversity if (fresh := _fresh(inside)) else None)
        _band(axes[0], one, x, values, before=before)
    _depth_axis(axes[0], shown, first=1)
    from_zero(axes[0])
    dress(axes[0], "Head Diversity")


def _fresh(inside: Inside) -> Heads | None:
    return None if inside.untrained is None else inside.untrained.heads


def widths_of(inside: Inside) -> str:
    """Widths of a head, from the first layer to the last; empty where they are not known."""
    used = [width for width in inside.head_width or () if width]
    if not used:
        return ""
    return f"{used[0]}" if len(set(used)) == 1 else f"{used[0]} to {used[-1]}"


def _distances(one: Shown) -> list[PerHead]:
    """Attention distances of every seed that has them."""
    return [
        inside.heads.attention_distance
        for inside in one.arm.insides
        if inside.heads and inside.heads.attention_distance
    ]


def draw_distances(axes: Sequence[Axes], shown: Sequence[Shown], *, alone: bool, across: int) -> None:
    """Attention distance, a plot an arm, ``across`` in a row: all have the same y axis."""
    top, columns = 0.0, across if alone else len(axes)
    most = max(sum(len(one) for heads in _distances(arm) for one in heads if one is not None) for arm in shown)
    for place, (plot, one) in enumerate(zip(axes, shown, strict=True)):
        dots(plot, _distances(one), place=one.place, most=most)
        before = [fresh for inside in one.arm.insides if (fresh := _fresh(inside)) and fresh.attention_distance]
        if before:
            means = [layer_means(fresh.attention_distance) for fresh in before]
            reference_line(plot, means[0][0], np.mean([mean for _, mean in means], axis=0))
        uniform = one.arm.first.heads.uniform_distance if one.arm.first.heads else None
        if uniform is not None:
            uniform_line(plot, uniform)
        top = max(top, plot.get_ylim()[1], 1.07 * plot.dataLim.y1)
        layer_axis(plot, one.arm.first.layers, most=4 if len(axes) > 2 else 6)
        width = widths_of(one.arm.first)
        if width:
            plot.annotate(f"head width {width}", (0, 1), xytext=(0, 3), xycoords="axes fraction", textcoords="offset points", color=MUTED)  # fmt: skip
        if not alone and place == 0:
            plot.set_ylabel("attention distance (px)")
        dress(plot, shorten(one.arm.label, to=(44 if alone else 90) // columns), above=1 if width else 0)
        plot.tick_params(labelleft=place % columns == 0)
    for plot in axes:
        plot.set_ylim(0, top)
        plot.locator_params(axis="y", nbins=4)


# ----------------------------------------------------------------------------------------------------------------- filters


def token_layers(shown: Sequence[Shown]) -> list[float]:
    """Where tokens were filtered in all arms that filtered any: places in depth."""
    found = [{at for at, _ in filtered_layers(inside)} for one in shown for inside in one.arm.insides if inside.filters]
    found = [layers for layers in found if layers]
    return sorted(set.intersection(*found)) if found else []


def draw_filters(axes: Sequence[Axes], shown: Sequence[Shown], *, alone: bool, at: float | None) -> None:
    """Accuracy under low-pass, high-pass and band noise: of images, or of the tokens at a place in depth."""
    for place, (plot, (kind, name)) in enumerate(zip(axes, KINDS.items(), strict=True)):
        for one in shown:
            having = [inside for inside in one.arm.insides if inside.filters is not None]
            values = one.arm.over_seeds(lambda inside, kind=kind: _accuracy(inside, kind, at))  # type: ignore[misc]
            if values is not None and having:
                filters = having[0].filters
                assert filters is not None, "chosen above"
                x = filters.centres if kind == "band" else filters.cutoffs
                known = np.isfinite(values).all(axis=0)  # a small grid has no frequency in some bands
                _band(plot, one, x[known], 100 * values[:, known])
                radius_axis(plot, filters)
        accuracy_axis(plot, None, _classes(shown))
        where = "Images" if at is None else f"Tokens, {Axis(('stem',)).after(at)}"
        dress(plot, name if alone else f"{where}: {name} (%)")
        if alone:
            plot.set_xlabel("radius")
            plot.tick_params(labelleft=place == 0)
    share_accuracy_axis(axes)


def _accuracy(inside: Inside, kind: str, at: float | None) -> FloatArray | None:
    curves: Curves | None = None
    if inside.filters is not None:
        curves = inside.filters.input if at is None else dict(filtered_layers(inside)).get(at)
    return None if curves is None else curves.get(kind)


def _classes(shown: Sequence[Shown]) -> int | None:
    """For the line of chance: where all have as many classes."""
    found = {inside.num_classes for one in shown for inside in one.arm.insides}
    return found.pop() if len(found) == 1 else None


# -------------------------------------------------------------------------------------------------------------- similarity


def draw_between(axes: Sequence[Axes], shown: Sequence[Shown], *, alone: bool, pair: Between) -> None:
    """CKA between the points of two arms."""
    up, across = Axis(pair.points_a), Axis(pair.points_b)
    draw_matrix(axes[0], pair.cka, across=across, up=up)
    dress(axes[0], "CKA")
    axes[0].grid(visible=False)
    axes[0].set_ylabel(f"{up.word} of {shorten(pair.a, to=24)}")
    axes[0].set_xlabel(f"{across.word} of {shorten(pair.b, to=24)}")


def distance_keys(shown: Sequence[Shown]) -> list[Line2D]:
    """The legend of the dots."""
    keys = [
        sample("a head of a seed", color=MUTED, marker="o", linestyle="none", alpha=0.8, markeredgewidth=0),
        sample("mean", color=INK, linewidth=1.1),
        sample("uniform attention", color=INK, linestyle=":", linewidth=1.0),
    ]
    return [*keys, *([sample("untrained mean", **{**REFERENCE, "zorder": 1})] if has_untrained(shown) else [])]
