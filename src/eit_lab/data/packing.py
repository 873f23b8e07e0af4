"""Packing one shard: each image decoded, rewritten with restart markers where that changes no pixel, and appended. No torch.

An image is decoded before it is stored, strictly, and again after it was rewritten: where one pixel differs, the file is
stored as it was. So is what cannot be rewritten: progressive and CMYK JPEGs, PNGs under a JPEG's name, of which ImageNet has
some.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from eit_lab.data.decode import DecodeError, Decoder, Pixels
from eit_lab.data.index import Container
from eit_lab.data.packed import DamagedShardError, Row, ShardWriter, pack_record, read_footer
from eit_lab.data.pool import count
from eit_lab.data.reading import SampleError, SampleReader
from eit_lab.data.restart import NotAJpegError, Segments, find_segments, interval_for, read_header, rewrite
from eit_lab.data.roots import Split

Damaged = Literal["stop", "skip", "keep"]
SPLITS: tuple[Split, ...] = ("train", "val")
ROW_COLUMNS = ("offset", "size", "checksum", "width", "height")
REWRITTEN = "rewritten"
"""The kind of images that got restart markers; the others are kept as they were, for a reason in two words."""


class Fault(NamedTuple):
    """An image that cannot be decoded."""

    number: int
    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard, as a worker gets it."""

    reader: SampleReader
    split: Split
    place: int
    samples: NDArray[np.int64]
    target: Path
    program: str | None
    """jpegtran; None: files as they are."""
    keep_original: bool
    damaged: Damaged
    plan: str
    """Hash of all that the shard's content follows from."""

    @property
    def name(self) -> str:
        return f"{self.split}/{self.place:05d}.shard"

    @property
    def original(self) -> str:
        return f"originals/{self.split}-{self.place:05d}.tar"


@dataclass(frozen=True, kw_only=True)
class PackedShard:
    """One shard, as a worker gives it back."""

    split: Split
    place: int
    container: Container | None
    """None: damaged images, and these were to stop the build; or there were no others."""
    original: Container | None
    numbers: NDArray[np.int64]
    """(samples,): places in the source's split."""
    rows: NDArray[np.uint64]
    """(samples, 5): ROW_COLUMNS."""
    kinds: Mapping[str, int]
    faults: Sequence[Fault]
    found: bool

    def files(self) -> list[Container]:
        return [file for file in (self.container, self.original) if file is not None]


def pack_shard(task: ShardTask) -> PackedShard:
    """Write one shard, whole or not at all; one that is there and right is left as it is. Raises OSError."""
    found = _found(task)
    if found is not None:
        return found
    path, decoders = task.target / task.name, (Decoder(), Decoder())
    kinds, faults = Counter[str](), list[Fault]()
    with ShardWriter(path) as shard, _Originals(task) as originals:
        for number in task.samples.tolist():
            count()
            key, data = task.reader.index.key(number), b""
            pixels: Pixels | None = None
            try:
                data = bytes(task.reader.read(number).data)
                pixels = decoders[0].decode(data)
            except SampleError as error:
                faults.append(Fault(number, key, error.reason))
            except DecodeError as error:
                faults.append(Fault(number, key, str(error)))
            if faults and task.damaged == "stop":
                continue  # the others are looked at, not written
            if pixels is None and (task.damaged == "skip" or not data):
                continue
            stored, segments, kind = _stored(data, pixels, decoders[1], task.program)
            kinds[kind] += 1
            height, width = (0, 0) if pixels is None else pixels.shape[:2]
            shard.add(
                pack_record(stored, segments),
                number=number,
                label=int(task.reader.index.label[number]),
                width=width,
                height=height,
                key=key,
            )
            originals.add(key, data)
        if not shard.rows or (faults and task.damaged == "stop"):
            return _result(task, None, None, [], {}, faults, found=False)
        tar = originals.finish()
        facts = {
            "plan": task.plan,
            "damaged": task.damaged if faults else None,
            "faults": faults,
            "kinds": kinds,
            "original": asdict(tar) if tar else None,
        }
        container = shard.finish(facts=facts, name=task.name)
    return _result(task, container, tar, shard.rows, kinds, faults, found=False)


def _stored(
    data: bytes, pixels: Pixels | None, decoder: Decoder, program: str | None
) -> tuple[bytes, Segments | None, str]:
    """(bytes to store, their segments, what became of them in a word)."""
    if pixels is None:
        return data, None, "damaged"
    try:
        segments, header = find_segments(data), read_header(data)
    except NotAJpegError:
        return data, None, "PNG" if data.startswith(b"\x89PNG") else "no JPEG"
    if segments is not None and (program is None or header.interval == interval_for(header)):
        return data, segments, "with markers"  # shards built from shards, a camera that writes them
    if header.components not in (1, 3):
        return data, None, "CMYK"
    if not header.sequential:
        return data, None, "progressive"
    if program is None:
        return data, None, "not rewritten"
    other = rewrite(data, program=program)
    if other is None:
        return data, None, "refused by jpegtran"
    segments = find_segments(other)
    assert segments is not None, "rewrite looks for them"
    height, width, _ = pixels.shape
    box = (height // 4, width // 4, -(-height // 2), -(-width // 2))
    try:
        same = np.array_equal(decoder.decode(other), pixels)
        crop = decoder.crop(other, segments, box=box)
        same = same and np.array_equal(crop, pixels[box[0] : box[0] + box[2], box[1] : box[1] + box[3]])
    except DecodeError:
        same = False
    return (other, segments, REWRITTEN) if same else (data, None, "pixels would differ")


def _result(
    task: ShardTask,
    container: Container | None,
    original: Container | None,
    rows: Sequence[Row],
    kinds: Mapping[str, int],
    faults: Sequence[Fault],
    *,
    found: bool,
) -> PackedShard:
    return PackedShard(
        split=task.split,
        place=task.place,
        container=container,
        original=original,
        numbers=np.array([row.number for row in rows], dtype=np.int64),
        rows=np.array([row[1:4] + row[5:7] for row in rows], dtype=np.uint64).reshape(-1, len(ROW_COLUMNS)),
        kinds=dict(kinds),
        faults=faults,
        found=found,
    )


def _found(task: ShardTask) -> PackedShard | None:
    """The shard as it is there, if it is the one that would be written: read and compared with its checksums."""
    path = task.target / task.name
    try:
        facts, rows = read_footer(path)
        faults = [Fault(*entry) for entry in facts["faults"]]
        if facts["plan"] != task.plan or (faults and facts["damaged"] != task.damaged):
            return None
        tar = Container(**facts["original"]) if facts["original"] else None
        if tar is not None and (task.target / tar.name).stat().st_size != tar.size:
            return None
        digest, place = xxhash.xxh3_128(), 0
        with path.open("rb") as file:
            for row in sorted(rows, key=lambda row: row.offset):
                digest.update(file.read(row.offset - place))
                record = file.read(row.size)
                if xxhash.xxh3_64_intdigest(record) != row.checksum:
                    return None
                digest.update(record)
                place = row.offset + row.size
                count()
            digest.update(file.read())
            size = file.tell()
    except (FileNotFoundError, DamagedShardError):
        return None
    count(len(task.samples) - len(rows))
    container = Container(name=task.name, num_samples=len(rows), size=size, checksum=digest.hexdigest())
    return _result(task, container, tar, rows, facts["kinds"], faults, found=True)


class _Originals:
    """The tar file of a shard's images as they were, where that was asked for: whole or not at all."""

    def __init__(self, task: ShardTask) -> None:
        self._wanted, self._name, self._path = task.keep_original, task.original, task.target / task.original
        self._part = self._path.with_name(f".{self._path.name}.{os.getpid()}.part")
        self._count = 0

    def __enter__(self) -> _Originals:
        if self._wanted:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._part.open("w+b")
            self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)
        return self

    def __exit__(self, *_: object) -> None:
        if self._wanted:
            try:
                self._file.close()  # which writes what is left: not so on a full disk
            finally:
                self._part.unlink(missing_ok=True)

    def add(self, key: str, data: bytes) -> None:
        if self._wanted:
            member = tarfile.TarInfo(key)
            member.size = len(data)
            self._tar.addfile(member, BytesIO(data))
            self._count += 1

    def finish(self) -> Container | None:
        if not self._wanted:
            return None
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.seek(0)
        digest = xxhash.xxh3_128()
        while block := self._file.read(1 << 20):
            digest.update(block)
        size = self._file.tell()
        self._part.replace(self._path)
        return Container(name=self._name, num_samples=self._count, size=size, checksum=digest.hexdigest())
