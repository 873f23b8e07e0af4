"""What is searched: axes written in Hydra's own grammar, the arms that are searched apart, the seeds of every trial. No torch.

``interval(a,b)`` is any number between, ends included; ``int(interval(a,b))`` any whole number; ``range(a,b,step)`` a list
of numbers without its end, as everywhere in Hydra; ``choice(a,b)`` or ``a,b`` one of a list; ``tag(log, ...)`` around an
interval or a range of step 1 searches the logarithm. A key can be any key, a group any group.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from eit_lab.compose import OpenSpace
from eit_lab.config import Config, ConfigError
from eit_lab.config_groups import Searched
from eit_lab.loading import nearest

Value: TypeAlias = float | int | str
_MOST_CORNERS, _MOST_VALUES = 64, 64
_MOST_LISTED = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
    """One searched key."""

    key: str
    """As typed, with a ``+`` or ``@package`` where there is one."""
    kind: Literal["float", "int", "choice"]
    low: float = 0
    high: float = 0
    """Ends of the numbers, both inside."""
    step: float | None = None
    log: bool = False
    choices: tuple[str, ...] = ()
    """Values as one types them."""

    def override(self, value: Value) -> str:
        """``key=value``."""
        return f"{self.key}={self.text(value)}"

    def text(self, value: Value) -> str:
        """A value as one types it; a number comes back as the same number."""
        if self.kind == "choice":
            return str(value)
        if self.kind == "int":
            return str(int(value))
        # low + k * step, without the digits that binary fractions add.
        return repr(float(f"{value:.12g}") if self.step is not None else float(value))

    def short(self, value: Value) -> str:
        """A value in the digits that a screen has room for."""
        return f"{value:.4g}" if self.kind == "float" else self.text(value)

    def values(self) -> list[Value] | None:
        """Every value, where there is a list of them, up to 10,000."""
        if self.kind == "choice":
            return list(self.choices)
        step = self.step if self.step is not None else (1 if self.kind == "int" else None)
        if step is None:
            return None
        count = round((self.high - self.low) / step) + 1
        if count > _MOST_LISTED:
            return None
        if self.kind == "int":
            return [int(self.low) + n * int(step) for n in range(count)]
        return [float(f"{self.low + n * step:.12g}") for n in range(count)]

    def corners(self) -> list[Value]:
        """Every choice, or both ends of the numbers."""
        if self.kind == "choice":
            return list(self.choices)
        ends = (self.low, self.high) if self.kind == "float" else (int(self.low), int(self.high))
        return list(dict.fromkeys(ends))

    def describe(self) -> dict[str, Any]:
        """The axis as plain values, for the file that says what a search is over."""
        plain = dataclasses.asdict(self)
        return {**plain, "choices": list(self.choices)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the configurations that are searched apart, each with the same number of trials."""

    label: str
    """"" where there is but one."""
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Axes, arms and seeds, and the configs that they stand for."""

    axes: tuple[Axis, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    """Of every trial, whose value is the mean over them."""
    composed: OpenSpace

    def overrides(self, values: Mapping[str, Value]) -> tuple[str, ...]:
        """``key=value`` of every axis."""
        return tuple(axis.override(values[axis.key]) for axis in self.axes)

    def short(self, values: Mapping[str, Value]) -> str:
        """``key=value`` of every axis, as a screen has room for."""
        return " ".join(f"{axis.key}={axis.short(values[axis.key])}" for axis in self.axes)

    def config(self, arm: Arm, values: Mapping[str, Value], seed: int) -> Config:
        """The checked config of one run of one trial. Raises ConfigError."""
        (config,) = self.configs(arm, [values], seed)
        return config

    def configs(self, arm: Arm, points: Sequence[Mapping[str, Value]], seed: int) -> list[Config]:
        """The checked configs of several points."""
        texts = [(*self.overrides(values), f"seed={seed}") for values in points]
        return self.composed.configs(texts, arm=arm.overrides, label=arm.label)

    def start(self) -> dict[str, Value]:
        """One point of the space: every axis at its first corner."""
        return {axis.key: axis.corners()[0] for axis in self.axes}

    def corners(self) -> Iterator[dict[str, Value]]:
        """What is checked: each axis by itself, through all values of a list of up to 64, else its ends; then the corners.

        Of many corners the first 64 and the last.
        """
        start = self.start()
        for axis in self.axes:
            values = axis.values()
            for value in values if values is not None and len(values) <= _MOST_VALUES else axis.corners():
                yield {**start, axis.key: value}
        sides = [axis.corners() for axis in self.axes]
        for corner in itertools.islice(itertools.product(*sides), _MOST_CORNERS):
            yield dict(zip(start, corner, strict=True))
        yield {axis.key: side[-1] for axis, side in zip(self.axes, sides, strict=True)}

    def check(self) -> None:
        """Compose and check the corners for every arm. Raises ConfigError in one line for the first that is wrong."""
        points = list({tuple(point.items()): point for point in self.corners()}.values())
        for arm in self.arms:
            try:
                self.configs(arm, points, self.seeds[0])
            except ConfigError as error:
                raise ConfigError(f"{error}{self._whole_numbers(str(error))}") from None

    def _whole_numbers(self, message: str) -> str:
        """What to write instead, where an interval gave fractions to a key that takes whole numbers."""
        for axis in self.axes:
            if axis.kind == "float" and message.startswith(f"{axis.key} must be") and "integer" in message:
                low, high = int(axis.low), int(axis.high)
                inner = f"int(interval({low},{high}))"
                return f"; whole numbers are {axis.key}={f'tag(log,{inner})' if axis.log else inner}"
        return ""


# ------------------------------------------------------------------------------------------------- from the command line


def read_space(
    composed: OpenSpace, *, per: Sequence[str] = (), arms: Mapping[str, Sequence[str]] | None = None
) -> SearchSpace:
    """The space of a command line; ``per`` names the keys whose values are arms, ``arms`` those of a declared experiment.

    Nothing is composed yet. Raises ConfigError in one line.
    """
    searched = {one.key: one for one in composed.searched}
    seeds: tuple[int, ...] = _fixed_seed(composed)
    if "seed" in searched:
        seeds = _seeds(searched.pop("seed"))
    mine = [_list_of(key, searched.pop(key, None), list(searched)) for key in per]
    if arms is not None:
        found = [Arm(label=label, overrides=tuple(overrides)) for label, overrides in arms.items()]
    else:
        found = [_arm(combination) for combination in itertools.product(*mine)]
    axes = tuple(_axis(one) for one in searched.values())
    if not axes:
        raise ConfigError(
            "nothing is searched: give a key an interval, a range or a choice, e.g. recipe.lr=tag(log,interval(1e-4,1e-2))"
        )
    return SearchSpace(axes=axes, arms=tuple(found), seeds=seeds, composed=composed)


def _fixed_seed(composed: OpenSpace) -> tuple[int, ...]:
    for text in composed.fixed:
        key, _, value = text.partition("=")
        if key == "seed":
            return (_seed(value),)
    return (0,)


def _seeds(one: Searched) -> tuple[int, ...]:
    if one.form == "interval":
        raise ConfigError(
            f"seed is not searched: every trial has all of its seeds and counts by their mean, got {one.text}; "
            "nearest: seed=0,1,2"
        )
    seeds = tuple(_seed(value) for value in one.values)
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seed must be different numbers, got {one.text}")
    return seeds


def _seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 2**32:
        raise ConfigError(f"seed must be an integer greater than or equal to 0, got {text!r}")
    return int(text)


def _list_of(key: str, one: Searched | None, keys: Sequence[str]) -> list[str]:
    if one is None:
        raise ConfigError(f"per must name a key that has a list of values, got {key!r}{nearest(key, keys)}")
    if one.form == "interval":
        raise ConfigError(f"per must name a key that has a list of values, got {one.text}")
    return [f"{key}={value}" for value in one.values]


def _arm(combination: Sequence[str]) -> Arm:
    label = combination[0].partition("=")[2] if len(combination) == 1 else " ".join(combination)
    return Arm(label=label, overrides=tuple(combination))


def _axis(one: Searched) -> Axis:
    for tag in one.tags:
        if tag != "log":
            raise ConfigError(f"{one.text}: the only tag is log, got {tag!r}{nearest(tag, ['log'])}")
    if one.form == "interval":
        return _interval(one)
    if one.form == "range":
        return _range(one)
    if one.tags:
        raise ConfigError(f"{one.text}: log needs an interval or a range, not a list of values")
    if len(set(one.values)) < len(one.values):
        raise ConfigError(f"{one.text}: the values must be different")
    return Axis(key=one.key, kind="choice", choices=one.values)


def _interval(one: Searched) -> Axis:
    low, high, log = one.start, one.stop, bool(one.tags)
    if not low < high:
        raise ConfigError(f"{one.text}: an interval goes from a smaller number to a larger one")
    if log and low <= 0:
        raise ConfigError(f"{one.text}: a logarithm needs numbers above 0")
    kind: Literal["int", "float"] = "int" if isinstance(low, int) and isinstance(high, int) else "float"
    return Axis(key=one.key, kind=kind, low=low, high=high, log=log)


def _range(one: Searched) -> Axis:
    if not one.values:
        raise ConfigError(f"{one.text}: this range is empty; its end is not a part of it")
    numbers = sorted(float(text) for text in one.values)
    whole = all(isinstance(part, int) for part in (one.start, one.stop, one.step))
    step = abs(one.step)
    if not one.tags:
        return Axis(key=one.key, kind="int" if whole else "float", low=numbers[0], high=numbers[-1], step=step)
    if not whole or step != 1 or numbers[0] <= 0:
        raise ConfigError(
            f"{one.text}: a logarithmic range has whole numbers above 0 and step 1; tag(log,interval(a,b)) is for others"
        )
    return Axis(key=one.key, kind="int", low=numbers[0], high=numbers[-1], log=True)
