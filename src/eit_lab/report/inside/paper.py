"""How a figure looks in a paper: a column's width, letters of 7 points and more, and how panels fill a page without holes.

Nothing is to be scaled: a figure of COLUMN inches goes into a column as it is, a page's figure over the whole width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from eit_lab.report.figure import GRID, INK, MUTED, style

COLUMN = 3.3
"""Inches of a column of a two-column paper."""
PAGE = (7.0, 9.5)
"""Inches of a page's text, the most a figure fills."""
ACROSS = 134
"""Letters of the smallest size on a line of a page."""
UNITS = 12
"""What the width of a page is counted in."""
POINTS = 7.0
"""Of the smallest letters."""
TITLE_POINTS = 8.0
WHITE = "#fefefe"
"""On a map, whose colours do not follow a page into the dark; the style's own white would."""
_STYLE: dict[Any, Any] = {
    "font.size": POINTS,
    "axes.labelsize": POINTS,
    "axes.titlesize": TITLE_POINTS,
    "axes.titlelocation": "left",
    "axes.titlepad": 5.0,
    "axes.labelpad": 2.0,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.5,
    "xtick.labelsize": POINTS,
    "ytick.labelsize": POINTS,
    "legend.fontsize": POINTS,
    "legend.handlelength": 1.5,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 0.9,
    "legend.labelspacing": 0.25,
    "legend.borderpad": 0.0,
    "legend.borderaxespad": 0.0,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
}
_LETTER = 0.57 * POINTS / 72
"""Inches, roughly, of a letter's width."""
_HANDLE = 0.28
"""Inches of what stands beside the letters of a legend's entry."""
_LINE = 1.35 * POINTS / 72
"""Inches from one line of text to the next."""


@contextmanager
def paper() -> Iterator[None]:
    """Draw in here; save in the report's ``style()``."""
    with style(), matplotlib.rc_context(_STYLE):
        yield


def depth_colours() -> LinearSegmentedColormap:
    """From dark (the stem) to light (the last layer): viridis without its end, which is lost on white."""
    return LinearSegmentedColormap.from_list("depth", matplotlib.colormaps["viridis"]([n / 255 for n in range(226)]))


def blank(height: float, *, width: float = COLUMN, top: float = 0.0) -> Figure:
    """A figure without anything in it; inches, the uppermost ``top`` of them left for words."""
    layout = ConstrainedLayoutEngine(
        w_pad=0.03, h_pad=0.03, hspace=0.02, wspace=0.02, rect=(0, 0, 1, 1 - top / height)
    )  # fmt: skip
    return Figure(figsize=(width, height), layout=layout)


def words(figure: Figure, title: str, lines: Sequence[tuple[str, str]]) -> None:
    """A page's title, and below it lines each with its colour; they take ``words_height`` inches."""
    width, height = figure.get_size_inches()
    left = 0.05 / width
    figure.text(left, 1 - 0.1 / height, title, fontsize=11, fontweight="bold", va="top", color=INK)
    for place, (text, tone) in enumerate(lines):
        figure.text(left, 1 - (0.33 + _LINE * place) / height, text, fontsize=POINTS, va="top", color=tone)


def words_height(lines: Sequence[tuple[str, str]]) -> float:
    """Inches of a page's title and the lines below it."""
    return 0.38 + _LINE * len(lines)


def broken(facts: Sequence[str]) -> list[str]:
    """Facts on as few lines of a page as hold them; a line ends between two of them, or in one that is longer than a line."""
    lines = [""]
    for fact in [part for long in facts for part in textwrap.wrap(long, ACROSS)]:
        longer = f"{lines[-1]}  ·  {fact}" if lines[-1] else fact
        if len(longer) <= ACROSS:
            lines[-1] = longer
        else:
            lines.append(fact)
    return [line for line in lines if line]


def dress(axes: Axes, title: str, *, handles: Sequence[Line2D] = (), above: float = 0.0) -> None:
    """Title, small ticks, and a legend between title and plot; ``above`` lines over the plot are left for other words."""
    lines = 0
    if handles:
        columns = _columns([str(handle.get_label()) for handle in handles], room(axes) - 0.3)
        lines = ceil(len(handles) / columns)
        figure = _figure(axes)
        lift = ScaledTranslation(0, 3 / 72 + above * _LINE, figure.dpi_scale_trans)
        axes.legend(
            handles=_by_rows(handles, columns), ncols=columns, loc="lower left", bbox_to_anchor=(0, 1),
            bbox_transform=axes.transAxes + lift,
        )  # fmt: skip
    axes.set_title(title, pad=4 + (lines + above) * 72 * _LINE)
    # NOTE: ticks are made when a figure is drawn, maybe outside paper(): their sizes are written down here.
    axes.tick_params(labelsize=POINTS, length=2.2, width=0.6, pad=1.8, which="major")
    axes.tick_params(length=0, labelsize=POINTS, which="minor")
    axes.grid(axis="y", color=GRID, linewidth=0.5)


def level(row: Sequence[Axes]) -> None:
    """Lift the titles of plots that stand side by side to one height."""
    pads = [72 / _figure(axes).dpi * float(axes.titleOffsetTrans.get_matrix()[1, 2]) for axes in row]  # type: ignore[attr-defined]
    for axes in row:
        axes.set_title(axes.get_title(loc="left"), pad=max(pads))


def room(axes: Axes) -> float:
    """Inches of a panel's width, roughly: its part of the figure's."""
    spec = axes.get_subplotspec()
    figure = _figure(axes)
    if spec is None:
        return float(figure.get_figwidth())
    box = spec.get_position(figure)
    margin = figure.subplotpars.right - figure.subplotpars.left
    return float(box.width / margin * figure.get_figwidth())


def _figure(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None, "axes are in a figure"
    return figure


def legend_height(handles: Sequence[Line2D], width: float) -> float:
    """Inches that a legend takes over such a width."""
    columns = _columns([str(handle.get_label()) for handle in handles], width - 0.1)
    return _LINE * ceil(len(handles) / columns)


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend under all plots of a figure."""
    columns = _columns([str(handle.get_label()) for handle in handles], figure.get_figwidth() - 0.1)
    figure.legend(handles=_by_rows(handles, columns), ncols=columns, loc="outside lower center", borderaxespad=0.35)


def legend_at(figure: Figure, handles: Sequence[Line2D], *, top: float) -> None:
    """A legend over the whole width of a page, ``top`` inches below its upper edge."""
    width, height = figure.get_size_inches()
    columns = _columns([str(handle.get_label()) for handle in handles], width - 0.1)
    legend = figure.legend(
        handles=_by_rows(handles, columns), ncols=columns, loc="upper left",
        bbox_to_anchor=(0.05 / width, 1 - top / height), bbox_transform=figure.transFigure,
    )  # fmt: skip
    legend.set_in_layout(False)


def _columns(labels: Sequence[str], width: float) -> int:
    """As many as fit; where there are more rows than one, rows of the same length."""
    for columns in range(len(labels), 1, -1):
        widest = [max(map(len, labels[place::columns])) for place in range(columns)]
        if sum(_LETTER * letters + _HANDLE for letters in widest) <= width + 0.08:  # no gap after the last
            return ceil(len(labels) / ceil(len(labels) / columns))
    return 1


def _by_rows(handles: Sequence[Line2D], columns: int) -> list[Line2D]:
    """In the order that reads row by row: a legend fills its columns first."""
    rows = ceil(len(handles) / columns)
    short = rows * columns - len(handles)  # the last columns have one entry less
    grid = [handles[row * columns : (row + 1) * columns] for row in range(rows)]
    assert short < columns, "or there would be fewer rows"
    return [row[column] for column in range(columns) for row in grid if column < len(row)]


def colour_bar(
    axes: Axes, of: ScalarMappable, *, ticks: Sequence[float], labels: Sequence[str], title: str = ""
) -> None:
    """A thin bar beside the axes, as high as they are."""
    bar = axes.inset_axes((1.03, 0.0, 0.035, 1.0))
    drawn = _figure(axes).colorbar(of, cax=bar)
    drawn.set_ticks(list(ticks), labels=list(labels))
    drawn.minorticks_off()
    drawn.outline.set_visible(False)
    bar.tick_params(labelsize=POINTS, length=1.5, width=0.6, pad=1.5)
    if title:
        bar.set_ylabel(title, labelpad=1.0)


def depth_bar(axes: Axes, last: float, *, word: str) -> None:
    """The bar of depth_colours()."""
    of = ScalarMappable(Normalize(0, last), depth_colours())
    colour_bar(axes, of, ticks=(0, last), labels=("0", f"{last:g}"), title=word)


def layer_ticks(axes: Axes, first: int, last: int, *, most: int = 9) -> None:
    """Whole layer numbers, at most so many, the last one always."""
    step = next(step for step in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 30, 50, 100, last) if (last - first) / step <= most)  # fmt: skip
    axes.set_xticks(list(range(last, first - 1, -step)))


def sample(label: str, **look: Any) -> Line2D:
    """An entry of a legend; the look is Line2D's."""
    return Line2D([], [], label=label, **look)


def reference(label: str) -> Line2D:
    """The entry of a reference line."""
    return Line2D([], [], label=label, color=MUTED, linestyle=(0, (3, 2)), linewidth=0.9)


REFERENCE: dict[str, Any] = {"color": MUTED, "linestyle": (0, (3, 2)), "linewidth": 0.9, "zorder": 1.5}


def fill_rows(units: Sequence[int]) -> list[list[int]]:
    """Panels of so many UNITS of a page's width -> the places in each row, in order, rows as full as they can be.

    What a row has too little is spread over its panels, so the sum of squares of it is what is made small.
    """
    best: list[tuple[int, list[list[int]]]] = [(0, [])]
    for end in range(1, len(units) + 1):
        found = []
        for begin in range(end):
            width = sum(units[begin:end])
            if width <= UNITS or end - begin == 1:
                cost, rows = best[begin]
                found.append((cost + (UNITS - width) ** 2, [*rows, list(range(begin, end))]))
        best.append(min(found, key=lambda one: one[0]))
    return best[-1][1]
