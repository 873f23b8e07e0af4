"""What the metrics of an analysis share: the mean over images of what each image has for itself, precision, size of a part."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torchmetrics import Metric

_CPU_CHUNK = 2**18
"""Elements a thread works on at once: 1 MB of float32, so that a core's own cache keeps them from their making to their sum."""
_GPU_CHUNK = 2**26
"""The same where starting a kernel costs more than memory: 256 MB."""


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


def chunk_size(device: torch.device) -> int:
    """How many elements of a large intermediate to make at once on a device."""
    return _CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else _GPU_CHUNK
