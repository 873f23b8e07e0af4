"""Linear layers on CPU by torch's own way and by oneDNN, each product by itself: ``python benchmarks/linear.py``.

The two take turns; the numbers are medians, on all threads. They decide ``_takes`` in src/eit_lab/models/linear.py. The table goes to
benchmarks/records/linear-cpu.md.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eit_lab.memory import keep_memory

# (rows, in, out): EIT-Base at batch 8 (MLP, qkv of the last and of the first layer), a small model at 50 tokens and at 17.
SHAPES = ((2896, 400, 1600), (2896, 1600, 400), (2896, 400, 1200), (2896, 32, 96), (12800, 96, 384), (1088, 48, 192))
REPETITIONS, WARM_UP = 9, 2


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer, or with other operands one of its gradients."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def seconds(function: Callable[[], Tensor]) -> float:
    """Of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def pairs(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> Iterator[tuple[Callable[[], Tensor], ...]]:
    """Torch's way and oneDNN's, of the output, the gradient of the input, that of the weight."""
    yield lambda: F.linear(x, weight, bias), lambda: onednn(x, weight, bias)
    yield lambda: grad @ weight, lambda: onednn(grad, weight.t(), None)
    if grad.shape[1] > x.shape[1]:  # as models/linear.py chooses
        yield lambda: grad.t() @ x, lambda: onednn(x.t(), grad.t(), None).t().contiguous()
    else:
        yield lambda: grad.t() @ x, lambda: onednn(grad.t(), x.t(), None)


def main() -> None:
    """Measure every shape and write the record."""
    keep_memory()
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("vendor_id")), "?")
    lines = [
        "# Linear layers on CPU: torch's own products and oneDNN's",
        "",
        "GFLOP/s of torch's and of oneDNN's: the output, the gradient of the input, the gradient of the weight.",
        "",
        f"- {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, {cpu.partition(':')[2].strip()}, "
        f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, memory kept (eit_lab.memory)",
        "- command: `python benchmarks/linear.py`",
        "",
        "| dtype | rows x in x out | output | | ratio | of the input | | ratio | of the weight | | ratio |",
        "|---|---:|" + "---:|" * 9,
    ]
    for dtype in (torch.float32, torch.bfloat16):
        for rows, width, out in SHAPES:
            x, weight, bias, grad = (
                torch.randn(*shape, dtype=dtype) for shape in ((rows, width), (out, width), (out,), (rows, out))
            )
            cells = []
            for pair in pairs(x, weight, bias, grad):
                turns = [[seconds(function) for function in pair] for _ in range(WARM_UP + REPETITIONS)]
                theirs, ours = (statistics.median(times) for times in zip(*turns[WARM_UP:], strict=True))
                gigaflop = 2 * rows * width * out / 1e9
                cells += [f"{gigaflop / theirs:,.0f}", f"{gigaflop / ours:,.0f}", f"{theirs / ours:.2f}"]
            name = str(dtype).removeprefix("torch.")
            lines.append(f"| {name} | {rows} x {width} x {out} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    Path(__file__).with_name("records").joinpath("linear-cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
