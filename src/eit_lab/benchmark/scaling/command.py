"""``python -m eit_lab.bench scaling``: the model of training on many GPUs, the simulation beside it, and the record of both."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eit_lab.benchmark.scaling.cluster import Cluster, measured_cluster
from eit_lab.benchmark.scaling.model import BASE_GPUS
from eit_lab.benchmark.words import read_words
from eit_lab.config import ConfigError

HELP = """\
Say what training on many GPUs would take: a model in closed form, a simulation beside it, and what of both this machine can check.

  python -m eit_lab.bench scaling [gpus=N,N,...] [steps=N] [seed=N] [data=FILE] [check=false] [out=FOLDER]

  gpus      numbers of GPUs: 8, and more that it divides, at most 4096    [8,16,32,64,128,256,512,1024]
  steps     steps simulated of each                                       [100]
  seed      of the simulation: the same numbers to the last digit         [0]
  data      record of `bench data`: what a core of your machine loads     [benchmarks/records/data.json]
  check     DDP's buckets and a ring's bytes, on processes of this machine  [true]
  out       folder of the record: scaling.md, .json, .png, .svg           [bench-scaling]

No GPU is used. Takes two to five minutes.
"""
_DEFAULTS = {
    "gpus": "8,16,32,64,128,256,512,1024", "steps": "100", "seed": "0", "data": "", "check": "true", "out": "bench-scaling",
}  # fmt: skip
_MOST_GPUS, _FEWEST_STEPS = 4096, 10
_RECORD = Path("benchmarks/records/data.json")
_RING_SIZES = (2, 3, 4)
"""Processes whose all-reduce is counted; DDP's buckets are those of the first."""

Progress = Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's words."""

    gpus: tuple[int, ...]
    steps: int
    seed: int
    cluster: Cluster
    check: bool
    out: Path


def run(argv: Sequence[str], *, progress: Progress) -> int:
    """Model, simulate, print, and write the record. Returns 0; raises ConfigError for wrong words, RunError."""
    options = _options(argv)
    from eit_lab.benchmark.scaling.reality import check
    from eit_lab.benchmark.scaling.results import compute, counted_gpus
    from eit_lab.benchmark.scaling.tables import Summary
    from eit_lab.benchmark.scaling.workload import SIZES, count_workload

    with progress() as advance:
        workloads = []
        for place, size in enumerate(SIZES):
            advance("counting operations", place, len(SIZES))
            workloads.append(count_workload(size, counted_gpus(options.gpus)))
        reality: dict[int, Sequence[Mapping[str, Any]]] = {}
        for processes in _RING_SIZES if options.check else ():
            advance("real processes", len(reality), len(_RING_SIZES))
            reality[processes] = check(() if reality else SIZES, processes=processes)
        results = compute(
            options.cluster,
            workloads,
            gpus=options.gpus,
            steps=options.steps,
            seed=options.seed,
            reality=reality,
            advance=advance,
        )
    summary = Summary(results, f"python -m eit_lab.bench scaling {shlex.join(argv)}".strip())
    print("\n".join(summary.lines))
    for path in summary.save(options.out):
        print(path)
    return 0


def _options(words: Sequence[str]) -> Options:
    told = read_words(words, _DEFAULTS, verb="scaling")
    if told["check"] not in ("true", "false"):
        raise ConfigError(f"check must be true or false, got {told['check']!r}")
    if not told["seed"].isdigit():
        raise ConfigError(f"seed must be a whole number of 0 or more, got {told['seed']!r}")
    if not told["steps"].isdigit() or int(told["steps"]) < _FEWEST_STEPS:
        raise ConfigError(f"steps must be a whole number of {_FEWEST_STEPS} or more, got {told['steps']!r}")
    return Options(
        gpus=_gpus(told["gpus"]),
        steps=int(told["steps"]),
        seed=int(told["seed"]),
        cluster=measured_cluster(Path(told["data"]).expanduser() if told["data"] else _record()),
        check=told["check"] == "true",
        out=Path(told["out"]).expanduser(),
    )


def _gpus(text: str) -> tuple[int, ...]:
    numbers = text.split(",")
    for number in numbers:
        count = int(number) if number.isdigit() else 0
        if count % BASE_GPUS or not BASE_GPUS <= count <= _MOST_GPUS:
            near = min(_MOST_GPUS, max(BASE_GPUS, round(count / BASE_GPUS) * BASE_GPUS))
            raise ConfigError(
                f"gpus must be whole machines of {BASE_GPUS}, at most {_MOST_GPUS}, got {number!r}; nearest: {near}"
            )
    return tuple(sorted({BASE_GPUS, *map(int, numbers)}))


def _record() -> Path:
    """The project's own record where there is a checkout, else the same place in the folder one is in."""
    inside = Path(__file__).parents[4] / _RECORD
    return inside if inside.is_file() else _RECORD
