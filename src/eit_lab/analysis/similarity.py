"""Similarity of representations: minibatch CKA between the points of one model, and between those of two.

Source: linear CKA, Kornblith et al. 2019 (arXiv:1905.00414); its unbiased form over minibatches, Nguyen et al. 2021
(arXiv:2010.15327). Images are taken in groups of n: the Gram matrices of a group are centred without bias, their inner products
are summed over all groups, and the ratio is made of the sums. A group is part of the definition. It holds n images that follow
one another in the data set, so that neither the batch size nor the number of ranks changes the figure, and a rank gets whole
groups.

Where we differ: groups may differ in size (the last one of a data set). The sums are of <K^, L^> itself and not of <K^, L^> /
(n (n - 3)): a group weighs as its n (n - 3), where equal weights would let four images count as much as a full group. For groups
of one size the two are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from eit_lab.analysis.means import full_precision

SMALLEST_GROUP = 4
"""Images that the unbiased form needs."""

_COLUMNS = 2**14
"""Features of an image that are turned into float64 at once: 4 MB for a group of 32."""


def gram(x: Tensor) -> Tensor:
    """X X^T of features (n, ...), flattened, with a zero diagonal: (n, n), float64.

    In float64 throughout, because the centred form is a small difference of products that a large mean feature dominates.
    """
    x = x.detach().flatten(1)
    K = x.new_zeros((len(x), len(x)), dtype=torch.float64)
    with full_precision(x):
        for columns in x.split(_COLUMNS, dim=1):
            part = columns.double()
            K.addmm_(part, part.T)
    return K.fill_diagonal_(0)


def centred(grams: Tensor) -> Tensor:
    """K^ of Gram matrices (..., n, n) with a zero diagonal: the same shape, rows summing to 0, float64.

    The same for features with any constant added; exactly 0 where only rounding is left, the features the same for all images.
    Of its own result it makes the same. ValueError below 4 images.
    """
    n = grams.shape[-1]
    if n < SMALLEST_GROUP:
        raise ValueError(f"the unbiased form needs at least {SMALLEST_GROUP} images in a group, got {n}")
    K = grams.double()
    m = K.sum(dim=-2) / (n - 2)
    m = m - m.sum(dim=-1, keepdim=True) / (2 * (n - 1))
    K = K - m[..., :, None] - m[..., None, :]
    K = K * (1 - torch.eye(n, dtype=K.dtype, device=K.device))
    largest, before = (x.abs().amax(dim=(-2, -1), keepdim=True) for x in (K, grams.double()))
    return torch.where(largest <= n * torch.finfo(K.dtype).eps * before, 0, K)


def hsic(grams_x: Tensor, grams_y: Tensor) -> Tensor:
    """The unbiased estimate <K^, L^> / (n (n - 3)) of Gram matrices (..., n, n) with zero diagonals: (...), float64.

    May be negative. ValueError below 4 images.
    """
    n = grams_x.shape[-1]
    return (centred(grams_x) * centred(grams_y)).sum(dim=(-2, -1)) / (n * (n - 3))


def minibatch_cka(grams_x: Tensor, grams_y: Tensor) -> Tensor:
    """CKA of two representations over G groups of n images, (G, n, n) each: (), float64.

    At most 1, near 0 (also below) for independent ones; not a number where one is the same for all images.
    """
    cross, xx, yy = (hsic(*pair).sum(dim=0) for pair in ((grams_x, grams_y), (grams_x, grams_x), (grams_y, grams_y)))
    return cross / (xx * yy).sqrt()


class MinibatchCKA(Metric):
    """Minibatch CKA of P representations with each other, or with Q ones of another model on the same images."""

    full_state_update = False
    cross: Tensor
    xx: Tensor
    yy: Tensor

    def __init__(self, num_x: int, num_y: int | None = None) -> None:
        """``num_x`` is P, ``num_y`` Q; without it each of the P is compared with each."""
        super().__init__()
        self.within = num_y is None
        num_y = num_x if num_y is None else num_y
        for name, shape in (("cross", (num_x, num_y)), ("xx", (num_x,)), ("yy", (num_y,))):
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, grams_x: Tensor, grams_y: Tensor | None = None) -> None:
        """Add one group of n images: Gram matrices (P, n, n), and (Q, n, n) of the other model. ValueError below 4 images."""
        assert (grams_y is None) == self.within, (
            "MinibatchCKA(num_x) takes one model's Gram matrices, (num_x, num_y) two"
        )
        x = centred(grams_x).flatten(1)
        y = x if grams_y is None else centred(grams_y).flatten(1)
        self.cross = self.cross + x @ y.T
        self.xx = self.xx + x.square().sum(dim=1)
        self.yy = self.yy + y.square().sum(dim=1)

    def compute(self) -> Tensor:
        """(P, Q), float64; not a number for a representation that is the same for all images."""
        return self.cross / (self.xx[:, None] * self.yy).sqrt()
