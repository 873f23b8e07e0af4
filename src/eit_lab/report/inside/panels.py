"""The panels about one model: each a function that draws one thing on the axes it is given.

On every axis of depth the stem is 0, the mixer of layer n (from 1) n - 0.5, its MLP n. Dashed grey is the same model with its
weights drawn anew. Sources of the pictures: dots of attention distance by layer, Dosovitskiy et al. 2021 (arXiv:2010.11929), fig. 7;
curves of relative log amplitude, Park & Kim 2022 (arXiv:2202.06709); squares on the receptive field, Ding et al. 2022
(arXiv:2203.06717). Unlike the second, the frequency axis has the true frequencies of the grid: it ends below pi.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.typing import ColorType

from eit_lab.report.figure import INK, MUTED, colour, marker
from eit_lab.report.inside.checked import FloatArray
from eit_lab.report.inside.maps import draw_cka, draw_receptive_field, draw_rollout
from eit_lab.report.inside.numbers import Curves, Filters, Frequency, Inside, PerHead
from eit_lab.report.inside.paper import (
    POINTS,
    REFERENCE,
    depth_bar,
    depth_colours,
    dress,
    layer_ticks,
    reference,
    room,
    sample,
)

_FRACTIONS = {1 / 4: "1/4", 1 / 3: "1/3", 1 / 2: "1/2", 3 / 4: "3/4", 2 / 3: "2/3"}
_MARKED = 16
"""Most layers that are marked one by one."""
UNTRAINED = "untrained"
KINDS = {"low": "low-pass", "high": "high-pass", "band": "band noise"}
"""The three ways of filtering."""


class Draw(Protocol):
    """Draws one thing; ``alone``: nothing around it says what its reference lines are."""

    def __call__(self, axes: Axes, inside: Inside, *, alone: bool) -> None: ...


@dataclass(frozen=True)
class Panel:
    """One thing to see: its name, what it takes of a page, whether a model has it, and how it is drawn."""

    name: str
    units: int
    """Of the page's width."""
    height: float
    """Inches, on a page."""
    alone: float
    """Inches of height, as a figure of a column's width."""
    has: Callable[[Inside], bool]
    draw: Draw


# --------------------------------------------------------------------------------------------------------------- frequency


def cutoff_name(cutoff: float) -> str:
    """``r > 1/2``."""
    return f"r > {next((name for value, name in _FRACTIONS.items() if abs(value - cutoff) < 1e-6), f'{cutoff:g}')}"


def draw_hfd_share(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Share of the energy beyond each cutoff at every point of the residual stream."""
    shares, fresh = _frequency(inside).hfd_share, _fresh_frequency(inside)
    assert shares is not None, "asked for where it is"
    if fresh is not None and fresh.hfd_share is not None:
        for share in fresh.hfd_share:
            reference_line(axes, inside.axis.depth, share)
    handles: list[Line2D] = []
    for place, (cutoff, share) in enumerate(zip(_frequency(inside).cutoffs, shares, strict=True)):
        if place and np.allclose(
            share, shares[place - 1], equal_nan=True
        ):  # a small grid has no radius between the two
            handles[-1].set_label(f"{handles[-1].get_label()}, {cutoff_name(cutoff).removeprefix('r > ')}")
        else:
            handles += _depth_line(axes, inside, share, place=place, label=cutoff_name(cutoff))
    if alone and fresh is not None and fresh.hfd_share is not None:
        handles.append(reference(UNTRAINED))
    axes.set_ylim(0, 1)
    _depth_axis(axes, inside)
    dress(axes, "HFD share", handles=handles)


def draw_log_amplitude(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Relative log amplitude along the half diagonal, a curve for the stem and for each block's output."""
    frequency, fresh = _frequency(inside), _fresh_frequency(inside)
    colours, last = depth_colours(), inside.axis.last
    handles: list[Line2D] = []
    if fresh is not None and fresh.log_amplitude:
        end = inside.axis.outputs[-1]
        axes.plot(fresh.frequencies[end], fresh.log_amplitude[end], **{**REFERENCE, "zorder": 3})
        handles = [reference(f"{UNTRAINED}, {inside.axis.after(last)}")]
    for place in inside.axis.outputs:
        shade = colours(inside.axis.depth[place] / last)
        dot = "o" if len(frequency.frequencies[place]) == 1 else None
        axes.plot(frequency.frequencies[place], frequency.log_amplitude[place], color=shade, linewidth=1.1, marker=dot)
    end_of_axis = max(float(one[-1]) for one in frequency.frequencies if len(one))
    frequency_ticks(axes, end_of_axis)
    dress(axes, "Relative log amplitude", handles=handles)
    depth_bar(axes, last, word=inside.axis.word)


def frequency_ticks(axes: Axes, last: float) -> None:
    """0, some between, and the true last frequency of the grid."""
    between = [tick for tick in (0.25, 0.5, 0.75) if tick < 0.82 * last]  # the labels have room
    axes.set_xticks([0, *between, last], ["0", *(f"{tick:g}π" for tick in between), f"{last:.3f}".rstrip("0").rstrip(".") + "π"])  # fmt: skip
    axes.set_xlim(0, last * 1.02 if last else 1)
    axes.set_xlabel("frequency on the diagonal")


def draw_hf_dc_ratio(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Norm of the tokens without their mean over that of the mean."""
    ratio, fresh = _frequency(inside).hf_dc_ratio, _fresh_frequency(inside)
    assert ratio is not None, "asked for where it is"
    before = None if fresh is None else fresh.hf_dc_ratio
    _single(axes, inside, ratio, before, title="HF / DC norm ratio", alone=alone)
    from_zero(axes)


def draw_feature_variance(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Variance over the grid, mean over images and channels; a logarithmic axis."""
    variance, fresh = _frequency(inside).feature_variance, _fresh_frequency(inside)
    assert variance is not None, "asked for where it is"
    before = None if fresh is None else fresh.feature_variance
    _single(axes, inside, variance, before, title="Feature variance", alone=alone)
    if (variance[np.isfinite(variance)] > 0).any():
        log_axis(axes)


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers: decades, and between them where it spans few."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 6 * low:  # two of 1, 2, 5, 10 lie in it whatever it begins with
        middle = np.sqrt(low * high)
        low, high = axes.set_ylim(middle / np.sqrt(6), middle * np.sqrt(6))
    decades = np.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0), numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if 1e-3 <= value < 1e4 else f"{value:.0e}"))  # fmt: skip
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=1.3, width=0.5)


def _frequency(inside: Inside) -> Frequency:
    assert inside.frequency is not None, "asked for where it is"
    return inside.frequency


def _fresh_frequency(inside: Inside) -> Frequency | None:
    return None if inside.untrained is None else inside.untrained.frequency


def _single(
    axes: Axes, inside: Inside, values: FloatArray, before: FloatArray | None, *, title: str, alone: bool
) -> None:
    if before is not None:
        reference_line(axes, inside.axis.depth, before)
    _depth_line(axes, inside, values, place=0, label="")
    _depth_axis(axes, inside)
    dress(axes, title, handles=_against_untrained(before, alone=alone))


def reference_line(axes: Axes, x: FloatArray, y: FloatArray) -> None:
    """Dashed grey; a single point is a dash."""
    axes.plot(x, y, marker="_" if len(x) == 1 else None, markersize=9, **REFERENCE)


def _against_untrained(before: FloatArray | None, *, alone: bool) -> list[Line2D]:
    return [sample("trained", color=colour(0)), reference(UNTRAINED)] if alone and before is not None else []


def _depth_line(axes: Axes, inside: Inside, values: FloatArray, *, place: int, label: str) -> list[Line2D]:
    """A line through all points, marks at the outputs of the blocks."""
    values = np.where(np.isfinite(values), values, np.nan)
    drawn = axes.plot(inside.axis.depth, values, color=colour(place), zorder=2.5)
    few = len(inside.axis.outputs) <= _MARKED + 1
    if few:
        axes.plot(
            inside.axis.depth[inside.axis.outputs], values[inside.axis.outputs], color=colour(place), marker=marker(place),
            linestyle="none", markeredgewidth=0, zorder=2.6,
        )  # fmt: skip
    assert drawn, "a line was drawn"
    return [sample(label, color=colour(place), marker=marker(place) if few else None, markeredgewidth=0)]


def _depth_axis(axes: Axes, inside: Inside) -> None:
    layer_ticks(axes, 0, int(inside.axis.last), most=9 if room(axes) > 2 else 6)
    pad = 0.03 * inside.axis.last
    axes.set_xlim(-pad, inside.axis.last + pad)
    axes.set_xlabel("layer" if inside.axis.is_layers else "point, in the model's order")


def from_zero(axes: Axes) -> None:
    """A y axis that begins at 0, with some numbers on it however small it is."""
    axes.set_ylim(0, max(axes.get_ylim()[1], 1.07 * axes.dataLim.y1))
    axes.locator_params(axis="y", nbins=5, min_n_ticks=3)


# ------------------------------------------------------------------------------------------------------------------- heads


def draw_attention_distance(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Mean attention distance: a dot a head, the mean over heads, uniform attention; head widths above."""
    heads = inside.heads
    assert heads is not None, "asked for where it is"
    fresh = None if inside.untrained is None else inside.untrained.heads
    handles = [*dots(axes, [heads.attention_distance], place=0), sample("mean", color=INK, linewidth=1.1)]
    if fresh is not None and fresh.attention_distance:
        reference_line(axes, *layer_means(fresh.attention_distance))
        handles += [reference(f"{UNTRAINED} mean")] if alone else []
    if heads.uniform_distance is not None:
        uniform_line(axes, heads.uniform_distance)
        handles.append(sample(f"uniform, {heads.uniform_distance:.1f} px", color=INK, linestyle=":", linewidth=1.0))
    from_zero(axes)
    layer_axis(axes, inside.layers)
    lines = widths_above(axes, inside.head_width, inside.layers)
    dress(axes, "Mean attention distance (px)", handles=handles, above=lines)


def dots(axes: Axes, seeds: Sequence[PerHead], *, place: int, most: int = 0) -> list[Line2D]:
    """A dot a head and seed, the mean over both as a line; ``most``: how many dots a plot beside it has, for dots of one size."""
    per_layer = [np.concatenate([one for one in found if one is not None]) if any(one is not None for one in found) else None for found in zip(*seeds, strict=True)]  # fmt: skip
    many = max(most, sum(len(one) for one in per_layer if one is not None))
    size = 3.4 if many <= 100 else 2.8 if many <= 300 else 2.2
    for layer, values in enumerate(per_layer, start=1):
        if values is not None:
            axes.plot(
                [layer] * len(values), values, marker="o", markersize=size, linestyle="none", color=colour(place),
                alpha=0.55, markeredgewidth=0, zorder=2,
            )  # fmt: skip
    x, mean = layer_means(per_layer)
    axes.plot(x, mean, color=INK, linewidth=1.1, marker="_" if len(per_layer) == 1 else None, zorder=3)
    return [sample("a head", color=colour(place), marker="o", linestyle="none", markersize=size, alpha=0.8, markeredgewidth=0)]  # fmt: skip


def layer_means(per_layer: Sequence[FloatArray | None]) -> tuple[FloatArray, FloatArray]:
    """(L,) layer numbers from 1, (L,) means over heads; nan for a layer without attention."""
    means = [np.nan if one is None else float(np.mean(one)) for one in per_layer]
    return np.arange(1, len(means) + 1, dtype=np.float64), np.array(means)


def uniform_line(axes: Axes, distance: float) -> None:
    """The mean attention distance of uniform attention."""
    axes.axhline(distance, color=INK, linestyle=":", linewidth=1.0, zorder=1.4)


def layer_axis(axes: Axes, layers: int, *, most: int = 12) -> None:
    """Layers from 1, a place each."""
    layer_ticks(axes, 1, max(layers, 1), most=most if room(axes) > 2.5 else 6)
    axes.set_xlim(0.4, max(layers, 1) + 0.6)
    axes.set_xlabel("layer")


def widths_above(axes: Axes, widths: tuple[int, ...] | None, layers: int) -> float:
    """Write the width d of a head over each layer, or once where all have the same; returns the lines that takes."""
    if not widths:
        return 0
    offset = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": POINTS, "color": MUTED, "annotation_clip": False}  # fmt: skip
    if len(set(widths)) == 1 or layers < 2:
        axes.annotate(f"head width {widths[0]} in every layer" if layers > 1 else f"head width {widths[0]}", (0, 1), xytext=(0, 3), **{**offset, "xycoords": "axes fraction"})  # type: ignore[arg-type]  # fmt: skip
        return 1
    a_place = (room(axes) - 0.5) / layers  # inches
    letters = max(len(str(width)) for width in widths)
    upright = a_place < (letters + 0.7) * 0.62 * POINTS / 72
    for layer, width in enumerate(widths, start=1):
        axes.annotate(
            str(width) if width else "–", (layer, 1), xytext=(0, 3), ha="center", va="bottom", rotation=90 if upright else 0, **offset,  # type: ignore[arg-type]
        )  # fmt: skip
    axes.annotate("d", (0, 1), xytext=(-6, 3), ha="center", va="bottom", **{**offset, "xycoords": "axes fraction", "fontstyle": "italic"})  # type: ignore[arg-type]  # fmt: skip
    return 1 if not upright else 0.55 * letters + 0.3


def draw_head_diversity(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Standard deviation over heads of their distance, in units of uniform attention's."""
    heads = inside.heads
    assert heads is not None, "asked for where it is"
    assert heads.head_diversity is not None, "asked for where it is"
    fresh = (
        None if inside.untrained is None or inside.untrained.heads is None else inside.untrained.heads.head_diversity
    )
    if fresh is not None:
        reference_line(axes, np.arange(1.0, inside.layers + 1), fresh)
    _layer_line(axes, heads.head_diversity, place=0, label="trained")
    from_zero(axes)
    layer_axis(axes, inside.layers)
    dress(axes, "Head Diversity", handles=_against_untrained(fresh, alone=alone))


def draw_head_pairs(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """How different two heads' maps are, mean over pairs."""
    heads = inside.heads
    assert heads is not None, "asked for where it is"
    handles = []
    for place, (label, values) in enumerate((("1 − cos", heads.head_cosine), ("JS, bits", heads.head_js))):
        if values is not None:
            handles += _layer_line(axes, values, place=place, label=label)
    from_zero(axes)
    layer_axis(axes, inside.layers)
    dress(axes, "Pairs of heads", handles=handles)


def draw_head_shares(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Entropy, NMI and mass on CLS: mean and range over heads."""
    heads = inside.heads
    assert heads is not None, "asked for where it is"
    handles = []
    named = (("entropy", heads.attention_entropy), ("NMI", heads.attention_nmi), ("mass on CLS", heads.cls_mass))
    for place, (label, per_layer) in enumerate(named):
        if not per_layer:
            continue
        x, mean = layer_means(per_layer)
        low, high = (
            np.array([np.nan if one is None else float(edge(one)) for one in per_layer]) for edge in (np.min, np.max)
        )
        if inside.layers > 1:
            axes.fill_between(x, low, high, color=colour(place), alpha=0.2, linewidth=0)
        else:
            axes.vlines(x, low, high, color=colour(place), alpha=0.4, linewidth=4)
        handles += _layer_line(axes, mean, place=place, label=label)
    axes.set_ylim(0, 1.02)
    layer_axis(axes, inside.layers)
    dress(axes, "Attention: mean and range over heads", handles=handles)


def _layer_line(axes: Axes, values: FloatArray, *, place: int, label: str) -> list[Line2D]:
    mark = marker(place) if len(values) <= _MARKED else None
    axes.plot(np.arange(1, len(values) + 1), values, color=colour(place), marker=mark, markeredgewidth=0, zorder=2.5)
    return [sample(label, color=colour(place), marker=mark, markeredgewidth=0)]


# ----------------------------------------------------------------------------------------------------------------- filters


def draw_input_filters(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Accuracy of filtered images: of low-pass and high-pass against the cutoff, of band noise against the band's centre."""
    filters = inside.filters
    assert filters is not None, "asked for where it is"
    assert filters.input is not None, "asked for where it is"
    handles = []
    for place, (kind, name) in enumerate(KINDS.items()):
        values = filters.input.get(kind)
        if values is not None:
            x = filters.centres if kind == "band" else filters.cutoffs
            curve(axes, x, values, color=colour(place), marker=marker(place))
            handles.append(sample(name if alone else kind, color=colour(place), marker=marker(place), markeredgewidth=0))  # fmt: skip
    lines = accuracy_axis(axes, filters.acc1, inside.num_classes)
    handles += lines if alone else []
    radius_axis(axes, filters)
    dress(axes, "Top-1 of filtered images (%)" if alone else "Images, filtered (%)", handles=handles)


def curve(axes: Axes, x: FloatArray, values: FloatArray, *, color: ColorType, marker: str) -> None:
    """Shares as per cent, over the places that have one: a small grid has no frequency in some bands."""
    known = np.isfinite(values)
    axes.plot(x[known], 100 * values[known], color=color, marker=marker, markeredgewidth=0)


def accuracy_axis(axes: Axes, unfiltered: float | None, num_classes: int | None) -> list[Line2D]:
    """Per cent from 0, with the lines of what is not filtered and of chance; returns their entries of a legend."""
    handles = []
    if unfiltered is not None:
        axes.axhline(100 * unfiltered, color=INK, linewidth=0.8, zorder=1.4)
        handles.append(sample("unfiltered", color=INK, linewidth=0.8))
    if num_classes:
        axes.axhline(100 / num_classes, color=INK, linestyle=":", linewidth=1.0, zorder=1.4)
        handles.append(sample("chance", color=INK, linestyle=":", linewidth=1.0))
    share_accuracy_axis([axes])
    return handles


def share_accuracy_axis(plots: Sequence[Axes]) -> None:
    """The same y axis from 0, of round numbers where accuracies are high."""
    heights = [np.asarray(drawn.get_ydata(), dtype=float) for axes in plots for drawn in axes.get_lines()]
    top = max([0.0, *(float(one[np.isfinite(one)].max()) for one in heights if np.isfinite(one).any())])
    for axes in plots:
        axes.set_ylim(0, 103 if top > 60 else 1.08 * top or 1)
        if top > 60:
            axes.set_yticks([0, 25, 50, 75, 100])


def radius_axis(axes: Axes, filters: Filters) -> None:
    """Radius of cutoff or centre; 1 is the Nyquist frequency on an axis."""
    last = max([1.0, *filters.cutoffs, *filters.centres])
    axes.set_xlim(0, 1.03 * last)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlabel("radius (1: Nyquist)")


def filtered_layers(inside: Inside) -> list[tuple[float, Curves]]:
    """The layers whose tokens were filtered, by their place in depth."""
    found = (
        [] if inside.filters is None else [(inside.axis.of(point), of) for point, of in inside.filters.tokens.items()]
    )
    return sorted(((at, of) for at, of in found if at is not None), key=lambda one: one[0])


def draw_token_filters(axes: Axes, inside: Inside, kind: str, *, alone: bool = True) -> None:
    """Accuracy where the patch tokens after a layer are filtered, a line a layer; kind: low, high or band."""
    filters = inside.filters
    assert filters is not None, "asked for where it is"
    colours, last = depth_colours(), inside.axis.last
    handles: list[Line2D] = []
    for place, (at, curves) in enumerate(filtered_layers(inside)):
        values = curves.get(kind)
        if values is not None:
            x = filters.centres if kind == "band" else filters.cutoffs
            shade = colours(at / last)
            curve(axes, x, values, color=shade, marker=marker(place))
            is_next = any(str(one.get_label()).startswith(inside.axis.word) for one in handles)
            label = f"{at:g}" if is_next and not alone else inside.axis.after(at)
            handles.append(sample(label, color=shade, marker=marker(place), markeredgewidth=0))
    lines = accuracy_axis(axes, filters.acc1, inside.num_classes)
    handles += lines if alone else []
    radius_axis(axes, filters)
    dress(axes, f"Tokens, {KINDS[kind]} (%)", handles=handles)


def has_frequency(name: str) -> Callable[[Inside], bool]:
    """Whether a model has one of the figures of Frequency."""

    def has(inside: Inside) -> bool:
        value = None if inside.frequency is None else getattr(inside.frequency, name)
        return value is not None and len(value) > 0

    return has


def has_amplitude(inside: Inside) -> bool:
    """Whether a model has log amplitudes of more than DC: grids of one or two tokens have not."""
    return inside.frequency is not None and any(len(one) > 1 for one in inside.frequency.log_amplitude)


def has_heads(*names: str) -> Callable[[Inside], bool]:
    """Whether a model has, in some layer, one of the figures of Heads."""

    def has(inside: Inside) -> bool:
        values = [None if inside.heads is None else getattr(inside.heads, name) for name in names]
        return any(
            value is not None and any(one is not None and np.isfinite(one).any() for one in value) for value in values
        )

    return has


def _has_tokens(kind: str) -> Callable[[Inside], bool]:
    return lambda inside: any(curves.get(kind) is not None for _, curves in filtered_layers(inside))  # fmt: skip


def _is_map(found: FloatArray | None) -> bool:
    return found is not None and bool(np.isfinite(found).any())


def _has_input(inside: Inside) -> bool:
    return inside.filters is not None and has_curves(inside.filters.input)


def has_curves(curves: Curves | None) -> bool:
    """Whether any of the three was measured."""
    return curves is not None and any(curves.get(kind) is not None for kind in KINDS)


PANELS = (
    Panel("hfd_share", 6, 1.7, 2.2, has_frequency("hfd_share"), draw_hfd_share),
    Panel("log_amplitude", 6, 1.7, 2.2, has_amplitude, draw_log_amplitude),
    Panel("attention_distance", 7, 1.95, 2.5, has_heads("attention_distance"), draw_attention_distance),
    Panel("head_shares", 5, 1.95, 2.3, has_heads("attention_entropy", "attention_nmi", "cls_mass"), draw_head_shares),
    Panel("head_diversity", 3, 1.4, 1.9, has_heads("head_diversity"), draw_head_diversity),
    Panel("head_pairs", 3, 1.4, 1.9, has_heads("head_cosine", "head_js"), draw_head_pairs),
    Panel("hf_dc_ratio", 3, 1.4, 1.9, has_frequency("hf_dc_ratio"), draw_hf_dc_ratio),
    Panel("feature_variance", 3, 1.4, 1.9, has_frequency("feature_variance"), draw_feature_variance),
    Panel("cka", 4, 2.0, 2.9, lambda inside: _is_map(inside.cka), draw_cka),
    Panel("rollout", 4, 2.0, 2.9, lambda inside: _is_map(inside.rollout), draw_rollout),
    Panel("receptive_field", 4, 2.0, 3.1, lambda inside: inside.receptive_field is not None and _is_map(inside.receptive_field.map), draw_receptive_field),
    Panel("filters_input", 3, 1.5, 2.3, _has_input, draw_input_filters),
    *(
        Panel(f"filters_tokens_{kind}", 3, 1.5, 2.1, _has_tokens(kind), partial(draw_token_filters, kind=kind))
        for kind in KINDS
    ),
)  # fmt: skip
