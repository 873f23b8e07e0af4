"""What was measured, against its goal: a table, a record to keep, a figure. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from eit_lab.report.figure import COLOURS

Cell = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    measured: str
    goal: str = ""
    met: bool | None = None
    """None: there is no goal, or it could not be measured."""

    @property
    def verdict(self) -> str:
        """In words."""
        if self.met is None:
            return "" if not self.goal else "not measured"
        return "met" if self.met else "MISSED"

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {"what": self.what, "measured": self.measured, "goal": self.goal, "met": self.met}


def text_table(head: Sequence[str], rows: Sequence[Cell]) -> list[str]:
    """Columns for a terminal; all but the first are flush right where they are numbers."""
    widths = [max(len(row[k]) for row in [tuple(head), *rows]) for k in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]


def markdown_table(head: Sequence[str], rows: Sequence[Cell]) -> list[str]:
    """The same for a record."""
    return [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]


def rates_figure(rates: Mapping[str, tuple[float, float, float]], colour: Mapping[str, int], title: str) -> Figure:
    """A bar for each rate (median, low, high), in images per second; ``colour`` is a place in COLOURS."""
    figure = Figure(figsize=(9.6, 0.9 + 0.34 * len(rates)), layout="constrained")
    axes = figure.subplots()
    for place, (name, (middle, low, high)) in enumerate(rates.items()):
        axes.barh(place, middle, color=COLOURS[colour[name]], height=0.7)
        axes.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="black", capsize=3, linewidth=1)
        axes.text(high, place, f"  {middle:,.0f}", va="center", fontsize=9)
    axes.set_yticks(range(len(rates)), list(rates))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(high for _, _, high in rates.values()))
    axes.set_xlabel("images per second: median and range over the rounds")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write(folder: Path, name: str, lines: Sequence[str]) -> Path:
    """FOLDER/name, with a newline at its end."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return path
