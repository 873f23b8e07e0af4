"""Arms beside each other: HFD share, Head Diversity, attention distance, wave filters, similarity; seeds as a band.

A line is the mean over seeds, its band reaches from the smallest to the largest seed, a dashed line of the same colour is the mean
of the untrained models. Depth is a layer's number where all arms have as many layers, else its share of the depth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eit_lab.report.figure import INK, MUTED, colour, line, marker, shorten
from eit_lab.report.inside.checked import FloatArray
from eit_lab.report.inside.numbers import ArmInside, Axis, Between, Curves, Filters, Heads, Inside
from eit_lab.report.inside.panels import (
    KINDS,
    accuracy_axis,
    cutoff_name,
    dots,
    draw_matrix,
    filtered_layers,
    has_curves,
    has_frequency,
    has_heads,
    layer_axis,
    layer_means,
    radius_axis,
    uniform_line,
)
from eit_lab.report.inside.paper import (
    COLUMN,
    PAGE,
    REFERENCE,
    TITLE_POINTS,
    UNITS,
    blank,
    broken,
    dress,
    fill_rows,
    layer_ticks,
    legend_at,
    legend_below,
    legend_height,
    level,
    paper,
    reference,
    sample,
    words,
    words_height,
)

SHOWN = 6
"""Most arms of one figure: more lines with bands cannot be told apart."""
_HALF = 0.5
_MATRICES = 3
"""Most matrices of similarity on a page; each is a figure of its own as well."""
_LAYERS = 2
"""Most layers whose filtered tokens are on a page."""
_MARKED = 16
_BAND = "Lines are means over seeds, bands reach from the smallest to the largest seed ({seeds})."


class _Draw(Protocol):
    def __call__(self, axes: Sequence[Axes], arms: Sequence[_Shown], *, alone: bool) -> None: ...


@dataclass(frozen=True)
class _Shown:
    """An arm with the look it has in every figure."""

    arm: ArmInside
    place: int

    @property
    def name(self) -> str:
        return shorten(self.arm.label, to=34)

    def key(self) -> Line2D:
        """Its entry of a legend."""
        mark = marker(self.place) if self.arm.first.layers <= _MARKED else None
        return sample(self.name, color=colour(self.place), linestyle=line(self.place), marker=mark, markeredgewidth=0)


@dataclass(frozen=True)
class _Panel:
    name: str
    units: int
    height: float
    """Inches, on a page."""
    alone: float
    """Inches of height, as a figure of a column's width."""
    caption: str
    draw: _Draw
    keys: Sequence[Line2D]
    """The legend of the figure that stands alone."""
    across: int = 1
    down: int = 1
    """How many plots it has; ``down`` as a figure of its own, on a page they stand in a row."""
    heading: str = ""
    """Of the figure that stands alone, where its plots have names of their own."""
    on_page: bool = True
    titles: tuple[str, ...] = field(default=())


def arms_page(arms: Sequence[ArmInside], *, between: Sequence[Between] = ()) -> Figure:
    """All comparisons on a page of 7 inches, at most 9.5 high. Save it in ``style()``.

    The first SHOWN arms are drawn; the page says which are not. ``between``: CKA between two arms.
    """
    shown = _shown(arms)
    panels = [panel for panel in _panels(shown, between) if panel.on_page]
    rows = [[panels[place] for place in row] for row in fill_rows([panel.units for panel in panels])]
    heights = [max(panel.height for panel in row) for row in rows]
    lines = _lines(arms, shown, num_matrices=len(between))
    with paper():
        keys = [one.key() for one in shown]
        keys += [sample("untrained", color=MUTED, linestyle=(0, (3, 2)), linewidth=0.9)] if _has_untrained(shown) else []
        at = words_height(lines)
        top = at + legend_height(keys, PAGE[0]) + 0.06
        figure = blank(min(top + max(sum(heights), 0.3), PAGE[1]), width=PAGE[0], top=top)
        words(figure, shorten(", ".join(one.name for one in shown), to=76), lines)
        legend_at(figure, keys, top=at)
        if not rows:
            figure.text(0.05 / PAGE[0], 0.02, "These analyses have nothing to draw.", va="bottom", color=MUTED)
            return figure
        grid = figure.add_gridspec(len(rows), 1, height_ratios=heights, hspace=0)
        for place, row in enumerate(rows):
            plots = [(panel, panel.across * panel.down) for panel in row]
            ratios = [panel.units / count for panel, count in plots for _ in range(count)]
            parts = grid[place].subgridspec(1, len(ratios), width_ratios=ratios, wspace=0)
            drawn = [figure.add_subplot(parts[0, column]) for column in range(len(ratios))]
            taken = 0
            for panel, count in plots:
                panel.draw(drawn[taken : taken + count], shown, alone=False)
                taken += count
            level(drawn)
    return figure


def arms_panels(arms: Sequence[ArmInside], *, between: Sequence[Between] = ()) -> dict[str, tuple[Figure, str]]:
    """Each comparison by its name: a figure of a column's width, and its caption. Save them in ``style()``."""
    shown = _shown(arms)
    left = _left_out(arms, shown)
    figures = {}
    for panel in _panels(shown, between):
        with paper():
            figure = blank(panel.alone)
            grid = figure.add_gridspec(panel.down, panel.across, wspace=0, hspace=0)
            plots = [figure.add_subplot(grid[at // panel.across, at % panel.across]) for at in range(panel.across * panel.down)]  # fmt: skip
            panel.draw(plots, shown, alone=True)
            for unused in (plot for plot in plots if not plot.has_data()):
                unused.remove()
            if panel.heading:
                figure.suptitle(panel.heading, x=0.02, ha="left", fontsize=TITLE_POINTS)
            if panel.keys:
                legend_below(figure, panel.keys)
        figures[panel.name] = (figure, " ".join(filter(None, [panel.caption, left])))
    return figures


def _shown(arms: Sequence[ArmInside]) -> list[_Shown]:
    return [_Shown(arm, at if arm.place is None else arm.place) for at, arm in enumerate(arms[:SHOWN])]


def _left_out(arms: Sequence[ArmInside], shown: Sequence[_Shown]) -> str:
    others = ", ".join(arm.label for arm in arms[len(shown) :])
    return f"The first {len(shown)} of {len(arms)} arms; not shown: {shorten(others, to=200)}." if others else ""


def _has_untrained(shown: Sequence[_Shown]) -> bool:
    return any(inside.untrained is not None for one in shown for inside in one.arm.insides)


# ------------------------------------------------------------------------------------------------------ what is said around


def _lines(arms: Sequence[ArmInside], shown: Sequence[_Shown], *, num_matrices: int) -> list[tuple[str, str]]:
    insides = [inside for one in shown for inside in one.arm.insides]
    facts = [
        _alike("data", [f"{inside.data} {inside.part}".strip() for inside in insides]),
        _alike("images", ["" if inside.images is None else f"{inside.images:,} images{_size(inside)}" for inside in insides]),
        _alike("weights", [f"{inside.weights} weights" if inside.weights else "" for inside in insides]),
        _alike("grids", ["" if inside.grid is None else f"{inside.grid[0]} × {inside.grid[1]} tokens" for inside in insides]),
        _alike("layers", [f"{inside.layers} layers" for inside in insides]),
        _alike("heads", ["" if inside.heads_per_layer is None else f"{inside.heads_per_layer} heads a layer" for inside in insides]),
    ]  # fmt: skip
    accuracy = [f"{one.name} {_mean_std(one.arm)}" for one in shown if _mean_std(one.arm)]
    lines = [(text, INK) for text in broken([fact for fact in facts if fact])]
    lines += [(text, INK) for text in broken([f"top-1: {accuracy[0]}", *accuracy[1:]])] if accuracy else []
    said = [_BAND.format(seeds=_seeds(shown)).rstrip("."), *([_different_heads(shown)] if _different_heads(shown) else [])]
    said += [left] if (left := _left_out(arms, shown).rstrip(".")) else []
    said += [f"{_MATRICES} of {num_matrices} matrices of CKA"] if num_matrices > _MATRICES else []
    return [*lines, *((text, MUTED) for text in broken([shorten(one, to=136) for one in said]))]


def _size(inside: Inside) -> str:
    return "" if inside.img_size is None else f" of {inside.img_size[0]} × {inside.img_size[1]} px"


def _alike(name: str, texts: Sequence[str]) -> str:
    """What all have in common, or that it differs."""
    different = list(dict.fromkeys(text for text in texts if text))
    return f"{name} differ: {shorten('; '.join(different), to=90)}" if len(different) > 1 else "".join(different)


def _mean_std(arm: ArmInside) -> str:
    found = [100 * inside.acc1 for inside in arm.insides if inside.acc1 is not None]
    if not found:
        return ""
    return f"{np.mean(found):.2f}" + (f" ± {np.std(found, ddof=1):.2f}%" if len(found) > 1 else "%")


def _seeds(shown: Sequence[_Shown]) -> str:
    counts = {len(one.arm.insides) for one in shown}
    if len(counts) == 1:
        (count,) = counts
        return f"{count} seeds an arm" if count > 1 else "one seed an arm: no band"
    return ", ".join(f"{one.name} {len(one.arm.insides)}" for one in shown)


def _different_heads(shown: Sequence[_Shown]) -> str:
    heads = {one.name: one.arm.first.heads_per_layer for one in shown if one.arm.first.heads_per_layer}
    if len(set(heads.values())) < 2:
        return ""
    return f"Numbers of heads differ ({', '.join(f'{name} {count}' for name, count in heads.items())}): Head Diversity cannot be compared"


# ------------------------------------------------------------------------------------------------------------------ panels


def _panels(shown: Sequence[_Shown], between: Sequence[Between]) -> list[_Panel]:
    """What at least one arm has; an arm without it is missing there."""
    keys = [one.key() for one in shown]
    with_untrained = [*keys, reference("untrained")] if _has_untrained(shown) else keys
    band = _BAND.format(seeds=_seeds(shown))
    dashed = " Dashed: the same models untrained." if _has_untrained(shown) else ""
    depth = "" if _same_depth(shown) else " Numbers of layers differ: depth is a share of them."
    found: list[_Panel] = []
    if _any(shown, has_frequency("hfd_share")):
        said = f"Share of the residual stream's energy at {cutoff_name(_cutoff(shown))} (1: Nyquist), after the stem (0) and after each layer. {band}{dashed}{depth}"
        found.append(_Panel("hfd_share", 4, 1.95, 2.4, said, _draw_hfd_share, with_untrained))
    if _any(shown, has_heads("head_diversity")):
        heads = f" {_different_heads(shown)}." if _different_heads(shown) else ""
        said = f"Head Diversity by layer: standard deviation over heads of their mean attention distance, in units of uniform attention's. {band}{dashed}{depth}{heads}"
        found.append(_Panel("head_diversity", 4, 1.95, 2.4, said, _draw_head_diversity, with_untrained))
    if _any(shown, has_frequency("log_amplitude")):
        said = f"Difference of log amplitude between the highest frequency on the diagonal{_highest(shown)} and DC, after the stem (0) and after each layer. {band}{dashed}{depth}"
        found.append(_Panel("log_amplitude", 4, 1.95, 2.4, said, _draw_log_amplitude, with_untrained))
    if having := [one for one in shown if _any([one], has_heads("attention_distance"))]:
        found.append(_distances(having))
    if _any(shown, lambda inside: inside.filters is not None and has_curves(inside.filters.input)):
        said = f"Top-1 of images filtered before they enter: low-pass and high-pass against the cutoff, band noise against the band's centre; 1 is the Nyquist frequency. {band}"
        found.append(_filter_panel("filters_input", said, keys, None, heading="Filtered images: top-1 (%)", on_page=True))
    layers = _token_layers(shown)
    for at in layers:
        after = Axis(("stem",)).after(at)
        said = f"Top-1 where the patch tokens after {'the ' if at == 0 else ''}{after} are filtered (CLS is not): low-pass and high-pass against the cutoff, band noise against the band's centre; 1 is the grid's Nyquist frequency. {band}"
        name = f"filters_tokens_{'stem' if at == 0 else f'layer_{at:g}'}"
        on_page = at in (layers if len(layers) <= _LAYERS else [layers[0], layers[-1]])
        found.append(_filter_panel(name, said, keys, at, heading=f"Filtered tokens after {after}: top-1 (%)", on_page=on_page))
    for place, pair in enumerate(between):
        said = f"CKA between the points of {pair.a} (upwards) and of {pair.b} (across)."
        name = "_".join(["cka", *(re.sub(r"[^\w-]+", "-", label).strip("-") for label in (pair.a, pair.b))])
        name = name if all(name != other.name for other in found) else f"{name}_{place}"
        found.append(_Panel(name, 4, 2.1, 3.0, said, partial(_draw_between, pair=pair), [], on_page=place < _MATRICES))
    return found  # fmt: skip


def _any(shown: Sequence[_Shown], has: Callable[[Inside], bool]) -> bool:
    return any(has(inside) for one in shown for inside in one.arm.insides)


def _same_depth(shown: Sequence[_Shown]) -> bool:
    return len({one.arm.first.layers for one in shown}) == 1 and len({one.arm.first.axis.is_layers for one in shown}) == 1


def _depth_axis(axes: Axes, shown: Sequence[_Shown], *, first: int) -> None:
    """Layers from ``first``, or shares of the depth."""
    if _same_depth(shown):
        axis = shown[0].arm.first.axis
        last = max(shown[0].arm.first.layers, 1) if axis.is_layers else int(axis.last)
        layer_ticks(axes, first if axis.is_layers else 0, last)
        axes.set_xlim(first - 0.04 * last - 0.1, last * 1.04 + 0.1)
        axes.set_xlabel("layer" if axis.is_layers else "point, in the model's order")
    else:
        axes.set_xlim(-0.04, 1.04)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
        axes.set_xlabel("share of the depth")


def _band(axes: Axes, one: _Shown, x: FloatArray, values: FloatArray | None, *, untrained: FloatArray | None = None) -> None:
    """Mean and range over seeds of values (seeds, x), and the mean of the untrained models."""
    if untrained is not None:
        mark = "_" if len(x) == 1 else None
        axes.plot(x, untrained.mean(axis=0), **{**REFERENCE, "color": colour(one.place)}, alpha=0.8, marker=mark, markersize=9)
    if values is None:
        return
    values = np.where(np.isfinite(values), values, np.nan)
    shade, mark = colour(one.place), marker(one.place) if len(x) <= _MARKED else None
    if len(values) > 1 and len(x) > 1:
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=shade, alpha=0.2, linewidth=0, zorder=2)
    elif len(values) > 1:
        axes.vlines(x, values.min(axis=0), values.max(axis=0), color=shade, alpha=0.4, linewidth=3)
    axes.plot(x, values.mean(axis=0), color=shade, linestyle=line(one.place), marker=mark, markeredgewidth=0, zorder=2.5)


def _stream(axes: Axes, shown: Sequence[_Shown], value: Callable[[Inside, bool], FloatArray | None]) -> None:
    """A value (P,) of the residual stream at the stem's and the blocks' outputs; the flag asks for the untrained model's."""
    for one in shown:
        axis = one.arm.first.axis
        places = axis.outputs
        x = axis.depth[places] / (1 if _same_depth(shown) else axis.last)
        found, before = (one.arm.over_seeds(partial(_taken, value=value, fresh=fresh, places=places)) for fresh in (False, True))
        _band(axes, one, x, found, untrained=before)
    _depth_axis(axes, shown, first=0)


def _taken(inside: Inside, *, value: Callable[[Inside, bool], FloatArray | None], fresh: bool, places: list[int]) -> FloatArray | None:  # fmt: skip
    found = value(inside, fresh)
    return None if found is None else found[places]


def _cutoff(shown: Sequence[_Shown]) -> float:
    """1/2, or the one nearest to it that was measured."""
    found = [cutoff for one in shown for inside in one.arm.insides if inside.frequency for cutoff in inside.frequency.cutoffs]
    return min(found, key=lambda cutoff: abs(cutoff - _HALF), default=_HALF)


def _highest(shown: Sequence[_Shown]) -> str:
    """The highest frequency on the diagonal, where all arms have the same."""
    found = {f"{inside.frequency.frequencies[-1][-1]:.3f}".rstrip("0") for one in shown for inside in one.arm.insides if inside.frequency and inside.frequency.frequencies}  # fmt: skip
    return f" ({found.pop()}π)" if len(found) == 1 else ""


def _draw_hfd_share(axes: Sequence[Axes], arms: Sequence[_Shown], *, alone: bool) -> None:
    cutoff = _cutoff(arms)

    def value(inside: Inside, fresh: bool) -> FloatArray | None:
        frequency = inside.frequency if not fresh else inside.untrained.frequency if inside.untrained else None
        if frequency is None or frequency.hfd_share is None or cutoff not in frequency.cutoffs:
            return None
        share: FloatArray = frequency.hfd_share[frequency.cutoffs.index(cutoff)]
        return share

    _stream(axes[0], arms, value)
    axes[0].set_ylim(0, None)
    dress(axes[0], f"HFD share, {cutoff_name(cutoff)}")


def _draw_log_amplitude(axes: Sequence[Axes], arms: Sequence[_Shown], *, alone: bool) -> None:
    def value(inside: Inside, fresh: bool) -> FloatArray | None:
        frequency = inside.frequency if not fresh else inside.untrained.frequency if inside.untrained else None
        return np.array([one[-1] for one in frequency.log_amplitude]) if frequency and frequency.log_amplitude else None

    _stream(axes[0], arms, value)
    dress(axes[0], "Δ log amplitude, highest − DC")


def _draw_head_diversity(axes: Sequence[Axes], arms: Sequence[_Shown], *, alone: bool) -> None:
    for one in arms:
        layers = one.arm.first.layers
        x = np.arange(1.0, layers + 1) / (1 if _same_depth(arms) else layers)
        found = one.arm.over_seeds(lambda inside: inside.heads.head_diversity if inside.heads else None)
        fresh = one.arm.over_seeds(lambda inside: inside.untrained.heads.head_diversity if inside.untrained and inside.untrained.heads else None)
        if found is not None or fresh is not None:
            _band(axes[0], one, x, found, untrained=fresh)
    _depth_axis(axes[0], arms, first=1)
    axes[0].set_ylim(0, None)
    dress(axes[0], "Head Diversity")


# -------------------------------------------------------------------------------------------------------------------- heads


def _distances(having: Sequence[_Shown]) -> _Panel:
    across = {1: 1, 2: 2, 3: 3, 4: 2}.get(len(having), 3)
    down = -(-len(having) // across)
    keys = [
        sample("a head of a seed", color=MUTED, marker="o", linestyle="none", alpha=0.8, markeredgewidth=0),
        sample("mean", color=INK, linewidth=1.1),
    ]
    if any(inside.untrained for one in having for inside in one.arm.insides):
        keys.append(reference("untrained mean"))
    keys.append(sample("uniform attention", color=INK, linestyle=":", linewidth=1.0))
    widths = "; ".join(f"{one.name} {_widths(one.arm.first)}" for one in having if _widths(one.arm.first))
    caption = (
        "Mean attention distance by layer: a dot is a head of one seed, the line the mean over heads and seeds, dotted is uniform attention."
        + (f" Widths of a head: {widths}." if widths else "")
    )  # fmt: skip
    height = 0.55 + 1.25 * down + 0.2
    return _Panel("attention_distance", UNITS, 1.75, max(height, 2.1), caption, partial(_draw_distances, having=having), keys, across=across, down=down, heading="Mean attention distance (px)")  # fmt: skip


def _widths(inside: Inside) -> str:
    used = [width for width in inside.head_width or () if width]
    if not used:
        return ""
    return f"{used[0]}" if len(set(used)) == 1 else f"{used[0]} to {used[-1]}"


def _draw_distances(axes: Sequence[Axes], arms: Sequence[_Shown], *, alone: bool, having: Sequence[_Shown]) -> None:
    del arms  # those without heads have no place here
    top = 0.0
    for number, (plot, one) in enumerate(zip(axes, having, strict=False)):
        heads = [inside.heads for inside in one.arm.insides if inside.heads is not None and inside.heads.attention_distance]
        fresh = [found for inside in one.arm.insides if inside.untrained and (found := inside.untrained.heads) and found.attention_distance]
        dots(plot, [found.attention_distance for found in heads], place=one.place)
        if fresh:
            plot.plot(*_mean_distance(fresh), **REFERENCE)
        uniform = next((found.uniform_distance for found in heads if found.uniform_distance is not None), None)
        if uniform is not None:
            uniform_line(plot, uniform)
        top = max(top, plot.get_ylim()[1])
        layer_axis(plot, one.arm.first.layers, most=4 if alone else 6)
        width = _widths(one.arm.first)
        if width:
            plot.text(0.98, 0.03, f"d {width}", ha="right", va="bottom", transform=plot.transAxes, color=MUTED)
        name = shorten(one.arm.label, to=16 if alone else 22)
        if not alone and number == 0:
            plot.set_ylabel("mean attention distance (px)")
        dress(plot, name)
        if number % 3 and (not alone or len(having) in (3, 5, 6)) or (alone and len(having) in (2, 4) and number % 2):
            plot.set_yticklabels([])
    for plot in axes[: len(having)]:
        plot.set_ylim(0, top)


def _mean_distance(found: Sequence[Heads]) -> tuple[FloatArray, FloatArray]:
    rows = [layer_means(heads.attention_distance) for heads in found]
    return rows[0][0], np.mean([mean for _, mean in rows], axis=0)
