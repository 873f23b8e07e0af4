"""Pieces of a training step on CPU, each way beside the other: ``python benchmarks/pieces.py``.

The stem, the MLP and the optimizer of EIT-Base at batch 8 and 224 px, forwards and backwards: torch's own way and the one that is built in.
The ways take turns; the numbers are medians, on all threads. The table goes to benchmarks/records/pieces-cpu.md.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from eit_lab import create_model
from eit_lab.memory import keep_memory
from eit_lab.models.attention import attention_kernel
from eit_lab.models.mlp import Mlp
from eit_lab.models.stem import EITPatch

REPETITIONS, WARM_UP = 9, 2


def both_passes(forward: Callable[[Tensor], Tensor], x: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """Forwards under autocast to a type, and backwards."""

    def run() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = forward(x)
        out.backward(torch.ones_like(out))

    return run


def milliseconds(ways: list[Callable[[], object]]) -> list[float]:
    """Median of each, in turn."""
    turns = []
    for _ in range(WARM_UP + REPETITIONS):
        row = []
        for way in ways:
            began = time.perf_counter()
            way()
            row.append(1000 * (time.perf_counter() - began))
        turns.append(row)
    return [statistics.median(times) for times in zip(*turns[WARM_UP:], strict=True)]


def main() -> None:
    """Measure every piece and write the record."""
    if attention_kernel(torch.device("cpu")) != "native":
        raise SystemExit(f"no kernels of ours here: {attention_kernel(torch.device('cpu'))}")
    keep_memory()
    torch.manual_seed(0)
    stem = EITPatch(400, in_chans=3, kernel_size=16, stride=4, pool=3)
    mlp = Mlp(400, hidden_dim=1600)
    plain = nn.Sequential(nn.Linear(400, 1600), nn.GELU(), nn.Linear(1600, 400))
    images, tokens = torch.randn(8, 3, 224, 224), torch.randn(8, 362, 400, requires_grad=True)

    def as_torch(x: Tensor) -> Tensor:
        return stem.pool(stem.conv(x)).permute(0, 2, 3, 1).flatten(1, 2).contiguous()

    def channels_last(x: Tensor) -> Tensor:
        return as_torch(x.contiguous(memory_format=torch.channels_last))

    def pool_left_out(x: Tensor) -> Tensor:
        return stem.conv(x.contiguous(memory_format=torch.channels_last))

    model = create_model("eit_base")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers = [torch.optim.AdamW(model.parameters(), **how) for how in ({"foreach": True}, {"fused": True})]
    lines = [
        "# Pieces of a training step on CPU",
        "",
        "Milliseconds, forwards and backwards, EIT-Base, batch 8, 224 px.",
        "",
        f"- {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, memory kept (eit_lab.memory)",
        "- command: `python benchmarks/pieces.py`",
        "",
        "| piece | dtype | ms of each way |",
        "|---|---|---|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found = milliseconds(
            [
                both_passes(way, images, dtype)
                for way in (as_torch, channels_last, lambda x: stem(x).flatten(1, 2), pool_left_out)
            ]
        )
        ways = ("torch's convolution", "channels-last", "as built in", "channels-last without the max pool")
        lines.append(f"| stem | {name} | {'; '.join(f'{way} {ms:.1f}' for way, ms in zip(ways, found, strict=True))} |")
        print(lines[-1], flush=True)
        found = milliseconds([both_passes(way, tokens, dtype) for way in (plain, mlp)])
        lines.append(f"| MLP | {name} | torch's layers {found[0]:.1f}; as built in {found[1]:.1f} |")
        print(lines[-1], flush=True)
    found = milliseconds([optimizer.step for optimizer in optimizers])
    lines.append(f"| AdamW | float32 | foreach {found[0]:.1f}; fused {found[1]:.1f} |")
    print(lines[-1], flush=True)
    Path(__file__).with_name("records").joinpath("pieces-cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
