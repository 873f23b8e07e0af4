"""What a device could do: the peak that perf/mfu sets a training's speed against, and where it comes from.

Model FLOPs utilisation (arXiv:2204.02311, appendix B): the products that the model needs over those that the device could have made
in the same time. Where no data sheet is known (every CPU), the peak is the rate of one large matrix product here and now, in the
precision of the run: a share of that is comparable between runs on the same machine, not between machines.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

from eit_lab.models.linear import linear

# Dense peak of half precision with float32 accumulation, in 1e12 floating-point operations per second, from the makers' data
# sheets; the first name that the device's own contains.
_PEAK_TFLOPS = (
    ("B200", 2250.0), ("H200", 989.0), ("H100 PCIe", 756.0), ("H100", 989.0), ("A100", 312.0), ("L40S", 362.0),
    ("A40", 149.7), ("A10", 125.0), ("L4", 121.0), ("V100", 125.0), ("T4", 65.0), ("RTX 4090", 165.2), ("RTX 3090", 71.0),
)  # fmt: skip
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
_FIRST_SIZE, _LARGEST_SIZE = 256, 4096
_LONG_ENOUGH_S = 2e-3  # of one product, for the clock and for all threads to be at work
_REPEATS = 3


@dataclass(frozen=True)
class Peak:
    """Of one device."""

    flops: float
    """Floating-point operations per second, two to a multiply-accumulate."""
    source: Literal["config", "data sheet", "measured"]


def known_peak(device_name: str, given_tflops: float | None) -> Peak | None:
    """What the config says, or a data sheet; None where neither knows the device."""
    if given_tflops is not None:
        return Peak(given_tflops * 1e12, "config")
    return next((Peak(1e12 * tflops, "data sheet") for name, tflops in _PEAK_TFLOPS if name in device_name), None)


def measure_peak(device: torch.device, *, precision: str) -> Peak:
    """The fastest of a few square matrix products in a precision of Lightning's; takes some tens of milliseconds.

    Draws no random numbers, and waits for the device.
    """
    dtype = _DTYPES.get(precision.partition("-")[0], torch.float32)
    size, seconds = _FIRST_SIZE, 0.0
    while True:
        left = torch.linspace(-1, 1, size * size, device=device).view(size, size).to(dtype)
        _product_s(left)  # first touches, the library's choice of a kernel
        seconds = _product_s(left)
        if seconds >= _LONG_ENOUGH_S or size >= _LARGEST_SIZE:
            break
        size *= 2
    seconds = min([seconds, *(_product_s(left) for _ in range(_REPEATS))])
    return Peak(2 * size**3 / seconds, "measured")


@torch.no_grad()
def _product_s(left: torch.Tensor) -> float:
    _wait(left.device)
    began = time.perf_counter()
    linear(left, left, None)  # the models' own way to a product, which on some CPUs is twice as fast as torch's
    _wait(left.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
