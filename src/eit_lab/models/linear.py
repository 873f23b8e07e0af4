"""``nn.Linear`` whose matrix products go to oneDNN on CPUs where torch's own way to them is slower. Same names, same values.

torch computes a float32 ``F.linear`` with MKL, which uses half of the vector units of AMD's processors; oneDNN uses all of them. In
bfloat16 both ways end in oneDNN, but torch's adds the bias in a pass of its own. Measured: benchmarks/records/linear-cpu.md,
``python benchmarks/linear.py``.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

_NARROW = 48  # channels; below, packing the operands costs more than the product wins


class Linear(nn.Linear):
    """x W^T + b on the last axis, as ``nn.Linear`` in all but time."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``: (..., i), (o, i), (o) -> (..., o)."""
    if x.device.type != "cpu" or not is_plain(x):
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if x.dtype != weight.dtype or not _takes(x.dtype) or x.numel() == 0:
        return F.linear(x, weight, bias)
    out: Tensor = _OneDNN.apply(x, weight, bias)
    return out


class _OneDNN(torch.autograd.Function):
    """F.linear by oneDNN; its gradients too where torch would compute them with MKL."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(..., i), (o, i), (o) -> (..., o)."""
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias."""
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            input_gradient(grad, weight) if needs_x else None,
            weight_gradient(grad, x) if needs_weight else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None,
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X W^T + b without a gradient of its own, on CPU, of one type: (..., i), (o, i), (o) -> (..., o)."""
    if not _takes(x.dtype):
        return F.linear(x, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """(..., o), (o, i) -> (..., i)."""
    return product(grad, weight.t(), None) if grad.dtype == torch.float32 else grad @ weight


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """(..., o), (..., i) -> (o, i)."""
    a, b = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    narrow = min(a.shape[1], b.shape[1]) < _NARROW
    if grad.dtype != torch.float32 or narrow or not _takes(torch.float32):
        return a.t() @ b
    # The wider one is handed over as the weight: that one is packed at full speed.
    return product(a.t(), b.t(), None) if a.shape[1] <= b.shape[1] else product(b.t(), a.t(), None).t().contiguous()


def is_plain(x: Tensor) -> bool:
    """Numbers in memory: nothing traces, compiles or transforms this call, so that a function of our own may take it."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


@cache
def _takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN's product is there for a type, and faster than torch's own on this processor."""
    if os.environ.get("EIT_LAB_NATIVE", "1") == "0":
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and _vendor() == "AuthenticAMD" and torch.backends.mkl.is_available()


def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
