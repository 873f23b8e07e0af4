"""The project's own shards: many images in one file, each a record that is checked whenever it is read. No torch.

A shard is written whole or not at all, and describes itself:

    magic | records, one after another | footer: JSON, compressed | its length, 8 bytes | its xxh3-128, 16 bytes | magic

A record is a table of restart segments (restart.py), then the bytes of the image file:

    kind, MCUs and px of a segment, number of segments, byte of the size | lengths of the segments, 2 bytes each | the file

Its xxh3-64 is in the footer and in the index of the split, so no damaged byte reaches a decoder.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from eit_lab.command import RunError
from eit_lab.data.index import Container
from eit_lab.data.restart import Segments

_MAGIC = b"EITSHARD1\n"
_TAIL = struct.Struct("<Q16s")
_HEAD = struct.Struct("<BBHIIII")  # kind, segment height, segment width, segments, size at, scan at, 0
_PLAIN, _SEGMENTED = 0, 1
_COMPRESSION = 1  # of footers: mostly keys


class DamagedShardError(RunError):
    """A shard that is not what was written. The message is one line that names the file."""


class DamagedRecordError(ValueError):
    """A record that is not what was written. The message is a few words."""


class Row(NamedTuple):
    """One record of a shard, as its footer has it."""

    number: int
    """The sample's place in its split."""
    offset: int
    size: int
    checksum: int
    label: int
    width: int
    height: int
    key: str


class Record(NamedTuple):
    """What is stored of one sample."""

    data: memoryview
    """The image file's bytes."""
    segments: Segments | None
    """Where crops can be cut from it, else None."""


def pack_record(data: bytes, segments: Segments | None) -> bytes:
    """A record's bytes; ``segments`` are those of ``data``, whose last one ends where it does."""
    if segments is None:
        return _HEAD.pack(_PLAIN, 0, 0, 0, 0, 0, 0) + data
    lengths = np.diff(segments.offsets).astype("<u2")
    head = _HEAD.pack(
        _SEGMENTED,
        segments.segment_height,
        segments.segment_width,
        len(lengths),
        segments.size_at,
        int(segments.offsets[0]),
        0,
    )
    return head + lengths.tobytes() + data


def unpack_record(record: bytes | memoryview, *, width: int, height: int, checksum: int) -> Record:
    """A record of an image of ``width`` x ``height`` px, checked against its xxh3-64. Raises DamagedRecordError."""
    if xxhash.xxh3_64_intdigest(record) != checksum:
        raise DamagedRecordError("its checksum differs")
    kind, segment_height, segment_width, count, size_at, scan_at, _ = _HEAD.unpack_from(record)
    data = memoryview(record)[_HEAD.size + 2 * count :]
    if kind == _PLAIN:
        return Record(data, None)
    if kind != _SEGMENTED:
        raise DamagedRecordError(f"it is of kind {kind}, which a later version writes")
    offsets = np.empty(count + 1, dtype=np.int64)
    offsets[0] = scan_at
    np.cumsum(np.frombuffer(record, dtype="<u2", count=count, offset=_HEAD.size), out=offsets[1:])
    offsets[1:] += scan_at
    return Record(data, Segments(width, height, size_at, segment_width, segment_height, offsets))


class ShardWriter:
    """Writes one shard; ``with`` it: what is not finished at the end of the block is gone."""

    def __init__(self, path: Path) -> None:
        """Begin a file beside ``path``, which gets its name when it is finished. Raises OSError."""
        self.path, self.rows = path, list[Row]()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._file = self._part.open("wb")
        self._hash, self._place = xxhash.xxh3_128(), 0
        self._append(_MAGIC)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()  # which writes what is left, and may find the disk full again
        finally:
            self._part.unlink(missing_ok=True)

    def add(self, record: bytes, *, number: int, label: int, width: int, height: int, key: str) -> None:
        """Append a record of ``pack_record``."""
        checksum = xxhash.xxh3_64_intdigest(record)
        self.rows.append(Row(number, self._place, len(record), checksum, label, width, height, key))
        self._append(record)

    def finish(self, *, facts: dict[str, Any], name: str) -> Container:
        """Write the footer, with ``facts`` in it, and give the file its name; ``name`` is that below the root."""
        footer = zlib.compress(json.dumps({"facts": facts, "rows": self.rows}).encode(), _COMPRESSION)
        self._append(footer)
        self._append(_TAIL.pack(len(footer), xxhash.xxh3_128_digest(footer)) + _MAGIC)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self.path)
        return Container(name=name, num_samples=len(self.rows), size=self._place, checksum=self._hash.hexdigest())

    def _append(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._place += len(content)


def read_footer(path: Path, *, number: int | None = None) -> tuple[dict[str, Any], Sequence[Row]]:
    """(facts, rows) of a shard, which may be open already as ``number``. Raises DamagedShardError, and FileNotFoundError."""
    end = _TAIL.size + len(_MAGIC)
    with open(path if number is None else number, "rb", closefd=number is None) as file:
        size = file.seek(0, os.SEEK_END)
        if size < len(_MAGIC) + end:
            raise DamagedShardError(f"{path} is cut short: {size} bytes")
        file.seek(-end, os.SEEK_END)
        tail = file.read()
        length, digest = _TAIL.unpack(tail[: _TAIL.size])
        if tail[_TAIL.size :] != _MAGIC or length > size - end - len(_MAGIC):
            raise DamagedShardError(f"{path} is cut short or damaged at its end ({size:,} bytes)")
        file.seek(size - end - length)
        footer = file.read(length)
    if xxhash.xxh3_128_digest(footer) != digest:
        raise DamagedShardError(f"{path} is damaged in its footer")
    content = json.loads(zlib.decompress(footer))
    return content["facts"], [Row(*row) for row in content["rows"]]
