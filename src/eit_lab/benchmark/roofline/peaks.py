"""What this machine can do at most, measured in the run that needs it: products in each precision, bytes, exponentials.

Products: the best rate of square matrix products of several sizes, both layouts of the second factor, and of a 3x3 convolution of many
channels. NOTE: the convolution belongs there: torch's float32 products on CPU are MKL's, which on an AMD EPYC with AVX-512 ran at half of
the rate of its convolutions, oneDNN's. Bytes: copy and triad
(a = b + s c), counted as STREAM does (https://www.cs.virginia.edu/stream/ref.html), on all threads, over arrays far larger than the
last cache, and on CPUs a second time over arrays that fit in it: an operator whose tensors all fit may be faster than main memory.
Exponentials: torch.exp on float32 in the nearest caches; a kernel with a shorter polynomial of its own can be faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eit_lab.training.peak import known_peak

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SIZES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # sides of the square products
_LEAST_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}  # of one array that lies in memory
_TIMES_CACHE = 4


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Per second: floating-point operations by precision, bytes of memory and of the last cache, exponentials."""

    flops: dict[str, float]
    matmul: dict[str, float]
    """Of these, torch's own matrix products alone."""
    memory: float
    cache: float | None
    """None where it was not measured: on GPUs."""
    cache_bytes: int
    """Size of the last cache; 0 where nobody says."""
    exponentials: float
    data_sheet: float | None
    """Dense bf16 operations of a known GPU, as its maker says."""

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)

    def bandwidth(self, num_bytes: float) -> float:
        """Bytes per second for an operator that touches so many in all."""
        fits = self.cache is not None and num_bytes <= self.cache_bytes
        return max(self.cache, self.memory) if fits and self.cache is not None else self.memory

    def bound(self, flops: float, num_bytes: float, *, precision: str, count: int = 1) -> tuple[float, str]:
        """Least seconds of ``count`` equal operators with these sums, and what sets them: products or bytes."""
        products = flops / self.flops[precision]
        moving = num_bytes / self.bandwidth(num_bytes / count)
        return (products, "products") if products >= moving else (moving, "bytes")

    def softmax_s(self, exponentials: float) -> float:
        """Seconds that so many exponentials take at torch's rate."""
        return exponentials / self.exponentials


def measure(device: torch.device, precisions: Sequence[str], *, seconds: float = 0.5, scale: int = 1) -> Peaks:
    """Each number the best of what fits into ``seconds``. ``scale`` divides sizes, for a quick look only."""
    kind = device.type
    cache_bytes = _last_cache(device)
    large = max(_LEAST_BYTES[kind], _TIMES_CACHE * cache_bytes) // scale
    small = cache_bytes // 8  # three of them, and room for what else is in there
    known = known_peak(torch.cuda.get_device_name(device), None) if kind == "cuda" else None
    sides = [side // scale for side in _SIZES[kind]]
    matmul = {one: _products(device, _DTYPES[one], sides, seconds) for one in precisions}
    return Peaks(
        flops={one: max(rate, _convolution(device, _DTYPES[one], seconds, scale)) for one, rate in matmul.items()},
        matmul=matmul,
        memory=_moving(device, large, seconds),
        cache=_moving(device, small, seconds) if kind == "cpu" and small else None,
        cache_bytes=cache_bytes,
        exponentials=_exponentials(device, seconds),
        data_sheet=known.flops if known is not None else None,
    )


def better(one: Peaks, other: Peaks) -> Peaks:
    """The best of two measurements: what a machine can do, it does not always do."""
    return Peaks(
        flops={key: max(rate, other.flops[key]) for key, rate in one.flops.items()},
        matmul={key: max(rate, other.matmul[key]) for key, rate in one.matmul.items()},
        memory=max(one.memory, other.memory),
        cache=None if one.cache is None or other.cache is None else max(one.cache, other.cache),
        cache_bytes=one.cache_bytes,
        exponentials=max(one.exponentials, other.exponentials),
        data_sheet=one.data_sheet,
    )


def best(body: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of at least three calls, warmed up."""
    body()
    shortest, began = float("inf"), time.perf_counter()
    count = 0
    while count < 3 or time.perf_counter() - began < seconds:
        _wait(device)
        start = time.perf_counter()
        body()
        _wait(device)
        shortest = min(shortest, time.perf_counter() - start)
        count += 1
    return shortest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _products(device: torch.device, dtype: torch.dtype, sides: Sequence[int], seconds: float) -> float:
    rates = []
    for side in sides:
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        for body in (lambda a=a, b=b: a @ b, lambda a=a, b=b: F.linear(a, b)):
            rates.append(2 * side**3 / best(body, device, seconds / 2))
    return max(rates)


def _convolution(device: torch.device, dtype: torch.dtype, seconds: float, scale: int) -> float:
    channels, side, images = 256 // scale, 28, 8 if device.type == "cpu" else 256
    image = torch.randn(images, channels, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    kernel = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    products = images * side * side * channels * channels * 9
    return 2 * products / best(lambda: F.conv2d(image, kernel, padding=1), device, seconds)


def _moving(device: torch.device, array_bytes: int, seconds: float) -> float:
    a, b, c = (torch.ones(max(1, array_bytes // 4), device=device) for _ in range(3))
    size = a.numel() * 4
    copy = 2 * size / best(lambda: a.copy_(b), device, seconds)
    triad = 3 * size / best(lambda: torch.add(b, c, alpha=3.0, out=a), device, seconds)
    return max(copy, triad)


def _exponentials(device: torch.device, seconds: float) -> float:
    num = (1 << 17) * torch.get_num_threads() if device.type == "cpu" else 1 << 26
    x = torch.randn(num, device=device)
    out = torch.empty_like(x)
    return num / best(lambda: torch.exp(x, out=out), device, seconds)


def _last_cache(device: torch.device) -> int:
    """Bytes of the last cache, as the system says; 0 where it does not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = 0
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        text = (index / "size").read_text().strip() if (index / "size").is_file() else ""
        if text[:-1].isdigit() and text[-1] in "KMG":
            found = max(found, int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return found
