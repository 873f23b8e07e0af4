"""Runs -> arms: what is the same but for the seed, with the statistics of its seeds.

Runs that failed or are missing are listed, never averaged over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from eit_lab.runs import PLACEMENT

Record = Mapping[str, Any]
_NOT_AN_ARM = (*PLACEMENT, "seed", "model.name", "model.size.name", "model.ib.name")  # labels and places


@dataclass
class Arm:
    """One configuration and its finished runs, by seed."""

    label: str
    runs: dict[int, Record] = field(default_factory=dict)
    plain: bool = False
    """Attention only: rule none, or strength 0."""
    point: dict[str, str] = field(default_factory=dict)
    """The keys in which the arms differ, with this arm's values."""
    superseded: list[Record] = field(default_factory=list)
    """Runs of a seed that has a later one."""

    @property
    def accuracies(self) -> list[float]:
        """Test top-1 of each seed, in percent, seeds ascending."""
        return [100 * self.runs[seed]["result"]["test/acc1"] for seed in sorted(self.runs)]

    @property
    def cost(self) -> Record:
        """Parameters and MACs, the same for every seed."""
        cost: Record = next(iter(self.runs.values()))["cost"]
        return cost

    @property
    def img_per_s(self) -> float | None:
        """Training images per second, the mean over seeds."""
        known = [run["img_per_s"] for run in self.runs.values() if run.get("img_per_s")]
        return mean(known) if known else None


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with its standard deviation and the half width of its 95% interval (Student's t); NaN for n = 1."""

    mean: float
    std: float
    half_width: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, sample standard deviation and 95% interval of independent values."""
    n = len(values)
    if n < 2:
        return Estimate(mean(values), math.nan, math.nan, n)
    from scipy.special import stdtrit

    spread = stdev(values)
    return Estimate(mean(values), spread, float(stdtrit(n - 1, 0.975)) * spread / math.sqrt(n), n)


def paired_difference(arm: Arm, baseline: Arm) -> Estimate | None:
    """Arm - baseline in points of top-1, paired by seed; None without a common seed."""
    seeds = sorted(arm.runs.keys() & baseline.runs.keys())
    if not seeds:
        return None
    return estimate([
        100 * (arm.runs[s]["result"]["test/acc1"] - baseline.runs[s]["result"]["test/acc1"]) for s in seeds
    ])  # fmt: skip


def group_arms(records: Sequence[Record]) -> list[Arm]:
    """Finished runs grouped by everything but the seed; the plain ViT first, then in the order of the records."""
    finished = [record for record in records if record["status"] == "finished"]
    flat = [
        {**_flatten(r["config"]), "data.fingerprint": r.get("data", {}).get("fingerprint")} for r in finished
    ]  # the same name over other files is another data set
    keys = [
        key
        for key in dict.fromkeys(key for config in flat for key in config)
        if not any(key == skip or key.startswith(f"{skip}.") for skip in _NOT_AN_ARM)
        and len({repr(config.get(key)) for config in flat}) > 1
    ]
    by_point: dict[tuple[str, ...], Arm] = {}
    for record, config in zip(finished, flat, strict=True):
        point = tuple(repr(config.get(key)) for key in keys)
        ib = record["config"]["model"]["ib"]
        plain = ib["rule"] == "none" or ib["strength"] == 0
        new = Arm(label=record["name"], plain=plain, point=dict(zip(keys, point, strict=True)))
        arm = by_point.setdefault(point, new)
        known = arm.runs.get(record["seed"])
        if known is None or known.get("ended", "") <= record.get("ended", ""):
            known, arm.runs[record["seed"]] = arm.runs.get(record["seed"]), record
        else:
            known = record
        arm.superseded += [known] if known is not None else []
    names = [arm.label for arm in by_point.values()]
    if len(set(names)) < len(names):  # the name does not tell them apart: say in which keys they differ
        for point, arm in by_point.items():
            arm.label += "".join(f" {key}={value}" for key, value in zip(keys, point, strict=True))
    return sorted(by_point.values(), key=lambda arm: not arm.plain)


def baseline_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm to hold this one against: the plain ViT that differs in nothing but the inductive bias.

    Where the arms differ in one key only, it is the first of them. Else a difference would mix factors: None.
    """
    if len(arm.point) == 1:
        return arms[0]

    def outside(other: Arm) -> dict[str, str]:
        return {key: value for key, value in other.point.items() if not key.startswith("model.ib.")}

    return next((other for other in arms if other.plain and outside(other) == outside(arm)), None)


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
