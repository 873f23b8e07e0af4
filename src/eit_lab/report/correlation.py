"""Rank correlation over the runs of several arms: of all runs, between arms, within arms, each with its uncertainty.

Runs of one arm are no independent draws: they share a model. So three questions are asked apart. Over all runs: Spearman's
rho with a bootstrap that draws arms and then seeds within them (two stages; Davison and Hinkley 1997, section 3.8). Between
arms: rho of the arms' means, with the permutation test of them. Within arms: ranks are taken inside each arm and centred
there, so that nothing that sets one arm apart from another can enter; permutation test within arms, score interval
with the variance of Bonett and Wright (Psychometrika 2000, 65, 23), widened for arms of few seeds.

What each can and cannot say, and how well the intervals hold: docs/report.md. Nothing here supposes a straight line.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from eit_lab.report.stats import LEVEL, holm

Floats = NDArray[np.float64]

FEWEST_RUNS = 4
"""Under which no rank correlation over runs is given."""
FEWEST_ARMS = 3
"""Under which none is given between arms: of two means it is 1 or -1 whatever they are."""
RESAMPLED_ARMS = 3
"""Under which no interval over all runs is given: half of the resamples of two arms hold one alone."""
RESAMPLES = 4_000
_EXACT = 8  # 8! = 40,320 orders of the arms, or of the seeds of one arm, are counted; of more, some are drawn
_SAMPLED = 9_999
_SAME = 1e-9
_NORMAL = 1.959963984540054  # 97.5% of the normal distribution
_CHUNK = 2_000_000  # numbers that a step of the bootstrap holds


@dataclass(frozen=True)
class Rho:
    """A rank correlation; without ``value`` there is a ``reason``."""

    value: float | None = None
    n: int = 0
    """Points: runs, or arms for the one between arms."""
    low: float | None = None
    """Lower end of the 95% interval, where there is one."""
    high: float | None = None
    no_interval: str = ""
    """Why there is no interval, where one was to be expected."""
    p: float | None = None
    """Two-sided, of the permutation test."""
    smallest: float | None = None
    """The smallest p that so many points can give."""
    exact: bool = True
    """All orders were counted, not a sample of them."""
    p_holm: float | None = None
    reason: str = ""
    """Why there is no number."""

    @property
    def excludes_zero(self) -> bool:
        """Whether there is an interval, and it leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Correlation:
    """Of two quantities over the same runs."""

    x: str
    y: str
    pooled: Rho
    between: Rho
    within: Rho
    runs: int
    arms: int
    planned: bool = False
    """Named before the runs were made: tested, and corrected for. Others are shown without a test."""
    tests: int = 0
    """How many the correction is for."""


def correlate(
    x: Sequence[float] | Floats,
    y: Sequence[float] | Floats,
    arms: Sequence[Hashable],
    *,
    names: tuple[str, str] = ("x", "y"),
) -> Correlation:
    """Correlation of x and y, (runs,), whose arms are given run by run; never raises for too few or constant values."""
    assert len(x) == len(y) == len(arms), "a value and an arm for each run"
    labels = list(dict.fromkeys(arms))
    groups = [np.array([n for n, arm in enumerate(arms) if arm == label], dtype=np.intp) for label in labels]
    first, second = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    assert np.isfinite(first).all(), "finite"
    assert np.isfinite(second).all(), "finite"
    return Correlation(
        *names, _pooled(first, second, groups), _between(first, second, groups), _within(first, second, groups),
        runs=len(first), arms=len(groups),
    )  # fmt: skip


def correct(found: Sequence[Correlation]) -> list[Correlation]:
    """The same with Holm's correction over every test of the planned ones, between and within arms together."""
    places = [(n, part) for n, one in enumerate(found) for part in ("between", "within")
              if one.planned and getattr(one, part).p is not None]  # fmt: skip
    adjusted = holm([getattr(found[n], part).p for n, part in places])
    made = list(found)
    for (n, part), p in zip(places, adjusted, strict=True):
        rho = replace(getattr(made[n], part), p_holm=p)
        made[n] = replace(made[n], between=rho) if part == "between" else replace(made[n], within=rho)
    return [replace(one, tests=len(places)) if one.planned else one for one in made]


def ranks(values: Floats) -> Floats:
    """Ranks from 1 of (n,) values; equal ones share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = last - (counts - 1) / 2
    return mean[place]


def spearman(x: Floats, y: Floats) -> float | None:
    """Spearman's rho of two (n,); None where either is constant."""
    a, b = ranks(x), ranks(y)
    return _cosine(a - a.mean(), b - b.mean())


def _cosine(a: Floats, b: Floats) -> float | None:
    size = math.sqrt(float(a @ a) * float(b @ b))
    return None if size == 0 else max(-1.0, min(1.0, float(a @ b) / size))


def _is_constant(values: Floats) -> bool:
    return bool(np.ptp(values) <= _SAME * max(1e-300, float(np.abs(values).max())))


def _constant(x: Floats, y: Floats, what: str) -> str:
    if _is_constant(x) or _is_constant(y):
        which = "both are" if _is_constant(x) and _is_constant(y) else "one of the two is"
        return f"{which} the same number in all {len(x)} {what}"
    return ""


# ----------------------------------------------------------------------------------------------------------- over all runs


def _pooled(x: Floats, y: Floats, groups: Sequence[NDArray[np.intp]]) -> Rho:
    n = len(x)
    if n < FEWEST_RUNS:
        return Rho(n=n, reason=f"{n} run{'' if n == 1 else 's'}: a rank correlation over runs needs {FEWEST_RUNS}")
    if len(groups) < 2:
        return Rho(n=n, reason="one arm: nothing is compared with it")
    if reason := _constant(x, y, "runs"):
        return Rho(n=n, reason=reason)
    value = spearman(x, y)
    assert value is not None, "not constant"
    if len(groups) < RESAMPLED_ARMS:
        return Rho(value, n, no_interval=f"{len(groups)} arms are too few to draw arms from")
    low, high = _bootstrap(x, y, groups)
    return Rho(value, n, low, high)


def _bootstrap(x: Floats, y: Floats, groups: Sequence[NDArray[np.intp]]) -> tuple[float, float]:
    """Percentiles of rho over resamples: as many arms with replacement, then in each as many of its seeds."""
    found = np.concatenate([_rhos(x, y, counts) for counts in _resamples([len(group) for group in groups], groups)])
    found = found[np.isfinite(found)]  # a resample of one run alone has no rho
    low, high = np.quantile(found, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def _resamples(sizes: Sequence[int], groups: Sequence[NDArray[np.intp]]) -> list[NDArray[np.int64]]:
    """How often each run is in each resample: (resamples, runs), in pieces; the same ones each time."""
    rng = np.random.default_rng(0)
    arms, runs, longest = len(sizes), sum(sizes), max(sizes)
    size = np.asarray(sizes)
    member = np.full((arms, longest), -1, dtype=np.intp)
    for n, group in enumerate(groups):
        member[n, : len(group)] = group
    step = max(1, _CHUNK // (arms * longest))
    made = []
    for start in range(0, RESAMPLES, step):
        many = min(step, RESAMPLES - start)
        drawn = rng.integers(0, arms, (many, arms))
        seed = (rng.random((many, arms, longest)) * size[drawn][..., None]).astype(np.intp)
        inside = np.arange(longest) < size[drawn][..., None]
        run = member[drawn[..., None], seed]
        row = np.broadcast_to(np.arange(many)[:, None, None], run.shape)
        flat = (row * runs + run)[inside]
        made.append(np.bincount(flat, minlength=many * runs).reshape(many, runs))
    return made


def _rhos(x: Floats, y: Floats, counts: NDArray[np.int64]) -> Floats:
    """Spearman's rho of each resample, given as counts (resamples, runs); NaN where one is constant."""
    total = counts.sum(1, keepdims=True)
    a = _counted_ranks(x, counts) - (total + 1) / 2
    b = _counted_ranks(y, counts) - (total + 1) / 2
    top, left, right = ((counts * p * q).sum(1) for p, q in ((a, b), (a, a), (b, b)))
    size = np.sqrt(left * right)
    with np.errstate(invalid="ignore", divide="ignore"):
        made: Floats = np.where(size > 0, top / size, np.nan)
    return made


def _counted_ranks(values: Floats, counts: NDArray[np.int64]) -> Floats:
    """Mean rank of each run in a resample that holds it so many times."""
    unique, place = np.unique(values, return_inverse=True)
    many = np.zeros((len(counts), len(unique)))
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(unique)))
    many[:] = np.add.reduceat(counts[:, order], starts, axis=1)
    mean: Floats = np.cumsum(many, axis=1) - (many - 1) / 2
    return mean[:, place]


# ------------------------------------------------------------------------------------------------------------ between arms


def _between(x: Floats, y: Floats, groups: Sequence[NDArray[np.intp]]) -> Rho:
    n = len(groups)
    if n < FEWEST_ARMS:
        few = ("no arm", "one arm: nothing is compared with it", "2 arms: of two means it is always 1 or -1")
        return Rho(n=n, reason=few[n])
    a, b = (np.array([values[group].mean() for group in groups]) for values in (x, y))
    if reason := _constant(a, b, "arms"):
        return Rho(n=n, reason=reason)
    value = spearman(a, b)
    assert value is not None, "not constant"
    left, right = (ranks(values) - (n + 1) / 2 for values in (a, b))
    exact = n <= _EXACT
    orders = np.array(list(itertools.permutations(range(n)))) if exact else _orders(n)
    sums = np.abs(right[orders] @ left)
    reach = abs(float(left @ right))
    largest = float(np.sort(left) @ np.sort(right))  # of all orders (rearrangement), against the grain as well
    p, smallest = (float(np.mean(sums >= at - _SAME * n**3)) for at in (reach, max(largest, reach)))
    if not exact:
        p, smallest = (1 + p * _SAMPLED) / (1 + _SAMPLED), 1 / (1 + _SAMPLED)
    return Rho(value, n, p=p, smallest=smallest, exact=exact)


def _orders(n: int) -> NDArray[np.intp]:
    """Orders of n things, the same ones each time: (samples, n)."""
    rows = np.broadcast_to(np.arange(n), (_SAMPLED, n)).copy()
    return np.random.default_rng(0).permuted(rows, axis=1)


# ------------------------------------------------------------------------------------------------------------- within arms


def _within(x: Floats, y: Floats, groups: Sequence[NDArray[np.intp]]) -> Rho:
    several = [group for group in groups if len(group) > 1]
    n = sum(map(len, several))
    if n < FEWEST_RUNS:
        return Rho(n=n, reason=f"{n} runs have another of their arm beside them: {FEWEST_RUNS} are needed")
    parts = [(_centred(x[group]), _centred(y[group])) for group in several]
    a, b = (np.concatenate(part) for part in zip(*parts, strict=True))
    value = _cosine(a, b)
    if value is None:
        return Rho(n=n, reason="inside each arm one of the two is the same number in all seeds")
    exact = all(len(group) <= _EXACT for group in several)
    reach = abs(float(a @ b))
    if exact:
        p, smallest = _exact_within(parts, reach)
    else:
        p, smallest = _sampled_within(parts, reach), 1 / (1 + _SAMPLED)
    spare = n - len(several)  # degrees of freedom: each arm gives one for its mean
    low, high, why = _interval(value, spare, arms=len(several))
    return Rho(value, n, low, high, why, p, smallest, exact)


def _centred(values: Floats) -> Floats:
    """Ranks inside one arm, their mean taken off; all zero where the values are the same."""
    if _is_constant(values):
        return np.zeros(len(values))
    return ranks(values) - (len(values) + 1) / 2


def _interval(value: float, spare: int, *, arms: int) -> tuple[float | None, float | None, str]:
    """95% interval of rho within arms from ``spare`` degrees of freedom: every rho that the one found is not too far from.

    How far it may be follows from the variance at that rho, not at the one found (a score interval, as Wilson's is for a
    share), so that rho = 1 has an interval, too. The variance is that of one long row of ranks, (1 - rho^2)^2 (1 + rho^2 / 2) / spare
    (Bonett and Wright), for many seeds an arm. Ranks of two seeds are a sign, whose mean has (1 - rho^2) / spare. Between the two we
    weight by arms / spare, which is 1 for two seeds an arm; simulated variances for 3, 4, 5 and 8 seeds lie on it or just under [ours].
    """
    if spare < 3:
        return None, None, f"{spare} degrees of freedom are left: an interval needs 3"
    few = arms / spare

    def far(rho: float) -> bool:
        left = 1 - rho**2
        variance = left * (few + (1 - few) * left * (1 + rho**2 / 2)) / spare
        return (value - rho) ** 2 > _NORMAL**2 * variance

    ends = []
    for outer in (-1.0, 1.0):
        inner = value
        for _ in range(60):  # halving: to the last digit
            middle = (inner + outer) / 2
            if far(middle):
                outer = middle
            else:
                inner = middle
        ends.append(inner)
    return ends[0], ends[1], ""


def _exact_within(parts: Sequence[tuple[Floats, Floats]], reach: float) -> tuple[float, float]:
    """P of |sum| >= reach over all orders of the seeds inside their arms, and of the largest sum there is.

    Centred ranks are multiples of a half, so their products are multiples of a quarter: counting in quarters, the sums of each
    arm have an integer distribution, and that of all arms is their convolution.
    """
    ways = np.ones(1)
    for a, b in parts:
        orders = np.array(list(itertools.permutations(range(len(a)))))
        sums = np.rint(4 * (b[orders] @ a)).astype(np.int64)
        widest = int(np.abs(sums).max())
        ways = np.convolve(ways, np.bincount(sums + widest, minlength=2 * widest + 1) / len(sums))
    half = len(ways) // 2
    quarters = np.abs(np.arange(-half, half + 1))
    found = quarters[ways > 0]
    p, smallest = (float(ways[quarters >= at].sum()) for at in (round(4 * reach), int(found.max())))
    return min(1.0, p), min(1.0, smallest)


def _sampled_within(parts: Sequence[tuple[Floats, Floats]], reach: float) -> float:
    rng = np.random.default_rng(0)
    sums = np.zeros(_SAMPLED)
    for a, b in parts:
        sums += rng.permuted(np.broadcast_to(b, (_SAMPLED, len(b))).copy(), axis=1) @ a
    return float(1 + np.sum(np.abs(sums) >= reach - _SAME)) / (1 + _SAMPLED)
