"""How a model is laid out, as far as an analysis must know: token grid, pitch, heads, widths; and its forward pass with a tap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from eit_lab.models.backbone import Backbone
from eit_lab.models.image_model import ImageModel
from eit_lab.models.intermediates import Tap
from eit_lab.models.stem import token_pitch
from eit_lab.schedule import LayerSplit


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Of one model for images of one size. Without heads where the model hands out no attention maps on a grid."""

    grid: tuple[int, int] | None
    """(h, w) of the tokens; None where it is not the same in all layers."""
    pitch: tuple[float, float] | None
    """(y, x) distance of two tokens in px."""
    depth: int
    num_heads: int
    conv_width: tuple[int, ...]
    """Channels of the convolution branch by layer."""
    attn_width: tuple[int, ...]
    """Channels of attention by layer; 0: it has none."""
    missing: str = ""
    """Why there are no heads, in a few words."""

    @property
    def has_heads(self) -> bool:
        """Whether any layer has attention maps on the grid."""
        return self.num_heads > 0 and self.grid is not None and any(self.attn_width)

    @property
    def head_width(self) -> tuple[int, ...]:
        """Width of a head by layer."""
        return tuple(width // self.num_heads if self.num_heads else 0 for width in self.attn_width)

    @property
    def splits(self) -> tuple[LayerSplit, ...]:
        """Channels of each layer's branches."""
        return tuple(map(LayerSplit, self.conv_width, self.attn_width))


def layout_of(model: ImageModel, *, img_hw: tuple[int, int]) -> Layout:
    """The layout of a model for images of (H, W) px."""
    if isinstance(model, Backbone):
        splits = model.config.layer_splits()
        pitch = token_pitch(model.config.stem)
        return Layout(
            grid=model.grid if img_hw == model.img_size else model.grid_of(img_hw),
            pitch=(pitch, pitch),
            depth=len(splits),
            num_heads=model.config.size.num_heads,
            conv_width=tuple(split.conv_dim for split in splits),
            attn_width=tuple(split.attn_dim for split in splits),
        )
    from eit_lab.models.timm_intermediates import timm_layout  # timm takes a second to import, and few need it

    found = timm_layout(model, img_hw=img_hw)
    return Layout(
        grid=found.grid,
        pitch=found.pitch,
        depth=found.depth,
        num_heads=found.num_heads,
        conv_width=(0,) * found.depth,
        attn_width=found.attn_width,
        missing=found.reason,
    )


def count_token_layers(model: ImageModel) -> int:
    """Layers whose tokens a tap gets and can change; 0 of a model that hands out features only."""
    if isinstance(model, Backbone):
        return len(model.blocks)
    from eit_lab.models.timm_intermediates import hands_out_tokens

    return len(cast(Any, model).blocks) if hands_out_tokens(model) else 0


def forward(model: ImageModel, x: Tensor, *, tap: Tap) -> Tensor:
    """Normalised images (B, C, H, W) -> logits (B, num_classes), the same as without a tap. Never the compiled pass."""
    if isinstance(model, Backbone):
        return model.forward(x, tap=tap)
    from eit_lab.models.timm_intermediates import forward_with_tap

    return forward_with_tap(model, x, tap)
