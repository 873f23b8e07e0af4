"""Runs -> arms: what is the same but for the seed, with the statistics of its seeds.

Runs that failed or are missing are listed, never averaged over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

Record = Mapping[str, Any]
_NOT_AN_ARM = (
    "seed",
    "run",
    "logger",
    "model.name",
    "model.size.name",
    "model.ib.name",
    "data.root",
    "data.num_workers",
)


@dataclass
class Arm:
    """One configuration and its finished runs, by seed."""

    label: str
    runs: dict[int, Record] = field(default_factory=dict)
    rule: str = ""

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
    flat = [_flatten(record["config"]) for record in finished]
    keys = [
        key
        for key in dict.fromkeys(key for config in flat for key in config)
        if not any(key == skip or key.startswith(f"{skip}.") for skip in _NOT_AN_ARM)
        and len({repr(config.get(key)) for config in flat}) > 1
    ]
    by_point: dict[tuple[str, ...], Arm] = {}
    for record, config in zip(finished, flat, strict=True):
        point = tuple(repr(config.get(key)) for key in keys)
        arm = by_point.setdefault(point, Arm(label=record["name"], rule=record["config"]["model"]["ib"]["rule"]))
        arm.runs[record["seed"]] = record
    names = [arm.label for arm in by_point.values()]
    if len(set(names)) < len(names):  # the name does not tell them apart: say in which keys they differ
        for point, arm in by_point.items():
            arm.label += "".join(f" {key}={value}" for key, value in zip(keys, point, strict=True))
    return sorted(by_point.values(), key=lambda arm: arm.rule != "none")


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat
