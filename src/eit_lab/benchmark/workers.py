"""What a training process sees of its workers: how soon the first batch comes, and how much memory they take.

Measured in a process of its own, which imports what a training does, through the DataModule that trains.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from eit_lab.benchmark.loaders import FULL_RECIPE, config_of
from eit_lab.command import RunError
from eit_lab.data.index import SplitIndex, write_index
from eit_lab.data.layouts.shards import MANIFEST, sealed
from eit_lab.data.module import ImageData
from eit_lab.data.roots import open_data

IMAGENET = 1_281_167  # training images of ImageNet-1K
_COLUMNS = ("container", "offset", "size", "label", "checksum", "width", "height")


def large_root(shards: Path, target: Path, *, num_samples: int = IMAGENET) -> Path:
    """A root whose training split has ``num_samples`` entries: those of ``shards``, again and again, with keys as long."""
    if (target / MANIFEST).exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    for name in ("train", "val", "val.index"):
        link = target / name
        link.unlink(missing_ok=True)
        link.symlink_to((shards / name).resolve())
    index = SplitIndex(shards / "train.index")
    place = np.arange(num_samples) % len(index)
    names = index.keys()
    keys = [name.encode() for name in names]
    times, rest = divmod(num_samples, len(index))
    blob = b"".join(keys) * times + b"".join(keys[:rest])
    columns = {name: getattr(index, name)[place] for name in _COLUMNS}
    columns["key_end"] = np.cumsum(np.array([len(key) for key in keys])[place])
    write_index(target / "train.index", columns, blob, containers=index.containers, facts=index.facts)
    manifest = json.loads((shards / MANIFEST).read_text())
    content = (target / "train.index").read_bytes()
    manifest["files"]["train.index"] = [len(content), xxhash.xxh3_128_hexdigest(content)]
    manifest["splits"]["train"]["num_samples"] = num_samples
    (target / MANIFEST).write_text(json.dumps(sealed(manifest)))
    return target


def measure(
    files: Path, shards: Path, large: Path, *, cache: Path, batch_size: int, rounds: int, memory_batches: int
) -> dict[str, Any]:
    """``_measure`` in a process of its own. Raises RunError."""
    words = [*map(str, (files, shards, large, cache)), str(batch_size), str(rounds), str(memory_batches)]
    # NOTE: not multiprocessing's "spawn": in such a process DataLoader would start its workers so too.
    done = subprocess.run(
        [sys.executable, "-m", "eit_lab.benchmark.workers", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RunError(f"measuring the workers failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _measure(
    files: Path, shards: Path, large: Path, cache: Path, *, batch_size: int, rounds: int, memory_batches: int
) -> dict[str, Any]:
    """First batches of files and shards in turn, opening the large root, memory of a worker on shards and on the large root."""
    torch.set_num_threads(1)
    roots = {"files": files, "shards": shards, "large": large}

    def module(name: str) -> ImageData:
        config = config_of(roots[name], recipe=FULL_RECIPE, batch_size=batch_size, cache=cache)
        data = ImageData(dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, repeated_augment=1)))
        data.setup("fit")
        return data

    found: dict[str, Any] = {"first_batch_s": {"files": [], "shards": []}}
    ready = {name: module(name) for name in ("files", "shards")}
    for name in ready:
        _first_batch(ready[name])
    for _ in range(rounds):
        for name, data in ready.items():
            found["first_batch_s"][name].append(_first_batch(data))
    config = config_of(large, recipe=FULL_RECIPE, batch_size=batch_size, cache=cache)
    found["open_index_s"] = [_seconds(lambda: SplitIndex(large / "train.index")) for _ in range(rounds)]
    found["open_root_s"] = [_seconds(lambda: open_data(config.data)) for _ in range(rounds)]  # type: ignore[arg-type]
    found["index_samples"] = len(SplitIndex(large / "train.index"))
    found["index_bytes"] = (large / "train.index").stat().st_size
    found["memory"] = _memory(ready["shards"], num_batches=memory_batches)
    ready.clear()
    found["memory_large"] = _memory(module("large"), num_batches=memory_batches)
    return found


def _seconds(what: Callable[[], object]) -> float:
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def _first_batch(data: ImageData) -> float:
    loader = data.train_dataloader()
    gc.collect()
    began = time.perf_counter()
    next(iter(loader))
    return time.perf_counter() - began


def _memory(data: ImageData, *, num_batches: int) -> dict[str, Any]:
    """Of one worker, in MB, after each of so many batches, epoch after epoch: see ``_smaps`` for the three kinds."""
    loader, samples, epoch = data.train_dataloader(), list[tuple[float, float, float]](), 0
    while len(samples) < num_batches:
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        for _ in islice(loader, num_batches - len(samples)):
            (worker,) = multiprocessing.active_children()
            samples.append(_smaps(worker.pid or 0))
        epoch += 1
    array, tenth = np.array(samples), max(1, num_batches // 10)

    def named(row: NDArray[np.float64]) -> dict[str, float]:
        return dict(zip(("rss", "pss", "uss"), row.round(1).tolist(), strict=True))

    return {
        "batches": num_batches,
        "peak_mb": named(array.max(axis=0)),
        "early_mb": named(np.median(array[tenth : 2 * tenth], axis=0)),
        "late_mb": named(np.median(array[-tenth:], axis=0)),
        "uss_mb": array[:, 2].round(1).tolist(),
    }


def _smaps(pid: int) -> tuple[float, float, float]:
    """(RSS, PSS, USS) in MB: all that is mapped and in memory; shared pages by their share; what only this process has."""
    kilobytes: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        kilobytes[name.rstrip(":")] = int(value)
    uss = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
    return kilobytes["Rss"] * 1.024e-3, kilobytes["Pss"] * 1.024e-3, uss * 1.024e-3


if __name__ == "__main__":
    _files, _shards, _large, _cache = map(Path, sys.argv[1:5])
    _batch_size, _rounds, _memory_batches = map(int, sys.argv[5:])
    _found = _measure(
        _files, _shards, _large, _cache, batch_size=_batch_size, rounds=_rounds, memory_batches=_memory_batches
    )
    print(json.dumps(_found))
