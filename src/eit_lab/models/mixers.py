"""Token mixing: attention, convolution (convolutions.py), and the split of the channels between them.

Sources: the split mixer of EIT (arXiv:2203.07116): the FIRST conv_dim channels through a depthwise convolution on the token
grid, the LAST attn_dim through multi-head self-attention, concatenated. LSRA (arXiv:2004.11886) is the same split, constant
over the layers, with either kind of convolution branch. With conv_dim = 0 it is the plain ViT's attention, the same
operations to the last bit.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eit_lab.config import IBConfig
from eit_lab.models.convolutions import build_convolution
from eit_lab.models.intermediates import AttentionMaps, ConvolutionTaps, Tap
from eit_lab.schedule import LayerSplit

# Up to so many tokens the product written out beats the fused kernel on CPU, forwards and with its backward:
# benchmarks/records/attention-cpu.md, `python benchmarks/attention.py`.
_CPU_TOKENS_WRITTEN_OUT = {torch.bfloat16: 512, torch.float32: 80}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for (B, h, N, d); the one place that chooses how it is computed.

    ``scaled_dot_product_attention``, except on CPU at few tokens, where its kernel (in bfloat16: its backward) is slower
    than the plain product.
    """
    if q.device.type == "cpu" and q.shape[-2] <= _CPU_TOKENS_WRITTEN_OUT.get(q.dtype, 0):
        return attention_written_out(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def attention_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same product with its (B, h, N, N) matrix in memory."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class SelfAttention(nn.Module):
    """Multi-head self-attention on ``dim`` channels, qkv and projection with bias."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, *, tap: Tap | None = None, layer: int = 0) -> Tensor:
        """(B, N, a) -> (B, N, a)."""
        B, N, a = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, a // self.num_heads).permute(2, 0, 3, 1, 4)  # (B, h, N, d)
        if tap is not None:
            tap.attention(layer, AttentionMaps(q, k))
        return self.proj(attention(q, k, v).transpose(1, 2).reshape(B, N, a))


class SplitMixer(nn.Module):
    """The first ``conv_dim`` channels through the convolution, the last ``attn_dim`` through attention, concatenated."""

    def __init__(self, split: LayerSplit, *, num_heads: int, ib: IBConfig) -> None:
        super().__init__()
        self.split = split
        self.conv = build_convolution(ib, dim=split.conv_dim, num_heads=num_heads) if split.conv_dim else None
        self.attn = SelfAttention(split.attn_dim, num_heads=num_heads) if split.attn_dim else None

    def forward(self, x: Tensor, grid: tuple[int, int], *, tap: Tap | None = None, layer: int = 0) -> Tensor:
        """Mix tokens on their grid: (B, 1 + h w, D) -> (B, 1 + h w, D)."""
        conv_in, attn_in = x.split(list(self.split), dim=-1)
        branches = [self.conv(conv_in, grid)] if self.conv is not None else []
        branches += [self.attn(attn_in, tap=tap, layer=layer)] if self.attn is not None else []
        if tap is not None:
            names = [name for name, branch in (("conv", self.conv), ("attn", self.attn)) if branch is not None]
            for name, branch in zip(names, branches, strict=True):
                tap.branch(f"blocks.{layer}.{name}", branch)
            if self.conv is not None:
                tap.convolution(layer, ConvolutionTaps(partial(self.conv.taps, conv_in, grid), grid))
        return torch.cat(branches, dim=-1) if len(branches) > 1 else branches[0]
