"""What a run was worth: its objective after every epoch, from metrics.csv, and the one number that counts. No torch."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal


def read_curve(folder: Path, metric: str) -> dict[int, float]:
    """Epochs done (from 1) -> the metric on the held-out slice then; empty where there is nothing yet."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return {}
    with path.open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row.get(metric)]
    return {int(row["epoch"]) + 1: float(row[metric]) for row in rows if row["epoch"]}


def run_value(
    curve: Mapping[int, float], record: Mapping[str, Any], metric: str, *, at: Literal["best", "last"], maximize: bool
) -> float | None:
    """The value of a finished run: its best epoch, or its last; None where the metric was never a finite number.

    A run that ended before its first validation was validated at its end, which its record has alone.
    """
    finite = {epoch: value for epoch, value in curve.items() if math.isfinite(value)}
    if finite:
        if at == "last":
            last = max(curve)
            return finite.get(last)
        return max(finite.values()) if maximize else min(finite.values())
    value = (record.get("best") or {}).get(metric)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def mean_curve(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """The mean over runs, at the epochs that all of them have, in order."""
    shared = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return {epoch: fmean(curve[epoch] for curve in curves) for epoch in sorted(shared)}
