"""What the guard asks of torch, in one process of its own: a model's cost, the width of a given budget, a training speed.

``python -m eit_lab.training.speed`` reads one JSON request a line and answers with one JSON object a line, so that the
command that launches a sweep never imports torch, and many arms cost one import. A request has "do" (cost, match, speed) and
"config" (resolved, as ``loading.dump`` makes it); an answer has what was asked, or "error" in one line and whether the user's input is to blame ("wrong_input").
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from eit_lab.config import Config, ConfigError, ModelConfig, as_hw, micro_batches
from eit_lab.data.augment import BatchAugment
from eit_lab.data.batch import Batch
from eit_lab.loading import load
from eit_lab.memory import keep_memory
from eit_lab.models.build import build_model
from eit_lab.models.cost import count_cost
from eit_lab.models.matching import match_width
from eit_lab.processes import die_with_parent
from eit_lab.training.compiling import recompute_blocks
from eit_lab.training.ema import WeightAverage
from eit_lab.training.optim import build_optimizer

_FIRST_BATCH = 2  # images, a pair to mix; doubled while a step is too short to be timed, up to the micro-batch
_STEPS = 4
_PRECISIONS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
_TRUE_PRECISIONS = {"bf16-true": torch.bfloat16, "64-true": torch.float64}


def main() -> int:
    """Answer requests until the asking process closes its end."""
    die_with_parent()
    keep_memory()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not write into an answer
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)
    return 0


def _answer(request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        config = load(request["config"])
        num_classes = request["num_classes"]
        match request["do"]:
            case "cost":
                return _cost(config, num_classes)
            case "match":
                return _match(config, num_classes, budget=request["budget"], target=request["target"])
            case "speed":
                return measure_speed(
                    config, num_classes=num_classes, seconds=request["seconds"], threads=request["threads"]
                )
        raise AssertionError(f"nothing to do for {request['do']!r}")
    except Exception as error:  # noqa: BLE001 - the asking process says it, whatever it is
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"error": said, "wrong_input": isinstance(error, ConfigError)}


def _cost(config: Config, num_classes: int) -> dict[str, Any]:
    data = config.data
    found = count_cost(config.model, num_classes=num_classes, img_size=data.img_size, in_chans=data.in_chans).as_dict()
    return {"params": found["params"], "macs": found["macs"]}


def _match(config: Config, num_classes: int, *, budget: Any, target: int) -> dict[str, Any]:
    assert isinstance(config.model, ModelConfig)
    data = config.data
    model, cost = match_width(
        config.model,
        budget=budget,
        target=target,
        num_classes=num_classes,
        img_size=data.img_size,
        in_chans=data.in_chans,
    )
    return {"embed_dim": model.size.embed_dim, "params": cost.params, "macs": cost.macs}


# ---------------------------------------------------------------------------------------------------------------- speed


def measure_speed(config: Config, *, num_classes: int, seconds: float, threads: int | None = None) -> dict[str, Any]:
    """Training images per second of one device: {"img_per_s", "device", "batch"}.

    Whole optimizer steps on random images that lie in memory: augmentation on the device, forward, backward, AdamW, averaged
    weights, in the precision of the run, not compiled, without a loader. The batch is that of one device and micro-batch, or
    smaller where ``seconds`` would not hold a few steps of it; the time is that of the median step, which a busy machine
    disturbs least. Where the device has not enough memory, "img_per_s" is null and "error" says so.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = _device(config)
    torch.manual_seed(config.seed)
    data = config.data
    model = build_model(config.model, num_classes=num_classes, img_size=data.img_size, in_chans=data.in_chans)
    recompute_blocks(model, config)
    model.to(device).train()
    precision = config.trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"
    wide = _TRUE_PRECISIONS.get(precision, torch.float32)
    model.to(wide)
    optimizer = build_optimizer(model, config.recipe)
    decay = config.recipe.ema_decay
    ema = None if decay is None else WeightAverage(model, decay=decay)
    augment = BatchAugment(config.data, config.recipe, num_classes=num_classes, seed=config.seed)
    autocast = torch.autocast(device.type, _PRECISIONS[precision]) if precision in _PRECISIONS else None

    def step(batch: Batch) -> None:
        images, targets = augment(batch)
        with autocast or contextlib.nullcontext():
            logits = model(images.to(wide))
            soft = targets.is_floating_point()
            smoothing = 0.0 if soft else config.recipe.label_smoothing
            loss = F.cross_entropy(logits, targets.to(logits.dtype) if soft else targets, label_smoothing=smoothing)
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch.nn.utils.get_total_norm(gradients)
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(model)

    def timed(batch: Batch) -> float:
        began = time.perf_counter()
        step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    whole, _ = micro_batches(config, world_size=_world_size(config))
    size = min(_FIRST_BATCH, whole)
    batch = _random_batch(config, num_classes, size, device)
    try:
        timed(batch)  # allocation, first touches
        took = timed(batch)
        while size < whole and 2 * took < seconds / _STEPS:
            size = min(2 * size, whole)
            batch = _random_batch(config, num_classes, size, device)
            timed(batch)
            took = min(timed(batch), timed(batch))
        times = [took]
        until = time.perf_counter() + seconds - took
        while time.perf_counter() < until:
            times.append(timed(batch))
    except torch.OutOfMemoryError:
        return {
            "img_per_s": None,
            "error": f"out of memory with {size} images on one device",
            "device": _name(device),
        }
    return {"img_per_s": size / median(times), "device": _name(device), "batch": size}


def _device(config: Config) -> torch.device:
    wanted = config.trainer.accelerator
    if wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if wanted in ("auto", "cpu"):
        return torch.device("cpu")
    raise ValueError(f"no speed is measured with trainer.accelerator={wanted} on this machine")


def _world_size(config: Config) -> int:
    devices = config.trainer.devices
    count = len(devices) if isinstance(devices, tuple) else devices
    known = isinstance(count, int) and count > 0
    return (count if known and isinstance(count, int) else 1) * config.trainer.num_nodes


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _random_batch(config: Config, num_classes: int, size: int, device: torch.device) -> Batch:
    shape = (size, config.data.in_chans, *as_hw(config.data.img_size))
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    labels = torch.randint(0, num_classes, (size,))
    place = torch.arange(size)
    draw = torch.stack([torch.zeros_like(place), torch.zeros_like(place), place], dim=1)
    return Batch(images.to(device), labels.to(device), place, draw)


if __name__ == "__main__":
    sys.exit(main())
