"""What happens inside one model: a page with every panel that its analysis has, and each panel as a figure of its own."""

from __future__ import annotations

import textwrap

from matplotlib.figure import Figure

from eit_lab.report.figure import INK, MUTED, shorten
from eit_lab.report.inside.numbers import Inside
from eit_lab.report.inside.panels import PANELS, Panel
from eit_lab.report.inside.paper import ACROSS, PAGE, blank, broken, fill_rows, level, paper, words, words_height

MEANS = {
    "hfd_share": ("HFD share", "{:.3f}"),
    "log_amplitude": ("log amplitude", "{:.2f}"),
    "hf_dc_ratio": ("HF / DC", "{:.2f}"),
    "feature_variance": ("variance", "{:.3g}"),
    "attention_distance": ("attention distance", "{:.1f} px"),
    "head_diversity": ("Head Diversity", "{:.3f}"),
    "attention_entropy": ("entropy", "{:.3f}"),
    "attention_nmi": ("NMI", "{:.3f}"),
    "cls_mass": ("mass on CLS", "{:.3f}"),
}
"""The figures that are one number a model, as people read them."""


def model_page(inside: Inside) -> Figure:
    """All panels there are on a page of 7 inches; as high as they need, at most 9.5. Save it in ``style()``."""
    panels = _panels(inside)
    rows = [[panels[place] for place in row] for row in fill_rows([panel.units for panel in panels])]
    heights = [max(panel.height for panel in row) for row in rows]
    lines = _lines(inside)
    top = words_height(lines)
    with paper():
        figure = blank(min(top + max(sum(heights), 0.3), PAGE[1]), width=PAGE[0], top=top)
        words(figure, shorten(inside.arm, to=72), lines)
        if not rows:
            figure.text(0.05 / PAGE[0], 0.02, "This analysis has nothing to draw.", va="bottom", color=MUTED)
            return figure
        grid = figure.add_gridspec(len(rows), 1, height_ratios=heights, hspace=0)
        for place, row in enumerate(rows):
            parts = grid[place].subgridspec(1, len(row), width_ratios=[panel.units for panel in row], wspace=0)
            drawn = [figure.add_subplot(parts[0, column]) for column in range(len(row))]
            for axes, panel in zip(drawn, row, strict=True):
                panel.draw(axes, inside, alone=False)
            level(drawn)
    return figure


def model_panels(inside: Inside) -> dict[str, Figure]:
    """Each panel by its name as a figure of a column's width. Save them in ``style()``."""
    figures = {}
    for panel in _panels(inside):
        with paper():
            figures[panel.name] = figure = blank(panel.alone)
            panel.draw(figure.subplots(), inside, alone=True)
    return figures


def _panels(inside: Inside) -> list[Panel]:
    return [panel for panel in PANELS if panel.has(inside)]


def _lines(inside: Inside) -> list[tuple[str, str]]:
    """What is below the title, with the colour of each line."""
    size = "" if inside.img_size is None else f" of {inside.img_size[0]} × {inside.img_size[1]} px"
    grid = None if inside.grid is None else f"{inside.grid[0]} × {inside.grid[1]} tokens"
    if grid and inside.pitch_px is not None:
        pitch = {f"{one:g}" for one in inside.pitch_px}
        grid += f" at {' × '.join(sorted(pitch))} px"
    facts = [
        f"model {shorten(inside.model, to=60)}" if inside.model != inside.arm else "",
        "" if inside.seed is None else f"seed {inside.seed}",
        " ".join(filter(None, [inside.data, inside.part])),
        "" if inside.images is None else f"{inside.images:,} images{size}",
        "" if inside.acc1 is None else f"top-1 {100 * inside.acc1:.2f}%",
        " ".join(filter(None, [inside.weights, "weights" if inside.weights else "", f"of {inside.checkpoint}" if inside.checkpoint else ""])),
        grid or "",
        "" if inside.heads_per_layer is None else f"{inside.heads_per_layer} heads a layer",
        "" if inside.identity is None else f"run {inside.identity}",
    ]  # fmt: skip
    means = [
        f"{name} {form.format(inside.means[key])}".replace("-", "−")
        for key, (name, form) in MEANS.items()
        if key in inside.means
    ]
    lines = [(line, INK) for line in broken([fact for fact in facts if fact])]
    if means:
        lines += [(line, MUTED) for line in broken([f"means: {means[0]}", *means[1:]])]
    said = []
    if inside.points and inside.axis.is_layers:
        said.append("Axes from 0: stem 0, mixer n at n − 0.5, MLP n at n.")
    if inside.untrained is not None:
        said.append("Dashed grey: the same model untrained.")
    if inside.filters is not None:
        said.append(f"Filters: solid unfiltered{', dotted chance' if inside.num_classes else ''}.")
    return [*lines, *((line, MUTED) for line in textwrap.wrap(" ".join(said), ACROSS))]
