"""Image -> token grid. Three kinds of stem behind one interface: (B, C, H, W) -> (B, h, w, D).

Sources: patchify arXiv:2010.11929; the EIT stem arXiv:2203.07116; convolution stems arXiv:2106.14881 ("early convolutions").

Where we differ: patchify and convolution stems pad an image that the pitch does not divide (zeros, right and bottom
first), so that h = ceil(H / pitch) and no pixel is lost. At 224 px and a pitch of 12 every stem then makes the 19x19 tokens
of EIT's, and the stem is an axis that leaves the token count alone.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eit_lab.config import ConvStem, EITStem, PatchifyStem, StemConfig
from eit_lab.models.linear import is_plain, linear


class Patchify(nn.Module):
    """One convolution with kernel = stride = pitch."""

    def __init__(self, embed_dim: int, *, in_chans: int, pitch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, pitch, stride=pitch)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, ceil(H / pitch), ceil(W / pitch), D)."""
        return convolve_image(self.proj, _pad_to_multiple(x, self.proj.stride[0])).permute(0, 2, 3, 1)


class EITPatch(nn.Module):
    """A large strided convolution, then max pooling; no norm, no activation. Published as 16/4/3 (kernel/stride/pool)."""

    def __init__(self, embed_dim: int, *, in_chans: int, kernel_size: int, stride: int, pool: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, embed_dim, kernel_size, stride=stride, padding=kernel_size // 2)
        self.pool = nn.MaxPool2d(pool, stride=pool) if pool > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, h, w, D); 224 px give 57x57 after the convolution and 19x19 tokens with 16/4/3."""
        return self.pool(convolve_image(self.conv, x)).permute(0, 2, 3, 1)


class ConvPatch(nn.Module):
    """``depth`` 3x3 convolutions (stride 2 or 3 while pitch is left, then 1), each with norm and activation, then a projection.

    The projection is 1x1, as published, once the convolutions have reached the pitch; a stem too shallow for that
    projects the rest in patches, so that depth 0 would be ``Patchify``. Widths double towards embed_dim.
    """

    def __init__(self, embed_dim: int, *, in_chans: int, depth: int, pitch: int, norm: str, act: str) -> None:
        super().__init__()
        strides = _strides(pitch)[:depth]
        strides += [1] * (depth - len(strides))
        widths = [in_chans, *(max(8, embed_dim // 2 ** (depth - 1 - i)) for i in range(depth))]
        layers: list[nn.Module] = []
        rest = pitch
        for (c_in, c_out), stride in zip(pairwise(widths), strides, strict=True):
            layers += [
                nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(c_out) if norm == "batch" else ChannelNorm(c_out),
                nn.ReLU() if act == "relu" else nn.GELU(),
            ]
            rest //= stride
        self.convs = nn.Sequential(*layers)
        self.proj = nn.Conv2d(widths[-1], embed_dim, rest, stride=rest)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, ceil(H / pitch), ceil(W / pitch), D)."""
        x = _pad_to_multiple(self.convs(x), self.proj.stride[0])
        return self.proj(x).permute(0, 2, 3, 1)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def convolve_image(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A strided convolution of few channels in, many out: (B, C, H, W) -> (B, D, h, w), channels last in memory on CPU.

    On CPU in bfloat16 it is one matrix product over copied windows: three channels leave the kernels for convolutions half empty
    (benchmarks/records/candidates.json, "stem"). The tokens then lie as the blocks want them, and pooling reads whole rows.
    """
    if x.device.type != "cpu" or not is_plain(x):
        return conv(x)
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype("cpu"))
    if x.dtype != torch.bfloat16:
        return conv(x.contiguous(memory_format=torch.channels_last))
    assert not isinstance(conv.padding, str)
    (k_h, k_w), (s_h, s_w), (p_h, p_w) = conv.kernel_size, conv.stride, conv.padding
    rows = F.pad(x, (p_w, p_w, p_h, p_h)).permute(0, 2, 3, 1).contiguous()  # (B, H, W, C)
    windows = rows.unfold(1, k_h, s_h).unfold(2, k_w, s_w).permute(0, 1, 2, 4, 5, 3)  # (B, h, w, k, k, C)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    return linear(windows.flatten(3), weight, conv.bias).permute(0, 3, 1, 2)


def build_stem(config: StemConfig, *, embed_dim: int, in_chans: int) -> nn.Module:
    """The stem of a config whose nulls are filled in (ModelConfig.for_images)."""
    match config:
        case PatchifyStem(pitch=int(pitch)):
            return Patchify(embed_dim, in_chans=in_chans, pitch=pitch)
        case EITStem(kernel_size=int(kernel_size), stride=int(stride), pool=int(pool)):
            return EITPatch(embed_dim, in_chans=in_chans, kernel_size=kernel_size, stride=stride, pool=pool)
        case ConvStem(pitch=int(pitch)):
            return ConvPatch(
                embed_dim, in_chans=in_chans, depth=config.depth, pitch=pitch, norm=config.norm, act=config.act
            )
    raise AssertionError(f"a stem with nulls left, call ModelConfig.for_images first: {config}")


def token_pitch(config: StemConfig) -> float:
    """Distance of two neighbouring tokens in px, of a config whose nulls are filled in."""
    match config:
        case EITStem(stride=int(stride), pool=int(pool)):
            return float(stride * pool)
        case PatchifyStem(pitch=int(pitch)) | ConvStem(pitch=int(pitch)):
            return float(pitch)
    raise AssertionError(f"a stem with nulls left, call ModelConfig.for_images first: {config}")


def token_grid(stem: nn.Module, img_hw: tuple[int, int], *, in_chans: int) -> tuple[int, int]:
    """(h, w) of the tokens that the stem really makes, asked of the stem itself on the meta device."""
    was_training = stem.training
    shapes = {name: torch.empty_like(p, device="meta") for name, p in [*stem.named_parameters(), *stem.named_buffers()]}
    image = torch.empty(1, in_chans, *img_hw, device="meta", dtype=next(stem.parameters()).dtype)
    stem.eval()
    out = torch.func.functional_call(stem, shapes, (image,))
    stem.train(was_training)
    return out.shape[1], out.shape[2]


def _strides(pitch: int) -> list[int]:
    """The pitch as a product of 2s, then 3s, and what is left is the projection's: 12 -> 2 2 3, 16 -> 2 2 2 2, 10 -> 2."""
    strides = []
    for factor in (2, 3):
        while pitch % factor == 0:
            strides.append(factor)
            pitch //= factor
    return strides


def _pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Zeros around (B, C, H, W), so that ``multiple`` divides both sides; the odd one goes right and bottom."""
    h, w = -x.shape[-2] % multiple, -x.shape[-1] % multiple
    return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2)) if h or w else x
