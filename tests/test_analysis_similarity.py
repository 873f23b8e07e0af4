"""Minibatch CKA: known answers, the slow definition, and one figure for any batches and any ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eit_lab.analysis.similarity import SMALLEST_GROUP, MinibatchCKA, centred, gram, hsic, minibatch_cka


def features(n: int, *shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def slow_hsic(x: Tensor, y: Tensor) -> float:
    """The unbiased HSIC as Song et al. write it, with loops: traces and sums of Gram matrices without their diagonals."""
    n = len(x)
    K = [[float(x[i].flatten() @ x[j].flatten()) if i != j else 0.0 for j in range(n)] for i in range(n)]
    L = [[float(y[i].flatten() @ y[j].flatten()) if i != j else 0.0 for j in range(n)] for i in range(n)]
    trace = sum(K[i][j] * L[j][i] for i in range(n) for j in range(n))
    sums = sum(map(sum, K)) * sum(map(sum, L)) / ((n - 1) * (n - 2))
    mixed = sum(K[i][j] * L[j][k] for i in range(n) for j in range(n) for k in range(n)) * 2 / (n - 2)
    return (trace + sums - mixed) / (n * (n - 3))


def slow_cka(x: Tensor, y: Tensor) -> float:
    return slow_hsic(x, y) / (slow_hsic(x, x) * slow_hsic(y, y)) ** 0.5


def cka_of(points: list[Tensor], *, size: int) -> Tensor:
    """CKA of all points, in groups of ``size`` images; the last one counts from four images on."""
    metric = MinibatchCKA(len(points))
    for first in range(0, len(points[0]), size):
        grams = [gram(x[first : first + size]) for x in points]
        if len(grams[0]) >= SMALLEST_GROUP:
            metric.update(torch.stack(grams))
    return metric.compute()


def test_gram_matrix_is_the_products_without_the_diagonal() -> None:
    x = features(5, 3, 4)
    expected = torch.tensor([[0.0 if i == j else float((x[i] * x[j]).sum()) for j in range(5)] for i in range(5)])
    torch.testing.assert_close(gram(x), expected.double())
    wide = features(4, 40_000).half()  # more features than are multiplied at once
    torch.testing.assert_close(gram(wide), (wide.double() @ wide.double().T).fill_diagonal_(0))


@pytest.mark.parametrize("n", [4, 9])
def test_hsic_is_the_unbiased_estimate(n: int) -> None:
    x, y = features(n, 3, 2), features(n, 5, seed=1) + features(n, 3, 2).flatten(1)[:, :5]
    assert float(hsic(gram(x), gram(y))) == pytest.approx(slow_hsic(x, y), rel=1e-10)


def test_one_group_of_all_images_is_the_unbiased_cka() -> None:
    x = features(12, 6, mean=3.0)
    y = x[:, :4] + features(12, 4, seed=1, mean=-5.0)
    found = cka_of([x, y], size=12)
    assert float(found[0, 1]) == pytest.approx(slow_cka(x, y), rel=1e-9)
    assert 0.1 < slow_cka(x, y) < 0.9
    assert float(minibatch_cka(gram(x)[None], gram(y)[None])) == pytest.approx(slow_cka(x, y), rel=1e-9)


def test_groups_add_up_before_the_ratio() -> None:
    x = features(16, 6)
    y = x[:, :4] + features(16, 4, seed=1)
    cross, xx, yy = (sum(slow_hsic(a[i : i + 8], b[i : i + 8]) for i in (0, 8)) for a, b in ((x, y), (x, x), (y, y)))
    found = cka_of([x, y], size=8)
    assert float(found[0, 1]) == pytest.approx(cross / (xx * yy) ** 0.5, rel=1e-9)
    assert float(found[0, 1]) != pytest.approx(slow_cka(x, y), rel=1e-3), "the group is a part of the definition"
    stacked = (torch.stack([gram(part) for part in z.split(8)]) for z in (x, y))
    assert float(minibatch_cka(*stacked)) == pytest.approx(float(found[0, 1]), rel=1e-12)


def test_cka_of_itself_of_rotations_scalings_and_shifts_is_one() -> None:
    x = features(32, 10)
    rotation = torch.linalg.qr(features(10, 10, seed=1)).Q
    points = [x, 7.5 * x, x @ rotation, x + features(1, 10, seed=2, mean=100.0)]
    torch.testing.assert_close(cka_of(points, size=8), torch.ones(4, 4, dtype=torch.float64))


def test_cka_of_independent_features_is_near_zero_and_unbiased() -> None:
    found = cka_of([features(640, 8, seed=seed) for seed in range(8)], size=32)
    others = found[~torch.eye(8, dtype=torch.bool)]
    assert float(others.abs().max()) < 0.1
    assert float(others.min()) < 0 < float(others.max())
    assert abs(float(others.mean())) < 0.02


def test_features_that_are_the_same_for_all_images_have_no_cka() -> None:
    found = cka_of([features(8, 3), torch.ones(8, 3, dtype=torch.float64)], size=4)
    assert float(found[0, 0]) == pytest.approx(1)
    assert found[1].isnan().all()


def test_two_ranks_of_whole_groups_merge_to_the_same_figure() -> None:
    x, y = features(24, 5), features(24, 5).abs()
    expected = cka_of([x, y], size=8)
    ranks = [MinibatchCKA(2), MinibatchCKA(2)]
    for number, part in enumerate(torch.stack([x, y]).split(8, dim=1)):
        ranks[number % 2].update(torch.stack([gram(point) for point in part]))
    ranks[0].merge_state(ranks[1])
    torch.testing.assert_close(ranks[0].compute(), expected, rtol=1e-12, atol=0)


def test_between_two_models_is_within_their_union() -> None:
    points = [features(16, 5, seed=seed).relu() + features(16, 5) for seed in range(5)]
    both, between = cka_of(points, size=8), MinibatchCKA(2, 3)
    for grams in torch.stack([torch.stack([gram(part) for part in x.split(8)]) for x in points], dim=1):
        between.update(grams[:2], grams[2:])
    torch.testing.assert_close(between.compute(), both[:2, 2:])


def test_fewer_than_four_images_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 images in a group, got 3"):
        MinibatchCKA(1).update(gram(features(3, 5))[None])


def test_features_alike_but_for_rounding_have_no_cka_and_centring_twice_is_centring_once() -> None:
    torch.manual_seed(0)
    same = (0.37 * torch.randn(1000)).expand(32, -1)
    other = gram(torch.randn(32, 50) + 1e4)
    cka = MinibatchCKA(2)
    cka.update(torch.stack([gram(same), other]))
    assert cka.compute()[0].isnan().all()
    assert cka.compute()[1, 1] == pytest.approx(1)
    torch.testing.assert_close(centred(centred(other)), centred(other), rtol=1e-3, atol=1e-3)  # of products of 5e9
