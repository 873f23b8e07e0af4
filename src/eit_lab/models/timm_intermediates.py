"""What a model of timm hands out of a forward pass: our ``Tap``, fed as far as the architecture lets it be.

Two kinds of models. Plain transformers (timm's VisionTransformer with DeiT and the hybrids, Eva, Beit, relative positions) have
one grid of tokens in all layers: they hand out the residual stream under our own names, ``stem``, ``blocks.l.mixer``,
``blocks.l.mlp``, while the pass goes on. All others (ConvNets, pyramids, mixers) go through timm's ``forward_intermediates``,
and hand out features under timm's own names once the pass is over.

Attention maps come from the modules that make query and key (``q_norm`` and ``k_norm`` of ``timm.layers.Attention``, which
are there whether they normalise or not), so nothing is computed twice and nothing of the fused kernel is guessed. Attention of
another kind (windows, relative or rotary positions, two maps, talking heads) is left out with a reason.

Tokens before the grid: with CLS alone, tokens are as our backbone has them. With more (DeiT's distillation token, registers)
those between CLS and the grid are kept back: the tap gets CLS and the grid, and in attention maps the first column is the
mass on all of them together (``PrefixMaps``). Without CLS the stream is handed out as maps, and attention is left out:
rollout, CLS mass and the rows of a query begin at CLS.

Importing this module takes as long as importing timm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import timm
import torch
from timm.layers.attention import Attention
from timm.models import beit, eva, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn

from eit_lab.models.intermediates import AttentionMaps, Tap

_PLAIN = (
    vision_transformer.VisionTransformer,
    eva.Eva,
    beit.Beit,
    vision_transformer_relpos.VisionTransformerRelPos,
)
# The submodule of a block whose input is the residual stream between its two branches; of these classes themselves, not of
# what is derived from them. Blocks of other kinds (both branches side by side) have no such place.
_BETWEEN_BRANCHES: dict[type[nn.Module], str] = {
    vision_transformer.Block: "norm2",
    eva.EvaBlock: "norm2",
    beit.Block: "norm2",
    vision_transformer_relpos.RelPosBlock: "norm2",
    vision_transformer.ResPostBlock: "mlp",  # these norm what a branch gives
    eva.EvaBlockPostNorm: "mlp",
    vision_transformer_relpos.ResPostRelPosBlock: "mlp",
}


class Support(NamedTuple):
    """What a model of timm hands out."""

    frequency: bool
    """Tokens or features of its layers."""
    heads: bool
    """Attention maps on a grid with CLS, of every layer."""
    reason: str
    """What is missing and why, in a few words; empty where nothing is."""


@dataclass(frozen=True, kw_only=True)
class TimmLayout:
    """What an analysis must know of a model of timm, for images of one size."""

    grid: tuple[int, int] | None
    """(h, w) of the tokens; None where layers differ in it."""
    pitch: tuple[float, float] | None
    """(y, x) distance of two tokens in px; None without ``grid``."""
    depth: int
    """Blocks of a plain transformer; else the places where timm hands out features."""
    num_heads: int
    """Heads of a layer; 0 without attention maps."""
    attn_width: tuple[int, ...]
    """Channels of attention by layer; 0 without attention maps."""
    reason: str
    """As in ``Support``."""


def supports(model: nn.Module) -> Support:
    """What ``forward_with_tap`` gets out of a model of timm, known from its classes alone."""
    if not _is_plain(model):
        if all(hasattr(model, name) for name in ("forward_intermediates", "forward_head", "feature_info")):
            return Support(True, False, f"{type(model).__name__} hands out features, not attention maps")
        return Support(
            False, False, f"{type(model).__name__} of timm {timm.__version__} hands out nothing of its layers"
        )
    kinds = {type(getattr(block, "attn", block)) for block in _blocks(model)}
    if kinds != {Attention}:
        other = ", ".join(sorted(kind.__name__ for kind in kinds - {Attention}))
        return Support(True, False, f"the attention maps of {other} are not written out")
    if not _has_cls(model):
        return Support(True, False, f"this {type(model).__name__} has no CLS token")
    return Support(True, True, "")


def hands_out_tokens(model: nn.Module) -> bool:
    """Whether a tap gets the residual stream of a model of timm as tokens, and can change them while the pass goes on."""
    return _is_plain(model) and _has_cls(model)


def timm_layout(model: nn.Module, *, img_hw: tuple[int, int]) -> TimmLayout:
    """The layout of a model of timm for images of (H, W) px."""
    found = supports(model)
    if not _is_plain(model):
        depth = len(cast(Any, model).feature_info) if found.frequency else 0
        return TimmLayout(grid=None, pitch=None, depth=depth, num_heads=0, attn_width=(0,) * depth, reason=found.reason)
    blocks = _blocks(model)
    py, px = cast(Any, model).patch_embed.feat_ratio(as_scalar=False)
    widths = [block.attn.num_heads * block.attn.head_dim if found.heads else 0 for block in blocks]
    return TimmLayout(
        grid=_grid(model, img_hw),
        pitch=(float(py), float(px)),
        depth=len(blocks),
        num_heads=blocks[0].attn.num_heads if found.heads else 0,
        attn_width=tuple(widths),
        reason=found.reason,
    )


def forward_with_tap(model: nn.Module, x: Tensor, tap: Tap) -> Tensor:
    """Images (B, C, H, W) -> logits (B, num_classes), to the last bit those of ``model(x)``; ``tap`` gets what there is.

    Tokens that a tap changes are what the pass goes on with. A plain transformer never holds more than one layer for it; the
    features of other models live until the pass is over. A model that hands out nothing runs as without a tap.
    """
    # ``forward`` and not a call, which may be that of the compiled pass: it was traced without these hooks.
    if _is_plain(model):
        with _tapped(model, tap, grid=_grid(model, (x.shape[-2], x.shape[-1]))):
            return model.forward(x)
    if not supports(model).frequency:
        return model.forward(x)
    any_model = cast(Any, model)
    last, features = any_model.forward_intermediates(x, output_fmt="NCHW")
    for name, feature in zip(_feature_names(model), features, strict=True):
        tap.maps(name, feature)
    return any_model.forward_head(last)


class PrefixMaps(AttentionMaps):
    """Maps of tokens with more than CLS before the grid: those others have no row, and their columns are a part of CLS's.

    Rows still sum to 1, and every figure of token columns is what it is in the whole map. The first column is the mass on all
    tokens before the grid.
    """

    def __init__(self, q: Tensor, k: Tensor, *, num_prefix: int) -> None:
        """Query and key (B, H, P + h w, d), the first of the P = ``num_prefix`` tokens before the grid being CLS."""
        super().__init__(torch.cat([q[:, :, :1], q[:, :, num_prefix:]], dim=2), k)
        self.num_prefix = num_prefix

    def logits(
        self, images: slice = slice(None), heads: slice = slice(None), queries: slice | Tensor = slice(None)
    ) -> Tensor:
        """(b, h, n, 1 + h w), float32: the first column is the log of the sum of its own columns' exponentials."""
        whole = super().logits(images, heads, queries)
        prefix = whole[..., : self.num_prefix].logsumexp(dim=-1, keepdim=True)
        return torch.cat([prefix, whole[..., self.num_prefix :]], dim=-1)


def _is_plain(model: nn.Module) -> bool:
    return isinstance(model, _PLAIN)


def _blocks(model: nn.Module) -> list[Any]:
    return list(cast(Any, model).blocks)


def _has_cls(model: nn.Module) -> bool:
    return getattr(model, "cls_token", None) is not None


def _feature_names(model: nn.Module) -> list[str]:
    """What timm calls what ``forward_intermediates`` gives; the second place of one name is ``name (2)``."""
    names: list[str] = []
    for place, info in enumerate(cast(Any, model).feature_info):
        name = info["module"] or f"features.{place}"
        again = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({again + 1})" if again else name)
    return names


def _grid(model: nn.Module, img_hw: tuple[int, int]) -> tuple[int, int]:
    h, w = cast(Any, model).patch_embed.dynamic_feat_size(img_hw)
    return int(h), int(w)


@contextmanager
def _tapped(model: nn.Module, tap: Tap, *, grid: tuple[int, int]) -> Iterator[None]:
    """Within it, every pass of a plain transformer calls the tap; behind it nothing of that is left."""
    stream = _Stream(tap, grid=grid, num_prefix=cast(Any, model).num_prefix_tokens, has_cls=_has_cls(model))
    has_maps = supports(model).heads
    handles = []
    try:
        for layer, block in enumerate(_blocks(model)):
            if layer == 0:
                handles.append(block.register_forward_pre_hook(stream.before("stem")))
            between = _BETWEEN_BRANCHES.get(type(block))
            if between is not None:
                place = block.get_submodule(between)
                handles.append(place.register_forward_pre_hook(stream.between(f"blocks.{layer}.mixer")))
            if has_maps:
                keep, hand_out = stream.attention(layer)
                handles.append(block.attn.q_norm.register_forward_hook(keep))
                handles.append(block.attn.k_norm.register_forward_hook(hand_out))
                handles.append(block.attn.register_forward_hook(stream.branch(f"blocks.{layer}.attn")))
            handles.append(block.register_forward_hook(stream.after(f"blocks.{layer}.mlp")))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Stream:
    """The residual stream of a plain transformer, (B, P + h w, D), as a tap is to see it."""

    def __init__(self, tap: Tap, *, grid: tuple[int, int], num_prefix: int, has_cls: bool) -> None:
        self.tap, self.grid, self.num_prefix, self.has_cls = tap, grid, num_prefix, has_cls

    def show(self, name: str, x: Tensor) -> Tensor:
        """Hand the stream out; the same tensor, or what it is to go on with."""
        if not self.has_cls:
            self.tap.maps(name, x[:, self.num_prefix :].transpose(1, 2).unflatten(2, self.grid))
            return x
        shown = self._without_extra(x)
        taken = self.tap.tokens(name, shown, self.grid)
        if taken is shown:
            return x
        return torch.cat([taken[:, :1], x[:, 1 : self.num_prefix], taken[:, 1:]], dim=1)

    def _without_extra(self, x: Tensor) -> Tensor:
        return x if self.num_prefix == 1 else torch.cat([x[:, :1], x[:, self.num_prefix :]], dim=1)

    def before(self, name: str) -> Callable[..., Any]:
        """A hook on what a module gets."""
        return lambda _, inputs: (self.show(name, inputs[0]), *inputs[1:])

    def after(self, name: str) -> Callable[..., Any]:
        """A hook on what a module gives."""
        return lambda _, __, output: self.show(name, output)

    def between(self, name: str) -> Callable[..., Any]:
        """A hook on a module whose input the block adds to its output: another input must reach both, so it is written over."""

        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            taken = self.show(name, inputs[0])
            if taken is not inputs[0]:
                inputs[0].copy_(taken)

        return hook

    def attention(self, layer: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Hooks on what gives the query, then on what gives the key."""
        queries: list[Tensor] = []

        def hand_out(_: nn.Module, __: tuple[Tensor], k: Tensor) -> None:
            q = queries.pop()
            maps = AttentionMaps(q, k) if self.num_prefix == 1 else PrefixMaps(q, k, num_prefix=self.num_prefix)
            self.tap.attention(layer, maps)

        return lambda _, __, q: queries.append(q), hand_out

    def branch(self, name: str) -> Callable[..., Any]:
        """A hook on what the attention of a layer gives."""

        def hook(_: nn.Module, __: tuple[Tensor], output: Tensor) -> None:
            self.tap.branch(name, self._without_extra(output))

        return hook
