"""The statistics of a report: means and intervals over seeds, paired tests, correction for several tests, tests per image.

Sources, and why these: docs/report.md. ``scipy.special`` has every distribution that is needed; ``scipy.stats``, which takes
a second to import, is what the tests hold these functions against.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.05
"""Of significance; intervals hold 1 - LEVEL."""
_EXACT_SEEDS = 20  # 2^20 sign patterns take a tenth of a second; beyond that they are sampled
_SAMPLED = 99_999
_FEW_IMAGES = 25  # discordant images under which the chi-squared distribution is not trusted
_SAME = 1e-9  # relative: differences that agree to this are the same number


@dataclass(frozen=True)
class Estimate:
    """A mean over n seeds with its sample standard deviation and the half width of its 95% interval; NaN for n = 1."""

    mean: float
    std: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width

    @property
    def is_constant(self) -> bool:
        """Whether two or more values are all the same number, to rounding."""
        return self.n > 1 and self.std <= _SAME * max(1.0, abs(self.mean))


def estimate(values: Sequence[float]) -> Estimate:
    """Mean, sample standard deviation and 95% interval (Student's t) of independent values, at least one."""
    n = len(values)
    if n < 2:
        return Estimate(mean(values), math.nan, math.nan, n)
    from scipy.special import stdtrit

    spread = stdev(values)
    return Estimate(mean(values), spread, float(stdtrit(n - 1, 1 - LEVEL / 2)) * spread / math.sqrt(n), n)


def paired_t(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test; None for fewer than two differences, or where they are all the same."""
    if len(differences) < 2:
        return None
    found = estimate(differences)
    if found.is_constant:
        return None
    from scipy.special import stdtr

    t = found.mean / (found.std / math.sqrt(found.n))
    return float(2 * stdtr(found.n - 1, -abs(t)))


@dataclass(frozen=True)
class SignFlip:
    """Result of a sign-flip permutation test."""

    p: float
    smallest: float
    """The smallest p that the test can give with so many differences."""
    exact: bool
    """All sign patterns were counted, not a sample of them."""


def sign_flip(differences: Sequence[float]) -> SignFlip | None:
    """Two-sided sign-flip permutation test of the mean difference; None without a difference.

    Under the null hypothesis each difference is as likely with the other sign. p is the share of the 2^n sign patterns whose
    mean is at least as far from zero, so that it is never below 2 / 2^n. Over 20 differences patterns are drawn, the
    same ones each time, and p counts the observed pattern too (Phipson and Smyth 2010), never zero.
    """
    n = len(differences)
    if n == 0:
        return None
    values = np.asarray(differences, dtype=np.float64)
    reached = abs(values.sum()) - _SAME * np.abs(values).sum()
    if n <= _EXACT_SEEDS:
        sums = values[:1]  # the first sign stays: a pattern and its mirror image are equally far from zero
        for value in values[1:]:
            sums = np.concatenate([sums + value, sums - value])
        return SignFlip(float(np.mean(np.abs(sums) >= reached)), 2.0 ** (1 - n), exact=True)
    signs = np.random.default_rng(0).integers(0, 2, (_SAMPLED, n), dtype=np.int8) * 2 - 1
    count = int(np.sum(np.abs(signs @ values) >= reached))
    return SignFlip((1 + count) / (1 + _SAMPLED), 1 / (1 + _SAMPLED), exact=False)


def can_reach(smallest: float, *, tests: int) -> bool:
    """Whether a test with this smallest p can be significant at 5% as one of so many (the strictest step of Holm's)."""
    return smallest < LEVEL / tests


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values, in their order, that may each be held against 5% however many there are."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted


@dataclass(frozen=True)
class McNemar:
    """Which of two arms is right more often on the same images."""

    better: int
    """Image-seed pairs where the first is right and the second wrong."""
    worse: int
    """The other way round."""
    images: int
    """Images on which they differ, counted once."""
    of: int
    """Images of the test set."""
    p: float
    exact: bool


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> McNemar:
    """McNemar's test of (seeds, images) correctness; both have the same shape, image by image.

    An image's score is the number of seeds in which the first is right and the second wrong, less the other way round. The
    image is what is independent, so the test flips the sign of whole scores. With one seed that is McNemar's own test; with
    several it is its form for clusters (Durkalski et al. 2003), where adding up the 2x2 tables would count an image that all
    seeds get wrong as that many images. Exact where fewer than 25 images have a score (binomial for one seed), else
    chi-squared with continuity correction.
    """
    assert first.shape == second.shape, "the same seeds and images"
    assert first.ndim == 2, "(seeds, images)"
    score = first.sum(0, dtype=np.int64) - second.sum(0, dtype=np.int64)
    scores = score[score != 0]
    few = len(scores) < _FEW_IMAGES
    return McNemar(
        better=int(np.sum(first & ~second)),
        worse=int(np.sum(~first & second)),
        images=len(scores),
        of=first.shape[1],
        p=_exact_p(scores) if few else _chi2_p(scores),
        exact=few,
    )


def _exact_p(scores: NDArray[np.int64]) -> float:
    """Share of the sign patterns of integer scores whose sum is at least as far from zero."""
    ways = np.ones(1)
    for size in np.abs(scores):
        step = np.zeros(2 * size + 1)
        step[[0, -1]] = 0.5
        ways = np.convolve(ways, step)
    reach = int(np.abs(scores).sum())
    sums = np.arange(-reach, reach + 1)
    return float(min(1.0, ways[np.abs(sums) >= abs(scores.sum())].sum()))


def _chi2_p(scores: NDArray[np.int64]) -> float:
    from scipy.special import chdtrc

    correction = int(np.gcd.reduce(np.abs(scores)))  # half the distance between two possible sums; 1 for one seed
    statistic = max(abs(int(scores.sum())) - correction, 0) ** 2 / int((scores**2).sum())
    return float(chdtrc(1, statistic))
