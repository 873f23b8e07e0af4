"""The MLP of a block: Linear, exact GELU, Linear. On CPU the activation is made anew in the backward pass and not kept.

The activation is the largest tensor of a block (4 D a token), and so is what it is made from: torch keeps both for the backward pass.
Our kernel (native/gelu.c) has the activation at no cost where it computes its derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eit_lab.models.linear import Linear, input_gradient, is_plain, product, weight_gradient
from eit_lab.models.native.gelu import gelu, gelu_and_gradient
from eit_lab.models.native.library import library


class Mlp(nn.Sequential):
    """Linear, GELU, Linear on the last axis."""

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = self.fc1(x)
        if not (_can_run(hidden) and _is_as_built(self.act, self.fc2)):
            return self.fc2(self.act(hidden))
        weight, bias = self.fc2.weight, self.fc2.bias
        out: Tensor = _Activated.apply(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
        return out


class _Activated(torch.autograd.Function):
    """GELU and the linear layer after it; keeps the input of the GELU only."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(..., i), (o, i), (o) -> (..., o)."""
        hidden = hidden.contiguous()
        ctx.save_for_backward(hidden, weight)
        return product(gelu(hidden), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias."""
        hidden, weight = ctx.saved_tensors
        _, needs_weight, needs_bias = ctx.needs_input_grad
        activation, dhidden = gelu_and_gradient(hidden, input_gradient(grad, weight))
        return (
            dhidden,
            weight_gradient(grad, activation) if needs_weight else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if needs_bias else None,
        )


def _can_run(hidden: Tensor) -> bool:
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in (torch.float32, torch.bfloat16)
        and is_plain(hidden)
        and hidden.numel() > 0
        and not isinstance(library(), str)
    )


def _is_as_built(act: nn.Module, fc2: nn.Module) -> bool:
    """Whether the two are what this file made them: nobody exchanged or wrapped one, or listens to it."""
    return (
        type(act) is nn.GELU
        and act.approximate == "none"
        and type(fc2) is Linear
        and fc2.bias is not None
        and not any(hooks for one in (act, fc2) for hooks in (one._forward_hooks, one._forward_pre_hooks))
    )
