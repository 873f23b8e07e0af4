"""EIT computed as its authors wrote it: the peer of the speed benchmarks, and the reference that every fast path agrees with.

Source: arXiv:2203.07116 and what its public model does, in words of our own: a convolution and a max pool, flattened and
transposed to tokens; attention through its explicit (N, N) matrix; the depthwise convolution on tokens rearranged into a
contiguous NCHW image and back; concatenations; nothing fused, no scaled_dot_product_attention, no channels-last.

Where we differ: the authors' rearrangement may leave the image as a view with the channels innermost, which torch's
convolution then reads as channels-last; ``contiguous=False`` does that. Their dropout layers have rate 0 in the published
models and are left out. Parameters carry our backbone's names, so that gradients are compared by name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eit_lab.models.backbone import Backbone
from eit_lab.schedule import LayerSplit


class Literal(nn.Module):
    """A copy of a backbone's weights, computed literally. Images (B, C, H, W) -> logits (B, num_classes).

    The backbone has the stem of EIT or a patchify stem, depthwise convolutions, no position embedding and no stochastic depth,
    as the published models; else ValueError. It lies where the backbone lies, in training mode or not as the backbone is.
    """

    def __init__(self, backbone: Backbone, *, contiguous: bool = True) -> None:
        super().__init__()
        config = backbone.config
        size = config.size
        if config.stem.kind not in ("eit", "patchify"):
            raise ValueError(f"a literal model has the stem eit or patchify, got {config.stem.kind}")
        if (
            config.ib.conv != "depthwise"
            or config.ib.cls != "pass"
            or config.pos_embed != "none"
            or config.drop_path_rate
        ):
            raise ValueError(
                "a literal model has depthwise convolutions that pass CLS, no position embedding and no stochastic depth"
            )
        image = backbone.img_size
        if config.stem.kind == "patchify" and any(side % int(config.stem.pitch or 0) for side in image):
            raise ValueError(f"a literal model does not pad images: {image} px at a pitch of {config.stem.pitch}")
        where = backbone.cls_token.device
        with torch.device(where):
            self.cls_token = nn.Parameter(torch.empty_like(backbone.cls_token))
            self.stem = _Stem(backbone.stem)
            self.blocks = nn.Sequential(
                *(
                    _Block(
                        split,
                        num_heads=size.num_heads,
                        hidden_dim=int(size.embed_dim * size.mlp_ratio),
                        kernel_size=config.ib.kernel_size,
                        grid=backbone.grid,
                        contiguous=contiguous,
                    )
                    for split in config.layer_splits()
                )
            )
            self.norm = nn.LayerNorm(size.embed_dim, eps=1e-6)
            self.head = nn.Linear(size.embed_dim, backbone.num_classes) if backbone.num_classes else nn.Identity()
        self.load_state_dict(backbone.state_dict())
        self.to(backbone.cls_token.dtype).train(backbone.training)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.stem(x).flatten(2).transpose(1, 2)  # (B, h w, D)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), tokens), dim=1)
        return self.head(self.norm(self.blocks(x))[:, 0])


class _Stem(nn.Module):
    """The same layers as the backbone's stem, new: (B, C, H, W) -> (B, D, h, w)."""

    def __init__(self, stem: nn.Module) -> None:
        super().__init__()
        for name, layer in stem.named_children():
            if isinstance(layer, nn.Conv2d):
                kernel, stride, padding = (layer.kernel_size[0], layer.stride[0], int(layer.padding[0]))
                self.add_module(
                    name, nn.Conv2d(layer.in_channels, layer.out_channels, kernel, stride=stride, padding=padding)
                )
            elif isinstance(layer, nn.MaxPool2d):
                self.add_module(name, nn.MaxPool2d(layer.kernel_size, stride=layer.stride))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class _Attention(nn.Module):
    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, a = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, a // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # (B, h, N, d)
        weights = (q @ k.transpose(-2, -1)) * self.scale
        weights = weights.softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, a))


class _Convolution(nn.Module):
    def __init__(self, dim: int, *, kernel_size: int, grid: tuple[int, int], contiguous: bool) -> None:
        super().__init__()
        self.grid, self.contiguous = grid, contiguous
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        image = x[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)  # (B, c, h, w)
        if self.contiguous:
            image = image.contiguous()
        tokens = self.conv(image).flatten(2).transpose(1, 2)
        return torch.cat((x[:, :1], tokens), dim=1)


class _Mixer(nn.Module):
    def __init__(
        self, split: LayerSplit, *, num_heads: int, kernel_size: int, grid: tuple[int, int], contiguous: bool
    ) -> None:
        super().__init__()
        self.split = split
        self.conv = (
            _Convolution(split.conv_dim, kernel_size=kernel_size, grid=grid, contiguous=contiguous)
            if split.conv_dim
            else None
        )
        self.attn = _Attention(split.attn_dim, num_heads=num_heads) if split.attn_dim else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            assert self.attn is not None
            return self.attn(x)
        if self.attn is None:
            return self.conv(x)
        return torch.cat((self.conv(x[..., : self.split.conv_dim]), self.attn(x[..., self.split.conv_dim :])), dim=2)


class _Mlp(nn.Module):
    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(
        self,
        split: LayerSplit,
        *,
        num_heads: int,
        hidden_dim: int,
        kernel_size: int,
        grid: tuple[int, int],
        contiguous: bool,
    ) -> None:
        super().__init__()
        dim = sum(split)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = _Mixer(split, num_heads=num_heads, kernel_size=kernel_size, grid=grid, contiguous=contiguous)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _Mlp(dim, hidden_dim=hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))
