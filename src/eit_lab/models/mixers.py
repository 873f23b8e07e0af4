"""Token mixing: attention, convolution (convolutions.py), and the split of the channels between them.

Sources: the split mixer of EIT (arXiv:2203.07116): the FIRST conv_dim channels through a depthwise convolution on the token
grid, the LAST attn_dim through multi-head self-attention, concatenated. LSRA (arXiv:2004.11886) is the same split, constant
over the layers, with either kind of convolution branch. With conv_dim = 0 it is the plain ViT's attention, the same
operations to the last bit.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from eit_lab.config import IBConfig
from eit_lab.models.attention import attention, padded_self_attention, padded_width
from eit_lab.models.convolutions import GridConv, build_convolution
from eit_lab.models.intermediates import AttentionMaps, ConvolutionTaps, Tap
from eit_lab.models.linear import Linear
from eit_lab.models.paths import attention_path, head_multiple
from eit_lab.models.triton_conv import grid_conv
from eit_lab.schedule import LayerSplit


class SelfAttention(nn.Module):
    """Multi-head self-attention on ``dim`` channels, qkv and projection with bias. How it is computed is chosen in paths.py."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, *, tap: Tap | None = None, layer: int = 0) -> Tensor:
        """(B, N, a) -> (B, N, a)."""
        B, N, a = x.shape
        multiple = head_multiple(x.device, x.dtype, head_dim=a // self.num_heads)
        if tap is None and multiple > 1:
            weights = (self.qkv.weight, self.qkv.bias), (self.proj.weight, self.proj.bias)
            width = padded_width(a // self.num_heads, multiple=multiple)
            path = attention_path(x.device, x.dtype, num_tokens=N, head_dim=width, native=False)
            return padded_self_attention(x, *weights, num_heads=self.num_heads, multiple=multiple, path=path)
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, a // self.num_heads)
        if tap is not None:
            tap.attention(layer, AttentionMaps.of_packed(qkv))
        return self.proj(attention(qkv).reshape(B, N, a))


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
        if tap is None and self.attn is not None and isinstance(self.conv, GridConv) and self.conv.joins(x):
            return grid_conv(
                conv_in, self.conv.conv.weight, grid, tail=self.attn(attn_in)
            )  # written beside, not concatenated
        branches = [self.conv(conv_in, grid)] if self.conv is not None else []
        branches += [self.attn(attn_in, tap=tap, layer=layer)] if self.attn is not None else []
        if tap is not None:
            names = [name for name, branch in (("conv", self.conv), ("attn", self.attn)) if branch is not None]
            for name, branch in zip(names, branches, strict=True):
                tap.branch(f"blocks.{layer}.{name}", branch)
            if self.conv is not None:
                keeps_cls = not (isinstance(self.conv, GridConv) and self.conv.cls == "zero")
                taps = ConvolutionTaps(partial(self.conv.taps, conv_in, grid), grid, keeps_cls=keeps_cls)
                tap.convolution(layer, taps)
        return torch.cat(branches, dim=-1) if len(branches) > 1 else branches[0]
