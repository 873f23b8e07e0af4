"""The tables of ``bench startup``. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from eit_lab.benchmark.table import Row, markdown_table

GOAL = 1.3
"""Of the time that the script needs which imports torch, lightning and torchvision and builds the model."""
LABELS = {
    "eit_lab": "eit_lab.train, until its first step has ended",
    "by_hand": "imports and model by hand, no step",
    "by_hand_with_step": "imports, model and a step by hand",
}
_SHOWN_FROM = 0.02  # seconds of a package's imports


def startup_lines(record: Mapping[str, Any]) -> list[str]:
    """Seconds of each start, the goal, where the imports' time goes."""
    starts: Mapping[str, Mapping[str, Sequence[float]]] = record["starts"]
    rows = []
    for name, label in LABELS.items():
        seconds, cpu = starts[name]["seconds"], starts[name]["cpu_seconds"]
        rows.append(
            (
                label,
                f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
                f"{median(cpu):.2f}",
                "1" if name == "by_hand" else _ratio(record, name, "by_hand"),
                "1" if name == "by_hand_with_step" else _ratio(record, name, "by_hand_with_step"),
            )
        )
    goal = goal_row(record)
    return [
        f"`{' '.join(record['train'])}`: {record['model']}, {record['params']:,} parameters, {record['batch']} images a step; "
        f"{record['rounds']} rounds in turn, medians and ranges, ratios within a round.",
        "",
        *markdown_table(["", "seconds (range)", "CPU seconds", "over by hand", "over by hand with a step"], rows),
        "",
        *markdown_table(
            ["goal", "", "measured (range)", "verdict"], [(goal.what, goal.goal, goal.measured, goal.verdict)]
        ),
        "",
        "Where the imports' time goes, seconds of each package's own modules (`-X importtime`, which slows them down; one run, "
        "ours to its end):",
        "",
        *markdown_table(["package", "eit_lab.train", "by hand"], list(_import_rows(record))),
    ]


def goal_row(record: Mapping[str, Any]) -> Row:
    """The goal: our first step has ended within so many times what imports and building alone take."""
    ratios = _ratios(record, "eit_lab", "by_hand")
    return Row(
        "command to first step, over imports and model by hand",
        _spread(ratios),
        f"<= {GOAL}",
        median(ratios) <= GOAL,
    )


def _import_rows(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    ours, theirs = record["imports"]["eit_lab"], record["imports"]["by_hand"]
    names = [name for name in dict.fromkeys((*ours, *theirs)) if name not in ("others", "all")]
    names.sort(key=lambda name: -max(ours.get(name, 0.0), theirs.get(name, 0.0)))
    shown = [name for name in names if max(ours.get(name, 0.0), theirs.get(name, 0.0)) >= _SHOWN_FROM]
    cells = [(name, *(f"{side[name]:.2f}" if name in side else "" for side in (ours, theirs))) for name in shown]
    return [*cells, *((name, f"{ours[name]:.2f}", f"{theirs[name]:.2f}") for name in ("all",))]


def _ratios(record: Mapping[str, Any], above: str, below: str) -> list[float]:
    starts = record["starts"]
    return [a / b for a, b in zip(starts[above]["seconds"], starts[below]["seconds"], strict=True)]


def _ratio(record: Mapping[str, Any], above: str, below: str) -> str:
    return _spread(_ratios(record, above, below))


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
