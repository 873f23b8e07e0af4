"""The state that most metrics of an analysis share: the mean over images of a value that each image has for itself."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torchmetrics import Metric


class ImageMean(Metric):
    """Sums of per-image values in float64 and the number of images: the same mean for any batches and any number of ranks."""

    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        """``shape`` of one image's value."""
        super().__init__()
        self.add_state("total", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Add the values (B, *shape) of B images."""
        self.total = self.total + values.double().sum(dim=0)
        self.images = self.images + len(values)

    def mean(self) -> Tensor:
        """(*shape), float64; not a number before the first image."""
        return self.total / self.images

    def compute(self) -> Tensor:
        """(*shape), float64."""
        return self.mean()


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the device of ``x``: a forward pass in half precision is measured in float32."""
    return torch.autocast(x.device.type, enabled=False)


def as_float(x: Tensor) -> Tensor:
    """float32; what is float64 stays it."""
    return x if x.dtype == torch.float64 else x.float()
