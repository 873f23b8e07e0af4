"""One backbone for ViT, LSRA and EIT: stem, CLS token, pre-norm blocks with a split mixer, norm, classifier on CLS.

Source: arXiv:2203.07116 and the authors' published models. LayerNorm eps 1e-6, exact GELU, qkv bias, no pre-logits layer, no
dropout. Initialisation as published: Linear truncated normal std 0.01, biases 0; Conv2d kaiming normal, fan out;
CLS and position embedding truncated normal std 0.02.

Where we differ: every arm is this class. A ViT is the schedule without convolution channels, not another model. The token
grid is what the stem makes, of any shape, and the published oddity of a position embedding one row short is gone.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth

from eit_lab.config import IBConfig, ImageSize, ModelConfig, as_hw
from eit_lab.models.convolutions import LightweightConv
from eit_lab.models.image_model import ImageModel
from eit_lab.models.intermediates import Tap
from eit_lab.models.linear import Linear
from eit_lab.models.mixers import SplitMixer
from eit_lab.models.mlp import Mlp
from eit_lab.models.stem import build_stem, token_grid
from eit_lab.schedule import LayerSplit

Norm = partial(nn.LayerNorm, eps=1e-6)


class Block(nn.Module):
    """Pre-norm transformer block: x + mixer(norm x), then x + mlp(norm x)."""

    def __init__(self, split: LayerSplit, *, num_heads: int, mlp_ratio: float, ib: IBConfig, drop_path: float) -> None:
        super().__init__()
        dim = sum(split)
        self.norm1 = Norm(dim)
        self.mixer = SplitMixer(split, num_heads=num_heads, ib=ib)
        self.norm2 = Norm(dim)
        self.mlp = Mlp(dim, hidden_dim=int(dim * mlp_ratio))
        self.drop_path = drop_path
        self.recomputed = False
        """Whether the backward pass computes the block anew from its input, instead of keeping what it needs of it."""
        self._draws = drop_path > 0 or ib.weight_dropout > 0

    def forward(self, x: Tensor, grid: tuple[int, int], *, tap: Tap | None = None, layer: int = 0) -> Tensor:
        """(B, 1 + h w, D) -> (B, 1 + h w, D)."""
        if (
            self.recomputed and tap is None and torch.is_grad_enabled()
        ):  # a tap would be called again in the second pass
            draws = self.training and self._draws
            return checkpoint(self._mix, x, grid, use_reentrant=False, preserve_rng_state=draws)
        return self._mix(x, grid, tap=tap, layer=layer)

    def _mix(self, x: Tensor, grid: tuple[int, int], *, tap: Tap | None = None, layer: int = 0) -> Tensor:
        mixed = self.mixer(self.norm1(x), grid, tap=tap, layer=layer)
        x = x + stochastic_depth(mixed, self.drop_path, "row", self.training)
        x = x if tap is None else tap.tokens(f"blocks.{layer}.mixer", x, grid)
        x = x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, "row", self.training)
        return x if tap is None else tap.tokens(f"blocks.{layer}.mlp", x, grid)


class Backbone(ImageModel):
    """The whole model, with timm's manners: forward_features, forward_head, num_features, reset_classifier.

    ``img_size`` in px fixes the size of a learned position embedding; without one any image size goes through.
    """

    def __init__(self, config: ModelConfig, *, num_classes: int, img_size: ImageSize, in_chans: int = 3) -> None:
        super().__init__()
        config = config.for_images(img_size)
        size = config.size
        self.config = config
        self.img_size = as_hw(img_size)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.num_features = self.embed_dim = size.embed_dim

        self.stem = build_stem(config.stem, embed_dim=size.embed_dim, in_chans=in_chans)
        self.grid = self.grid_of(self.img_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size.embed_dim))
        num_tokens = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = (
            nn.Parameter(torch.empty(1, num_tokens, size.embed_dim)) if config.pos_embed == "learned" else None
        )
        drop_path = torch.linspace(0, config.drop_path_rate, size.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(
            Block(
                split,
                num_heads=size.num_heads,
                mlp_ratio=size.mlp_ratio,
                ib=config.ib,
                drop_path=drop_path[layer],
            )
            for layer, split in enumerate(config.layer_splits())
        )
        self.norm = Norm(size.embed_dim)
        self.head = Linear(size.embed_dim, num_classes) if num_classes else nn.Identity()
        self.reset_parameters()

    def forward(self, x: Tensor, *, tap: Tap | None = None) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes). A ``tap`` gets the intermediates as they are made."""
        return self.forward_head(self.forward_features(x, tap=tap))

    def forward_features(self, x: Tensor, *, tap: Tap | None = None) -> Tensor:
        """Images (B, C, H, W) -> normed tokens (B, 1 + h w, D), CLS first."""
        x = self.stem(x)  # (B, h, w, D)
        grid = (x.shape[1], x.shape[2])
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x.flatten(1, 2)], dim=1)
        x = self._add_position(x, grid)
        return self.forward_blocks(x if tap is None else tap.tokens("stem", x, grid), grid, tap=tap)

    def forward_blocks(self, x: Tensor, grid: tuple[int, int], *, first: int = 0, tap: Tap | None = None) -> Tensor:
        """Tokens as block ``first`` gets them (B, 1 + h w, D) -> normed tokens after the last block, the same shape."""
        for layer in range(first, len(self.blocks)):
            block = self.blocks[layer]
            # A compiled block was traced without a tap; and without one no number of the layer is given, which blocks of one
            # shape would be compiled apart for.
            x = block(x, grid) if tap is None else block.forward(x, grid, tap=tap, layer=layer)
        return self.norm(x)

    def forward_head(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, D) -> logits (B, num_classes), or the CLS features (B, D) with ``pre_logits``."""
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def _add_position(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.config.pos_embed == "none":
            return x
        if self.config.pos_embed == "sincos":
            return x + sincos_position(grid, self.embed_dim, device=x.device, dtype=x.dtype)
        assert self.pos_embed is not None
        if grid != self.grid:
            raise ValueError(
                f"model.pos_embed=learned was made for {self.grid[0]}x{self.grid[1]} tokens ({self.img_size[0]}x"
                f"{self.img_size[1]} px), got {grid[0]}x{grid[1]} tokens"
            )
        return x + self.pos_embed

    def grid_of(self, img_hw: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the tokens of images of (H, W) px."""
        return token_grid(self.stem, img_hw, in_chans=self.in_chans)

    def get_classifier(self) -> nn.Module:
        """The classifier: Linear(D, num_classes), or Identity without classes."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier for ``num_classes`` (0: none, the model then returns CLS features)."""
        self.num_classes = num_classes
        where = self.cls_token.device
        self.head = Linear(self.embed_dim, num_classes, device=where) if num_classes else nn.Identity()
        self.head.apply(_init_layer)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks anew in the backward pass: the same gradients, less memory, a third more work."""
        for block in self.blocks:
            cast(Block, block).recomputed = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters of more than one axis that take no weight decay all the same."""
        return {"cls_token", "pos_embed"}

    def reset_parameters(self) -> None:
        """The published initialisation, drawn from torch's global generator."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_layer)


def _init_layer(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        nn.init.trunc_normal_(layer.weight, std=0.01)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out")
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    elif isinstance(layer, LightweightConv):
        layer.reset_parameters()


def sincos_position(
    grid: tuple[int, int], dim: int, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Fixed 2-D sine-cosine position embedding (1, 1 + h w, dim); the CLS row is zero.

    Source: arXiv:1706.03762 on each axis, as in arXiv:2104.02057. Where we differ: a width that 4 does not divide takes the
    first ``dim`` channels of the next one that it does.
    """
    quarter = -(-dim // 4)
    omega = 10000.0 ** (-torch.arange(quarter, device=device, dtype=torch.float32) / quarter)
    rows, cols = (torch.arange(n, device=device, dtype=torch.float32)[:, None] * omega for n in grid)
    rows, cols = rows[:, None].expand(-1, grid[1], -1), cols[None].expand(grid[0], -1, -1)  # (h, w, quarter)
    table = torch.cat([rows.sin(), rows.cos(), cols.sin(), cols.cos()], dim=-1)[..., :dim].flatten(0, 1)
    return torch.cat([table.new_zeros(1, dim), table])[None].to(dtype)
