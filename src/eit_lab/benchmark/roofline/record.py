"""The record of a profile: what was measured, beside the least that each operator needs on this machine. No torch."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eit_lab.config import ConfigError
from eit_lab.processor import machine
from eit_lab.runs import code_state, versions

if TYPE_CHECKING:
    from eit_lab.benchmark.roofline.peaks import Peaks
    from eit_lab.benchmark.roofline.work import Operator

KIND = "profile"


def assemble(
    runs: Sequence[Mapping[str, Any]],
    work: Mapping[str, Sequence[Operator]],
    peaks: Peaks,
    *,
    facts: Mapping[str, Any],
    before: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything that tables and figures are drawn from.

    ``runs``: of ``measure``; ``work``: operators by precision; ``facts``: what was asked for, device, threads; ``before``: earlier
    records, of which times by group are kept.
    """
    made, (commit, changes) = versions(), code_state()
    return {
        "kind": KIND,
        **facts,
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "changed": bool(changes),
        "python": made["python"],
        "torch": made["packages"]["torch"],
        "eit_lab": made["eit_lab"],
        "load": os.getloadavg()[0],
        "peaks": peaks.as_dict(),
        "work": {
            precision: [_bounded(one, peaks, precision=precision) for one in each] for precision, each in work.items()
        },
        "runs": list(runs),
        "before": [earlier for record in before for earlier in _earlier(record)],
    }


def _bounded(operator: Operator, peaks: Peaks, *, precision: str) -> dict[str, Any]:
    count = max(1, len(operator.places))
    seconds, by = peaks.bound(operator.flops, operator.num_bytes, precision=precision, count=count)
    return {
        **operator.as_dict(),
        "bound_s": seconds,
        "set_by": by,
        "softmax_s": peaks.softmax_s(operator.exponentials),
    }


def _earlier(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What of an earlier record goes into the next one's tables: of our own step only, the literal one has not changed."""
    kept = [
        {
            "title": record["title"] or record["date"],
            "date": record["date"],
            "commit": record["commit"],
            **{key: run[key] for key in ("peer", "precision", "seconds", "groups")},
        }
        for run in record["runs"]
        if not is_literal(run) and "failed" not in run
    ]
    return [*record["before"], *kept]


def read_record(path: Path) -> dict[str, Any]:
    """A record of this verb. ConfigError in one line where there is none."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"before must be records of `bench profile`, got {path}: {error}") from None
    if not isinstance(record, dict) or record.get("kind") != KIND:
        raise ConfigError(f"before must be records of `bench profile` (profile-*.json), got {path}")
    return record


# ------------------------------------------------------------------------------------------------------- sums of a record


def is_literal(run: Mapping[str, Any]) -> bool:
    """Whether a run is of the implementation as the authors wrote it."""
    return str(run["peer"]).startswith("literal")


def seconds_of(run: Mapping[str, Any], group: str, phases: Sequence[str] | None) -> float:
    """Of a run's step: what a group takes, in these phases or in all."""
    cells = run["groups"].get(group, {})
    return float(sum(cell["seconds"] for phase, cell in cells.items() if phases is None or phase in phases))


def copies_of(run: Mapping[str, Any], group: str, phases: Sequence[str] | None) -> float:
    """Of these, seconds in copies and casts."""
    cells = run["groups"].get(group, {})
    return float(sum(cell["copies"] for phase, cell in cells.items() if phases is None or phase in phases))


def work_of(
    record: Mapping[str, Any], precision: str, group: str, phases: Sequence[str] | None
) -> list[Mapping[str, Any]]:
    """Operators of a group, in these phases or in all."""
    return [
        one for one in record["work"][precision] if one["group"] == group and (phases is None or one["phase"] in phases)
    ]


def measured_s(run: Mapping[str, Any], operator: Mapping[str, Any]) -> float | None:
    """What an operator takes in a run, over all its places; None where the profile has none of them."""
    at = run["places"].get(operator["group"], {}).get(operator["phase"], {})
    if not operator["places"]:
        return sum(at.values()) or None
    found = [at[place] for place in operator["places"] if place in at]
    return sum(found) if len(found) == len(operator["places"]) else None


def done(record: Mapping[str, Any], precision: str) -> list[Mapping[str, Any]]:
    """The runs of a precision that came to their end, in the order they were asked for."""
    return [run for run in record["runs"] if run["precision"] == precision and "failed" not in run]
