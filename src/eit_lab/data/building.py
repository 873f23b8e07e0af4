"""Building shards (packed.py) from a data set of any layout: lossless, in parallel, going on where it was stopped. No torch.

What is written is a function of the source and the options alone, to the last byte: samples are dealt to shards in a random
order of a fixed seed, so that each shard holds all classes, and the index has them in the source's order: a run sees the
same numbers on a folder and on its shards.

    manifest.json                counts, class names, fingerprint, options, size and checksum of every file
    train.index, val.index       a row for each sample
    train/00000.shard ...        the samples
    originals/train-00000.tar    their files as they were, where that was asked for

A shard is there whole or not at all. The same command goes on after a kill, and mends shards that were lost or damaged since.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from eit_lab.command import RunError
from eit_lab.config import ConfigError
from eit_lab.data.index import Container, SplitIndex, write_index
from eit_lab.data.layouts.shards import FORMAT, MANIFEST, VERSION, hash_of_files, read_manifest, sealed
from eit_lab.data.packing import REWRITTEN, ROW_COLUMNS, SPLITS, Damaged, PackedShard, ShardTask, pack_shard
from eit_lab.data.pool import run_all
from eit_lab.data.restart import jpegtran
from eit_lab.data.roots import OpenRoot, Split
from eit_lab.version import __version__

SHARD_MB = 128
_FEWEST_SHARDS = 16  # of a split, if they get _SMALLEST_MB each: work for as many processes, windows to shuffle in
_SMALLEST_MB = 4
_SEED = 20211  # of the deal: fixed, part of the format
_GUESSED_BYTES = 110_000  # of an image whose size nothing tells: ImageNet's mean
_SIZES_LOOKED_AT = 512
_WINDOW = 32  # fetched files to mix
_PLAN = "build.json"
DAMAGED = "damaged.txt"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EINVAL)  # of folders, on network disks
_OURS = (MANIFEST, _PLAN, DAMAGED, "train.index", "val.index", "train", "val", "originals")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to build."""

    shard_mb: int = SHARD_MB
    rewrite: bool = True
    """Restart markers where they can be put in; False: all files as they are."""
    keep_original: bool = False
    damaged: Damaged = "stop"
    """What becomes of images that cannot be decoded; does not change shards without any."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What a build did."""

    manifest: Mapping[str, Any]
    num_shards: int
    num_found: int
    """Shards that were there already."""


# ---------------------------------------------------------------------------------------------------------- the whole of it


def build(
    source: OpenRoot,
    target: Path,
    options: Options,
    *,
    workers: int,
    overwrite: bool = False,
    on_progress: Callable[[int], None] = lambda num: None,
) -> Built:
    """Build shards in ``target``, or go on with it; ``on_progress`` gets the number of images done.

    Raises ConfigError for a target that is something else, RunError for damaged images, a full disk, a worker that died.
    """
    _check_target(target, source, options)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with _held(target):
            plan = _agreed_plan(source, target, options, overwrite=overwrite)
            _sweep(target)  # what processes left that were killed
            try:
                return _build(source, target, options, plan, workers=workers, on_progress=on_progress)
            finally:
                _sweep(target)
    except OSError as error:
        where = error.filename or target
        if error.errno in _DISK_FULL:
            raise RunError(
                f"{where}: {error.strerror}; the shards that are finished stay: make room, and the same command goes on"
            ) from None
        raise RunError(f"{where}: {error.strerror or error}; the same command goes on") from None


def _sweep(target: Path) -> None:
    """Remove what is half-written; nobody writes now."""
    for part in target.rglob(".*.part"):
        part.unlink(missing_ok=True)


def _build(
    source: OpenRoot,
    target: Path,
    options: Options,
    plan: Mapping[str, Any],
    *,
    workers: int,
    on_progress: Callable[[int], None],
) -> Built:
    program = jpegtran() if options.rewrite else None
    tasks = [
        ShardTask(
            reader=source.reader(split),
            split=split,
            place=place,
            samples=samples,
            target=target,
            program=program,
            keep_original=options.keep_original,
            damaged=options.damaged,
            plan=hashlib.sha256(json.dumps([plan, split, place], sort_keys=True).encode()).hexdigest(),
        )
        for split in SPLITS
        for place, samples in enumerate(
            deal(source.listing.splits[split], plan["shards"][split], windowed=source.windowed)
        )
    ]
    with closing(run_all(pack_shard, tasks, workers=workers, on_progress=on_progress)) as results:
        packed = sorted(results, key=lambda shard: (SPLITS.index(shard.split), shard.place))
    _tell_damaged(source, target, packed, options.damaged)
    files: dict[str, Container] = {}
    splits, missing = {}, list[str]()
    for split in SPLITS:
        shards = [shard for shard in packed if shard.split == split]
        files |= {file.name: file for shard in shards for file in shard.files()}
        num_samples, without = _write_index(source, split, target, shards)
        missing += [f"{split} {key}" for key in without]
        index_file = target / f"{split}.index"
        content = index_file.read_bytes()
        files[index_file.name] = Container(
            name=index_file.name,
            num_samples=num_samples,
            size=len(content),
            checksum=xxhash.xxh3_128_hexdigest(content),
        )
        kinds = sum((Counter(shard.kinds) for shard in shards), Counter[str]())
        splits[split] = {
            "num_samples": num_samples,
            "num_shards": len(shards),
            "bytes": sum(shard.container.size for shard in shards if shard.container),
            "rewritten": kinds.pop(REWRITTEN, 0),
            "as_they_were": dict(sorted(kinds.items())),
            "left_out": len(without),
        }
    manifest = sealed(
        {
            "format": FORMAT,
            "version": VERSION,
            "eit_lab": __version__,
            "class_names": list(source.listing.class_names),
            "fingerprint": _fingerprint(source, missing),
            "notes": list(source.listing.notes),
            "source": str(source.store.folder.resolve()) if source.store.is_local else source.store.root,
            "plan": plan,
            "options": asdict(options),
            "splits": splits,
            "files": {name: [file.size, file.checksum] for name, file in sorted(files.items())},
            "hash": hash_of_files({name: (file.size, file.checksum) for name, file in files.items()}),
        }
    )
    _write_whole(target / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False))
    (target / _PLAN).unlink(missing_ok=True)
    return Built(manifest=manifest, num_shards=len(packed), num_found=sum(shard.found for shard in packed))


def _fingerprint(source: OpenRoot, missing: Sequence[str]) -> str:
    """The source's own where all of it is here: a run on either is the same run."""
    if not missing:
        return source.listing.fingerprint
    return hashlib.sha256("\n".join([source.listing.fingerprint, *missing]).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------ what is there already


def _check_target(target: Path, source: OpenRoot, options: Options) -> None:
    if target.exists() and not target.is_dir():
        raise ConfigError(f"DST must be a folder, got the file {str(target)!r}")
    if source.store.is_local and target.resolve().is_relative_to(source.store.folder.resolve()):
        raise ConfigError(f"DST must lie outside SRC, got {str(target)!r} in {source.store.root!r}")
    if target.is_dir() and not any((target / name).exists() for name in (MANIFEST, _PLAN)):
        there = sorted(path.name for path in target.iterdir())
        if there:
            raise ConfigError(
                f"DST must be a new or empty folder, or shards, got {str(target)!r} with {there[0]} in it"
            )
    if options.rewrite and jpegtran() is None:
        raise ConfigError(
            "jpegtran is not installed, which puts restart markers into JPEGs: apt install libjpeg-turbo-progs (Debian), "
            "conda install libjpeg-turbo, brew install jpeg-turbo; or --no-rewrite packs the files as they are"
        )


def _agreed_plan(source: OpenRoot, target: Path, options: Options, *, overwrite: bool) -> dict[str, Any]:
    """What all of the build follows from: begun here, or that of a build that is here already."""
    plan: dict[str, Any] = {
        "version": VERSION,
        "source": source.listing.fingerprint,
        "num_samples": {split: len(index) for split, index in source.listing.splits.items()},
        "shard_mb": options.shard_mb,
        "rewrite": options.rewrite,
        "keep_original": options.keep_original,
        "windowed": source.windowed,
    }
    there = any((target / name).exists() for name in (MANIFEST, _PLAN))
    # An unfinished build of the same goes on with --overwrite too: else a command that is repeated would never end.
    goes_on = there and (not overwrite or not (target / MANIFEST).exists())
    before = _plan_of(target, overwrite=overwrite) if goes_on else None
    if before is not None:
        other = next((key for key in plan if before.get(key) != plan[key]), None)
        if other is None:
            return before
        if not overwrite:
            raise ConfigError(
                f"DST {str(target)!r} was built from another source or with other options: {other} was "
                f"{before.get(other)}, got {plan[other]}; --overwrite builds it anew"
            )
    sizes = {split: _bytes_per_image(source, split) * len(source.listing.splits[split]) for split in SPLITS}
    plan["shards"] = {
        split: _num_shards(sizes[split], len(source.listing.splits[split]), options.shard_mb) for split in SPLITS
    }
    if there:
        for name in _OURS:
            path = target / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    needed, free = sum(sizes.values()) * (1 + options.keep_original), shutil.disk_usage(target).free
    if free < 0.95 * needed:
        raise RunError(
            f"{target}: the disk is too full: about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        )
    _write_whole(target / _PLAN, json.dumps(plan))
    return plan


def _plan_of(target: Path, *, overwrite: bool) -> dict[str, Any] | None:
    """That of shards that are here, finished or not; None: damaged, and to be overwritten."""
    path = target / MANIFEST
    if path.is_file():
        plan: dict[str, Any] = read_manifest(path.read_bytes(), str(path))["plan"]
        return plan
    try:
        plan = json.loads((target / _PLAN).read_text())
    except ValueError:
        if overwrite:
            return None
        raise ConfigError(f"DST: {target / _PLAN} is damaged; --overwrite builds the shards anew") from None
    return plan


def _bytes_per_image(source: OpenRoot, split: Split) -> float:
    index = source.listing.splits[split]
    if len(index) and int(index.size.min()):
        return float(index.size.mean())
    total = sum(container.size for container in index.containers)
    if total:
        return total / len(index)
    if source.listing.layout != "folder":
        return _GUESSED_BYTES
    some = np.random.Generator(np.random.Philox(key=_SEED)).permutation(len(index))[:_SIZES_LOOKED_AT]
    reader = source.reader(split)
    paths = [Path(reader.name(sample)) for sample in some.tolist()]
    sizes = [path.stat().st_size for path in paths if path.exists()]
    return float(np.mean(sizes)) if sizes else _GUESSED_BYTES


def _num_shards(size: float, num_samples: int, shard_mb: int) -> int:
    by_size = -(-size // (shard_mb * 1e6))
    return max(1, min(num_samples, int(max(by_size, min(_FEWEST_SHARDS, size // (_SMALLEST_MB * 1e6))))))


def deal(index: SplitIndex, num_shards: int, *, windowed: bool) -> list[NDArray[np.int64]]:
    """The samples of each shard, in the order in which they lie there.

    ``windowed`` mixes only the samples of _WINDOW files at a time: those which have to be fetched are needed once.
    """
    random = np.random.Generator(np.random.Philox(key=_SEED))
    drawn, turn = random.permutation(len(index)), random.permutation(len(index.containers))
    window = turn[index.container] // _WINDOW if windowed else np.zeros(len(index))
    order = np.lexsort((drawn, window))
    return [order[first:last] for first, last in pairwise(np.arange(num_shards + 1) * len(index) // num_shards)]


@contextmanager
def _held(target: Path) -> Iterator[None]:
    """Nobody else builds here meanwhile; the operating system lets go, whatever ends the process."""
    number = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"DST {str(target)!r} is being built by another process; wait for it, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(number)


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------- at the end


def _tell_damaged(source: OpenRoot, target: Path, shards: Sequence[PackedShard], damaged: Damaged) -> None:
    """Write damaged.txt, and end the build where that was asked for."""
    faults = [(shard.split, fault) for shard in shards for fault in shard.faults]
    if not faults:
        (target / DAMAGED).unlink(missing_ok=True)
        return
    named = [
        (source.reader(split).name(fault.number), fault.reason)
        for split, fault in sorted(faults, key=lambda pair: (SPLITS.index(pair[0]), pair[1].number))
    ]
    _write_whole(target / DAMAGED, "".join(f"{name}\t{reason}\n" for name, reason in named))
    if damaged == "stop":
        some = ", ".join(f"{name} ({reason})" for name, reason in named[:3])
        raise RunError(
            f"{len(named)} image{'s' * (len(named) > 1)} cannot be decoded: {some}{' ...' * (len(named) > 3)}; all are in "
            f"{target / DAMAGED}; mend the source, or --damaged skip leaves them out, --damaged keep stores them as they are"
        )


def _write_index(
    source: OpenRoot, split: Split, target: Path, shards: Sequence[PackedShard]
) -> tuple[int, Sequence[str]]:
    """Write the split's index, in the source's order; (its samples, keys of those that are not stored)."""
    index, containers = source.listing.splits[split], list[Container]()
    where = np.full(len(index), -1)
    rows = np.zeros((len(index), len(ROW_COLUMNS)), dtype=np.uint64)
    for shard in shards:
        if shard.container is not None:
            where[shard.numbers], rows[shard.numbers] = len(containers), shard.rows
            containers.append(shard.container)
    if not containers:
        raise RunError(f"{target}: no image of {split} can be decoded")
    kept, keys = np.flatnonzero(where >= 0), index.keys()
    stored = [keys[sample].encode() for sample in kept.tolist()]
    columns = {
        "container": where[kept],
        "label": index.label[kept],
        "key_end": np.cumsum([len(key) for key in stored]),
        **{name: rows[kept, place] for place, name in enumerate(ROW_COLUMNS)},
    }
    write_index(target / f"{split}.index", columns, b"".join(stored), containers=containers, facts={"split": split})
    return len(kept), [keys[sample] for sample in np.flatnonzero(where < 0).tolist()]
