"""A slow, literal EIT: loops over heads, the attention matrix written out, the convolution as NCHW shifts and sums.

Written from the paper's definition and independent of the package's modules: it takes a state dict and computes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attend(x: Tensor, state: dict[str, Tensor], prefix: str, num_heads: int) -> Tensor:
    dim = x.shape[-1]
    width = dim // num_heads
    qkv = x @ state[f"{prefix}.qkv.weight"].T + state[f"{prefix}.qkv.bias"]
    heads = []
    for head in range(num_heads):
        q, k, v = (qkv[..., part * dim + head * width : part * dim + (head + 1) * width] for part in range(3))
        scores = torch.einsum("bid,bjd->bij", q, k) * width**-0.5
        scores = scores - scores.amax(-1, keepdim=True)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        heads.append(torch.einsum("bij,bjd->bid", weights, v))
    return torch.cat(heads, -1) @ state[f"{prefix}.proj.weight"].T + state[f"{prefix}.proj.bias"]


def convolve(x: Tensor, kernel: Tensor, grid: tuple[int, int]) -> Tensor:
    """The CLS row passes; the rest is an NCHW image, and each output the sum of its weighted neighbours."""
    h, w = grid
    k = kernel.shape[-1]
    image = torch.zeros(x.shape[0], x.shape[2], h + k - 1, w + k - 1, dtype=x.dtype)
    for row in range(h):
        for col in range(w):
            image[:, :, row + k // 2, col + k // 2] = x[:, 1 + row * w + col]
    out = torch.zeros(x.shape[0], x.shape[2], h, w, dtype=x.dtype)
    for dy in range(k):
        for dx in range(k):
            out = out + image[:, :, dy : dy + h, dx : dx + w] * kernel[:, 0, dy, dx].view(1, -1, 1, 1)
    rows = [x[:, 0], *(out[:, :, row, col] for row in range(h) for col in range(w))]
    return torch.stack(rows, dim=1)


def eit(
    images: Tensor, state: dict[str, Tensor], *, attn_dims: list[int], num_heads: int, stride: int, pool: int
) -> Tensor:
    """Logits of images (B, C, H, W) under the weights of a state dict with the EIT stem."""
    kernel = state["stem.conv.weight"]
    maps = torch.nn.functional.conv2d(
        images, kernel, state["stem.conv.bias"], stride=stride, padding=kernel.shape[-1] // 2
    )
    h, w = maps.shape[-2] // pool, maps.shape[-1] // pool
    tokens = [
        maps[:, :, row * pool : (row + 1) * pool, col * pool : (col + 1) * pool].amax((-2, -1))
        for row in range(h)
        for col in range(w)
    ]
    x = torch.stack([state["cls_token"][0, 0].expand(len(images), -1), *tokens], dim=1)
    for layer, attn_dim in enumerate(attn_dims):
        block = f"blocks.{layer}"
        y = layer_norm(x, state[f"{block}.norm1.weight"], state[f"{block}.norm1.bias"])
        conv_dim = x.shape[-1] - attn_dim
        mixed = []
        if conv_dim:
            mixed.append(convolve(y[..., :conv_dim], state[f"{block}.mixer.conv.conv.weight"], (h, w)))
        if attn_dim:
            mixed.append(attend(y[..., conv_dim:], state, f"{block}.mixer.attn", num_heads))
        x = x + torch.cat(mixed, -1)
        y = layer_norm(x, state[f"{block}.norm2.weight"], state[f"{block}.norm2.bias"])
        y = gelu(y @ state[f"{block}.mlp.fc1.weight"].T + state[f"{block}.mlp.fc1.bias"])
        x = x + y @ state[f"{block}.mlp.fc2.weight"].T + state[f"{block}.mlp.fc2.bias"]
    cls = layer_norm(x, state["norm.weight"], state["norm.bias"])[:, 0]
    return cls @ state["head.weight"].T + state["head.bias"]
