"""What looking inside costs: a model's forward pass alone, and with the figures of all its layers, in turn over the same images.

Three things are timed in each round, one after the other: the plain pass; the pass with HFD share and attention distance of every
layer (goal: at most 1.6 times the plain one); the pass with everything that ``analyze`` takes from it. Then, in a process of its
own, memory: how far it rises above what the process has with the model alone (goal: 4 GB for EIT-Large), and whether it goes on
rising with the number of images.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from eit_lab.benchmark.words import read_words
from eit_lab.config import ConfigError
from eit_lab.processor import machine
from eit_lab.runs import code_state, versions, write_text

HELP = """\
Measure what looking inside a network costs: the forward pass with the figures of all layers beside the plain one, and memory.

  python -m eit_lab.bench analysis [models=NAME,NAME] [memory=NAME] [images=N] [batch=N] [rounds=N] [device=cpu|cuda] [out=FOLDER]

  models    what is timed                                                          [vit_base,eit_base]
  memory    the model whose memory is measured                                     [eit_large]
  images    random ones of 224 px, in each turn; the memory is of ten times as many [64]
  batch     of one forward pass, a multiple of 32                                  [32]
  rounds    turns of each; what is compared is compared within a round             [5]
  device    cpu, or cuda                                                           [cuda where there is one]
  out       folder of the record: analysis.md, analysis.json                       [bench-analysis]

Takes about fifteen minutes on two cores; let the machine do nothing else. Exit status 0 whether the goals are met or not.
"""
GOAL_RATIO, GOAL_GB = 1.6, 4.0
_DEFAULTS = {
    "models": "vit_base,eit_base", "memory": "eit_large", "images": "64", "batch": "32", "rounds": "5", "device": "",
    "out": "bench-analysis",
}  # fmt: skip
_IMG_SIZE = 224
_MEMORY_TIMES = 10


@dataclass(frozen=True, kw_only=True)
class _Options:
    models: tuple[str, ...]
    memory: str
    images: int
    batch: int
    rounds: int
    device: str
    out: Path


def run(argv: Sequence[str], *, progress: Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]) -> int:
    """``bench analysis``: measure, print and write the record. Returns 0; raises ConfigError for wrong words.

    ``progress``: a bar, told of a step's name, what of it is done, and all of it.
    """
    options = _options(argv)
    with progress() as advance:
        results = _measure(options, advance)
    results["command"] = " ".join(["python -m eit_lab.bench analysis", *argv])
    text = as_markdown(results)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "analysis.json", json.dumps(results, indent=2) + "\n")
    write_text(options.out / "analysis.md", text)
    print(f"{options.out / 'analysis.md'}\n{options.out / 'analysis.json'}")
    return 0


def _options(argv: Sequence[str]) -> _Options:
    told = read_words(argv, _DEFAULTS, verb="analysis")
    for key in ("images", "batch", "rounds"):
        if not told[key].isdecimal() or int(told[key]) == 0:
            raise ConfigError(f"{key} must be a whole number of 1 or more, got {told[key]!r}")
    if int(told["batch"]) % 32:
        raise ConfigError(f"batch must be a multiple of 32, got {told['batch']}; nearest: 32")
    import torch

    device = told["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"device must be cpu, or cuda where there is one, got {device!r}; nearest: cpu")
    return _Options(
        models=tuple(told["models"].split(",")),
        memory=told["memory"],
        images=int(told["images"]),
        batch=int(told["batch"]),
        rounds=int(told["rounds"]),
        device=device,
        out=Path(told["out"]).expanduser(),
    )


# -------------------------------------------------------------------------------------------------------------- measuring


def _measure(options: _Options, advance: Callable[[str, int, int], None]) -> dict[str, Any]:
    import torch

    from eit_lab.benchmark.turns import interleave
    from eit_lab.training.trainer import device_name

    precisions = ("float32", "bfloat16")
    turns: dict[str, Callable[[], float]] = {}
    for model in options.models:
        for precision in precisions:
            for what, turn in _turns(model, precision, options).items():
                turns[f"{model} {precision} {what}"] = turn
    for place, turn in enumerate(turns.values()):
        advance("warming up", place, len(turns))
        turn()  # allocations, first touches
    total = options.rounds * len(turns)
    done = iter(range(1, total + 1))
    seconds = interleave(turns, rounds=options.rounds, on_turn=lambda: advance("in turn", next(done), total))
    advance("memory", 0, 1)
    memory = _memory(options)
    advance("memory", 1, 1)
    return {
        "seconds": seconds,
        "memory": memory,
        "images": options.images,
        "batch": options.batch,
        "img_size": _IMG_SIZE,
        "device": device_name(torch.device(options.device)),
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "commit": code_state()[0],
        "date": time.strftime("%Y-%m-%d"),
        **{key: value for key, value in versions().items() if key in ("python", "packages", "eit_lab")},
    }


def _turns(name: str, precision: str, options: _Options) -> dict[str, Callable[[], float]]:
    """Seconds of one turn over the images: the plain pass, with the two figures, with everything."""
    import torch

    from eit_lab import create_model
    from eit_lab.analysis.profile import Profile

    torch.manual_seed(0)
    model = create_model(name, img_size=_IMG_SIZE).eval().to(options.device)
    images = torch.randn(options.images, 3, _IMG_SIZE, _IMG_SIZE, device=options.device)
    two = Profile(model, _IMG_SIZE, frequency=("hfd_share",), heads=("attention_distance",))
    everything = Profile(model, _IMG_SIZE, similarity=True, rollout=True)

    def timed(body: Callable[[Any, int], object]) -> Callable[[], float]:
        def turn() -> float:
            began = time.perf_counter()
            with (
                torch.inference_mode(),
                torch.autocast(options.device, torch.bfloat16, enabled=precision == "bfloat16"),
            ):
                for first in range(0, options.images, options.batch):
                    body(images[first : first + options.batch], first)
            if options.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - began

        return turn

    return {
        "plain": timed(lambda x, first: model(x)),
        "two": timed(lambda x, first: two.update(x, first=first)),
        "everything": timed(lambda x, first: everything.update(x, first=first)),
    }


def _memory(options: _Options) -> dict[str, Any]:
    """Of a process of its own, whose memory nothing else has raised before."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(options, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv()
    finally:
        process.join()
    return found


def _measure_memory(options: _Options, sender: Any) -> None:
    import torch

    from eit_lab import create_model
    from eit_lab.analysis.filters import FilteredAccuracy, filter_batch, filter_settings
    from eit_lab.analysis.profile import Profile
    from eit_lab.analysis.receptive_field import contribution

    device, total = options.device, options.images * _MEMORY_TIMES
    model = create_model(options.memory, img_size=_IMG_SIZE).eval().to(device)
    profile = Profile(model, _IMG_SIZE, similarity=True, rollout=True)
    before = _now(device)
    peaks = []
    with torch.inference_mode():
        for first in range(0, total, options.batch):
            images = torch.randn(min(options.batch, total - first), 3, _IMG_SIZE, _IMG_SIZE, device=device)
            profile.update(images, first=first)
            peaks.append(_peak(device))
        settings = filter_settings(model, img_hw=(_IMG_SIZE, _IMG_SIZE))
        metric = FilteredAccuracy(settings).to(device)
        index = torch.arange(len(images), device=device)
        filter_batch(model, images, index, settings=settings, metric=metric, index=index)
    contribution(model, images[:8].clone())
    gigabytes = [(peak - before) / 1e9 for peak in [*peaks, _peak(device)]]
    sender.send(
        {
            "model": options.memory,
            "images": total,
            "gb_half_way": gigabytes[len(peaks) // 2 - 1],
            "gb_forward": gigabytes[-2],
            "gb": gigabytes[-1],
        }
    )


def _now(device: str) -> int:
    """Bytes in use."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def _peak(device: str) -> int:
    """Most bytes that were in use at once so far."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


# ----------------------------------------------------------------------------------------------------------------- the record


def as_markdown(results: dict[str, Any]) -> str:
    """The record for people."""
    seconds: dict[str, list[float]] = results["seconds"]
    head = [
        "# What looking inside costs",
        "",
        f"`{results['command']}`, {results['date']}, {results['device']} ({results['machine']}), Python {results['python']}, "
        f"torch {results['packages']['torch']}, commit {results['commit']}.",
        "",
        f"{results['images']} random images of {results['img_size']} px, batch {results['batch']}; medians over rounds, in which the "
        "three take turns; ratios within a round.",
        "",
        "| model | precision | plain pass, ms an image | HFD share and attention distance of all layers | range | goal | everything | range |",
        "|---|---|---:|---:|---|---:|---:|---|",
    ]
    for key, plain in seconds.items():
        if not key.endswith(" plain"):
            continue
        model, precision, _ = key.split()
        ratios = {
            what: [a / b for a, b in zip(seconds[f"{model} {precision} {what}"], plain, strict=True)]
            for what in ("two", "everything")
        }
        goal = f"{GOAL_RATIO}" if precision == "float32" else ""
        head.append(
            f"| {model} | {precision} | {1000 * median(plain) / results['images']:.1f} | {median(ratios['two']):.2f}x | "
            f"{min(ratios['two']):.2f} to {max(ratios['two']):.2f} | {goal} | {median(ratios['everything']):.2f}x | "
            f"{min(ratios['everything']):.2f} to {max(ratios['everything']):.2f} |"
        )
    memory = results["memory"]
    head += [
        "",
        f"Memory beyond the model's, {memory['model']}: {memory['gb_half_way']:.2f} GB at its most half way and "
        f"{memory['gb_forward']:.2f} GB after {memory['images']:,} images with everything of a forward pass; {memory['gb']:.2f} GB with "
        f"filters and receptive field of one batch too (goal: {GOAL_GB:g}).",
        "",
    ]
    return "\n".join(head)
