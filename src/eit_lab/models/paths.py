"""The one place that names how an operation is computed, by device, type and shape: attention, head widths, depthwise kernels.

Every path of an operation computes the same function; they differ in time and memory only, and the tests hold them against each
other. What is chosen follows from measurements, whose records are named at each table. A benchmark or a test forces one::

    with paths.use(attention="efficient", depthwise="triton"):
        step()

Ours; nothing published is followed here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

ATTENTION = ("sdpa", "flash", "efficient", "cudnn", "math", "written_out", "native")
"""``sdpa``: torch's choice among its kernels; the next four force one of them; ``written_out``: the (N, N) matrix in memory;
``native``: our own kernel for CPU (models/native/), where it could be compiled."""

DEPTHWISE = ("conv2d", "triton")
"""``conv2d``: torch's convolution on a channels-last view of the tokens; ``triton``: one kernel on the tokens, CLS row included
(triton_conv.py)."""

HEAD_MULTIPLES = (1, 8, 16, 32)
"""Head widths d are padded by zeros to a multiple of one of these; 1: as they are."""

# Up to so wide a head our own kernel beats both others on CPU, forwards and with its backward; wider ones in bfloat16 are for the
# matrix units. Same record.
_CPU_WIDTH_NATIVE = {torch.bfloat16: 48, torch.float32: 64}

# Without it, up to so many tokens the product written out beats the fused kernel on CPU, forwards and with its backward:
# benchmarks/records/attention-cpu.md, `python benchmarks/attention.py`.
_CPU_TOKENS_WRITTEN_OUT = {torch.bfloat16: 512, torch.float32: 32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forced:
    """What a benchmark asks for; None: as measured."""

    attention: str | None = None
    head_multiple: int | None = None
    depthwise: str | None = None


# A plain global, not a context variable: with checkpointed blocks the autograd thread of a GPU computes a forward pass too.
_forced = Forced()


@contextmanager
def use(
    *, attention: str | None = None, head_multiple: int | None = None, depthwise: str | None = None
) -> Iterator[None]:
    """Force paths inside the block, backward passes included; what is None stays as it was. For one thread at a time.

    A compiled model is compiled anew when a path changes. Raises ValueError for a name that there is not.
    """
    global _forced
    for what, value, known in (
        ("attention", attention, ATTENTION),
        ("head_multiple", head_multiple, HEAD_MULTIPLES),
        ("depthwise", depthwise, DEPTHWISE),
    ):
        if value is not None and value not in known:
            raise ValueError(f"{what} must be one of {', '.join(map(str, known))}, got {value!r}")
    before = _forced
    asked = {"attention": attention, "head_multiple": head_multiple, "depthwise": depthwise}
    _forced = dataclasses.replace(before, **{key: value for key, value in asked.items() if value is not None})  # type: ignore[arg-type]
    try:
        yield
    finally:
        _forced = before


def attention_path(
    device: torch.device, dtype: torch.dtype, *, num_tokens: int, head_dim: int, native: bool = True
) -> str:
    """One of ATTENTION for query, key and value (B, h, N, d) on ``device``; ``native`` False: our own kernel cannot run.

    On GPUs torch's own choice stands until a record shows a better one: ``python -m eit_lab.bench model`` measures the others.
    """
    if _forced.attention is not None:
        return _forced.attention if native or _forced.attention != "native" else "sdpa"
    if device.type == "cpu" and native and head_dim <= _CPU_WIDTH_NATIVE.get(dtype, 0):
        return "native"
    if device.type == "cpu" and num_tokens <= _CPU_TOKENS_WRITTEN_OUT.get(dtype, 0):
        return "written_out"
    return "sdpa"


def head_multiple(device: torch.device, dtype: torch.dtype, *, head_dim: int) -> int:
    """One of HEAD_MULTIPLES: what the width of a head is padded to a multiple of."""
    return 1 if _forced.head_multiple is None else _forced.head_multiple


def depthwise_path(device: torch.device, dtype: torch.dtype, *, kernel_size: int) -> str:
    """One of DEPTHWISE for a k x k depthwise convolution of tokens.

    ``conv2d`` everywhere until a GPU has measured the other one.
    """
    return "conv2d" if _forced.depthwise is None else _forced.depthwise


def has_triton(device: torch.device) -> bool:
    """Whether a Triton kernel can run on tensors of ``device``: on a GPU, or anywhere in Triton's interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
