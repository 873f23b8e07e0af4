"""What a start costs at least: torch, lightning and torchvision imported, and EIT built by hand with torch.nn. A script on its own.

It imports nothing of eit_lab, and is started as a file: ``python by_hand.py EMBED_DIM DEPTH NUM_HEADS CLASSES KERNEL STRIDE POOL
[BATCH IMG_SIZE]``. With the last two it takes a training step too. It prints one line when it is done: the number of parameters.
"""

from __future__ import annotations

import sys

import lightning  # noqa: F401 - what it costs is what is measured
import torch
import torchvision  # noqa: F401
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with its matrix."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, a = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * (a // self.num_heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, a))


class Block(nn.Module):
    """Pre-norm block whose first channels are convolved."""

    def __init__(self, dim: int, num_heads: int, conv_dim: int) -> None:
        super().__init__()
        self.conv_dim = conv_dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.conv = nn.Conv2d(conv_dim, conv_dim, 3, padding=1, groups=conv_dim, bias=False) if conv_dim else None
        self.attn = Attention(dim - conv_dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        mixed = self.attn(y[..., self.conv_dim :])
        if self.conv is not None:
            B, N, _ = x.shape
            side = int((N - 1) ** 0.5)
            image = y[:, 1:, : self.conv_dim].transpose(1, 2).reshape(B, self.conv_dim, side, side)
            tokens = torch.cat([y[:, :1, : self.conv_dim], self.conv(image).flatten(2).transpose(1, 2)], dim=1)
            mixed = torch.cat([tokens, mixed], dim=-1)
        x = x + mixed
        return x + self.mlp(self.norm2(x))


class EIT(nn.Module):
    """Images (B, 3, H, W) -> logits."""

    def __init__(
        self, dim: int, depth: int, num_heads: int, num_classes: int, kernel: int, stride: int, pool: int
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, dim, kernel, stride=stride, padding=kernel // 2), nn.MaxPool2d(pool, stride=pool)
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        attn_dims = [dim // num_heads * (layer + 1) // depth * num_heads for layer in range(depth)]
        self.blocks = nn.Sequential(*(Block(dim, num_heads, dim - attn_dim) for attn_dim in attn_dims))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))
        return self.head(self.norm(x)[:, 0])


def main(arguments: list[str]) -> None:
    """Build, and with a batch and an image size take a step."""
    *shape, batch, img_size = map(int, arguments) if len(arguments) == 9 else (*map(int, arguments), 0, 0)
    model = EIT(*shape)
    if batch:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        images, labels = torch.randn(batch, 3, img_size, img_size), torch.zeros(batch, dtype=torch.long)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    print(sum(parameter.numel() for parameter in model.parameters()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
