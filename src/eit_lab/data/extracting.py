"""Shards, or any other layout, back to a file an image in class folders: OUT/SPLIT/CLASS/FILE. No torch."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from eit_lab.command import RunError
from eit_lab.config import ConfigError
from eit_lab.data.layouts.listing import IMAGE_SUFFIXES
from eit_lab.data.pool import count, run_all
from eit_lab.data.reading import SampleError, SampleReader
from eit_lab.data.roots import OpenRoot, Split


@dataclass(frozen=True, kw_only=True)
class _Task:
    """The samples of one container, as a worker gets them."""

    reader: SampleReader
    samples: NDArray[np.int64]
    class_names: Sequence[str]
    target: Path
    originals: Path | None
    """The tar file that has them as they were."""


def extract(
    root: OpenRoot,
    target: Path,
    *,
    splits: Sequence[Split],
    workers: int,
    on_progress: Callable[[int], None] = lambda num: None,
) -> bool:
    """Write all images of these splits; True: as they were, byte for byte, False: as they are stored.

    Raises ConfigError for a target that has files in it, RunError for an image that cannot be read, or a full disk.
    """
    for split in splits:
        if (target / split).exists():
            raise ConfigError(f"OUT must be a new or empty folder, got {str(target)!r} with {split} in it")
    store = root.store
    originals = store.folder / "originals" if store.is_local and root.listing.layout == "shards" else None
    kept = originals is not None and originals.is_dir()
    tasks = []
    for split in splits:
        index = root.listing.splits[split]
        order = np.lexsort((index.offset, index.container))
        bounds = np.searchsorted(index.container[order], np.arange(len(index.containers) + 1))
        for place, container in enumerate(index.containers):
            tar = f"{container.name.replace('/', '-').removesuffix('.shard')}.tar"
            tasks.append(
                _Task(
                    reader=root.reader(split),
                    samples=order[bounds[place] : bounds[place + 1]],
                    class_names=root.listing.class_names,
                    target=target / split,
                    originals=originals / tar if kept and originals is not None else None,
                )
            )
    try:
        for split in splits:
            for name in root.listing.class_names:
                (target / split / _safe(name)).mkdir(parents=True, exist_ok=True)
        with closing(run_all(_extract, tasks, workers=workers, on_progress=on_progress)) as results:
            for _ in results:
                pass
    except FileExistsError as error:
        raise RunError(f"{error.filename}: two images have this name") from None
    except OSError as error:
        raise RunError(f"{error.filename or target}: {error.strerror or error}") from None
    return kept or root.listing.layout != "shards"


def _extract(task: _Task) -> None:
    index = task.reader.index

    def write(sample: int, data: bytes) -> None:
        count()
        name = _safe(index.key(sample).rpartition("/")[2])
        if not name.lower().endswith(IMAGE_SUFFIXES):
            name += ".png" if data.startswith(b"\x89PNG") else ".JPEG"
        with (task.target / _safe(task.class_names[int(index.label[sample])]) / name).open("xb") as file:
            file.write(data)

    if task.originals is None:
        for sample in task.samples.tolist():
            try:
                write(sample, bytes(task.reader.read(sample).data))
            except SampleError as error:
                raise RunError(f"{error}; shards verify tells all that is damaged") from None
        return
    left = {index.key(sample): sample for sample in task.samples.tolist()}
    try:
        with tarfile.open(task.originals) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None, "only files are written there"
                write(left.pop(member.name), file.read())
    except (tarfile.TarError, KeyError) as error:
        raise RunError(f"{task.originals} is damaged ({error}); shards verify tells all that is") from None
    if left:
        raise RunError(f"{task.originals} lacks {len(left)} images; shards verify tells all that is damaged")


def _safe(name: str) -> str:
    """A name of a file or folder, from a data set's own."""
    return "_" if name in ("", ".", "..") else name.replace("/", "_")
