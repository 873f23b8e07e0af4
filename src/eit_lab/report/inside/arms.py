"""Arms beside each other: HFD share, Head Diversity, attention distance, wave filters, similarity; seeds as a band.

Each comparison is a figure of a column's width with its caption, and all of them together are a page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from eit_lab.report.figure import INK, MUTED, shorten
from eit_lab.report.inside.arm_panels import (
    Draw,
    Shown,
    any_has,
    distance_keys,
    draw_apart,
    draw_between,
    draw_distances,
    draw_filters,
    draw_head_diversity,
    draw_hfd_share,
    draw_log_amplitude,
    has_untrained,
    nearest_cutoff,
    same_depth,
    token_layers,
    widths_of,
)
from eit_lab.report.inside.numbers import ArmInside, Between, Inside
from eit_lab.report.inside.panels import cutoff_name, has_amplitude, has_curves, has_frequency, has_heads
from eit_lab.report.inside.paper import (
    PAGE,
    TITLE_POINTS,
    UNITS,
    blank,
    broken,
    fill_rows,
    legend_at,
    legend_below,
    legend_height,
    level,
    paper,
    reference,
    words,
    words_height,
)

SHOWN = 7
_TOGETHER = 4
"""Most arms whose bands can be told apart in one plot; a figure that stands alone has a plot an arm beyond."""
_ACROSS = 3
"""Most arms of one figure: more lines with bands cannot be told apart."""
_MATRICES = 3
"""Most matrices of similarity on a page; each is a figure of its own as well."""
_TITLE = 64
"""Most letters of a page's title."""


@dataclass(frozen=True, kw_only=True)
class _Panel:
    name: str
    caption: str
    shown: Sequence[Shown]
    draw: Draw
    keys: Sequence[Line2D]
    """The legend of the figure that stands alone."""
    units: int = 4
    """Of the page's width."""
    height: float = 1.9
    """Inches, on a page."""
    alone: float = 2.4
    """Inches of height, as a figure of a column's width."""
    plots: int = 1
    across: int = 1
    """Plots in a row of the figure that stands alone; on a page they all are in one row."""
    apart: str = ""
    """A name that the figure which stands alone has where its one plot would hold too many bands, and each arm gets a plot."""
    heading: str = ""
    """Of the figure that stands alone, where its plots have names of their own."""
    on_page: bool = True
    is_matrix: bool = False


def arms_page(arms: Sequence[ArmInside], *, between: Sequence[Between] = ()) -> Figure:
    """All comparisons on a page of 7 inches, at most 9.5 high. Save it in ``style()``.

    The first SHOWN arms are drawn; the page says which are not. ``between``: CKA between two arms.
    """
    shown = _shown(arms)
    with paper():
        panels = _for_page(list(_panels(shown, between)))
    rows = [[panels[place] for place in row] for row in fill_rows([panel.units for panel in panels])]
    heights = [max(panel.height for panel in row) for row in rows]
    lines = _lines(arms, shown, num_matrices=len(between))
    with paper():
        keys = _with_untrained(shown)
        at = words_height(lines)
        top = at + legend_height(keys, PAGE[0]) + 0.05
        figure = blank(min(top + max(sum(heights), 0.3), PAGE[1]), width=PAGE[0], top=top)
        words(
            figure,
            title if len(title := ", ".join(one.name for one in shown)) <= _TITLE else f"{len(shown)} arms",
            lines,
        )
        legend_at(figure, keys, top=at)
        if not rows:
            figure.text(0.05 / PAGE[0], 0.02, "These analyses have nothing to draw.", va="bottom", color=MUTED)
            return figure
        grid = figure.add_gridspec(len(rows), 1, height_ratios=heights, hspace=0)
        for number, row in enumerate(rows):
            ratios = [panel.units / panel.plots for panel in row for _ in range(panel.plots)]
            parts = grid[number].subgridspec(1, len(ratios), width_ratios=ratios, wspace=0)
            plots = [figure.add_subplot(parts[0, column]) for column in range(len(ratios))]
            taken = 0
            for panel in row:
                panel.draw(plots[taken : taken + panel.plots], panel.shown, alone=False)
                taken += panel.plots
            level(plots)
    return figure


def arms_panels(arms: Sequence[ArmInside], *, between: Sequence[Between] = ()) -> dict[str, tuple[Figure, str]]:
    """Each comparison by its name: a figure of a column's width, and its caption. Save them in ``style()``."""
    shown = _shown(arms)
    left = _left_out(arms, shown)
    figures = {}
    with paper():
        for panel in map(_apart, _panels(shown, between)):
            figure = blank(panel.alone)
            rows = -(-panel.plots // panel.across)
            grid = figure.add_gridspec(rows, panel.across, wspace=0, hspace=0)
            plots = [figure.add_subplot(grid[divmod(place, panel.across)]) for place in range(panel.plots)]
            panel.draw(plots, panel.shown, alone=True)
            if panel.heading:
                figure.suptitle(panel.heading, x=0.02, ha="left", fontsize=TITLE_POINTS)
            if panel.keys:
                legend_below(figure, panel.keys)
            figures[panel.name] = (figure, " ".join(filter(None, [panel.caption, left])))
    return figures


def _apart(panel: _Panel) -> _Panel:
    """With a plot an arm, where one would hold too many bands and all arms have the same layers."""
    if not panel.apart or len(panel.shown) <= _TOGETHER or not same_depth(panel.shown):
        return panel
    rows = -(-len(panel.shown) // _ACROSS)
    first = panel.shown[0].name
    return replace(
        panel, heading=panel.apart, draw=partial(draw_apart, draw=panel.draw, across=_ACROSS), plots=len(panel.shown),
        across=_ACROSS, alone=0.75 + 1.25 * rows, caption=f"{panel.caption} Grey: the mean of {first}.",
        keys=[reference("untrained")] if has_untrained(panel.shown) else [],
    )  # fmt: skip


def _shown(arms: Sequence[ArmInside]) -> list[Shown]:
    return [Shown(arm, at if arm.place is None else arm.place) for at, arm in enumerate(arms[:SHOWN])]


def _for_page(panels: Sequence[_Panel]) -> list[_Panel]:
    """Those that stand on the page; a single matrix beside the plots over depth, not in a row of its own."""
    kept = [panel for panel in panels if panel.on_page]
    small = [panel for panel in kept if panel.units < UNITS]
    if len(small) != 4 or sum(panel.is_matrix for panel in small) != 1:
        return kept
    return [*(replace(panel, units=UNITS // 4) for panel in small), *(one for one in kept if one.units == UNITS)]


def _with_untrained(shown: Sequence[Shown]) -> list[Line2D]:
    return [*(one.key for one in shown), *([reference("untrained")] if has_untrained(shown) else [])]


def _panels(shown: Sequence[Shown], between: Sequence[Between]) -> Iterator[_Panel]:
    """What at least one arm has; an arm without it is missing there."""
    keys = _with_untrained(shown)
    band, heads = _band(shown), _different_heads(shown)
    band_and_dashes = band + (" Dashed: the same models untrained." if has_untrained(shown) else "")
    if not same_depth(shown):
        band_and_dashes += " Numbers of layers differ: depth is a share of them."
    if any_has(shown, has_frequency("hfd_share")):
        said = f"Share of the residual stream's energy at radii {cutoff_name(nearest_cutoff(shown))} (1 is the Nyquist frequency of an axis), after the stem and after each layer."
        yield _Panel(
            name="hfd_share",
            caption=f"{said} {band_and_dashes}",
            shown=shown,
            draw=draw_hfd_share,
            keys=keys,
            apart=f"HFD share, {cutoff_name(nearest_cutoff(shown))}",
        )
    if any_has(shown, has_heads("head_diversity")):
        said = "Head Diversity: standard deviation over the heads of a layer of their mean attention distance, in units of uniform attention's."
        said = " ".join(filter(None, [said, band_and_dashes, f"{heads}." if heads else ""]))
        yield _Panel(
            name="head_diversity",
            caption=said,
            shown=shown,
            draw=draw_head_diversity,
            keys=keys,
            apart="Head Diversity",
        )
    if any_has(shown, has_amplitude):
        said = f"Log amplitude of the highest frequency on the diagonal{_highest(shown)} minus that of DC, after the stem and after each layer."
        yield _Panel(name="log_amplitude", caption=f"{said} {band_and_dashes}", shown=shown, draw=draw_log_amplitude, keys=keys, apart="Δ log amplitude")  # fmt: skip
    if having := [one for one in shown if any_has([one], has_heads("attention_distance"))]:
        yield _distances(having)
    if any_has(shown, lambda inside: inside.filters is not None and has_curves(inside.filters.input)):
        yield _filters(shown, None, band=band)
    layers = token_layers(shown)
    for at in layers:
        yield _filters(shown, at, band=band, on_page=at in (layers[0], layers[-1]))
    taken: set[str] = set()
    for place, pair in enumerate(between):
        name = "_".join(["cka", *(re.sub(r"[^\w-]+", "-", label).strip("-") for label in (pair.a, pair.b))])
        name = f"{name}_{place}" if name in taken else name
        taken.add(name)
        said = f"CKA between the points of {pair.a} (upwards) and those of {pair.b} (across)."
        yield _Panel(name=name, caption=said, shown=shown, draw=partial(draw_between, pair=pair), keys=[], height=2.1, alone=3.0, on_page=place < _MATRICES, is_matrix=True)  # fmt: skip


def _distances(having: Sequence[Shown]) -> _Panel:
    across = {1: 1, 2: 2, 4: 2}.get(len(having), 3)
    rows = -(-len(having) // across)
    widths = "; ".join(f"{one.name} {width}" for one in having if (width := widths_of(one.arm.first)))
    said = (
        "Mean attention distance by layer: a dot is a head of one seed, the line the mean over heads and seeds, dotted is"
        " uniform attention." + (f" Width of a head from the first layer to the last: {widths}." if widths else "")
    )
    return _Panel(
        name="attention_distance", caption=said, shown=having, keys=distance_keys(having), heading="Mean attention distance (px)",
        draw=partial(draw_distances, across=across), plots=len(having), across=across, units=UNITS, height=1.8, alone=0.75 + 1.6 * rows,
    )  # fmt: skip


def _filters(shown: Sequence[Shown], at: float | None, *, band: str, on_page: bool = True) -> _Panel:
    where = "stem" if at == 0 else f"layer {at:g}" if at is not None else ""
    nyquist = "1 is the Nyquist frequency" if at is None else "1 is the Nyquist frequency of the token grid"
    what = "images filtered before they enter" if at is None else f"images whose patch tokens after {'the ' if at == 0 else ''}{where} are filtered"  # fmt: skip
    chance = " Dotted: chance." if any_has(shown, lambda inside: inside.num_classes is not None) else ""
    said = f"Top-1 of {what}: low-pass and high-pass against the cutoff's radius, band noise against the band's centre; {nyquist}.{chance} {band}"
    return _Panel(
        name="filters_input" if at is None else f"filters_tokens_{where.replace(' ', '_')}",
        heading="Filtered images: top-1 (%)" if at is None else f"Filtered tokens, {where}: top-1 (%)",
        caption=said, shown=shown, keys=[one.key for one in shown], draw=partial(draw_filters, at=at), plots=3, across=3,
        units=UNITS, height=1.55, alone=2.2, on_page=on_page,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ what is said around


def _lines(arms: Sequence[ArmInside], shown: Sequence[Shown], *, num_matrices: int) -> list[tuple[str, str]]:
    """What is below a page's title, with the colour of each line."""
    insides = [inside for one in shown for inside in one.arm.insides]
    facts = [
        _alike("data", [f"{inside.data} {inside.part}".strip() for inside in insides]),
        _alike("images", ["" if inside.images is None else f"{inside.images:,} images{_size(inside)}" for inside in insides]),
        _alike("weights", [f"{inside.weights} weights" if inside.weights else "" for inside in insides]),
        _alike("grids", ["" if inside.grid is None else f"{inside.grid[0]} × {inside.grid[1]} tokens" for inside in insides]),
        _alike("depths", [f"{inside.layers} layers" for inside in insides]),
        _alike("heads", ["" if inside.heads_per_layer is None else f"{inside.heads_per_layer} heads a layer" for inside in insides]),
    ]  # fmt: skip
    accuracy = [f"{one.name} {percent}" for one in shown if (percent := _mean_std(one.arm))]
    said = [
        _band(shown).rstrip("."), _different_heads(shown), _left_out(arms, shown).rstrip("."),
        f"{_MATRICES} of {num_matrices} matrices of CKA" if num_matrices > _MATRICES else "",
    ]  # fmt: skip
    lines = [(text, INK) for text in broken([fact for fact in facts if fact])]
    lines += [(text, INK) for text in broken([f"top-1: {accuracy[0]}", *accuracy[1:]])] if accuracy else []
    return [*lines, *((text, MUTED) for text in broken([one for one in said if one]))]


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


def _band(shown: Sequence[Shown]) -> str:
    """What lines and bands are."""
    counts = [len(one.arm.insides) for one in shown]
    if max(counts, default=1) == 1:
        return "One seed an arm, so no bands."
    seeds = f"{counts[0]} seeds an arm" if len(set(counts)) == 1 else f"seeds: {', '.join(f'{one.name} {n}' for one, n in zip(shown, counts, strict=True))}"  # fmt: skip
    return f"Lines are means over seeds, bands reach from the smallest to the largest seed ({seeds})."


def _left_out(arms: Sequence[ArmInside], shown: Sequence[Shown]) -> str:
    others = ", ".join(arm.label for arm in arms[len(shown) :])
    return f"The first {len(shown)} of {len(arms)} arms; not shown: {shorten(others, to=90)}." if others else ""


def _different_heads(shown: Sequence[Shown]) -> str:
    heads = {one.name: one.arm.first.heads_per_layer for one in shown if one.arm.first.heads_per_layer}
    if len(set(heads.values())) < 2:
        return ""
    counts = ", ".join(f"{name} {count}" for name, count in heads.items())
    return f"Numbers of heads differ ({counts}): Head Diversity cannot be compared"


def _highest(shown: Sequence[Shown]) -> str:
    """The highest frequency on the diagonal, where all arms have the same."""
    found = {float(one.frequency.frequencies[-1][-1]) for arm in shown for one in arm.arm.insides if one.frequency and one.frequency.frequencies}  # fmt: skip
    return f" ({found.pop():.3f}π)" if len(found) == 1 else ""
