"""Tar shards in webdataset's layout, as published for ImageNet-1K (timm/imagenet-1k-wds). Records are read in place. No torch.

A sample is the neighbouring members of one name up to its first dot: KEY.jpg (or png, webp ...), its label in KEY.cls as a
number or in KEY.json as "label". Only headers are read, 512 bytes each; what lies between them is skipped.

Where we differ from Python's tarfile: a file that ends early is an error with the file's name, where that module takes what
is there, and headers are read four times as fast. Understood are ustar, GNU's long names and POSIX's extended headers.
"""

from __future__ import annotations

import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from eit_lab.config import ConfigError
from eit_lab.data.index import Container, write_index
from eit_lab.data.layouts.listing import (
    IMAGE_SUFFIXES,
    SPLITS,
    THREADS,
    Listing,
    Summary,
    by_split,
    kept,
    progress,
    summary_of_packed,
    wrong_start,
)

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_WINDOW = 4096  # bytes read at once: a sample's small members and the next one's header
_ADLER = 65521
_EXTENSIONS = frozenset(suffix[1:] for suffix in IMAGE_SUFFIXES)
CLASS_FILES = ("classes.txt", "classnames.txt")
INFO = "_info.json"  # timm's
_NAME_FIELDS = ("class_name", "classname", "synset", "wnid")


@dataclass
class _Samples:
    """What one tar file holds, in its order."""

    keys: list[str] = field(default_factory=list)
    offset: array[int] = field(default_factory=lambda: array("Q"))
    size: array[int] = field(default_factory=lambda: array("Q"))
    label: array[int] = field(default_factory=lambda: array("i"))
    names: dict[int, str] = field(default_factory=dict)
    """Label -> class name, where the samples tell it."""
    num_bytes: int = 0
    """Of the file."""


def list_tars(
    files: Mapping[str, int | None],
    *,
    root: str,
    stamp: Any,
    opened: Callable[[str], IO[bytes]],
    text_of: Callable[[str], str | None],
    cache: Path,
) -> Listing:
    """The listing of tar files {name below the root: bytes}. Raises ConfigError, in one line.

    ``opened`` opens a file of this machine, or one brought to it; ``text_of`` reads a small one, None where there is none.
    """
    splits = by_split(files, root=root)
    published = published_shards(text_of(INFO))
    for split, shards in published.items():
        _refuse_missing(shards, splits[split], root)

    def build(target: Path) -> Summary:
        names = _class_names(text_of)
        with progress(f"indexing {root}, files", len(files)) as advance, ThreadPoolExecutor(THREADS) as pool:

            def read(name: str) -> _Samples:
                with opened(name) as file:
                    samples = read_tar(file, name)
                advance()
                return samples

            for split in SPLITS:
                found = dict(zip(splits[split], pool.map(read, splits[split]), strict=True))
                _refuse_short(published.get(split, {}), found)
                _write(target / f"{split}.index", found)
                for samples in found.values():
                    names = {**samples.names, **names}
        return summary_of_packed(target, names)

    return kept(cache, root=root, layout="tar", stamp=stamp, build=build)


def read_tar(file: IO[bytes], name: str) -> _Samples:
    """The samples of one open tar file; ``name`` is for messages. Raises ConfigError: cut short, damaged, without labels."""
    found = _Samples()
    ask_names, current, image_name = True, "", ""
    image, about = (0, 0), (0, 0)  # (offset, size)
    label: Any = None

    def end_sample() -> None:
        nonlocal ask_names, label
        told = None
        if about[1] and (label is None or (ask_names and label not in found.names)):
            told = _json(window.read(*about), name, current)
            label = told.get("label", label)
        if not image[1]:
            if label is None:
                return  # members that are no sample
            raise ConfigError(
                f"data.root: {name} has no image with the label of {current!r}: webdataset's KEY.jpg, KEY.cls"
            )
        if type(label) is not int or label < 0:
            raise ConfigError(
                f"data.root: {name} must tell the label of {current!r}, as a number in KEY.cls or as label in KEY.json, "
                f"got {label!r}"
            )
        if told is not None:
            words = next((told[key] for key in _NAME_FIELDS if isinstance(told.get(key), str)), None)
            if words is None:
                ask_names = False  # nor will the next one's tell
            else:
                found.names[label] = words
        found.keys.append(image_name)
        found.offset.append(image[0])
        found.size.append(image[1])
        found.label.append(label)

    try:
        window = _Window(file)
        found.num_bytes = window.end
        for member, offset, size in members(window, name):
            folder, _, last = member.rpartition("/")
            stem, _, extension = last.partition(".")
            if not stem or not size:
                continue
            key = f"{folder}/{stem}" if folder else stem
            if key != current:
                if current:
                    end_sample()
                current, image, label, about = key, (0, 0), None, (0, 0)
            kind = extension.rpartition(".")[2].lower()
            if kind == "cls":
                text = window.read(offset, min(size, 20))
                try:
                    label = int(text)
                except ValueError:
                    raise ConfigError(
                        f"data.root: {name} must have a number in {member}, got {text.decode(errors='replace')!r}"
                    ) from None
            elif kind in _EXTENSIONS:
                if image[1]:
                    raise ConfigError(f"data.root: {name} must have one image a sample, {current!r} has two")
                image, image_name = (offset, size), member
            elif kind == "json":
                about = (offset, size)
        if current:
            end_sample()
    except OSError as error:
        raise ConfigError(f"data.root: {name} cannot be read: {error.strerror or error}") from None
    if not found.keys:
        raise ConfigError(
            f"data.root: {name} holds no samples in webdataset's layout (KEY.jpg and KEY.cls or KEY.json)"
        )
    return found


class _Window:
    """Small pieces of a file, mostly in order: one system call for the headers between two images."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file.fileno()
        self._first, self._data = 0, b""
        self.end = os.fstat(self._file).st_size

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset`` on, fewer at the file's end."""
        start = offset - self._first
        if start < 0 or start + size > len(self._data):
            self._data = os.pread(self._file, max(size, _WINDOW), offset)
            self._first, start = offset, 0
        return self._data[start : start + size]


def members(window: _Window, shown: str) -> Iterator[tuple[str, int, int]]:
    """(name, offset of its bytes, how many) of each regular file in a tar file."""
    place, long_name, long_size = 0, "", -1
    while True:
        block = window.read(place, _BLOCK)
        if len(block) < _BLOCK:
            if place == 0:
                raise wrong_start(shown, block, "tar")
            what = "its mark of the end is missing" if not block else "it ends within a header"
            raise _cut(shown, window.end, what)
        if block == _ZEROS:
            return
        try:
            # Adler-32's lower half is 1 plus the sum of the bytes: a tar header's checksum, twenty times as fast as sum().
            # Its own field counts as eight blanks.
            added = zlib.adler32(block[156:], zlib.adler32(block[:148])) & 0xFFFF
            if added != (1 + _number(block[148:156]) - 8 * 32) % _ADLER:
                raise ValueError
            size = _number(block[124:136])
        except ValueError:
            if place == 0:
                raise wrong_start(shown, block, "tar") from None
            raise ConfigError(
                f"data.root: {shown} is damaged at byte {place:,} (no tar header): download it again"
            ) from None
        kind = block[156:157]
        if kind in (b"x", b"g", b"L", b"K"):
            start = place + _BLOCK
            if start + size > window.end:
                raise _cut(shown, window.end, f"a name reaches to byte {start + size:,}")
            content = window.read(start, size)
            if kind == b"x":
                entries = _extended(content)
                long_name = entries.get("path", long_name)
                long_size = int(entries.get("size", long_size))
            elif kind == b"L":
                long_name = content.split(b"\0", 1)[0].decode(errors="surrogateescape")
        else:
            name = long_name or _name(block)
            size = long_size if long_size >= 0 else size
            start = place + _BLOCK
            if start + size > window.end:
                raise _cut(shown, window.end, f"its member {name} reaches to byte {start + size:,}")
            if kind in (b"0", b"\0", b"7"):
                yield name.removeprefix("./"), start, size
            elif kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
                size = 0  # links, devices and folders have no bytes, whatever their header says
            long_name, long_size = "", -1
        place = start + -(-size // _BLOCK) * _BLOCK


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0].decode(errors="surrogateescape")
    if block[345] and block[257:263] == b"ustar\0":
        return f"{block[345:500].split(bytes(1), 1)[0].decode(errors='surrogateescape')}/{name}"
    return name


def _number(digits: bytes) -> int:
    if digits[0] & 0x80:  # GNU's, for 8 GiB and more
        return int.from_bytes(digits[1:], "big")
    return int(digits.rstrip(b"\0 ").split(b"\0", 1)[0] or b"0", 8)


def _extended(content: bytes) -> dict[str, str]:
    """POSIX's records: LENGTH KEY=VALUE and a line end."""
    entries = {}
    while content:
        length, _, _ = content.partition(b" ")
        record, content = content[: int(length)], content[int(length) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        entries[key.decode()] = value.decode(errors="surrogateescape")
    return entries


def _json(content: bytes, shown: str, key: str) -> dict[str, Any]:
    try:
        told = json.loads(content)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ConfigError(f"data.root: {shown} has a damaged {key}.json: download it again")
    return told


def _cut(shown: str, size: int, what: str) -> ConfigError:
    return ConfigError(f"data.root: {shown} is cut short at {size:,} bytes: {what}; download it again")


# ------------------------------------------------------------------------------------------------------- files beside them


def _class_names(text_of: Callable[[str], str | None]) -> dict[int, str]:
    """Label -> class, where a file beside the shards tells it."""
    for file in CLASS_FILES:
        text = text_of(file)
        if text:
            return dict(enumerate(text.strip().splitlines()))
    info = _info(text_of(INFO))
    names: Any = next((info[key] for key in ("class_names", "classes", "label_names") if info.get(key)), [])
    if isinstance(names, dict):
        return {int(label): str(name) for label, name in names.items() if str(label).isdecimal()}
    return {label: str(name) for label, name in enumerate(names)}


def published_shards(text: str | None) -> dict[str, dict[str, int]]:
    """{split: {file: samples}} as timm's _info.json tells them."""
    found: dict[str, dict[str, int]] = {}
    for name, entry in _info(text).get("splits", {}).items():
        split = {"train": "train", "val": "val", "validation": "val"}.get(name)
        if split and entry.get("filenames") and entry.get("shard_lengths"):
            found[split] = dict(zip(entry["filenames"], entry["shard_lengths"], strict=False))
    return found


def _info(text: str | None) -> dict[str, Any]:
    try:
        info = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"data.root: {INFO} is damaged ({error}): download it again") from None
    return info if isinstance(info, dict) else {}


def _refuse_missing(published: Mapping[str, int], files: Mapping[str, int | None], root: str) -> None:
    there = {name.rpartition("/")[2] for name in files}
    absent = [name for name in published if name.rpartition("/")[2] not in there]
    if absent:
        raise ConfigError(
            f"data.root must hold all files that {INFO} names, got {root!r}: {absent[0]} is missing: "
            f"{len(published) - len(absent)} of {len(published)} files; download the others"
        )


def _refuse_short(published: Mapping[str, int], found: Mapping[str, _Samples]) -> None:
    samples = {name.rpartition("/")[2]: len(shard.keys) for name, shard in found.items()}
    for name, expected in published.items():
        number = samples[name.rpartition("/")[2]]
        if number != expected:
            raise ConfigError(f"data.root: {name} has {number} samples, {INFO} says {expected}: download it again")


def _write(path: Path, shards: Mapping[str, _Samples]) -> None:
    parts: Sequence[_Samples] = list(shards.values())
    counts = [len(part.keys) for part in parts]
    nothing = np.zeros(sum(counts), dtype=np.uint8)
    encoded = [key.encode(errors="replace") for part in parts for key in part.keys]
    columns = {
        "container": np.repeat(np.arange(len(parts)), counts),
        "offset": np.concatenate([np.frombuffer(part.offset, dtype=np.uint64) for part in parts]),
        "size": np.concatenate([np.frombuffer(part.size, dtype=np.uint64) for part in parts]),
        "label": np.concatenate([np.frombuffer(part.label, dtype=np.int32) for part in parts]),
        "key_end": np.cumsum(np.fromiter(map(len, encoded), dtype=np.uint64, count=len(encoded))),
        **dict.fromkeys(("checksum", "width", "height"), nothing),
    }
    containers = [
        Container(name=name, num_samples=len(part.keys), size=part.num_bytes) for name, part in shards.items()
    ]
    write_index(path, columns, b"".join(encoded), containers=containers, facts={"folder": ""})
