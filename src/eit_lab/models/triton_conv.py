"""Depthwise k x k convolution of tokens in one Triton kernel: channels-last rows, the CLS row passed through, forwards and back.

EIT's convolution branch (arXiv:2203.07116) on tokens as the mixer has them: ``x`` are the first channels of wider rows
(B, 1 + h w, D), read where they lie. With ``tail`` (what the attention branch gave) the result is the mixer's concatenation, and
neither branch is written twice. Accumulated in float32, for float32, bfloat16 and float16. The weight's gradient is summed in
two stages in an order that follows from the shapes alone, without atomic operations: it is the same in every run.

Ours. Chosen in paths.py, where a measurement says so; models/convolutions.py is the reference and the fallback. On CPU it runs
in Triton's interpreter only (TRITON_INTERPRET=1), which is how it is tested where there is no GPU.
"""

# ruff: noqa: N803 - Triton's constants are in capitals, as in its own kernels.
from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from eit_lab.models.paths import has_triton

try:
    import triton
    import triton.language as tl
except ImportError:  # has_triton says so, and grid_conv refuses in words
    triton = tl = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TOKENS, _CHANNELS = 32, 64
"""Tokens and channels of a tile: rows of 128 bytes in 16-bit types, 16 sums a thread."""
_PROGRAMS = 2048
"""About so many programs share the sum of the weight's gradient; a GPU runs some hundreds at once."""


def grid_conv(x: Tensor, weight: Tensor, grid: tuple[int, int], *, tail: Tensor | None = None) -> Tensor:
    """Tokens (B, 1 + h w, c), kernels (c, 1, k, k) with k odd -> (B, 1 + h w, c), zeros around the grid, CLS unchanged.

    With ``tail`` (B, 1 + h w, a) -> (B, 1 + h w, c + a): the tail comes after. Under autocast everything is cast as torch casts
    what a convolution gets. Raises ValueError where there is no Triton for the device, and for other types than DTYPES.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, tail = x.to(dtype), weight.to(dtype), None if tail is None else tail.to(dtype)
    if not has_triton(x.device):
        raise ValueError(f"depthwise=triton needs Triton and a GPU, got tensors on {x.device}")
    if x.dtype not in DTYPES:
        raise ValueError(f"depthwise=triton takes float32, bfloat16 and float16, got {x.dtype}")
    out: Tensor = _grid_conv(x, weight, tail, grid[0], grid[1])
    return out


# ------------------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("eit_lab::grid_conv", mutates_args=())
def _grid_conv(x: Tensor, weight: Tensor, tail: Tensor | None, h: int, w: int) -> Tensor:
    return _convolve(x, weight, tail, h=h, w=w, flipped=False)


@_grid_conv.register_fake
def _(x: Tensor, weight: Tensor, tail: Tensor | None, h: int, w: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], x.shape[2] + (0 if tail is None else tail.shape[2]))


@torch.library.custom_op("eit_lab::grid_conv_input_grad", mutates_args=())
def _input_grad(grad: Tensor, weight: Tensor, h: int, w: int) -> Tensor:
    return _convolve(grad, weight, None, h=h, w=w, flipped=True)


@_input_grad.register_fake
def _(grad: Tensor, weight: Tensor, h: int, w: int) -> Tensor:
    return grad.new_empty(grad.shape)


@torch.library.custom_op("eit_lab::grid_conv_weight_grad", mutates_args=())
def _weight_grad(grad: Tensor, x: Tensor, k: int, h: int, w: int) -> Tensor:
    grad, x = _rows(grad), _rows(x)
    B, _, c = x.shape
    tiles, blocks = -(-h * w // _TOKENS), -(-c // _block(c))
    images = max(1, B * tiles * blocks // _PROGRAMS)  # that a program adds up
    parts = -(-B // images)
    sums = torch.empty(parts * tiles, k * k, c, device=x.device, dtype=torch.float32)
    taps = _power_of_two(k * k)
    _launch(
        _weight_grad_kernel, (tiles, blocks, parts), x.device,
        grad, x, sums, grad.stride(0), grad.stride(1), x.stride(0), x.stride(1),
        B, h, w, c, images, K=k, TAPS=taps, TOKENS=_TOKENS, CHANNELS=_block(c),
    )  # fmt: skip
    return sums.sum(dim=0).t().reshape(c, 1, k, k).to(x.dtype)


@_weight_grad.register_fake
def _(grad: Tensor, x: Tensor, k: int, h: int, w: int) -> Tensor:
    return x.new_empty(x.shape[2], 1, k, k)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int, int], output: Tensor) -> None:
    x, weight, tail, h, w = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
    ctx.grid, ctx.k, ctx.has_tail = (h, w), weight.shape[-1], tail is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    c = weight.shape[0]
    mine = grad[..., :c]
    grad_x = _input_grad(mine, weight, *ctx.grid) if ctx.needs_input_grad[0] else None
    grad_weight = _weight_grad(mine, x, ctx.k, *ctx.grid) if ctx.needs_input_grad[1] else None
    grad_tail = grad[..., c:] if ctx.has_tail and ctx.needs_input_grad[2] else None
    return grad_x, grad_weight, grad_tail, None, None


_grid_conv.register_autograd(_backward, setup_context=_keep)


# -------------------------------------------------------------------------------------------------------------- launching


def _convolve(x: Tensor, weight: Tensor, tail: Tensor | None, *, h: int, w: int, flipped: bool) -> Tensor:
    x = _rows(x)
    B, N, c = x.shape
    assert h * w + 1 == N, f"{N} tokens are not CLS and a grid of {h} x {w}"
    assert weight.shape[0] == c, f"{weight.shape[0]} kernels for {c} channels"
    a = 0 if tail is None else tail.shape[2]
    tail = x if tail is None else _rows(tail)
    out = torch.empty(B, N, c + a, device=x.device, dtype=x.dtype)
    block = _block(c)
    blocks = -(-c // block)
    k = weight.shape[-1]
    _launch(
        _conv_kernel, (-(-N // _TOKENS), blocks + -(-a // block), B), x.device,
        x, weight.contiguous(), tail, out, x.stride(0), x.stride(1), tail.stride(0), tail.stride(1),
        h, w, c, a, blocks, K=k, FLIPPED=flipped, TOKENS=_TOKENS, CHANNELS=block,
    )  # fmt: skip
    return out


def _rows(x: Tensor) -> Tensor:
    """The same with its channels side by side; a copy only where they are not, as in the gradient of a sum."""
    return x if x.stride(2) == 1 else x.contiguous()


def _block(c: int) -> int:
    return min(_CHANNELS, max(16, _power_of_two(c)))


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _launch(
    kernel: Callable[..., None], grid: tuple[int, int, int], device: torch.device, *args: Any, **consts: int
) -> None:
    compiled = _compiled(kernel, os.environ.get("TRITON_INTERPRET") == "1")
    if device.type == "cuda":
        with torch.cuda.device(device):
            compiled[grid](*args, **consts)
    else:
        compiled[grid](*args, **consts)


@cache
def _compiled(kernel: Callable[..., None], interpreted: bool) -> Any:
    """The kernel as Triton runs it; which of the two ways it takes, it reads from the environment at this moment."""
    return triton.jit(kernel)


# ---------------------------------------------------------------------------------------------------------------- kernels
# Only builtins of Triton's language are called: tl.sum and tl.zeros are kernels themselves, which Triton's import binds to a GPU or to
# the interpreter for good. _sum_combine is what tl.sum adds with.


def _conv_kernel(  # type: ignore[no-untyped-def]
    x, weight, tail, out, x_image, x_token, tail_image, tail_token,
    h, w, c, a, blocks,
    K: tl.constexpr, FLIPPED: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """A tile of tokens and channels of one image: convolved, or copied where it is the tail's. FLIPPED: kernels turned by 180 degrees."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    block, image = tl.program_id(1), tl.program_id(2).to(tl.int64)
    inside = token < h * w + 1
    width = c + a
    into = out + image * (h * w + 1) * width + token[:, None] * width
    if block < blocks:
        channel = block * CHANNELS + tl.arange(0, CHANNELS)
        rows, cols = (token - 1) // w, (token - 1) % w
        known = channel < c
        source = x + image * x_image + channel[None, :]
        total = tl.full((TOKENS, CHANNELS), 0.0, tl.float32)
        for tap in tl.static_range(K * K):
            row, col = rows + (tap // K - K // 2), cols + (tap % K - K // 2)
            there = (token > 0) & inside & (row >= 0) & (row < h) & (col >= 0) & (col < w)
            place = 1 + row * w + col
            value = tl.load(source + place[:, None] * x_token, mask=there[:, None] & known[None, :], other=0.0)
            taken = K * K - 1 - tap if FLIPPED else tap
            kernel = tl.load(weight + channel * (K * K) + taken, mask=known, other=0.0)
            total += value.to(tl.float32) * kernel.to(tl.float32)[None, :]
        cls = tl.load(source + token[:, None] * x_token, mask=(token == 0)[:, None] & known[None, :], other=0.0)
        total = tl.where((token == 0)[:, None], cls.to(tl.float32), total)
        tl.store(into + channel[None, :], total.to(out.dtype.element_ty), mask=inside[:, None] & known[None, :])
    else:
        channel = (block - blocks) * CHANNELS + tl.arange(0, CHANNELS)
        wanted = inside[:, None] & (channel < a)[None, :]
        value = tl.load(tail + image * tail_image + token[:, None] * tail_token + channel[None, :], mask=wanted)
        tl.store(into + c + channel[None, :], value, mask=wanted)


def _weight_grad_kernel(  # type: ignore[no-untyped-def]
    grad, x, sums, grad_image, grad_token, x_image, x_token,
    B, h, w, c, images,
    K: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
) -> None:  # fmt: skip
    """One row of the first stage (parts * tiles, k k, c): the products of a tile of tokens over some images, in their order."""
    tile, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = tile * TOKENS + tl.arange(0, TOKENS)  # on the grid: CLS has no part in a kernel
    rows, cols = place // w, place % w
    channel = block * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < c
    taps = tl.arange(0, TAPS)
    total = tl.full((TAPS, CHANNELS), 0.0, tl.float32)
    for number in range(images):
        image = part * images + number
        inside = (place < h * w) & (image < B)
        of_grad = grad + image.to(tl.int64) * grad_image + channel[None, :]
        of_x = x + image.to(tl.int64) * x_image + channel[None, :]
        slope = tl.load(of_grad + (1 + place)[:, None] * grad_token, mask=inside[:, None] & known[None, :], other=0.0)
        slope = slope.to(tl.float32)
        for tap in tl.static_range(K * K):
            row, col = rows + (tap // K - K // 2), cols + (tap % K - K // 2)
            there = inside & (row >= 0) & (row < h) & (col >= 0) & (col < w)
            at = (1 + row * w + col)[:, None] * x_token
            value = tl.load(of_x + at, mask=there[:, None] & known[None, :], other=0.0)
            product = tl.reduce(slope * value.to(tl.float32), 0, tl.standard._sum_combine)
            total += tl.where((taps == tap)[:, None], product[None, :], 0.0)
    row_of_sums = sums + (part * tl.num_programs(0) + tile).to(tl.int64) * (K * K) * c
    tl.store(row_of_sums + taps[:, None] * c + channel[None, :], total, mask=(taps < K * K)[:, None] & known[None, :])
