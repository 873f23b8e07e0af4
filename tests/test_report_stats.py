"""The report's statistics against known answers: scipy.stats, published tables, sums done by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as reference

from eit_lab.report.stats import Estimate, can_reach, estimate, holm, mcnemar, paired_t, sign_flip

SAMPLES = [[0.3, 1.2, 0.8], [2.0, -1.0, 0.5, 0.25], [1.1, 0.9, 1.3, 0.2, -0.4, 0.7, 0.6], list(np.linspace(-1, 2, 12))]


@pytest.mark.parametrize("values", SAMPLES)
def test_mean_and_interval_are_students(values: list[float]) -> None:
    found = estimate(values)
    low, high = reference.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=reference.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.std == pytest.approx(np.std(values, ddof=1))


def test_one_value_has_no_interval_and_equal_ones_an_empty_one() -> None:
    assert estimate([5.0]).mean == 5.0
    assert math.isnan(estimate([5.0]).half_width)
    assert not estimate([5.0]).is_constant
    assert estimate([0.1 + 0.2, 0.3, 0.3]).is_constant  # but for rounding
    assert not estimate([0.3, 0.3, 0.3001]).is_constant


@pytest.mark.parametrize("values", SAMPLES)
def test_the_paired_t_test_is_scipys(values: list[float]) -> None:
    other = np.arange(len(values)) * 0.1
    assert paired_t(values) == pytest.approx(reference.ttest_rel(np.asarray(values) + other, other).pvalue)


def test_there_is_no_t_test_without_a_spread() -> None:
    assert paired_t([1.0]) is None
    assert paired_t([1.0, 1.0, 1.0]) is None
    assert paired_t([]) is None


@pytest.mark.parametrize("values", SAMPLES)
def test_the_sign_flip_test_is_scipys_exact_permutation_test(values: list[float]) -> None:
    def mean(x: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(x, axis=axis)

    expected = reference.permutation_test(
        (values,), mean, permutation_type="samples", n_resamples=math.inf, vectorized=True
    )
    found = sign_flip(values)
    assert found is not None
    assert found.exact
    assert found.p == pytest.approx(expected.pvalue)
    assert found.smallest == pytest.approx(2 / 2 ** len(values))


def test_the_sign_flip_test_by_hand() -> None:
    # 3, 2, 4: of the 8 patterns only + + + and - - - reach a sum of 9.
    found = sign_flip([3.0, 2.0, 4.0])
    assert found is not None
    assert (found.p, found.smallest) == (0.25, 0.25)
    # 1, -1: every pattern is as far from zero as the observed one.
    assert sign_flip([1.0, -1.0]).p == 1.0  # type: ignore[union-attr]
    assert sign_flip([0.0, 0.0, 0.0]).p == 1.0  # type: ignore[union-attr]
    assert sign_flip([]) is None


def test_five_seeds_cannot_reach_five_percent_and_six_can_alone() -> None:
    assert not can_reach(sign_flip([1.0] * 5).smallest, tests=1)  # type: ignore[union-attr]
    assert can_reach(sign_flip([1.0] * 6).smallest, tests=1)  # type: ignore[union-attr]
    assert not can_reach(sign_flip([1.0] * 6).smallest, tests=2)  # type: ignore[union-attr]


def test_many_differences_are_sampled_the_same_way_each_time_and_never_give_zero() -> None:
    values = [1.0 + 0.01 * n for n in range(25)]
    found = sign_flip(values)
    assert found is not None
    assert not found.exact
    assert found.p == pytest.approx(1e-5)
    assert found == sign_flip(values)
    mixed = np.random.default_rng(3).normal(0.3, 1, 30)
    sampled = sign_flip(list(mixed))
    assert sampled is not None
    assert sampled.p == pytest.approx(reference.ttest_1samp(mixed, 0).pvalue, abs=0.01)


def test_holm_by_hand() -> None:
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, 1 x 0.04 raised to what came before it: Holm (1979).
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def table(both: int, first: int, second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """A 2x2 table as correctness of two arms, (1, images)."""
    counts = (both, first, second, neither)
    a = np.repeat([True, True, False, False], counts)
    b = np.repeat([True, False, True, False], counts)
    return a[None], b[None]


def test_mcnemar_of_agrestis_approval_ratings() -> None:
    # Agresti, Categorical Data Analysis, table 10.1: 794, 150, 86, 570; z = (86 - 150) / sqrt(236) = -4.17 without correction.
    found = mcnemar(*table(794, 150, 86, 570))
    assert (found.better, found.worse, found.images, found.of, found.exact) == (150, 86, 236, 1600, False)
    assert found.p == pytest.approx(reference.chi2.sf((64 - 1) ** 2 / 236, 1))
    assert found.p == pytest.approx(4.115e-05, rel=1e-3)


def test_mcnemar_with_few_discordant_images_is_the_exact_binomial_test() -> None:
    # 6 against 16, a textbook's example: exact p 0.052, with continuity correction 0.055.
    found = mcnemar(*table(30, 6, 16, 7))
    assert found.exact
    assert found.p == pytest.approx(reference.binomtest(6, 22).pvalue)
    assert round(found.p, 3) == 0.052
    assert mcnemar(*table(10, 0, 0, 5)).p == 1.0
    assert mcnemar(*table(0, 4, 4, 0)).p == 1.0


def test_images_that_all_seeds_get_alike_count_once_not_once_a_seed() -> None:
    first, second = table(100, 12, 4, 50)
    alone = mcnemar(first, second)
    thrice = mcnemar(np.repeat(first, 3, axis=0), np.repeat(second, 3, axis=0))
    assert (thrice.better, thrice.worse) == (36, 12)  # what adding up the tables would take for 48 independent images
    assert thrice.images == alone.images == 16
    assert thrice.p == pytest.approx(alone.p)
    big = table(500, 60, 30, 50)
    assert mcnemar(*(np.repeat(x, 5, axis=0) for x in big)).p == pytest.approx(mcnemar(*big).p)


def test_pooled_mcnemar_is_the_sign_flip_test_of_the_images_scores() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.random((3, 9)) < 0.8, rng.random((3, 9)) < 0.5
    scores = first.sum(0).astype(int) - second.sum(0)
    expected = sign_flip([float(s) for s in scores if s])
    assert expected is not None
    found = mcnemar(first, second)
    assert found.exact
    assert found.images == np.count_nonzero(scores)
    assert found.p == pytest.approx(expected.p)


def test_the_interval_of_an_estimate_is_around_its_mean() -> None:
    assert (Estimate(1.0, 0.5, 0.25, 4).low, Estimate(1.0, 0.5, 0.25, 4).high) == (0.75, 1.25)
