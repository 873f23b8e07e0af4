"""A training step of one implementation in one precision: its wall time, and a profile of it, in a process of its own.

The step is forward, cross entropy, backward, AdamW, on random images. torch's profiler makes a step longer, and not evenly: so
the step is timed without it too, before and after, and shares of the profiled steps are laid over that time. On a GPU the kernels'
own times stand as they are, and what of the step no kernel fills is said beside them.

Each implementation has a process, because what it asks of the allocator holds for the whole process. Both are eager: in a compiled
step one kernel does what here are several operators.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile, record_function

from eit_lab import create_model
from eit_lab.benchmark.roofline.attribution import STEP, Times, attribute, scopes
from eit_lab.benchmark.roofline.peers import Peer
from eit_lab.benchmark.roofline.work import check
from eit_lab.command import RunError
from eit_lab.config import RecipeConfig
from eit_lab.models.backbone import Backbone
from eit_lab.processes import end_with_parent
from eit_lab.training.optim import build_optimizer

_WARM_UP = 2
_NUM_NAMES = 25
"""Event names kept for the record, those with most time."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is profiled."""

    model: str
    peer: Peer
    precision: str
    batch: int
    img_size: int
    steps: int
    device: str


def measure_alone(setting: Setting) -> dict[str, Any]:
    """``measure`` in a new process. Raises RunError in one line where that ends without an answer."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(setting, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    except EOFError:
        process.join()
        raise RunError(
            f"the process that profiled {setting.peer.name} in {setting.precision} ended with status {process.exitcode}"
        ) from None
    process.join()
    return found


def _answer(setting: Setting, sender: Any) -> None:
    end_with_parent()
    if setting.peer.keeps_memory:
        setting.peer.keep_memory()
    sender.send(measure(setting))


def measure(setting: Setting) -> dict[str, Any]:
    """Wall seconds without and with the profiler, and seconds by group, place and event, of a step; in this process.

    A step that does not fit into a GPU's memory has ``failed`` instead, with the reason.
    """
    head = {"peer": setting.peer.name, "precision": setting.precision}
    try:
        with setting.peer.paths():
            return {**head, **_measure(setting)}
    except torch.OutOfMemoryError:
        return {**head, "failed": "out of memory"}


def _measure(setting: Setting) -> dict[str, Any]:
    device = torch.device(setting.device)
    model, step = build_step(setting)
    for _ in range(_WARM_UP):
        step()
    plain = [_timed(step, device) for _ in range(setting.steps)]
    with scopes(model):
        step()
        times, profiled = profile_steps(step, device, steps=setting.steps)
    plain += [_timed(step, device) for _ in range(setting.steps)]
    return _summary(times, plain=plain, profiled=profiled, steps=setting.steps, on_device=device.type == "cuda")


def build_step(setting: Setting) -> tuple[nn.Module, Callable[[], None]]:
    """The model, and a training step of it, everything made from seed 0. ConfigError for a model without a literal copy."""
    device = torch.device(setting.device)
    torch.manual_seed(0)
    backbone = create_model(setting.model, img_size=setting.img_size)
    check(backbone)
    assert isinstance(backbone, Backbone)
    images = torch.randn(setting.batch, backbone.in_chans, setting.img_size, setting.img_size, device=device)
    labels = torch.randint(0, backbone.num_classes, (setting.batch,), device=device)
    backbone.to(device).train()
    model: nn.Module = backbone
    optimizer: torch.optim.Optimizer
    if setting.peer.literal:
        from eit_lab.benchmark.speed.literal import Literal

        model = Literal(backbone)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    else:
        optimizer = build_optimizer(backbone, RecipeConfig())

    def step() -> None:
        optimizer.zero_grad()
        low = setting.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return model, step


def profile_steps(step: Callable[[], None], device: torch.device, *, steps: int) -> tuple[Times, list[float]]:
    """Seconds by key of all the steps together, and the wall seconds of each under the profiler."""
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    wall = []
    with _quiet(), profile(activities=activities, acc_events=True) as profiler:
        for _ in range(steps):
            wall.append(_timed(lambda: _in_scope(step), device))
    events = [one for one in profiler.events() or () if one.device_type == DeviceType.CPU]
    return attribute(events, on_device=on_device), wall


def _in_scope(step: Callable[[], None]) -> None:
    with record_function(STEP):
        step()


def _timed(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library says on stderr, past Python, that there is no GPU."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ["KINETO_LOG_LEVEL"] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ["KINETO_LOG_LEVEL"]
        else:
            os.environ["KINETO_LOG_LEVEL"] = before


def _summary(times: Times, *, plain: list[float], profiled: list[float], steps: int, on_device: bool) -> dict[str, Any]:
    """For the record: ``scale`` is what a profiled second counts of a step without the profiler."""
    wall = median(plain)
    scale = 1 / steps if on_device else wall / times.total()
    groups: dict[str, dict[str, dict[str, float]]] = {}
    places: dict[str, dict[str, dict[str, float]]] = {}
    for key, seconds in times.seconds.items():
        cell = groups.setdefault(key.group, {}).setdefault(key.phase, {"seconds": 0.0, "copies": 0.0})
        cell["seconds"] += scale * seconds
        cell["copies"] += scale * times.copies.get(key, 0.0)
        at = places.setdefault(key.group, {}).setdefault(key.phase, {})
        at[key.place] = at.get(key.place, 0.0) + scale * seconds
    idle = max(0.0, wall - times.total() / steps) if on_device else 0.0
    if on_device:
        cell = groups.setdefault("everything else", {}).setdefault("idle", {"seconds": 0.0, "copies": 0.0})
        cell["seconds"] += idle
    most = sorted(times.names.items(), key=lambda item: -item[1])[:_NUM_NAMES]
    return {
        "wall": plain,
        "profiled_wall": profiled,
        "seconds": wall,
        "idle": idle,
        "groups": groups,
        "places": places,
        "events": [
            {"group": group, "phase": phase, "name": name, "seconds": scale * seconds}
            for (group, phase, name), seconds in most
        ],
    }
