"""The ways to compute attention, by the names of paths.py: torch's own, ours for CPU (native/), and heads padded to widths that kernels like.

EIT's first layers have heads of 2 to 29 channels (arXiv:2203.07116), and fused kernels of GPUs are made for multiples of 8 up to
256. A head is padded in its WEIGHTS: rows of zeros in qkv make query, key and value channels that are zero, and columns of zeros in
the projection read what comes out of them. So nothing is copied or cut at the size of the tokens, and the result is the same:
products with zero add nothing, and the scale stays that of the true width. Gradients of the padding fall away with it.

Ours. Chosen in paths.py by measurement.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eit_lab.models.native.attention import can_run, native_attention
from eit_lab.models.native.library import library
from eit_lab.models.paths import attention_path

_FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(qkv: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v by the path of its device, type and shape: (B, N, 3, h, d) -> (B, N, h, d)."""
    ask = partial(attention_path, qkv.device, qkv.dtype, num_tokens=qkv.shape[1], head_dim=qkv.shape[-1])
    path = ask()
    if path == "native":
        if can_run(qkv):
            return native_attention(qkv)
        path = ask(native=False)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, h, N, d)
    return attend(q, k, v, path=path).transpose(1, 2)


def attention_kernel(device: torch.device) -> str:
    """Whose kernel computes attention on a device, for records and summaries: ours, or torch's and why."""
    if device.type != "cpu":
        return "torch"
    found = library()
    return f"torch ({found})" if isinstance(found, str) else "native"


def attend(q: Tensor, k: Tensor, v: Tensor, *, path: str, scale: float | None = None) -> Tensor:
    """softmax(scale q k^T) v for (B, h, N, d), d^-0.5 where no scale is given; ``path`` of paths.ATTENTION, but for ``native``.

    Raises RuntimeError where torch has no such kernel for these tensors.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if path == "written_out":
        return ((q * scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    if path == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    with sdpa_kernel(_FORCED[path]):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def padded_width(head_dim: int, *, multiple: int) -> int:
    """The width of a head that is padded to a multiple of something."""
    return -(-head_dim // multiple) * multiple


def pad_qkv(weight: Tensor, bias: Tensor, *, num_heads: int, width: int) -> tuple[Tensor, Tensor]:
    """Weight (3 h d, a) and bias (3 h d) of qkv with rows of zeros after each head: (3 h width, a), (3 h width)."""
    a = weight.shape[1]
    head_dim = weight.shape[0] // (3 * num_heads)
    rows = F.pad(weight.view(3, num_heads, head_dim, a), (0, 0, 0, width - head_dim))
    shifts = F.pad(bias.view(3, num_heads, head_dim), (0, width - head_dim))
    return rows.view(-1, a), shifts.view(-1)


def pad_projection(weight: Tensor, *, num_heads: int, width: int) -> Tensor:
    """Weight (a, h d) of the projection with columns of zeros after each head: (a, h width)."""
    a = weight.shape[0]
    columns = weight.view(a, num_heads, weight.shape[1] // num_heads)
    return F.pad(columns, (0, width - columns.shape[2])).view(a, -1)


def padded_self_attention(
    x: Tensor,
    qkv: tuple[Tensor, Tensor],
    projection: tuple[Tensor, Tensor],
    *,
    num_heads: int,
    multiple: int,
    path: str,
) -> Tensor:
    """Multi-head self-attention (B, N, a) -> (B, N, a) of heads padded to a multiple; weights and biases as SelfAttention has them."""
    head_dim = x.shape[-1] // num_heads
    width = padded_width(head_dim, multiple=multiple)
    weight, bias = pad_qkv(*qkv, num_heads=num_heads, width=width)
    heads = F.linear(x, weight, bias).view(x.shape[0], x.shape[1], 3, num_heads, width)
    q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, h, N, width)
    mixed = attend(q, k, v, path=path, scale=head_dim**-0.5).transpose(1, 2).flatten(2)
    return F.linear(mixed, pad_projection(projection[0], num_heads=num_heads, width=width), projection[1])
