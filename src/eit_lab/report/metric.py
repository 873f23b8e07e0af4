"""What is compared: a key of ``record["result"]``, with its name, its unit and its better end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_NAMES = {"acc1": "top-1", "acc5": "top-5"}


@dataclass(frozen=True)
class Metric:
    """A key of a run's result, as people read it."""

    key: str
    name: str
    """In words: ``test top-1``."""
    scale: float
    """What the recorded number is multiplied with to be shown."""
    unit: str
    """Of a value: ``%`` or nothing."""
    difference_unit: str
    """Of a difference: ``points`` or nothing."""
    digits: int
    higher_is_better: bool | None
    """None where nobody said."""

    @property
    def title(self) -> str:
        """Name and unit, for an axis or a column."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    def of(self, record: Mapping[str, Any]) -> float | None:
        """The shown value of a record; None where it has none, or one that is no number."""
        value = number((record.get("result") or {}).get(self.key))
        return None if value is None else self.scale * value

    def text(self, value: float) -> str:
        """A value without its unit."""
        return f"{value:.{self.digits}f}"

    def signed(self, value: float) -> str:
        """A difference without its unit."""
        shown = f"{value:+.{self.digits}f}"
        return shown.replace("-", "+") if float(shown) == 0 else shown

    def interval(self, low: float, high: float) -> str:
        """Both ends of a difference's interval."""
        return f"[{self.signed(low)}, {self.signed(high)}]"


def metric_of(key: str) -> Metric:
    """How to show a key: accuracies in percent, other numbers as they are."""
    part, _, rest = key.rpartition("/")
    words = [_NAMES.get(word, word) for word in rest.split("_")]
    name = " ".join([*([part] if part else []), *("(EMA)" if word == "ema" else word for word in words)])
    if rest.startswith("acc"):
        return Metric(key, name, 100.0, "%", "points", 2, True)
    return Metric(key, name, 1.0, "", "", 4, False if rest.startswith(("loss", "error", "ece", "nll")) else None)


def number(value: object) -> float | None:
    """A finite number, or None: records write nan and inf as their names."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < float("inf") else None
