"""Arm against arm: differences paired by seed, the test that suits their number, and the test per image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from eit_lab.report import stats
from eit_lab.report.arms import Ablation, Arm, differences
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


@dataclass(frozen=True)
class Comparison:
    """An arm less another one, in the metric as it is shown."""

    arm: Arm
    against: Arm
    metric: Metric
    seeds: tuple[int, ...]
    """That both have."""
    alone: tuple[int, ...]
    """That only one of them has: not used."""
    differences: tuple[float, ...]
    """By seed."""
    estimate: Estimate | None
    """None without a common seed."""
    t: float | None
    """p of the paired t test."""
    flip: SignFlip | None
    test: Literal["paired t", "sign-flip", None]
    """The one that counts."""
    p: float | None
    """Of that one."""
    p_holm: float | None
    tests: int
    """How many the correction is for."""
    caveats: tuple[str, ...]
    """What else differs between the two arms."""
    images: PerImage

    @property
    def name(self) -> str:
        """Arm minus arm."""
        return f"{self.arm.label} - {self.against.label}"

    @property
    def is_significant(self) -> bool:
        """At 5%, after the correction."""
        return self.p_holm is not None and self.p_holm < stats.LEVEL


def compare(ablation: Ablation) -> list[Comparison]:
    """Every planned comparison, corrected for their number."""
    made = [_compare(arm, against, ablation.metric) for arm, against in ablation.pairs]
    testable = [one for one in made if len(one.differences) > 1]
    chosen = [_choose(one, tests=len(testable)) for one in made]
    return _correct(chosen)


def _compare(arm: Arm, against: Arm, metric: Metric) -> Comparison:
    seeds = tuple(sorted(arm.runs.keys() & against.runs.keys()))
    of = [(metric.of(arm.runs[s].record), metric.of(against.runs[s].record)) for s in seeds]
    found = tuple(a - b for a, b in of if a is not None and b is not None)
    return Comparison(
        arm=arm,
        against=against,
        metric=metric,
        seeds=seeds,
        alone=tuple(sorted(arm.runs.keys() ^ against.runs.keys())),
        differences=found,
        estimate=stats.estimate(found) if found else None,
        t=stats.paired_t(found),
        flip=stats.sign_flip(found) if len(found) > 1 else None,
        test=None,
        p=None,
        p_holm=None,
        tests=0,
        caveats=_caveats(arm, against),
        images=_per_image(arm, against, metric, seeds),
    )


def _choose(one: Comparison, *, tests: int) -> Comparison:
    """The sign-flip test where its smallest p can pass the correction, or where the spread is zero; else the paired t test.

    The choice rests on the numbers of seeds and of comparisons alone, never on what was measured (a zero spread aside,
    where the t test has no value at all).
    """
    if one.flip is None:
        return one
    if one.t is None or stats.can_reach(one.flip.smallest, tests=tests):
        return replace(one, test="sign-flip", p=one.flip.p)
    return replace(one, test="paired t", p=one.t)


def _correct(made: Sequence[Comparison]) -> list[Comparison]:
    tested = [one for one in made if one.p is not None]
    adjusted = dict(zip(map(id, tested), stats.holm([one.p for one in tested if one.p is not None]), strict=True))
    pooled = [one for one in made if one.images.pooled is not None]
    by_image = dict(
        zip(map(id, pooled), stats.holm([one.images.pooled.p for one in pooled if one.images.pooled]), strict=True)
    )
    return [
        replace(
            one,
            p_holm=adjusted.get(id(one)),
            tests=len(tested),
            images=replace(one.images, p_holm=by_image.get(id(one))),
        )
        for one in made
    ]


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
