"""Arm against arm, and difference against difference: paired by seed, the test that suits their number, the test per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

import numpy as np

from eit_lab.report import stats
from eit_lab.report.arms import Ablation, Arm, Pair, differences
from eit_lab.report.keys import covers
from eit_lab.report.metric import Metric
from eit_lab.report.stats import Estimate, McNemar, SignFlip


@dataclass(frozen=True)
class PerImage:
    """What the saved predictions of two arms say of the test images; ``reason`` where they cannot be compared."""

    by_seed: dict[int, McNemar]
    pooled: McNemar | None
    reason: str
    p_holm: float | None = None


@dataclass(eq=False, kw_only=True)
class Contrast:
    """What a planned test is of: a sum of arms, some of them with a minus, in the metric as it is shown."""

    name: str
    """The sum, written out."""
    metric: Metric
    seeds: tuple[int, ...]
    """That all its arms have."""
    alone: tuple[int, ...]
    """That only some of them have: not used."""
    differences: tuple[float, ...]
    """Its value by seed."""
    caveats: tuple[str, ...]
    """What else differs between its arms."""
    estimate: Estimate | None = field(init=False)
    """None without a common seed."""
    t: float | None = field(init=False)
    """p of the paired t test."""
    flip: SignFlip | None = field(init=False)
    test: Literal["paired t", "sign-flip", None] = field(init=False, default=None)
    """The one that counts."""
    p: float | None = field(init=False, default=None)
    """Of that one."""
    p_holm: float | None = field(init=False, default=None)
    tests: int = field(init=False, default=0)
    """How many the correction is for."""
    corrected_for: str = field(init=False, default="")
    """The same in words, such as ``3 comparisons``."""

    def __post_init__(self) -> None:
        found = self.differences
        self.estimate = stats.estimate(found) if found else None
        self.t = stats.paired_t(found)
        self.flip = stats.sign_flip(found) if len(found) > 1 else None

    @property
    def is_significant(self) -> bool:
        """At 5%, after the correction."""
        return self.p_holm is not None and self.p_holm < stats.LEVEL


@dataclass(eq=False, kw_only=True)
class Comparison(Contrast):
    """An arm less another one."""

    arm: Arm
    against: Arm
    images: PerImage


@dataclass(eq=False, kw_only=True)
class Interaction(Contrast):
    """The difference of two arms less that of two others."""

    first: Pair
    second: Pair
    means: tuple[float, float] | None
    """Of the two differences, over the seeds that are used; None without any."""


def compare(ablation: Ablation) -> list[Comparison]:
    """Every planned comparison, corrected for the number of planned tests."""
    return compare_all(ablation)[0]


def compare_all(ablation: Ablation) -> tuple[list[Comparison], list[Interaction]]:
    """Every planned comparison and every planned difference of differences, all of them corrected together."""
    comparisons = [_compare(pair, ablation.metric) for pair in ablation.pairs]
    interactions = [_interact(first, second, ablation.metric) for first, second in ablation.interactions]
    _test([*comparisons, *interactions], what="test" if interactions else "comparison")
    _correct_images(comparisons)
    return comparisons, interactions


def _compare(pair: Pair, metric: Metric) -> Comparison:
    arm, against = pair
    seeds, alone, values = _by_seed(pair, metric)
    return Comparison(
        name=_minus(pair),
        metric=metric,
        seeds=seeds,
        alone=alone,
        differences=tuple(a - b for a, b in values),
        caveats=_caveats(arm, against),
        arm=arm,
        against=against,
        images=_per_image(arm, against, metric, seeds),
    )


def _interact(first: Pair, second: Pair, metric: Metric) -> Interaction:
    seeds, alone, values = _by_seed((*first, *second), metric)
    sides = [(a - b, c - d) for a, b, c, d in values]
    others = (first[1], *second)
    return Interaction(
        name=f"({_minus(first)}) - ({_minus(second)})",
        metric=metric,
        seeds=seeds,
        alone=alone,
        differences=tuple(one - other for one, other in sides),
        caveats=tuple(dict.fromkeys(said for arm in others for said in _caveats(first[0], arm))),
        first=first,
        second=second,
        means=(fmean(one for one, _ in sides), fmean(other for _, other in sides)) if sides else None,
    )


def _minus(pair: Pair) -> str:
    return f"{pair[0].label} - {pair[1].label}"


def _by_seed(arms: Sequence[Arm], metric: Metric) -> tuple[tuple[int, ...], tuple[int, ...], list[list[float]]]:
    """The seeds that all arms have, those that only some have, and for each of the first the value of every arm."""
    having = [set(arm.runs) for arm in arms]
    common = set.intersection(*having)
    seeds = tuple(sorted(common))
    found = [[metric.of(arm.runs[seed].record) for arm in arms] for seed in seeds]
    values = [[value for value in row if value is not None] for row in found]
    assert all(len(row) == len(arms) for row in values), "a run that counts has the metric"
    return seeds, tuple(sorted(set.union(*having) - common)), values


def _test(family: Sequence[Contrast], *, what: str) -> None:
    """Choose the test of each, and correct for all that have one."""
    tested = [one for one in family if one.flip is not None]
    for one in tested:
        one.test, one.p = _choose(one, tests=len(tested))
    adjusted = stats.holm([one.p for one in tested if one.p is not None])
    for one, p in zip(tested, adjusted, strict=True):
        one.p_holm = p
    for one in family:
        one.tests = len(tested)
        one.corrected_for = f"{len(tested)} {what}{'' if len(tested) == 1 else 's'}"


def _choose(one: Contrast, *, tests: int) -> tuple[Literal["paired t", "sign-flip"], float]:
    """The sign-flip test where its smallest p can pass the correction, or where the spread is zero; else the paired t test.

    The choice rests on the numbers of seeds and of tests alone, never on what was measured (a zero spread aside,
    where the t test has no value at all).
    """
    assert one.flip is not None, "two seeds or more"
    if one.t is None or stats.can_reach(one.flip.smallest, tests=tests):
        return "sign-flip", one.flip.p
    return "paired t", one.t


def _correct_images(made: Sequence[Comparison]) -> None:
    pooled = [(one, one.images.pooled) for one in made if one.images.pooled is not None]
    for (one, _), p in zip(pooled, stats.holm([test.p for _, test in pooled]), strict=True):
        one.images = replace(one.images, p_holm=p)


def _caveats(arm: Arm, against: Arm) -> tuple[str, ...]:
    """What differs beside what was meant to: the set-up, or more than one factor where none was declared."""
    both = [
        source for source in arm.setups if source in against.setups
    ]  # what one source has as factor is none of another's
    setups = (arm.setups[both[0]], against.setups[both[0]]) if both else (arm.setup, against.setup)
    found = differences(*setups, "{key} ({a}; {b})")
    if arm.declared and against.declared:
        return tuple(found)
    keys = [key for key in arm.point if arm.config.get(key) != against.config.get(key)]
    factors = dict.fromkeys(".".join(key.split(".")[:2]) for key in keys if not covers(arm.matched, key))
    if len(factors) > 1:
        found.append(f"several factors at once ({', '.join(factors)})")
    return tuple(found)


def _per_image(arm: Arm, against: Arm, metric: Metric, seeds: Sequence[int]) -> PerImage:
    if not metric.key.startswith("test/acc1"):
        return PerImage({}, None, f"{metric.name} is not a count of images")
    if not seeds:
        return PerImage({}, None, "no seed in common")
    averaged = metric.key.endswith("_ema")
    first, second, used, unlike, absent = [], [], [], [], []
    for seed in seeds:
        a, b = arm.runs[seed].predictions, against.runs[seed].predictions
        if a is None or b is None:
            absent.append(seed)
            continue
        x, y = (p.correct_ema if averaged else p.correct for p in (a, b))
        if x is None or y is None:
            absent.append(seed)
        elif a.of != b.of or _fingerprint(arm, seed) != _fingerprint(against, seed):
            unlike.append(seed)
        else:
            first.append(x)
            second.append(y)
            used.append((seed, a.of))
    if not used:
        return PerImage({}, None, "the test images are not the same" if unlike else "no predictions were kept")
    by_seed = {s: stats.mcnemar(x[None], y[None]) for (s, _), x, y in zip(used, first, second, strict=True)}
    if len({of for _, of in used}) > 1:
        return PerImage(by_seed, None, "the test images differ from seed to seed")
    reason = "; ".join(
        f"{why}: seed {', '.join(map(str, which))}"
        for why, which in (("no predictions were kept", absent), ("other test images", unlike))
        if which
    )
    return PerImage(by_seed, stats.mcnemar(np.stack(first), np.stack(second)), reason)


def _fingerprint(arm: Arm, seed: int) -> object:
    return (arm.runs[seed].record.get("data") or {}).get("fingerprint")
