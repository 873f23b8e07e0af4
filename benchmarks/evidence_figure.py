"""The figure on the front page: LSRA - ViT, EIT - ViT and EIT - LSRA in every experiment that trained all three.

    python benchmarks/evidence_figure.py       # writes docs/figures/evidence.png and .svg

Every number is of ``python -m eit_lab.report experiments/NNN-slug`` (differences.csv). 021 shares its runs with 020 and is left out.
"""

from __future__ import annotations

import contextlib
import csv
import io
import sys
import tempfile
from pathlib import Path

from eit_lab.report.__main__ import main as report
from eit_lab.report.figure import INK, MUTED, colour, marker, panel, save_figure, style

ROOT = Path(__file__).parents[1]
NAMES = {"020-fashion-params": "Fashion-MNIST", "025-digits-arms": "8x8 digits"}
PAIRS = (("lsra", "vit"), ("eit", "vit"), ("eit", "lsra"))


def main() -> int:
    """Draw it; the exit status of the report where one fails."""
    rows: list[tuple[str, str, dict[str, str]]] = []
    for folder, name in NAMES.items():
        with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
            if status := report([str(ROOT / "experiments" / folder), f"out={scratch}"]):
                return status
            found = list(csv.DictReader((Path(scratch) / "differences.csv").read_text().splitlines()))
        for pair in PAIRS:
            (row,) = [one for one in found if (one["arm"], one["against"]) == pair]
            rows.append((folder, f"{name}, {row['n']} seeds", row))
    rows.sort(key=lambda one: PAIRS.index((one[2]["arm"], one[2]["against"])))
    with style():
        figure, axes = panel(width=6.0, height=0.9 + 0.34 * len(rows))
        axes.axvline(0, color=INK, linewidth=1, zorder=1)
        for place, (folder, _, row) in enumerate(rows):
            n = list(NAMES).index(folder)
            mean, low, high = (100 * float(row[key]) for key in ("difference", "low95", "high95"))
            seeds = [100 * float(value) for value in row["by_seed"].split()]
            axes.plot([low, high], [place, place], color=colour(n), linewidth=2.2, zorder=2)
            axes.plot(mean, place, marker=marker(n), color=colour(n), markersize=7, zorder=3)
            axes.plot(
                seeds, [place - 0.28] * len(seeds), marker(n), color=colour(n), alpha=0.45, markersize=3, zorder=2
            )
            if place % len(NAMES) == 0:
                names = {"vit": "ViT", "lsra": "LSRA", "eit": "EIT"}
                axes.annotate(
                    f"{names[row['arm']]} minus {names[row['against']]}", (1.02, place + (len(NAMES) - 1) / 2),
                    xycoords=("axes fraction", "data"), va="center",
                )  # fmt: skip
                if place:
                    axes.axhline(place - 0.5, color=MUTED, alpha=0.25, linewidth=0.6)
        axes.set_yticks(range(len(rows)), [label for _, label, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel("difference in test top-1 (points): every seed, mean and 95% interval")
        save_figure(figure, ROOT / "docs" / "figures" / "evidence")
    return 0


if __name__ == "__main__":
    sys.exit(main())
