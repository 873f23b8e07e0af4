"""The table of one split's samples: where each lies, its label and key. One file, memory-mapped, whatever the layout.

1.28 million samples take some 80 MB, which all processes of a machine share in the page cache: a Python list of as many
would be copied into each worker, page by page, as its reference counts change. No torch.

The file: magic, length and checksum of the header, the header as JSON, then the columns as they lie in memory, each at a
multiple of 64 bytes. It is read only after both checksums were found right: a flipped byte here would be a wrong label.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from eit_lab.command import RunError

_MAGIC = b"EITINDEX1\n"
_LEAD = struct.Struct("<Q16s")  # length of the header, its xxh3-128
_ALIGNED = 64
_COLUMNS: dict[str, str] = {
    "container": "<u4",  # place in ``containers``
    "offset": "<u8",  # of the record in its container; of a parquet file: its row
    "size": "<u8",  # bytes; 0: not known before it is read
    "label": "<i4",
    "checksum": "<u8",  # xxh3-64 of the record, 0: none
    "width": "<u4",  # px, 0: not known before it is read
    "height": "<u4",
    "key_end": "<u8",  # end of the sample's key in ``keys``
}


@dataclass(frozen=True, kw_only=True)
class Container:
    """A file that holds records, or a folder of files."""

    name: str
    """Relative to the root, with forward slashes."""
    num_samples: int
    size: int = 0
    """Bytes; 0: not known, or a folder."""
    checksum: str = ""
    """xxh3-128 of the file in hex; empty: none."""


class DamagedIndexError(RunError):
    """An index file that is not what was written. The message is one line."""


class SplitIndex:
    """Samples of one split, in the data set's own order. Columns are read-only arrays of (num_samples,).

    It travels between processes as its path, and is mapped again there.
    """

    def __init__(self, path: Path) -> None:
        """Map a file that ``IndexBuilder.write`` wrote. Raises DamagedIndexError, and FileNotFoundError."""
        self.path = path
        content = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
        start = len(_MAGIC) + _LEAD.size
        if bytes(content[: len(_MAGIC)]) != _MAGIC or len(content) < start:
            raise DamagedIndexError(f"{path} is not an index of samples, or of another version: build it again")
        length, digest = _LEAD.unpack(bytes(content[len(_MAGIC) : start]))
        end = start + length
        text = bytes(content[start:end])
        if xxhash.xxh3_128_digest(text) != digest:
            raise DamagedIndexError(f"{path} is damaged in its header: build it again")
        header = json.loads(text)
        if xxhash.xxh3_128_hexdigest(content[_aligned(end) :].data) != header["checksum"]:
            raise DamagedIndexError(f"{path} is damaged or cut short (its checksum differs): build it again")
        self.num_samples: int = header["num_samples"]
        self.facts: dict[str, Any] = header["facts"]
        """What the layout notes about the split: plain values."""
        self.containers = [Container(**entry) for entry in header["containers"]]

        def column(name: str) -> NDArray[Any]:
            dtype, first, count = header["columns"][name]
            view: NDArray[Any] = content[first : first + count * np.dtype(dtype).itemsize].view(dtype)
            return view

        self.container: NDArray[np.uint32] = column("container")
        self.offset: NDArray[np.uint64] = column("offset")
        self.size: NDArray[np.uint64] = column("size")
        self.label: NDArray[np.int32] = column("label")
        self.checksum: NDArray[np.uint64] = column("checksum")
        self.width: NDArray[np.uint32] = column("width")
        self.height: NDArray[np.uint32] = column("height")
        self._key_end: NDArray[np.uint64] = column("key_end")
        self._keys: NDArray[np.uint8] = column("keys")

    def __len__(self) -> int:
        return self.num_samples

    def key(self, sample: int) -> str:
        """The sample's name in its data set: of a folder, ``CLASS/FILE``."""
        first = int(self._key_end[sample - 1]) if sample else 0
        return bytes(self._keys[first : int(self._key_end[sample])]).decode()

    def keys(self) -> list[str]:
        """All names, in order."""
        ends, blob = self._key_end.tolist(), bytes(self._keys)
        return [blob[a:b].decode() for a, b in zip([0, *ends], ends, strict=False)]

    def __reduce__(self) -> tuple[type[SplitIndex], tuple[Path]]:
        return SplitIndex, (self.path,)


class IndexBuilder:
    """Collects samples in the order in which they are to be numbered, then writes the index."""

    def __init__(self) -> None:
        self.containers: list[Container] = []
        self._columns = {name: array({"<u4": "I", "<u8": "Q", "<i4": "i"}[kind]) for name, kind in _COLUMNS.items()}
        self._keys = bytearray()

    def __len__(self) -> int:
        return len(self._columns["label"])

    def add(
        self,
        *,
        container: int,
        label: int,
        key: str,
        offset: int = 0,
        size: int = 0,
        checksum: int = 0,
        width: int = 0,
        height: int = 0,
    ) -> None:
        """Append one sample; ``container`` is a place in ``containers``, which may be filled before or after."""
        self._keys += key.encode()
        values = (container, offset, size, label, checksum, width, height, len(self._keys))
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def write(self, path: Path, *, facts: Mapping[str, Any]) -> None:
        """Write the file: whole, or not at all. Raises OSError."""
        columns: dict[str, NDArray[Any]] = {
            name: np.frombuffer(self._columns[name], dtype=kind) for name, kind in _COLUMNS.items()
        }
        write_index(path, columns, bytes(self._keys), containers=self.containers, facts=facts)


def write_index(
    path: Path,
    columns: Mapping[str, NDArray[Any]],
    keys: bytes,
    *,
    containers: Sequence[Container],
    facts: Mapping[str, Any],
) -> None:
    """The file of these columns, of (num_samples,) each: whole, or not at all."""
    parts = {name: np.ascontiguousarray(columns[name], dtype=kind) for name, kind in _COLUMNS.items()}
    parts["keys"] = np.frombuffer(keys, dtype=np.uint8)
    header: dict[str, Any] = {
        "num_samples": len(parts["label"]),
        "containers": [asdict(container) for container in containers],
        "facts": dict(facts),
        "checksum": "0" * 32,
        "columns": {name: [part.dtype.str, 0, len(part)] for name, part in parts.items()},
    }
    # The columns' places depend on the header's length: leave room for the longest number.
    room = len(json.dumps(header)) + 20 * len(parts)
    place = _aligned(len(_MAGIC) + _LEAD.size + room)
    first = place
    body = bytearray()
    for name, part in parts.items():
        header["columns"][name][1] = place + len(body)
        body += part.tobytes()
        body += bytes(-len(body) % _ALIGNED)
    header["checksum"] = xxhash.xxh3_128_hexdigest(body)
    text = json.dumps(header).encode().ljust(room)
    path.parent.mkdir(parents=True, exist_ok=True)
    part_path = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part_path.open("wb") as file:
            file.write(_MAGIC + _LEAD.pack(len(text), xxhash.xxh3_128_digest(text)) + text)
            file.write(bytes(first - file.tell()))
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        part_path.replace(path)
    finally:
        part_path.unlink(missing_ok=True)


def _aligned(place: int) -> int:
    return -(-place // _ALIGNED) * _ALIGNED
