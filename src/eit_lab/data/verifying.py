"""Whether shards are what was written: every checksum, and pixels and labels compared with the source. No torch.

A damaged record is named by its image. The manifest vouches for each file, an index for each record of its shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from eit_lab.config import ConfigError
from eit_lab.data.decode import DecodeError, Decoder
from eit_lab.data.index import DamagedIndexError, SplitIndex
from eit_lab.data.layouts.shards import MANIFEST, hash_of_files, read_manifest
from eit_lab.data.packed import DamagedRecordError, Record, unpack_record
from eit_lab.data.packing import SPLITS
from eit_lab.data.pool import count, run_all
from eit_lab.data.reading import SampleError, SampleReader
from eit_lab.data.roots import OpenRoot, Split

_BLOCK = 1 << 20
_SEED = 0  # of the images that are compared


class Damage(NamedTuple):
    """Something that is not what was written."""

    name: str
    """File below the root, or file and image."""
    reason: str


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What was looked at, and what is wrong."""

    damages: Sequence[Damage]
    num_files: int
    num_records: int
    num_compared: int
    """Images whose pixels were compared with the source's."""


def verify(
    root: Path,
    manifest: Mapping[str, Any],
    *,
    source: OpenRoot | None,
    sample: int | None,
    workers: int,
    on_progress: Callable[[int], None] = lambda num: None,
) -> Verified:
    """Check the shards in ``root``; compare ``sample`` images with ``source`` (None: all of them), where there is one.

    Raises ConfigError for a source of other classes or images.
    """
    damages = list[Damage]()
    if (
        hash_of_files({name: (size, checksum) for name, (size, checksum) in manifest["files"].items()})
        != manifest["hash"]
    ):
        damages.append(Damage(MANIFEST, "the hash of the whole differs"))
    indices = {split: index for split in SPLITS if (index := _check_index(root, split, manifest, damages)) is not None}
    pairs: dict[Split, NDArray[np.int64]] = {}
    if source is not None:
        if list(source.listing.class_names) != manifest["class_names"]:
            raise ConfigError(
                f"SRC must be what the shards were built from, got {source.store.root!r} with other classes"
            )
        total = sum(map(len, indices.values()))
        chosen = np.sort(np.random.Generator(np.random.Philox(key=_SEED)).permutation(total)[:sample])
        first = 0
        for split, index in indices.items():
            partner = _partners(split, index, source, damages)
            mine = chosen[(chosen >= first) & (chosen < first + len(index))] - first
            pairs[split] = np.full(len(index), -1)
            pairs[split][mine] = partner[mine]
            first += len(index)
    tasks = list(_tasks(root, manifest, indices, source, pairs))
    num_compared = 0
    with closing(run_all(check_file, tasks, workers=workers, on_progress=on_progress)) as results:
        for found, compared in results:
            damages += found
            num_compared += compared
    return Verified(
        damages=sorted(damages),
        num_files=len(manifest["files"]),
        num_records=sum(map(len, indices.values())),
        num_compared=num_compared,
    )


def manifest_of(root: Path) -> dict[str, Any]:
    """The manifest of shards in a local folder. Raises ConfigError."""
    path = root / MANIFEST
    if not path.is_file():
        unfinished = (root / "build.json").is_file()
        why = "the build has not finished: its command goes on" if unfinished else f"there is no {MANIFEST}"
        raise ConfigError(f"DST must be a folder of shards, got {str(root)!r}: {why}")
    return read_manifest(path.read_bytes(), str(path))


def _check_index(root: Path, split: Split, manifest: Mapping[str, Any], damages: list[Damage]) -> SplitIndex | None:
    name = f"{split}.index"
    size, checksum = manifest["files"][name]
    try:
        content = (root / name).read_bytes()
        index = SplitIndex(root / name)
    except FileNotFoundError:
        damages.append(Damage(name, "is missing"))
        return None
    except DamagedIndexError:
        damages.append(Damage(name, "is damaged or cut short"))
        return None
    if (len(content), xxhash.xxh3_128_hexdigest(content)) != (size, checksum):
        damages.append(Damage(name, "its checksum differs"))
    if len(index) != manifest["splits"][split]["num_samples"]:
        damages.append(Damage(name, f"has {len(index)} images, must have {manifest['splits'][split]['num_samples']}"))
    return index


def _partners(split: Split, index: SplitIndex, source: OpenRoot, damages: list[Damage]) -> NDArray[np.int64]:
    """The source's number of each sample; labels are compared on the way."""
    other = source.listing.splits[split]
    keys, others = index.keys(), other.keys()
    if keys == others:
        partner = np.arange(len(index))
    else:  # some were left out
        places = {key: place for place, key in enumerate(others)}
        absent = next((key for key in keys if key not in places), None)
        if absent is not None:
            raise ConfigError(
                f"SRC must be what the shards were built from, got {source.store.root!r} without {split} {absent}"
            )
        partner = np.array([places[key] for key in keys])
    for sample in np.flatnonzero(other.label[partner] != index.label).tolist():
        damages.append(
            Damage(
                f"{split}.index ({keys[sample]})",
                f"has label {index.label[sample]}, the source {other.label[partner[sample]]}",
            )
        )
    return partner


# ------------------------------------------------------------------------------------------------------------------ one file


@dataclass(frozen=True, kw_only=True)
class FileTask:
    """One file, as a worker gets it."""

    root: Path
    name: str
    size: int
    checksum: str
    index: SplitIndex | None
    """Of a shard: what its records are."""
    samples: NDArray[np.int64]
    """Of a shard: its samples in the order of their places."""
    source: SampleReader | None
    partners: NDArray[np.int64]
    """(samples,): the source's numbers, -1: not compared."""


def _tasks(
    root: Path,
    manifest: Mapping[str, Any],
    indices: Mapping[Split, SplitIndex],
    source: OpenRoot | None,
    pairs: Mapping[Split, NDArray[np.int64]],
) -> Iterator[FileTask]:
    of_shard: dict[str, tuple[Split, NDArray[np.int64]]] = {}
    for split, index in indices.items():
        order = np.lexsort((index.offset, index.container))
        bounds = np.searchsorted(index.container[order], np.arange(len(index.containers) + 1))
        for place, container in enumerate(index.containers):
            of_shard[container.name] = (split, order[bounds[place] : bounds[place + 1]])
    for name, (size, checksum) in manifest["files"].items():
        if name.endswith(".index"):
            continue
        where, samples = of_shard.get(name, (None, np.zeros(0, dtype=np.int64)))
        yield FileTask(
            root=root,
            name=name,
            size=size,
            checksum=checksum,
            index=indices[where] if where else None,
            samples=samples,
            source=source.reader(where) if source is not None and where else None,
            partners=pairs[where][samples] if where is not None and where in pairs else np.full(len(samples), -1),
        )


def check_file(task: FileTask) -> tuple[list[Damage], int]:
    """(what is wrong with a file, number of its images that were compared)."""
    damages, compared, decoders = list[Damage](), 0, (Decoder(), Decoder())
    digest, place = xxhash.xxh3_128(), 0
    try:
        with (task.root / task.name).open("rb") as file:
            for sample, partner in zip(task.samples.tolist(), task.partners.tolist(), strict=True):
                assert task.index is not None
                offset, size = int(task.index.offset[sample]), int(task.index.size[sample])
                digest.update(file.read(offset - place))
                content = file.read(size)
                digest.update(content)
                place = offset + size
                count()
                named = f"{task.name} ({task.index.key(sample)})"
                try:
                    record = unpack_record(
                        content,
                        width=int(task.index.width[sample]),
                        height=int(task.index.height[sample]),
                        checksum=int(task.index.checksum[sample]),
                    )
                except DamagedRecordError as error:
                    damages.append(Damage(named, "is cut short" if len(content) < size else str(error)))
                    continue
                if partner >= 0 and task.source is not None:
                    compared += 1
                    reason = _compare(record, task.source, partner, decoders)
                    if reason is not None:
                        damages.append(Damage(named, reason))
            while block := file.read(_BLOCK):
                digest.update(block)
            there = file.tell()
    except FileNotFoundError:
        count(len(task.samples))
        with_images = f", with {len(task.samples):,} images" if len(task.samples) else ""
        return [Damage(task.name, f"is missing{with_images}")], 0
    except OSError as error:
        return [*damages, Damage(task.name, f"cannot be read: {error.strerror or error}")], compared
    if there != task.size:
        damages.append(Damage(task.name, f"has {there:,} bytes, must have {task.size:,}"))
    elif digest.hexdigest() != task.checksum:
        damages.append(Damage(task.name, "its checksum differs"))
    return damages, compared


def _compare(record: Record, source: SampleReader, partner: int, decoders: tuple[Decoder, Decoder]) -> str | None:
    """What differs between a stored image and the source's, if anything does: all pixels, and those of a crop."""
    try:
        original = bytes(source.read(partner).data)
    except SampleError as error:
        return f"cannot be compared: {error}"
    if record.segments is None and record.data == original:
        return None
    try:
        theirs = decoders[0].decode(original)
    except DecodeError as error:
        return f"cannot be compared: {source.name(partner)} cannot be decoded ({error})"
    try:
        if not np.array_equal(decoders[1].decode(record.data), theirs):
            return f"its pixels are not those of {source.name(partner)}"
        height, width = theirs.shape[:2]
        top, left, h, w = height // 4, width // 4, max(1, height // 2), max(1, width // 2)
        crop = decoders[1].crop(record.data, record.segments, box=(top, left, h, w))
        if not np.array_equal(crop, theirs[top : top + h, left : left + w]):
            return f"pixels of a crop are not those of {source.name(partner)}"
    except DecodeError as error:
        return f"cannot be decoded: {error}"
    return None
