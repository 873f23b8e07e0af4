"""Self-attention by our own kernel (attention.c), with its gradient: float32 and bfloat16 on CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eit_lab.models.linear import is_plain
from eit_lab.models.native.library import kernels, library, threads

WIDEST = 64
"""Head widths up to this one; attention.c holds a row of a head in registers."""


class NativeAttention(torch.autograd.Function):
    """(B, N, 3, h, d) -> softmax(q k^T / sqrt(d)) v, (B, N, h, d); saves its input, its output and one number a row."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor) -> Tensor:
        """Compute, and keep the logarithm of each row's sum."""
        B, N, _, h, d = qkv.shape
        qkv = qkv.contiguous()
        out = qkv.new_empty(B, N, h, d)
        lse = qkv.new_empty(B, h, N, dtype=torch.float32)
        failed = kernels().eit_attention_forward(
            qkv.data_ptr(), out.data_ptr(), lse.data_ptr(), B, N, h, d, d**-0.5, qkv.dtype == torch.bfloat16, threads()
        )
        _check(failed)
        ctx.save_for_backward(qkv, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Of out -> of qkv."""
        qkv, out, lse = ctx.saved_tensors
        B, N, _, h, d = qkv.shape
        grad, dqkv = grad.contiguous(), torch.empty_like(qkv)
        failed = kernels().eit_attention_backward(
            qkv.data_ptr(), out.data_ptr(), lse.data_ptr(), grad.data_ptr(), dqkv.data_ptr(), B, N, h, d, d**-0.5,
            qkv.dtype == torch.bfloat16, threads(),
        )  # fmt: skip
        _check(failed)
        return dqkv


def native_attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: (B, N, 3, h, d) -> (B, N, h, d). Only where ``can_run`` says so."""
    out: Tensor = NativeAttention.apply(qkv)
    return out


def can_run(qkv: Tensor) -> bool:
    """Whether the kernel takes this tensor: real numbers in a CPU's memory, no graph being traced, and a kernel there."""
    return (
        is_plain(qkv)
        and qkv.device.type == "cpu"
        and qkv.dtype in (torch.float32, torch.bfloat16)
        and qkv.shape[-1] <= WIDEST
        and qkv.numel() > 0
        and not isinstance(library(), str)
    )


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("no memory for the scores of a block of queries")
