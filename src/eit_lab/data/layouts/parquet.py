"""Parquet files as Hugging Face publishes image data sets (ILSVRC/imagenet-1k): data/train-00000-of-00294-*.parquet. No torch.

Columns: image as struct<bytes: binary, path: string>, or as plain binary ("image", "jpg"), and label as a number; the schema's
metadata names the classes. Listing reads labels and paths alone, no image. A row of a compressed file cannot be read at
random at the rate that training needs: ``rows`` is for rewriting a file, once, into a form that can.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from eit_lab.config import ConfigError
from eit_lab.data.index import Container, write_index
from eit_lab.data.layouts.listing import (
    SPLITS,
    Listing,
    Summary,
    by_split,
    kept,
    progress,
    summary_of_packed,
    wrong_start,
)
from eit_lab.data.packed import DamagedShardError, ShardWriter, pack_record

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")
_MAGIC = b"PAR1"
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Where a file keeps what is asked of it: paths of leaves, "image.bytes"."""

    image: str
    path: str
    """Empty: samples have no names."""
    label: str
    names: tuple[str, ...]
    """Classes in label order, empty where the file does not tell them."""


def list_parquet(
    files: Mapping[str, int | None], *, root: str, stamp: Any, opened: Callable[[str], IO[bytes]], cache: Path
) -> Listing:
    """The listing of parquet files {name below the root: bytes}. Raises ConfigError, in one line.

    A sample's offset is its row. ``opened`` opens a file of this machine, or one brought to it.
    """
    splits = by_split(files, root=root)

    def build(target: Path) -> Summary:
        names: tuple[str, ...] = ()
        with progress(f"indexing {root}, files", len(files)) as advance:
            for split in SPLITS:
                keys, label, counts, containers = bytearray(), [], [], []
                ends = array("Q")
                for name in splits[split]:
                    with opened(name) as stream:
                        size = os.fstat(stream.fileno()).st_size
                        columns, labels, paths = _labels(stream, name)
                    if names and columns.names and columns.names != names:
                        raise ConfigError(f"data.root: {name} names other classes than the files before it")
                    names = names or columns.names
                    for row in range(len(labels)):
                        keys += (
                            (paths[row] or _row_name(name, row)).encode() if paths else _row_name(name, row).encode()
                        )
                        ends.append(len(keys))
                    label.append(labels)
                    counts.append(len(labels))
                    containers.append(Container(name=name, num_samples=len(labels), size=size))
                    advance()
                table = {
                    "container": np.repeat(np.arange(len(counts)), counts),
                    "offset": np.concatenate([np.arange(count) for count in counts]),
                    "label": np.concatenate(label),
                    "key_end": np.frombuffer(ends, dtype=np.uint64),
                    **dict.fromkeys(("size", "checksum", "width", "height"), np.zeros(sum(counts), dtype=np.uint8)),
                }
                write_index(target / f"{split}.index", table, bytes(keys), containers=containers, facts={"folder": ""})
        return summary_of_packed(target, dict(enumerate(names)))

    return kept(cache, root=root, layout="parquet", stamp=stamp, build=build)


def rows(path: Path) -> Iterator[tuple[bytes, int, str]]:
    """(image as it is in the file, label, key) of each row, in order.

    In memory is what Arrow holds of a row group: measured, 95 MB for groups of 10 MB, 350 MB for groups of 100 MB.

    Raises DamagedShardError, in one line, for a file that is cut short, damaged, or has a row without an image.
    """
    with path.open("rb") as stream:
        try:
            yield from _rows(stream, path.name)
        except ConfigError as error:  # right while a root is listed; here a run has begun
            raise DamagedShardError(str(error)) from None


def unpack(source: Path, target: Path) -> None:
    """Rewrite a parquet file as a shard of plain records in the same order, whole or not at all. Raises DamagedShardError."""
    with ShardWriter(target) as writer:
        for number, (image, label, key) in enumerate(rows(source)):
            writer.add(pack_record(image, None), number=number, label=label, width=0, height=0, key=key)
        writer.finish(facts={}, name=source.name)


def _rows(stream: IO[bytes], shown: str) -> Iterator[tuple[bytes, int, str]]:
    file = _open(stream, shown)
    columns = _columns(file, shown)
    outer, _, inner = columns.image.partition(".")
    wanted = [columns.image, columns.label, *([columns.path] if columns.path else [])]
    row = 0
    for group in range(file.num_row_groups):
        for batch in _batches(file, group, wanted, shown):
            images = batch[outer]
            records = images.field(inner).to_pylist() if inner else images.to_pylist()
            names = images.field("path").to_pylist() if columns.path else [None] * len(records)
            for record, label, name in zip(records, batch[columns.label].to_pylist(), names, strict=True):
                if not record or label is None:
                    raise ConfigError(f"data.root: {shown} has no {'label' if record else 'image'} in row {row}")
                yield record, label, name or _row_name(shown, row)
                row += 1


def _batches(file: pq.ParquetFile, group: int, columns: list[str], shown: str) -> Iterator[Any]:
    import pyarrow as pa

    batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(shown, error) from None
        if batch is None:
            return
        yield batch


def _row_name(name: str, row: int) -> str:
    return f"{name.rpartition('/')[2].removesuffix('.parquet')}/{row:06d}"


def _labels(stream: IO[bytes], shown: str) -> tuple[_Columns, NDArray[np.int32], list[str | None] | None]:
    with _open(stream, shown) as file:
        import pyarrow as pa  # there: the file is open

        columns = _columns(file, shown)
        try:
            table = file.read([columns.label, *([columns.path] if columns.path else [])], use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise _damaged(shown, error) from None
        labels = table[columns.label]
        if labels.null_count or not len(labels):
            what = f"a label in each row, {labels.null_count} have none" if len(labels) else "rows, it has none"
            raise ConfigError(f"data.root: {shown} must have {what}")
        found = labels.to_numpy().astype(np.int32)
        if found.min() < 0:
            raise ConfigError(f"data.root: {shown} must have labels from 0 on, got {found.min()} (a test set has none)")
        if columns.names and found.max() >= len(columns.names):
            raise ConfigError(f"data.root: {shown} names {len(columns.names)} classes, and has a label {found.max()}")
        paths = None
        if columns.path:
            struct = table[columns.path.partition(".")[0]].combine_chunks()
            paths = struct.field("path").to_pylist()
        return columns, found, paths


def _open(stream: IO[bytes], shown: str) -> pq.ParquetFile:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(
            f"data.root: {shown} needs pyarrow to be read, which is not installed; pip install 'eit_lab[parquet]'"
        ) from None
    try:
        start = stream.read(64)
        if not start.startswith(_MAGIC):
            raise wrong_start(shown, start, "parquet")
        return pq.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
    except (pa.ArrowException, OSError) as error:
        size = os.fstat(stream.fileno()).st_size
        if isinstance(error, pa.ArrowInvalid):
            raise ConfigError(
                f"data.root: {shown} is cut short at {size:,} bytes: the table of contents at its end is missing; "
                "download it again"
            ) from None
        raise _damaged(shown, error) from None


def _damaged(shown: str, error: Exception) -> ConfigError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ConfigError(f"data.root: {shown} is damaged ({reason}): download it again")


def _columns(file: pq.ParquetFile, shown: str) -> _Columns:
    import pyarrow as pa

    schema = file.schema_arrow
    image = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in _LABEL_COLUMNS if name in schema.names), None)
    inner = ""
    if image is not None:
        kind = schema.field(image).type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            inner = "bytes"
        elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            image = None
    if image is None or label is None or not pa.types.is_integer(schema.field(label).type):
        raise ConfigError(
            f"data.root: {shown} must have the columns image (bytes, or struct with bytes) and label (a number), "
            f"got {', '.join(f'{column.name} ({column.type})' for column in schema)}"
        )
    has_path = bool(inner) and schema.field(image).type.get_field_index("path") >= 0
    return _Columns(
        image=f"{image}.{inner}" if inner else image,
        path=f"{image}.path" if has_path else "",
        label=label,
        names=_class_names((schema.metadata or {}).get(b"huggingface"), label),
    )


def _class_names(metadata: bytes | None, label: str) -> tuple[str, ...]:
    """Of Hugging Face's description of the columns: info.features.LABEL.names."""
    try:
        described = json.loads(metadata or b"{}")
    except ValueError:
        return ()
    for key in ("info", "features", label, "names"):
        described = described.get(key) if isinstance(described, dict) else None
    return tuple(map(str, described)) if isinstance(described, list) else ()
