"""What a depthwise convolution of tokens must give, for the interpreter's test and the device's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eit_lab.models.triton_conv import grid_conv


@dataclass(frozen=True)
class Case:
    grid: tuple[int, int]
    channels: int
    tail: int
    kernel_size: int = 3
    dtype: torch.dtype = torch.float32
    images: int = 2

    def __str__(self) -> str:
        h, w = self.grid
        return f"{h}x{w}-{self.channels}+{self.tail}-k{self.kernel_size}-{str(self.dtype).removeprefix('torch.')}"


CASES = (
    Case((7, 7), 2, 3),
    Case((5, 9), 70, 0, images=1),
    Case((4, 3), 20, 7, kernel_size=5),
    Case((1, 6), 3, 0),
    Case((7, 7), 20, 66, dtype=torch.bfloat16, images=1),
)
LARGE_CASES = (
    Case((19, 19), 368, 32, images=64),
    Case((19, 19), 368, 32, images=64, dtype=torch.bfloat16),
    Case((19, 19), 50, 0, images=8, dtype=torch.float16),
)
"""For a device: the sum of the weight's gradient is shared by programs of more than one image."""

_CLOSE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def convolve(x: Tensor, weight: Tensor, tail: Tensor | None, grid: tuple[int, int]) -> Tensor:
    """The slow way: an image of its own, torch's convolution, and everything put together again."""
    image = x[:, 1:].transpose(1, 2).reshape(x.shape[0], x.shape[2], *grid)
    image = F.conv2d(image, weight, padding=weight.shape[-1] // 2, groups=len(weight))
    mixed = torch.cat([x[:, :1], image.flatten(2).transpose(1, 2)], dim=1)
    return mixed if tail is None else torch.cat([mixed, tail], dim=-1)


def compare(case: Case, device: torch.device) -> None:
    """Output, and gradients of rows and kernels, of channels that lie inside of wider rows, against float64."""
    torch.manual_seed(0)
    c, a = case.channels, case.tail
    rows = torch.randn(case.images, 1 + case.grid[0] * case.grid[1], c + a + 4).to(case.dtype)
    weight = torch.randn(c, 1, case.kernel_size, case.kernel_size).to(case.dtype)
    slope = torch.randn(*rows.shape[:2], c + a).to(case.dtype)
    found = _results(grid_conv_of_rows, rows.to(device), weight.to(device), slope.to(device), case)
    expected = _results(convolve_rows, rows.double(), weight.double(), slope.double(), case)
    for name, one, other in zip(("output", "rows", "kernels"), found, expected, strict=True):
        error = (one.cpu().double() - other).norm() / other.norm()
        assert error < _CLOSE[case.dtype], f"{name}: {error:.1e}"


def grid_conv_of_rows(rows: Tensor, weight: Tensor, case: Case) -> Tensor:
    c, a = case.channels, case.tail
    return grid_conv(rows[..., :c], weight, case.grid, tail=rows[..., -a:] if a else None)


def convolve_rows(rows: Tensor, weight: Tensor, case: Case) -> Tensor:
    c, a = case.channels, case.tail
    return convolve(rows[..., :c], weight, rows[..., -a:] if a else None, case.grid)


def _results(
    function: Callable[..., Tensor], rows: Tensor, weight: Tensor, slope: Tensor, case: Case
) -> tuple[Tensor, ...]:
    rows, weight = rows.requires_grad_(), weight.requires_grad_()
    out = function(rows, weight, case)
    return out.detach(), *torch.autograd.grad(out, [rows, weight], slope)
