"""What a loader hands over: one micro-batch of images as bytes, and what their augmentation is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

FILLER = -1
"""Index of a blank image that fills up an evaluation batch, so that all ranks have equally many; it is never counted.

In training, the place (``draw``) of an image that does the same in an epoch's last, shorter step: its loss weighs nothing."""


class Batch(NamedTuple):
    """B images of one rank. Normalising, erasing and mixing happen on the device (augment.py)."""

    images: Tensor
    """(B, C, H, W) uint8."""
    labels: Tensor
    """(B,) int64."""
    index: Tensor  # type: ignore[assignment]  # a field, not the method of tuples
    """(B,) int64: the sample's index in its part of the data set, or FILLER."""
    draw: Tensor
    """(B, 3) int64: epoch, copy (of repeated augmentation) and place in the epoch's order; zeros in evaluation."""
    unread: Sequence[tuple[int, str]] = ()
    """(index, where it lies and what is wrong) of samples that could not be read; others stand in their places."""
