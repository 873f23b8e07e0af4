"""The exact GELU on CPU by our own kernel (gelu.c): float32 and bfloat16, contiguous, without gradients of its own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eit_lab.models.native.library import kernels, threads


def gelu(x: Tensor) -> Tensor:
    """X Phi(x) of any shape."""
    if x.dtype == torch.bfloat16:  # torch's own reads a table, in half the time
        return F.gelu(x)
    y = torch.empty_like(x)
    kernels().eit_gelu(x.data_ptr(), y.data_ptr(), x.numel(), False, threads())
    return y


def gelu_and_gradient(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Y = x Phi(x) and, from its gradient dy, that of x."""
    dy = dy.contiguous()
    y, dx = torch.empty_like(x), torch.empty_like(x)
    kernels().eit_gelu_backward(
        x.data_ptr(), dy.data_ptr(), y.data_ptr(), dx.data_ptr(), x.numel(), x.dtype == torch.bfloat16, threads()
    )
    return y, dx
