"""Rank correlation over, between and within arms: known answers, parity with scipy, slow references, and how well intervals hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats as reference

from eit_lab.report import correlation
from eit_lab.report.correlation import Correlation, correct, correlate, ranks, spearman


def arms_of(sizes: Sequence[int]) -> list[int]:
    return [arm for arm, size in enumerate(sizes) for _ in range(size)]


def centred(values: np.ndarray, arms: Sequence[int]) -> np.ndarray:
    """Ranks inside each arm less their mean, by scipy."""
    found = np.zeros(len(values))
    for arm in set(arms):
        here = [n for n, one in enumerate(arms) if one == arm]
        found[here] = reference.rankdata(values[here]) - (len(here) + 1) / 2
    return found


# ----------------------------------------------------------------------------------------------------------- known answers


@pytest.mark.parametrize("sign", [1, -1])
def test_what_rises_together_is_one_and_reversed_minus_one_at_every_level(sign: int) -> None:
    x = np.arange(12.0)
    found = correlate(x, sign * np.exp(x), arms_of([3, 3, 3, 3]))
    assert (found.pooled.value, found.between.value, found.within.value) == (sign, sign, sign)
    assert (found.runs, found.arms) == (12, 4)
    # Of the 24 orders of four arms two are monotone, and so is one order of 6 in each arm, or its reverse in all of them.
    assert found.between.p == pytest.approx(2 / 24)
    assert found.within.p == pytest.approx(2 / 6**4)
    assert found.between.smallest == found.between.p
    assert found.within.smallest == found.within.p
    assert found.within.excludes_zero
    assert 0.3 < abs(found.within.low if sign > 0 else found.within.high) < 0.5  # type: ignore[arg-type]  # no point
    assert found.pooled.excludes_zero


def test_simpsons_paradox_is_seen() -> None:
    # Arms rise, and inside each arm the seeds fall.
    x = [0, 1, 2, 10, 11, 12, 20, 21, 22, 30, 31, 32]
    y = [2, 1, 0, 12, 11, 10, 22, 21, 20, 32, 31, 30]
    found = correlate(x, y, arms_of([3] * 4))
    assert found.between.value == 1
    assert found.within.value == -1
    assert 0 < (found.pooled.value or 0) < 1


def test_ranks_inside_arms_do_not_mind_the_scale_of_an_arm() -> None:
    x, y = [0, 1, 2, 5, 6, 7], [0, 1, 2, 500, 600, 701]
    assert correlate(x, y, arms_of([3, 3])).within.value == 1


@pytest.mark.parametrize("seed", range(6))
def test_spearman_is_scipys_with_and_without_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 15))
    if seed % 2:
        x, y = np.round(x), np.round(2 * y)  # ties
        assert len(set(x)) < 15
    assert spearman(x, y) == pytest.approx(reference.spearmanr(x, y).statistic, abs=1e-12)
    assert ranks(x) == pytest.approx(reference.rankdata(x))
    assert correlate(x, y, arms_of([3] * 5)).pooled.value == spearman(x, y)


@pytest.mark.parametrize("seed", range(4))
def test_the_permutation_test_between_arms_is_counted_by_hand(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4, (2, 10)).astype(float)  # with ties
    arms = arms_of([2] * 5)
    found = correlate(x, y, arms)
    a, b = x.reshape(5, 2).mean(1), y.reshape(5, 2).mean(1)
    of = [abs(reference.spearmanr(a, b[list(order)]).statistic) for order in itertools.permutations(range(5))]
    assert found.between.value == pytest.approx(reference.spearmanr(a, b).statistic)
    assert found.between.p == pytest.approx(np.mean(np.array(of) >= abs(found.between.value or 0) - 1e-9))
    assert found.between.smallest == pytest.approx(np.mean(np.array(of) >= max(of) - 1e-9))


@pytest.mark.parametrize("sizes", [[3, 2, 3], [2, 2, 2, 2], [4, 1, 3]])
def test_the_permutation_test_within_arms_is_counted_by_hand(sizes: list[int]) -> None:
    rng = np.random.default_rng(sum(sizes))
    arms = arms_of(sizes)
    x, y = rng.standard_normal((2, len(arms)))
    x[0] = x[1]  # a tie
    found = correlate(x, y, arms).within
    starts = np.cumsum([0, *sizes])
    a, b = centred(x, arms), centred(y, arms)
    each = [itertools.permutations(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
    sums = [abs(float(a @ b[list(itertools.chain(*orders))])) for orders in itertools.product(*each)]
    assert found.p == pytest.approx(np.mean(np.array(sums) >= abs(float(a @ b)) - 1e-9))
    assert found.smallest == pytest.approx(np.mean(np.array(sums) >= max(sums) - 1e-9))
    assert found.value == pytest.approx(float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)))


def test_the_interval_within_arms_holds_every_rho_that_is_not_too_far() -> None:
    rng = np.random.default_rng(9)
    found = correlate(*rng.standard_normal((2, 15)), arms_of([3] * 5)).within
    rho = np.linspace(-1, 1, 400_001)
    left = 1 - rho**2
    variance = left * (0.5 + 0.5 * left * (1 + rho**2 / 2)) / 10  # 5 arms, 10 degrees of freedom
    inside = rho[(rho - (found.value or 0)) ** 2 <= 1.959964**2 * variance]
    assert (found.low, found.high) == pytest.approx((inside[0], inside[-1]), abs=1e-5)


def test_the_interval_within_one_long_arm_is_bonett_and_wrights() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal(200)
    y = x + rng.standard_normal(200)
    found = correlate(x, y, [0] * 200).within
    rho, n = reference.spearmanr(x, y).statistic, 200
    half = 1.959964 * math.sqrt((1 + rho**2 / 2) / (n - 3))
    assert found.value == pytest.approx(rho)
    assert (found.low, found.high) == pytest.approx(
        (math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)), abs=0.01
    )


def test_the_bootstrap_draws_arms_and_then_seeds_in_them() -> None:
    rng = np.random.default_rng(4)
    sizes = [3, 2, 4, 3]
    arms = np.array(arms_of(sizes))
    x, y = rng.standard_normal((2, 12)).round(1)
    found = correlate(x, y, arms.tolist()).pooled
    slow, draw = [], np.random.default_rng(5)
    for _ in range(1200):
        runs = np.concatenate([draw.choice(np.flatnonzero(arms == arm), sizes[arm]) for arm in draw.integers(0, 4, 4)])
        a, b = (reference.rankdata(values[runs]) for values in (x, y))
        if np.ptp(a) and np.ptp(b):
            slow.append(np.corrcoef(a, b)[0, 1])
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])), abs=0.07)
    again = correlate(x, y, arms.tolist()).pooled
    assert (found.low, found.high) == (again.low, again.high)  # to the last digit


def test_many_arms_and_many_seeds_are_sampled_and_never_zero() -> None:
    rng = np.random.default_rng(6)
    x = np.arange(100.0)
    found = correlate(x, x + 0.1 * rng.standard_normal(100), arms_of([10] * 10))
    assert not found.between.exact
    assert not found.within.exact
    assert found.between.p == found.between.smallest == found.within.p == 1 / 10_000


# ------------------------------------------------------------------------------------------------------------- not enough


@pytest.mark.parametrize(
    ("x", "sizes", "pooled", "between", "within"),
    [
        ([], [], "0 runs: a rank correlation over runs needs 4", "no arm", "0 runs have another"),
        ([1, 2, 3], [1, 1, 1], "3 runs: a rank correlation", None, "0 runs have another of their arm"),
        ([1, 2, 3, 4], [4], "one arm", "one arm", None),
        ([1, 2, 3, 4], [2, 2], None, "2 arms: of two means it is always 1 or -1", None),
        ([5, 5, 5, 5, 5, 5], [2, 2, 2], "one of the two is the same number in all 6 runs", "in all 3 arms", "inside each arm"),
        ([1, 1, 2, 2, 3, 3], [2, 2, 2], None, None, "inside each arm one of the two is the same number"),
    ],
)  # fmt: skip
def test_what_has_no_number_has_a_reason(
    x: list[float], sizes: list[int], pooled: str | None, between: str | None, within: str | None
) -> None:
    found = correlate(x, list(range(len(x))), arms_of(sizes))
    for rho, reason in ((found.pooled, pooled), (found.between, between), (found.within, within)):
        if reason is None:
            assert rho.value is not None
            assert rho.reason == ""
        else:
            assert (rho.value, rho.low, rho.p) == (None, None, None)
            assert reason in rho.reason


def test_two_arms_have_a_number_without_an_interval_and_one_seed_each_an_interval() -> None:
    two = correlate([1, 2, 3, 4], [1, 3, 2, 4], arms_of([2, 2])).pooled
    assert two.value == pytest.approx(0.8)
    assert (two.low, two.no_interval) == (None, "2 arms are too few to draw arms from")
    single = correlate([1, 2, 3, 4, 5], [1, 3, 2, 4, 5], arms_of([1] * 5))
    assert single.pooled.low is not None
    assert single.between.value == single.pooled.value
    short = correlate([1, 2, 3, 4], [2, 1, 4, 3], arms_of([2, 2])).within
    assert (short.value, short.low, short.no_interval) == (
        -1,
        None,
        "2 degrees of freedom are left: an interval needs 3",
    )


def test_only_what_was_planned_is_tested_and_corrected_for() -> None:
    rng = np.random.default_rng(7)
    found = [correlate(*rng.standard_normal((2, 15)), arms_of([3] * 5), names=(name, "y")) for name in "abc"]
    made = correct([Correlation(**{**vars(one), "planned": one.x != "c"}) for one in found])
    assert [one.tests for one in made] == [4, 4, 0]
    assert (made[2].between.p_holm, made[2].within.p_holm) == (None, None)
    ps = [rho.p for one in made[:2] for rho in (one.between, one.within)]
    adjusted = [rho.p_holm for one in made[:2] for rho in (one.between, one.within)]
    first = min(range(4), key=lambda n: ps[n] or 0)
    assert adjusted[first] == pytest.approx(min(1, 4 * (ps[first] or 0)))
    assert all((q or 0) >= (p or 0) for p, q in zip(ps, adjusted, strict=True))


# ------------------------------------------------------------------------------------------------- how well they hold


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arms", "seeds", "between", "within", "least"),
    [
        (4, 3, 0.0, 0.0, 0.93), (5, 3, 0.8, 0.8, 0.93), (5, 3, 0.8, 0.0, 0.92), (10, 3, 0.8, 0.3, 0.92), (20, 3, 0.5, 0.5, 0.93),
        (5, 5, 0.5, 0.9, 0.90), (4, 10, 0.5, 0.9, 0.80),
    ],
)  # fmt: skip
def test_intervals_hold_as_often_as_docs_report_says(
    arms: int, seeds: int, between: float, within: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arms and seeds are normal, half of the variance between arms: the whole has rho 6 / pi asin(r / 2)."""
    monkeypatch.setattr(correlation, "RESAMPLES", 400)
    rng = np.random.default_rng(8)

    def pairs(rho: float, n: int) -> np.ndarray:
        a, b = rng.standard_normal((2, n))
        return np.stack([a, rho * a + math.sqrt(1 - rho**2) * b])

    true = 6 / math.pi * math.asin((between + within) / 4)
    found = []
    for _ in range(400):
        x, y = np.repeat(pairs(between, arms), seeds, axis=1) + pairs(within, arms * seeds)
        found.append(correlate(x, y, arms_of([seeds] * arms)))
    inside = np.mean([one.within.value for one in found])  # what so few seeds have on average
    holds = np.mean([one.pooled.low <= true <= one.pooled.high for one in found])  # type: ignore[operator]
    holds_inside = np.mean([one.within.low <= inside <= one.within.high for one in found])  # type: ignore[operator]
    assert holds > least
    assert holds_inside > 0.93
    if within == 0:
        assert np.mean([(one.within.p or 0) < 0.05 for one in found]) < 0.08
    if between == 0:
        assert np.mean([(one.between.p or 0) < 0.05 for one in found]) < 0.08
