"""torch.compile on CPU, the model whole and block by block, cold and from the cache: ``python benchmarks/compiling.py``.

Each row is a process of its own with one thread, in seconds of CPU time, its compiler's included, so that a machine that does other
things disturbs little. Takes about ten minutes. What auto does on CPU, and that a model is one graph, follows from the record
benchmarks/records/compile-cpu.md (src/eit_lab/training/compiling.py). Blocks of a ViT are all alike, those of EIT all different.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = ("vit_nano", "eit_nano")
WORDS = ("data=synthetic", "data.img_size=32", "logger=none", "model.size.depth=6", "model.size.num_heads=6")
BATCH, STEPS = 8, 15


def spent() -> float:
    """Seconds of CPU time of this process and of the compilers that it has waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def measure(name: str, how: str) -> dict[str, Any]:
    """One process: seconds until the first training step and the first evaluation are done, and of a step after that."""
    import torch

    from eit_lab.compose import compose_one
    from eit_lab.config import ModelConfig
    from eit_lab.models.build import build_model
    from eit_lab.training.compiling import Compilation, compile_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = compose_one([f"model={name}", *WORDS])
    model = build_model(config.model, num_classes=10, img_size=config.data.img_size)
    compile_model(model, Compilation(on=how != "eager", why="", by_block=how == "blocks"))
    images = torch.randn(BATCH, 3, 32, 32)

    def step() -> None:
        model(images).square().mean().backward()
        for parameter in model.parameters():
            parameter.grad = None

    began = spent()
    step()
    with torch.no_grad():
        model.eval()(images)
    model.train()
    first, times = spent() - began, []
    for _ in range(STEPS):
        began = time.process_time()
        step()
        times.append(time.process_time() - began)
    assert isinstance(config.model, ModelConfig)
    return {
        "first_s": first,
        "step_ms": 1e3 * statistics.median(times),
        "blocks": len(set(config.model.layer_splits())),
    }


def asked(name: str, how: str, cache: str) -> dict[str, Any]:
    """The same in a process with one thread and this cache."""
    told = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": cache}
    line = subprocess.run(
        [sys.executable, __file__, name, how], env={**os.environ, **told}, check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, Any] = json.loads(line.splitlines()[-1])
    return found


def main() -> None:
    """Measure every row and write the record."""
    import torch

    lines = [
        "# torch.compile on CPU: the model whole and block by block",
        "",
        "Seconds of CPU time until the first training step and the first evaluation are done, with an empty cache and with one that an",
        "earlier process has filled; milliseconds of CPU time of a training step after that (median). Three starts from a full cache.",
        "",
        f"- {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.machine()}, 1 thread, "
        f"{torch.backends.cpu.get_cpu_capability()}; {', '.join(WORDS)}, {BATCH} images",
        "- command: `python benchmarks/compiling.py`",
        "",
        "| model | kinds of blocks | run | cold start, s | start from the cache, s | step, ms |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for name in MODELS:
        for how in ("eager", "whole", "blocks"):
            with tempfile.TemporaryDirectory() as cache:
                cold = asked(name, how, cache)
                warm = [asked(name, how, cache) for _ in range(3)]
            start, step = (statistics.median(one[key] for one in warm) for key in ("first_s", "step_ms"))
            lines.append(f"| {name} | {cold['blocks']} | {how} | {cold['first_s']:.1f} | {start:.1f} | {step:.1f} |")
            print(lines[-1], flush=True)
    Path(__file__).with_name("records").joinpath("compile-cpu.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(*sys.argv[1:])))
    else:
        main()
