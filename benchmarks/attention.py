"""Ways to compute attention on CPU, forwards and with the backward: ``python benchmarks/attention.py``.

torch's fused kernel, the product written out and our own kernel take turns; the numbers are medians, on all threads. They decide
``_CPU_WIDTH_NATIVE`` and ``_CPU_TOKENS_WRITTEN_OUT`` in src/eit_lab/models/paths.py. The table goes to
benchmarks/records/attention-cpu.md.
"""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path

import torch

from eit_lab.memory import keep_memory
from eit_lab.models import paths
from eit_lab.models.attention import attention, attention_kernel

# (tokens, batch): digits, 28 px, 32 px, DeiT at 224 px, EIT at 224 px.
SHAPES = ((17, 256), (50, 128), (65, 64), (197, 16), (362, 8))
# (heads, head width): EIT-Base's first, middle and last layer, a small model's, DeiT-Ti's.
HEADS = ((16, 2), (16, 12), (16, 25), (6, 16), (3, 64))
WAYS = ("native", "sdpa", "written_out")
REPETITIONS, WARM_UP = 9, 2


def seconds(way: str, qkv: torch.Tensor, *, backward: bool) -> float:
    """Of one call."""
    began = time.perf_counter()
    with paths.use(attention=way), torch.set_grad_enabled(backward):
        out = attention(qkv.view(qkv.shape))
    if backward:
        out.backward(torch.ones_like(out))
        qkv.grad = None
    return time.perf_counter() - began


def main() -> None:
    """Measure every shape and write the record."""
    device = torch.device("cpu")
    if attention_kernel(device) != "native":
        raise SystemExit(f"no kernel of ours here: {attention_kernel(device)}")
    keep_memory()
    lines = [
        "# Attention on CPU: our kernel, torch's fused kernel, the product written out",
        "",
        "Milliseconds of our kernel; then how many times as long the other two take (above 1: ours is faster).",
        "",
        f"- {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, memory kept (eit_lab.memory)",
        "- command: `python benchmarks/attention.py`",
        "",
        "| dtype | tokens | batch | heads x width | forward, ms | fused | written out | and backward, ms | fused | written out |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, batch in SHAPES:
            for heads, width in HEADS:
                qkv = torch.randn(batch, tokens, 3, heads, width, dtype=dtype, requires_grad=True)
                cells = []
                for backward in (False, True):
                    turns = [
                        [seconds(way, qkv, backward=backward) for way in WAYS] for _ in range(WARM_UP + REPETITIONS)
                    ]
                    ours, fused, written = (statistics.median(times) for times in zip(*turns[WARM_UP:], strict=True))
                    cells += [f"{1000 * ours:.2f}", f"{fused / ours:.2f}", f"{written / ours:.2f}"]
                name = str(dtype).removeprefix("torch.")
                lines.append(f"| {name} | {tokens} | {batch} | {heads} x {width} | {' | '.join(cells)} |")
                print(lines[-1], flush=True)
    Path(__file__).with_name("records").joinpath("attention-cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
