"""What the convolution branch costs in time: the training step of LSRA with each kind, over that of the plain ViT of its size.

``python benchmarks/convolutions.py [auto|cpu|cuda]``. The models take turns, a step each, so that a machine that slows down slows
them all; the ratio is of medians. The table goes to benchmarks/records/convolutions-DEVICE.md.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from eit_lab import create_model
from eit_lab.models.image_model import ImageModel

ARMS = ("vit", "lsra", "lsra_lite", "lsra_dynamic", "eit")
# (model size, image side in px, batch on CPU, batch on a GPU)
SHAPES = (("nano", 32, 64, 512), ("mini", 224, 8, 256), ("base", 224, 2, 128))
REPETITIONS, WARM_UP = 9, 2


def step_seconds(model: ImageModel, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> float:
    """Seconds of one forward, backward and AdamW step, in bf16 on a GPU."""
    cuda = images.device.type == "cuda"
    began = time.perf_counter()
    with torch.autocast("cuda", torch.bfloat16, enabled=cuda):
        loss = F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.long, device=images.device))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Measure every size and write the record."""
    asked = sys.argv[1] if len(sys.argv) > 1 else "auto"
    device = torch.device("cuda" if asked == "cuda" or (asked == "auto" and torch.cuda.is_available()) else "cpu")
    cuda = device.type == "cuda"
    where = (
        torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads, float32"
    )
    lines = [
        "# The training step of each convolution branch over the plain ViT's",
        "",
        "Seconds over the seconds of the ViT of the same width, which has more parameters and MACs (docs/models.md).",
        "",
        f"- {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {where}{', bf16' if cuda else ''}",
        f"- command: `python benchmarks/convolutions.py {device.type}`",
        "",
        f"| size | images | {' | '.join(ARMS)} |",
        f"|---|---:|{'---:|' * len(ARMS)}",
    ]
    for size, side, cpu_batch, gpu_batch in SHAPES:
        batch = gpu_batch if cuda else cpu_batch
        torch.manual_seed(0)
        models = [create_model(f"{arm}_{size}", img_size=side).to(device) for arm in ARMS]
        optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
        images = torch.randn(batch, 3, side, side, device=device)
        turns = [
            [step_seconds(model, optimizer, images) for model, optimizer in zip(models, optimizers, strict=True)]
            for _ in range(WARM_UP + REPETITIONS)
        ]
        medians = [statistics.median(times) for times in zip(*turns[WARM_UP:], strict=True)]
        ratios = [f"{seconds / medians[0]:.2f}" for seconds in medians]
        ratios[0] = f"{1000 * medians[0]:.0f} ms"
        lines.append(f"| {size} | {batch} of {side} px | {' | '.join(ratios)} |")
        print(lines[-1], flush=True)
    Path(__file__).with_name("records").joinpath(f"convolutions-{device.type}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
