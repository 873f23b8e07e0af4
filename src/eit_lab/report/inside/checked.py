"""A mapping that came from a file, taken apart: whatever is wrong in it is one line with the file, the dotted key, rule and value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from eit_lab.config import ConfigError

FloatArray = NDArray[np.float64]
_NUMBERS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no names for them: records write these
_SHOWN = 60


class Part:
    """A mapping with the place it has in its file. What it does not have is None; every reader raises ConfigError."""

    def __init__(self, found: object, *, source: str, key: str = "") -> None:
        """``key``: dotted, where in the file ``source`` it stands; empty for all of it."""
        self.source, self._prefix = source, f"{key}." if key else ""
        if not isinstance(found, Mapping):
            wrong(source, key or "the result", "must be a mapping", found)
        self._found = found

    def keys(self) -> list[str]:
        """Its names."""
        return list(self._found)

    def get(self, key: str) -> Any:
        """A value as it is, unchecked."""
        return self._found.get(key)

    def wrong(self, key: str, rule: str, got: object) -> NoReturn:
        """Raise the one line about a key."""
        wrong(self.source, self._prefix + key, rule, got)

    def part(self, key: str) -> Part | None:
        """A mapping in it."""
        value = self.get(key)
        return None if value is None else Part(value, source=self.source, key=self._prefix + key)

    def text(self, key: str) -> str:
        """Text; empty where there is none."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            self.wrong(key, "must be text", value)
        return value or ""

    def names(self, key: str) -> tuple[str, ...]:
        """A list of texts; empty where there is none."""
        value = self.get(key)
        if value is not None and not (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)):
            self.wrong(key, "must be a list of names", value)
        return tuple(value or ())

    def count(self, key: str) -> int | None:
        """An integer, 0 or more."""
        value = self.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            self.wrong(key, "must be an integer, 0 or more", value)
        return value

    def number(self, key: str) -> float | None:
        """A finite number; None for one that is not finite too."""
        value = self.get(key)
        found = math.nan if value is None else self._float(value, key)
        return found if math.isfinite(found) else None

    def pair(self, key: str) -> tuple[float, float] | None:
        """Two finite numbers."""
        found = self.array(key, (2,))
        if found is not None and not np.isfinite(found).all():
            self.wrong(key, "must be two finite numbers", self.get(key))
        return None if found is None else (float(found[0]), float(found[1]))

    def counts(self, key: str) -> tuple[int, int] | None:
        """Two integers, 1 or more: a grid, a size."""
        found = self.pair(key)
        if found is not None and (min(found) < 1 or any(one != int(one) for one in found)):
            self.wrong(key, "must be two integers, 1 or more", self.get(key))
        return None if found is None else (int(found[0]), int(found[1]))

    def array(self, key: str, shape: tuple[int | None, ...]) -> FloatArray | None:
        """Nested lists of numbers; a None in the shape is any length. A null among the numbers is nan."""
        value = self.get(key)
        return None if value is None else self._array(value, shape, key)

    def arrays(self, key: str, lengths: Sequence[int | None], *, null: bool) -> tuple[FloatArray | None, ...]:
        """A list of lists of numbers, each of its own length; with ``null``, null may stand for one. Empty where there is none."""
        value = self.get(key)
        if value is None:
            return ()
        if not isinstance(value, list | tuple):
            self.wrong(key, "must be a list", value)
        if len(value) != len(lengths):
            self.wrong(key, f"must have {len(lengths)} entries", len(value))
        return tuple(
            None if one is None and null else self._array(one, (length,), f"{key}[{n}]")
            for n, (one, length) in enumerate(zip(value, lengths, strict=True))
        )

    def _float(self, value: object, key: str) -> float:
        if value is None:
            return math.nan
        if isinstance(value, str) and value in _NUMBERS:
            return _NUMBERS[value]
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.wrong(key, "must be a number", value)
        return float(value)

    def _array(self, value: Any, shape: tuple[int | None, ...], key: str) -> FloatArray:
        if not isinstance(value, list | tuple):
            self.wrong(key, "must be a list", value)
        if shape[0] is not None and len(value) != shape[0]:
            self.wrong(key, f"must have {shape[0]} entries", len(value))
        if len(shape) == 1:
            return np.array([self._float(one, f"{key}[{n}]") for n, one in enumerate(value)], dtype=np.float64)
        rows: list[FloatArray] = []
        for n, row in enumerate(value):  # the first row says how long the others are
            rows.append(self._array(row, rows[0].shape if rows else shape[1:], f"{key}[{n}]"))
        return np.stack(rows) if rows else np.zeros((0,) * len(shape))


def wrong(source: str, key: str, rule: str, got: object) -> NoReturn:
    """Raise the one line."""
    raise ConfigError(f"{source}: {key} {rule}, got {shown(got)}")


def shown(value: object) -> str:
    """A value on one line, its end left out where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"
