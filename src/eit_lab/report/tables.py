"""Tables: what stands in each cell, and the same as Markdown, LaTeX (booktabs), CSV and on a terminal.

Names and texts of runs can hold anything: each form escapes what means something in it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"\textbar{}", "±": r"$\pm$",
    "×": r"$\times$", "−": r"$-$", "≥": r"$\geq$", "≤": r"$\leq$",
    "ρ": r"$\rho$",
}  # fmt: skip
_COLUMNS, _COLUMNS_OF_A_FILE = 110, 240
_MINUS = re.compile(r"(?<![\w.)\]-])-(?=\d)")
_MARKDOWN = re.compile(r"([\\`*\[\]<>|#~&$])|(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word means nothing


@dataclass(frozen=True)
class Table:
    """A table as people read it; the first ``texts`` columns are words, the others numbers."""

    stem: str
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    texts: int = 1
    note: str = ""
    strong: frozenset[int] = field(default_factory=frozenset)
    """Rows that add the others up."""
    fold: str = ""
    """What a page shows instead until it is opened: for what is looked up rather than read."""


def markdown(text: str) -> str:
    """Text with nothing that Markdown reads as markup, on one line."""
    return " ".join(_MARKDOWN.sub(lambda found: "\\" + found.group(0), text).split())


def latex(text: str) -> str:
    """Text with nothing that LaTeX reads as markup, on one line."""
    minus = _MINUS.sub("−", text)
    return " ".join("".join(_LATEX.get(letter, letter) for letter in minus).split())


def markdown_table(table: Table) -> str:
    """In Markdown; numbers to the right."""
    lines = [
        _markdown_row(table.columns),
        "|" + "|".join(["---"] * table.texts + ["---:"] * (len(table.columns) - table.texts)) + "|",
    ]
    lines += [_markdown_row(row) for row in table.rows]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(markdown(cell) for cell in cells) + " |"


def latex_table(table: Table) -> str:
    """A table of the booktabs package, with its caption and its label."""
    lines = [
        r"\begin{table}[tbp]",
        r"  \centering",
        rf"  \caption{{{latex(table.title)}{f'. {latex(table.note[0].upper() + table.note[1:])}' if table.note else ''}}}",
        rf"  \label{{tab:{table.stem.replace('_', '-')}}}",
        rf"  \begin{{tabular}}{{{'l' * table.texts}{'r' * (len(table.columns) - table.texts)}}}",
        r"    \toprule",
        f"    {_latex_row(table.columns)}",
        r"    \midrule",
        *(f"    {_latex_row(row)}" for row in table.rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    # NOTE: a row that begins with [ would be read as an argument of the \\ before it.
    texts = [latex(cell) for cell in cells]
    return " & ".join(f"{{}}{text}" if text.startswith("[") else text for text in texts) + r" \\"


def csv_text(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows as CSV: numbers with all their digits, None as an empty cell; the columns are the first row's."""
    out = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(out, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    return out.getvalue()


def terminal_table(table: Table) -> str:
    """As wide as the terminal, or 110 columns where that is less; in a file or a pipe no cell is folded for want of room."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(table.columns):
        drawn.add_column(Text(name), justify="left" if place < table.texts else "right", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(Text, row))
    out = io.StringIO()
    there = Console()
    Console(width=max(_COLUMNS if there.is_terminal else _COLUMNS_OF_A_FILE, there.width), file=out).print(drawn)
    return "\n".join(text.rstrip() for text in out.getvalue().splitlines())
