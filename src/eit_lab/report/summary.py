"""A first summary of some runs from their records alone: a table on the terminal, a figure and the table's data on disk."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eit_lab.report.arms import Arm, Estimate, Record, baseline_of, estimate, group_arms, paired_difference
from eit_lab.runs import find_records, write_text
from eit_lab.units import si

COLUMNS = ("arm", "parameters", "MACs", "top-1 (%)", "seeds", "images/s", "minus {baseline} (points, 95% interval)")


def write_summary(folder: Path) -> str:
    """The table of a folder's runs as text; summary.md, summary.csv and accuracy.png/.svg are written beside the records."""
    records = list(find_records(folder))
    arms = group_arms(records)
    notes = _notes(records, arms)
    if not arms:
        return "\n".join([f"no finished run in {folder}", *notes])
    from eit_lab.report.figure import accuracy_figure, save_figure

    save_figure(accuracy_figure(arms), folder / "accuracy")
    rows, header = _rows(arms)
    write_text(folder / "summary.md", markdown_table(header, rows) + "".join(f"\n{note}\n" for note in notes))
    _write_csv(folder / "summary.csv", arms)
    return "\n".join([_terminal_table(header, rows), *notes, f"figure {folder / 'accuracy.png'} (and .svg)"])


def _rows(arms: list[Arm]) -> tuple[list[list[str]], list[str]]:
    rows = []
    baselines = [baseline_of(arm, arms) for arm in arms]
    for arm, baseline in zip(arms, baselines, strict=True):
        spread = estimate(arm.accuracies)
        difference = paired_difference(arm, baseline) if baseline not in (None, arm) else None
        rows.append([
            arm.label,
            f"{arm.cost['params']:,}",
            si(arm.cost["macs"]),
            f"{spread.mean:.2f} ± {spread.std:.2f}" if spread.n > 1 else f"{spread.mean:.2f}",
            str(spread.n),
            f"{arm.img_per_s:,.0f}" if arm.img_per_s else "-",
            _difference(difference),
        ])  # fmt: skip
    against = {baseline.label for baseline in baselines if baseline is not None}
    name = against.pop() if len(against) == 1 else "its plain ViT"
    return rows, [column.format(baseline=name) for column in COLUMNS[: None if len(arms) > 1 else -1]]


def _difference(difference: Estimate | None) -> str:
    if difference is None:
        return ""
    if math.isnan(difference.half_width):
        return f"{difference.mean:+.2f} (one seed: no interval)"
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    return f"{difference.mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def _notes(records: Sequence[Record], arms: Sequence[Arm]) -> list[str]:
    """What a reader must know before trusting the table."""
    notes = [
        f"not in the table: {r['name']} seed {r['seed']} is {r['status']}"
        + (f" ({r['error'].splitlines()[0]})" if r.get("error") else "")
        for r in records
        if r["status"] != "finished"
    ]
    notes += [
        f"not in the table: {run['name']} seed {run['seed']} in {run['folder']}, which has a later run of the same arm and seed"
        for arm in arms
        for run in arm.superseded
    ]
    codes = {r["versions"]["code"] for r in records if r["status"] == "finished"}
    if len(codes) > 1:
        notes.append(
            f"runs were made with {len(codes)} versions of the code ({', '.join(sorted(codes))}): rerun for a fair table"
        )
    seeds = {arm.label: sorted(arm.runs) for arm in arms}
    if len({tuple(s) for s in seeds.values()}) > 1:
        listed = "; ".join(f"{label}: {', '.join(map(str, s))}" for label, s in seeds.items())
        notes.append(f"arms have different seeds ({listed}): differences use the common ones only")
    return notes


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    lines += ["| " + " | ".join(row[: len(header)]) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _terminal_table(header: list[str], rows: list[list[str]]) -> str:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate(header):
        table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row[: len(header)])
    out = Console(width=max(100, Console().width), file=io.StringIO())
    out.print(table)
    text: str = out.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _write_csv(path: Path, arms: list[Arm]) -> None:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "seed", "params", "macs", "macs_thop", "test_acc1", "test_acc5", "img_per_s", "run"])
    for arm in arms:
        for seed, run in sorted(arm.runs.items()):
            cost, result = arm.cost, run["result"]
            writer.writerow([
                arm.label, seed, cost["params"], cost["macs"], cost["macs_thop"], result["test/acc1"], result["test/acc5"],
                run.get("img_per_s"), run["identity"],
            ])  # fmt: skip
    write_text(path, out.getvalue())
