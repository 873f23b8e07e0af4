"""Layer index -> attention and convolution channels. Pure integers: the whole inductive-bias axis of an ablation is here.

Source: arXiv:2203.07116 (EIT) for ``decreasing``, arXiv:2004.11886 (LSRA, Lite Transformer) for ``constant``.
Each rule is a function of the layer that gives *convolution channels per head*; attention takes the rest of the head.
A channel split in whole heads keeps every head the same width in a layer, as both papers do.

Where we differ: ``strength`` is ours. It scales the convolution channels of any rule: 1 is the published model, 0 is the
plain ViT. ``increasing`` is ``decreasing`` read backwards, so both cost the same parameters and MACs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

RULES = ("none", "constant", "decreasing", "increasing", "custom")


class LayerSplit(NamedTuple):
    """Channels of one layer: ``conv_dim + attn_dim == embed_dim``."""

    conv_dim: int
    attn_dim: int


def _none(layer: int, depth: int, head_dim: int) -> int:
    return 0


def _constant(layer: int, depth: int, head_dim: int) -> int:
    return head_dim - head_dim // 2


def _decreasing(layer: int, depth: int, head_dim: int) -> int:
    return head_dim - head_dim * (layer + 1) // depth


def _increasing(layer: int, depth: int, head_dim: int) -> int:
    return _decreasing(depth - 1 - layer, depth, head_dim)


_CONV_PER_HEAD: dict[str, Callable[[int, int, int], int]] = {
    "none": _none,
    "constant": _constant,
    "decreasing": _decreasing,
    "increasing": _increasing,
}


def layer_splits(
    rule: str,
    *,
    embed_dim: int,
    depth: int,
    num_heads: int,
    strength: float = 1.0,
    attn_dims: Sequence[int] | None = None,
) -> tuple[LayerSplit, ...]:
    """Channel split of every layer, first layer first.

    ``strength`` in [0, 1] multiplies the rule's convolution channels per head, rounded half up.
    ``attn_dims`` is the explicit list of the rule ``custom``: attention channels per layer, each a multiple of num_heads.
    Raises ValueError that names the key when the numbers do not fit each other.
    """
    if embed_dim % num_heads:
        raise ValueError(
            f"model.size.embed_dim must be a multiple of model.size.num_heads ({num_heads}), got {embed_dim}; "
            f"nearest: {max(1, round(embed_dim / num_heads)) * num_heads}"
        )
    head_dim = embed_dim // num_heads
    if rule == "custom":
        full = _custom_conv_per_head(attn_dims, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
    else:
        if attn_dims is not None:
            raise ValueError(f"model.ib.attn_dims belongs to model.ib.rule=custom, got it with rule {rule!r}")
        full = [_CONV_PER_HEAD[rule](layer, depth, head_dim) for layer in range(depth)]
    scaled = [int(strength * conv + 0.5) for conv in full]
    return tuple(LayerSplit(conv * num_heads, embed_dim - conv * num_heads) for conv in scaled)


def _custom_conv_per_head(attn_dims: Sequence[int] | None, *, embed_dim: int, depth: int, num_heads: int) -> list[int]:
    if attn_dims is None:
        raise ValueError(f"model.ib.attn_dims must list {depth} attention widths with model.ib.rule=custom, got null")
    if len(attn_dims) != depth:
        raise ValueError(f"model.ib.attn_dims must have model.size.depth ({depth}) entries, got {len(attn_dims)}")
    for layer, attn_dim in enumerate(attn_dims):
        if attn_dim % num_heads or not 0 <= attn_dim <= embed_dim:
            nearest = min(max(round(attn_dim / num_heads), 0), embed_dim // num_heads) * num_heads
            raise ValueError(
                f"model.ib.attn_dims[{layer}] must be a multiple of model.size.num_heads ({num_heads}) in "
                f"[0, {embed_dim}], got {attn_dim}; nearest: {nearest}"
            )
    return [(embed_dim - attn_dim) // num_heads for attn_dim in attn_dims]
