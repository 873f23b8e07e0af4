"""Fused against written-out attention on CPU, forwards and with the backward: ``python benchmarks/attention.py``.

Each pair of numbers is measured side by side, the median of several repetitions, on all threads. The ratios decide
``_CPU_TOKENS_WRITTEN_OUT`` in src/eit_lab/models/mixers.py. The table goes to benchmarks/records/attention-cpu.md.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eit_lab.models.mixers import attention_written_out

# (tokens, batch): digits, 32 px, DeiT at 224 px, EIT at 224 px. (heads, head width): EIT-Base's last and first layer,
# eit_mini, DeiT-Ti.
SHAPES = ((17, 256), (65, 64), (197, 16), (362, 8))
HEADS = ((16, 25), (16, 2), (10, 25), (3, 64))
REPETITIONS = 9


def seconds(function: Callable[[Tensor, Tensor, Tensor], Tensor], qkv: list[Tensor], *, backward: bool) -> float:
    """Median seconds of one call."""
    times = []
    for repetition in range(REPETITIONS + 2):
        began = time.perf_counter()
        with torch.set_grad_enabled(backward):
            out = function(*qkv)
        if backward:
            out.backward(torch.ones_like(out))
            for tensor in qkv:
                tensor.grad = None
        if repetition >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Measure every shape and write the record."""
    lines = [
        "# Attention on CPU: scaled_dot_product_attention over the product written out",
        "",
        "Seconds of the fused kernel over seconds of the plain product: above 1 the plain product is faster.",
        "",
        f"- {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "- command: `python benchmarks/attention.py`",
        "",
        "| dtype | tokens | batch | heads x width | forward | forward and backward |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, batch in SHAPES:
            for heads, width in HEADS:
                packed = torch.randn(batch, tokens, 3, heads, width, dtype=dtype).permute(2, 0, 3, 1, 4)
                qkv = [tensor.detach().requires_grad_() for tensor in packed]
                ratios = [
                    seconds(F.scaled_dot_product_attention, qkv, backward=b)
                    / seconds(attention_written_out, qkv, backward=b)
                    for b in (False, True)
                ]
                name = str(dtype).removeprefix("torch.")
                lines.append(f"| {name} | {tokens} | {batch} | {heads} x {width} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
                print(lines[-1], flush=True)
    Path(__file__).with_name("records").joinpath("attention-cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
