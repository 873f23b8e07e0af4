"""The least work of a training step, operator by operator: products, bytes and exponentials, whoever computes them.

An operator is one of the model's, not a kernel: attention is one, however many products and copies an implementation makes of it.
So the literal implementation and ours have the same work, and what differs is the time. Counted at least: every input is read once
and every output written once, in the width of the precision; nothing is computed twice. Two of these can exclude each other (an
attention that keeps no matrix computes its scores twice), so a bound made of them can lie below what any kernel reaches, never above.

- Linear layers: forward 2 M i o, backward twice that (the input's gradient and the weight's).
- Attention proper, without its linear layers: 4 B N^2 a forwards, 8 backwards (a recomputed q k^T is not counted), B H N^2 exponentials.
- Stem: its backward is the weight's gradient alone, for images need none. A step is therefore less than three forward passes.
- Operators without products (norms, GELU, pool, sums, optimizer) have bytes only. A concatenation has nothing: who writes in place
  needs none.
- AdamW reads weight, gradient and two moments, and writes three of them: 28 bytes a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from eit_lab.benchmark.roofline.groups import PHASES
from eit_lab.config import ConfigError, EITStem, PatchifyStem
from eit_lab.models.backbone import Backbone

WIDTH = {"float32": 4, "bfloat16": 2}
"""Bytes of an activation."""
_MASTER = 4  # bytes of a parameter, and of its gradient when the optimizer reads it
_ADAMW_BYTES = 28


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator of the model in one phase of a step, summed over the places where it has this shape."""

    group: str
    phase: str
    shape: str
    """In words, e.g. ``linear 2896 x 400 -> 1600``."""
    flops: int
    num_bytes: int
    exponentials: int = 0
    places: tuple[str, ...] = field(default=())
    """Modules, as the profiler's attribution calls them; () where no module is its place."""

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {**asdict(self), "places": list(self.places)}


def operators(backbone: Backbone, *, batch: int, precision: str) -> list[Operator]:
    """All operators of a training step on ``batch`` images of the backbone's size, those of one shape and phase as one.

    ConfigError for a backbone that has other branches or stems than EIT and ViT.
    """
    check(backbone)
    merged: dict[tuple[str, str, str], Operator] = {}
    for one in _each(backbone, batch=batch, width=WIDTH[precision]):
        key = (one.group, one.phase, one.shape)
        before = merged.get(key)
        merged[key] = one if before is None else _sum(before, one)
    return list(merged.values())


def check(backbone: nn.Module) -> None:
    """ConfigError in one line for a model that there is no literal implementation of."""
    if not isinstance(backbone, Backbone):
        raise ConfigError(f"model must be one of ours (vit_*, eit_*, lsra_*), got a {type(backbone).__name__}")
    config = backbone.config
    if config.ib.conv != "depthwise" or not isinstance(config.stem, EITStem | PatchifyStem):
        raise ConfigError(
            f"model must have depthwise convolutions and the stem eit or patchify, got {config.ib.conv} and "
            f"{config.stem.kind}; nearest: eit_base"
        )
    if config.ib.cls != "pass":
        raise ConfigError(
            f"model.ib.cls must be pass for a literal implementation, got {config.ib.cls!r}; nearest: pass"
        )


def _sum(one: Operator, other: Operator) -> Operator:
    return Operator(
        group=one.group,
        phase=one.phase,
        shape=one.shape,
        flops=one.flops + other.flops,
        num_bytes=one.num_bytes + other.num_bytes,
        exponentials=one.exponentials + other.exponentials,
        places=tuple(dict.fromkeys(one.places + other.places)),
    )


def _each(backbone: Backbone, *, batch: int, width: int) -> Iterator[Operator]:
    num_tokens = 1 + backbone.grid[0] * backbone.grid[1]
    rows = batch * num_tokens
    yield from _stem(backbone, batch=batch, width=width)
    for name, layer in backbone.named_modules():
        if isinstance(layer, nn.Linear):
            yield from _linear(name, layer, rows=batch if name == "head" else rows, width=width)
    dim, num_heads = backbone.embed_dim, backbone.config.size.num_heads
    hidden = int(dim * backbone.config.size.mlp_ratio)
    for number, split in enumerate(backbone.config.layer_splits()):
        place = f"blocks.{number}"
        if split.attn_dim:
            yield from _attention(place, split.attn_dim, num_heads, batch=batch, num_tokens=num_tokens, width=width)
        if split.conv_dim:
            yield from _depthwise(place, split.conv_dim, backbone, batch=batch, width=width)
        elements = width * rows * dim
        for _ in range(2):
            yield from _bytes("norms", f"layer norm {rows} x {dim}", (2 * elements, 3 * elements), place)
            yield from _bytes("residual sums", f"sum {rows} x {dim}", (3 * elements, 3 * elements), place)
        wide = width * rows * hidden
        yield from _bytes("GELU", f"GELU {rows} x {hidden}", (2 * wide, 3 * wide), place)
    elements = width * rows * dim
    yield from _bytes("norms", f"layer norm {rows} x {dim}", (2 * elements, 3 * elements), "")
    params = sum(one.numel() for one in backbone.parameters())
    yield Operator(
        group="optimizer",
        phase="update",
        shape=f"AdamW, {params:,} parameters",
        flops=0,
        num_bytes=_ADAMW_BYTES * params,
    )
    if width != _MASTER:
        images = batch * backbone.in_chans * backbone.img_size[0] * backbone.img_size[1]
        cast = sum(
            one.numel()
            for layer in backbone.modules()
            if isinstance(layer, nn.Linear | nn.Conv2d)
            for one in layer.parameters(recurse=False)
        )
        each = width + _MASTER
        shape = f"casts of {cast:,} weights"
        yield from _bytes("casts and copies", shape, (each * (cast + images), each * cast), None)


def _bytes(group: str, shape: str, both: tuple[int, int], place: str | None) -> Iterator[Operator]:
    """An operator without products: bytes forwards, bytes backwards."""
    for phase, num_bytes in zip(PHASES, both, strict=False):
        yield Operator(
            group=group,
            phase=phase,
            shape=shape,
            flops=0,
            num_bytes=num_bytes,
            places=() if place is None else (place,),
        )


def _stem(backbone: Backbone, *, batch: int, width: int) -> Iterator[Operator]:
    config = backbone.config.stem
    assert isinstance(config, EITStem | PatchifyStem)
    height, wide = backbone.img_size
    if isinstance(config, EITStem):
        kernel, stride, pool = config.kernel_size, config.stride, config.pool
        assert kernel is not None
        assert stride is not None
        out = [(side + 2 * (kernel // 2) - kernel) // stride + 1 for side in (height, wide)]
    else:
        kernel = stride = config.pitch
        assert kernel is not None
        pool, out = 1, list(backbone.grid)
    positions = batch * out[0] * out[1]
    taps = backbone.in_chans * kernel * kernel
    flops = 2 * positions * backbone.embed_dim * taps
    made = positions * backbone.embed_dim
    num_bytes = width * (batch * backbone.in_chans * height * wide + backbone.embed_dim * taps + made)
    shape = f"convolution {kernel}x{kernel}/{stride}, {backbone.in_chans} -> {backbone.embed_dim}, {out[0]}x{out[1]}"
    for phase in PHASES[:2]:
        yield Operator(
            group="stem convolution", phase=phase, shape=shape, flops=flops, num_bytes=num_bytes, places=("stem",)
        )
    if pool and pool > 1:
        pooled = batch * backbone.grid[0] * backbone.grid[1] * backbone.embed_dim
        moved = width * (made + pooled)
        name = f"max pool {pool}/{pool}, {out[0]}x{out[1]} -> {backbone.grid[0]}x{backbone.grid[1]}"
        yield from _bytes("max pool", name, (moved, moved), "stem")


def _linear(name: str, layer: nn.Linear, *, rows: int, width: int) -> Iterator[Operator]:
    i, o = layer.in_features, layer.out_features
    shape = f"linear {rows} x {i} -> {o}"
    flops = 2 * rows * i * o
    forward = width * (rows * i + i * o + o + rows * o)
    backward = width * (rows * o + rows * i + i * o + rows * i + i * o + o)
    for phase, times, num_bytes in (("forward", 1, forward), ("backward", 2, backward)):
        yield Operator(
            group="matrix products",
            phase=phase,
            shape=shape,
            flops=times * flops,
            num_bytes=num_bytes,
            places=(name,),
        )


def _attention(
    place: str, attn_dim: int, num_heads: int, *, batch: int, num_tokens: int, width: int
) -> Iterator[Operator]:
    elements = batch * num_tokens * attn_dim
    flops = 4 * elements * num_tokens
    scores = batch * num_heads * num_tokens**2
    shape = f"attention {num_heads} x {attn_dim // num_heads}, {num_tokens} tokens"
    for phase, times, tensors, exponentials in (("forward", 1, 4, scores), ("backward", 2, 8, 0)):
        yield Operator(
            group="attention",
            phase=phase,
            shape=shape,
            flops=times * flops,
            num_bytes=tensors * width * elements,
            exponentials=exponentials,
            places=(place,),
        )


def _depthwise(place: str, conv_dim: int, backbone: Backbone, *, batch: int, width: int) -> Iterator[Operator]:
    height, wide = backbone.grid
    taps = backbone.config.ib.kernel_size**2
    elements = batch * (1 + height * wide) * conv_dim
    flops = 2 * batch * height * wide * conv_dim * taps
    shape = f"depthwise {backbone.config.ib.kernel_size}x{backbone.config.ib.kernel_size}, {conv_dim}, {height}x{wide}"
    for phase, times, tensors in (("forward", 1, 2), ("backward", 2, 3)):
        yield Operator(
            group="convolution branch",
            phase=phase,
            shape=shape,
            flops=times * flops,
            num_bytes=width * (tensors * elements + times * conv_dim * taps),
            places=(place,),
        )
