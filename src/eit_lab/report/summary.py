"""The short form of a report, at the end of a sweep: a table on the terminal, its data and one figure beside the records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from eit_lab.report.analyses import Analyses, choose
from eit_lab.report.arms import Ablation, Arm, LeftOut, collect
from eit_lab.report.comparison import Comparison, compare
from eit_lab.report.content import NO, inside_cells, runs_rows
from eit_lab.report.metric import metric_of
from eit_lab.report.pareto import images_per_s
from eit_lab.report.records import read_sources
from eit_lab.report.tables import Table, csv_text, markdown, markdown_table, terminal_table
from eit_lab.runs import write_text
from eit_lab.units import si

_SHOWN = 40  # arms, and runs that do not count; a report has them all


def write_summary(folder: Path) -> str:
    """The table of a folder's runs as text; summary.md, summary.csv and accuracy.png/.svg are written beside the records.

    Raises ConfigError where there is no run.
    """
    sources = read_sources([folder])
    metric = metric_of(str(sources[0].declaration.get("metric") or "test/acc1"))
    ablation = collect(sources, metric)
    said = notes(ablation)
    if not ablation.arms:
        return "\n".join([f"no finished run in {folder}", *said])
    from eit_lab.report.figure import save_figure, style
    from eit_lab.report.figures import accuracy_figure

    with style():
        save_figure(accuracy_figure(ablation.arms, metric), folder / "accuracy")
    table = _table(ablation, compare(ablation), choose(ablation.arms))
    write_text(folder / "summary.md", markdown_table(table) + "".join(f"\n{markdown(note)}\n" for note in said))
    write_text(folder / "summary.csv", csv_text(runs_rows(ablation)))
    lines = [terminal_table(_first(table)), *said, f"figure {folder / 'accuracy.png'} (and .svg)"]
    return "\n".join([*lines, f"report: python -m eit_lab.report {folder}"])


def _table(ablation: Ablation, comparisons: Sequence[Comparison], analyses: Analyses | None) -> Table:
    metric = ablation.metric
    found = {id(one.arm): one for one in reversed(comparisons)}  # the first comparison of an arm
    against = {one.against.label for one in comparisons}
    name = against.pop() if len(against) == 1 else "its baseline"
    rows: list[tuple[str, ...]] = [
        (
            arm.label,
            *_cost(arm),
            *_value(arm, ablation),
            *inside_cells(arm, analyses),
            _speed(arm),
            _difference(found.get(id(arm))),
        )
        for arm in ablation.arms
    ]
    unit = f"{metric.difference_unit}, " if metric.difference_unit else ""
    columns: tuple[str, ...] = (
        "arm",
        "parameters",
        "MACs",
        metric.title,
        "seeds",
        *(one.title for one in (analyses.beside if analyses else ())),
        "images/s",
        f"minus {name} ({unit}95% interval)",
    )
    if not comparisons:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table("summary", "Arms", columns, rows)


def _first(table: Table) -> Table:
    hidden = len(table.rows) - _SHOWN
    if hidden <= 0:
        return table
    last = (f"... and {hidden} more", *[""] * (len(table.columns) - 1))
    return Table(table.stem, table.title, table.columns, [*table.rows[:_SHOWN], last])


def _cost(arm: Arm) -> tuple[str, str]:
    params, macs = arm.fact("cost", "params"), arm.fact("cost", "macs")
    return NO if params is None else f"{params:,}", NO if macs is None else si(macs)


def _value(arm: Arm, ablation: Ablation) -> tuple[str, str]:
    found, metric = arm.estimate(ablation.metric), ablation.metric
    mean = metric.text(found.mean)
    return f"{mean} ± {metric.text(found.std)}" if found.n > 1 else mean, str(found.n)


def _speed(arm: Arm) -> str:
    speed = images_per_s(arm)
    return NO if speed is None else f"{speed:,.0f}"


def _difference(one: Comparison | None) -> str:
    if one is None or one.estimate is None:
        return ""
    found, metric = one.estimate, one.metric
    if found.n == 1:
        return f"{metric.signed(found.mean)} (one seed: no interval)"
    return f"{metric.signed(found.mean)} {metric.interval(found.low, found.high)}"


def _why(one: LeftOut) -> str:
    return f"{one.name}: {one.why}" if one.state in ("repeated", "unequal", "superseded") else one.why


def notes(ablation: Ablation) -> list[str]:
    """What a reader must know before trusting the table."""
    left = [
        f"not in the table: {one.arm} seed {'?' if one.seed is None else one.seed} is {one.state}"
        + (f" ({_why(one)})" if one.why else "")
        for one in ablation.left_out
    ]
    if len(left) > _SHOWN:
        left = [*left[:_SHOWN], f"not in the table: {len(left) - _SHOWN} more runs"]
    return [*left, *ablation.unmet, *ablation.unequal]
