"""The bytes of any sample, from wherever its split lies: a folder, tar files, shards; in place or through the cache. No torch.

What cannot be read is a ``SampleError`` that names the file: the loader decides what becomes of it.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from eit_lab.data.cache import FileCache
from eit_lab.data.index import SplitIndex
from eit_lab.data.packed import DamagedRecordError, DamagedShardError, read_footer, unpack_record
from eit_lab.data.prefetch import Wanted
from eit_lab.data.restart import Bytes, Segments
from eit_lab.data.store import LOG, Store

Layout = Literal["folder", "tar", "parquet", "shards"]

_OPEN_FILES = 4096  # of one process, or a quarter of what the system allows
_OPEN_COPIES = 8  # of one process: a copy that was dropped takes its space as long as somebody has it open


class SampleError(ValueError):
    """A sample that cannot be read. ``name`` says where it lies, ``reason`` what is wrong, in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class Sample(NamedTuple):
    """What is stored of one sample."""

    data: Bytes
    """The bytes of an image file."""
    segments: Segments | None = None
    """Where crops can be cut from it, else None."""


class SampleReader:
    """Reads samples of a split by their numbers. Each process opens files of its own; it travels as its description."""

    def __init__(self, index: SplitIndex, *, store: Store, files: FileCache | None, layout: Layout) -> None:
        """``files`` holds containers that cannot be read in place: all of a remote store, and parquet files."""
        self.index, self.store, self.files, self.layout = index, store, files, layout
        self._open: OrderedDict[int, _File] = OrderedDict()
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = min(_OPEN_FILES, allowed // 4) if files is None else _OPEN_COPIES
        self._rows: dict[int, NDArray[np.uint64]] = {}

    def __len__(self) -> int:
        return len(self.index)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}

    def name(self, sample: int) -> str:
        """Where a sample lies, for people."""
        key = self.index.key(sample)
        if self.layout == "folder":
            return f"{self.store.root.rstrip('/')}/{self.index.facts['folder']}/{key}"
        container = self.index.containers[int(self.index.container[sample])]
        return f"{self.store.root.rstrip('/')}/{container.name} ({key})"

    def wanted(self, container: int) -> Wanted:
        """What the cache is asked for, for a file of this split."""
        from eit_lab.data.layouts.parquet import unpack

        what = self.index.containers[container]
        make = unpack if self.layout == "parquet" else None
        return Wanted(what.name, size=what.size or None, checksum=what.checksum or None, make=make)

    def read(self, sample: int) -> Sample:
        """The bytes of a sample, checked where there is something to check against. Raises SampleError, RunError."""
        if self.layout == "folder":
            return Sample(self._whole_file(sample))
        container = int(self.index.container[sample])
        try:
            return self._record(container, sample)
        except (DamagedRecordError, DamagedShardError) as error:
            if self.files is None:
                raise SampleError(self.name(sample), str(error)) from None
            LOG.warning("%s: %s: fetched again", self.name(sample), error)
        # The copy on this machine may be what is damaged: once more from the source.
        self._forget(container)
        self.files.drop(self.index.containers[container].name)
        try:
            return self._record(container, sample)
        except (DamagedRecordError, DamagedShardError) as error:
            raise SampleError(self.name(sample), f"{error}, in a second copy too") from None

    def _whole_file(self, sample: int) -> bytes:
        path = self.store.folder / self.index.facts["folder"] / self.index.key(sample)
        try:
            return path.read_bytes()
        except OSError as error:
            raise SampleError(str(path), f"cannot be read: {error.strerror or type(error).__name__}") from None

    def _record(self, container: int, sample: int) -> Sample:
        index = self.index
        try:
            file = self._file(container)
        except FileNotFoundError:
            raise SampleError(self.name(sample), "the file is missing") from None
        except OSError as error:
            raise SampleError(self.name(sample), f"cannot be read: {error.strerror or error}") from None
        offset, size, checksum = int(index.offset[sample]), int(index.size[sample]), int(index.checksum[sample])
        width, height = int(index.width[sample]), int(index.height[sample])
        if file.rows is not None:  # converted here: the index knows its row only
            offset, size, checksum, width, height = (int(value) for value in file.rows[offset])
        try:
            record = os.pread(file.number, size, offset)
        except OSError as error:
            raise SampleError(self.name(sample), f"cannot be read: {error.strerror or error}") from None
        if len(record) < size:
            raise DamagedRecordError(f"cut short: {len(record):,} of its {size:,} bytes are there")
        if self.layout == "tar":
            return Sample(record)
        return Sample(*unpack_record(record, width=width, height=height, checksum=checksum))

    def _file(self, container: int) -> _File:
        file = self._open.get(container)
        if file is not None:
            self._open.move_to_end(container)
            return file
        rows = None
        if self.files is None:
            number = os.open(self.store.folder / self.index.containers[container].name, os.O_RDONLY)
        else:
            wanted = self.wanted(container)
            number = self.files.open(wanted.name, size=wanted.size, checksum=wanted.checksum, make=wanted.make)
            if wanted.make is not None:
                rows = self._rows.get(container)  # reading them costs as much as ten images
                if rows is None:
                    try:
                        self._rows[container] = rows = _rows(number, Path(wanted.name))
                    except DamagedShardError:
                        os.close(number)
                        raise
        self._open[container] = file = _File(number, rows)
        if len(self._open) > self._most:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest.number)
        return file

    def _forget(self, container: int) -> None:
        self._rows.pop(container, None)
        file = self._open.pop(container, None)
        if file is not None:
            os.close(file.number)


class _File(NamedTuple):
    number: int
    rows: NDArray[np.uint64] | None
    """(rows, 5) uint64: offset, size, checksum, width, height of each; of converted files."""


def _rows(number: int, path: Path) -> NDArray[np.uint64]:
    _, rows = read_footer(path, number=number)
    return np.array([(row.offset, row.size, row.checksum, row.width, row.height) for row in rows], dtype=np.uint64)
