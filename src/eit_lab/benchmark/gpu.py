"""How many cores keep one H100 fed, by size of the model: images a GPU takes over images a core gives.

Assumed, and printed beside the numbers: a training step costs three forward passes, a multiply-accumulate is two operations,
and the GPU does MFU_SHARES of its peak (dense bf16, NVIDIA's data sheet). A model that reaches less needs fewer cores.
"""

from __future__ import annotations

from dataclasses import dataclass

from eit_lab.compose import compose_model
from eit_lab.models.cost import count_cost

PEAK_FLOPS = 989e12  # H100 SXM
MFU_SHARES = (0.35, 0.45)
SIZES = ("mini", "tiny", "base", "large")
_FORWARDS, _OPERATIONS = 3, 2


@dataclass(frozen=True)
class Appetite:
    """Of one model at 224 px: the range is that of MFU_SHARES."""

    model: str
    macs: int
    images_per_s: tuple[float, float]

    def cores(self, rate: float) -> tuple[float, float]:
        """How many cores of ``rate`` images per second each."""
        low, high = (taken / rate for taken in self.images_per_s)
        return low, high


def appetites() -> list[Appetite]:
    """Of the EIT arms."""
    found = []
    for size in SIZES:
        macs = count_cost(compose_model(f"eit_{size}"), num_classes=1000, img_size=224).macs
        low, high = (share * PEAK_FLOPS / (_FORWARDS * _OPERATIONS * macs) for share in MFU_SHARES)
        found.append(Appetite(f"eit_{size}", macs, (low, high)))
    return found
