"""How figures look: colours that people with any colour vision tell apart, one style, saved as PNG and SVG."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours without their yellow and black, which are lost on white and on dark paper, and an indigo, which is darker
# than the others, so that it differs without its hue too.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#4B2E83")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
LINES = ("-", "--", ":", "-.")
# Colours of their own, so that a page can exchange them for its own in the dark (page.py).
INK, MUTED, GRID, PAPER = "#1c2126", "#697177", "#dde1e4", "#ffffff"
PANEL = (4.5, 3.2)
"""Inches of one figure: on a page three go side by side, and one fits a telephone."""

_STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.8,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "text.parse_math": False,  # a dollar sign in the name of a run is a dollar sign
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "svg.hashsalt": "eit_lab",  # the same figure is the same file
}


@contextmanager
def style() -> Iterator[None]:
    """Draw and save in here."""
    with matplotlib.rc_context(_STYLE):
        yield


def panel(*, width: float = PANEL[0], height: float = PANEL[1]) -> tuple[Figure, Axes]:
    """A figure with one plot; sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def colour(place: int) -> str:
    """Of the n-th arm."""
    return COLOURS[place % len(COLOURS)]


def marker(place: int) -> str:
    """Of the n-th arm; with the colour it repeats after 56 arms only."""
    return MARKERS[place % len(MARKERS)]


def line(place: int) -> str:
    """Of the n-th arm."""
    return LINES[place // len(COLOURS) % len(LINES)]


def shorten(label: str, *, to: int = 30) -> str:
    """A label with its middle left out where it is too long."""
    keep = (to - 1) // 2
    return label if len(label) <= to else f"{label[: to - 1 - keep]}…{label[-keep:]}"


def save_figure(figure: Figure, stem: Path) -> None:
    """STEM.png and STEM.svg."""
    with warnings.catch_warnings():
        # A box stands for a letter that we have no shape of.
        warnings.filterwarnings("ignore", message=".*missing from font.*")
        figure.savefig(stem.parent / f"{stem.name}.png", dpi=160)
        figure.set_layout_engine("none")  # it stays as it was laid out for the first
        figure.savefig(stem.parent / f"{stem.name}.svg", metadata={"Date": None})
