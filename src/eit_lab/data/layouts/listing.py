"""What every layout gives, and how it is kept from one start to the next. No torch.

A listing is kept in a folder of its own, named by the root and by a stamp of it (times of change, sizes): what was changed
is listed anew, and a folder once written never changes, so processes that have mapped its indices lose nothing. It is there
whole or not at all, and of several ranks one lists while the others wait.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from eit_lab.config import ConfigError
from eit_lab.data.index import DamagedIndexError, SplitIndex

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS: tuple[str, ...] = ("train", "val")
THREADS = 8
"""For network disks, where each folder or file is a wait; local ones are no slower by it."""
_VERSION = 1  # of what is kept: another one is listed anew
_FORGOTTEN_DAYS = 30
_IMAGENET_1K = {"train": 1_281_167, "val": 50_000}
_SPLIT_WORD = re.compile(r"(?<![a-z])(train|val|validation|valid)(?![a-z])")
_OF = re.compile(r"(?P<head>.*?)(?P<number>\d+)-of-(?P<of>\d+)")
_LAST_NUMBER = re.compile(r"(?P<head>.*?)(?P<number>\d+)(?P<tail>\D*)")
_LFS_POINTER = b"version https://git-lfs"

Layout = Literal["folder", "tar", "parquet", "shards"]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """A data set: its splits' samples, and their classes."""

    layout: Layout
    class_names: tuple[str, ...]
    """In label order: synset ids, or the folders' names."""
    splits: Mapping[str, SplitIndex]
    """"train" and "val". ``facts["folder"]`` is the split's folder below the root: of class folders, a sample's file is
    ROOT/folder/key."""
    fingerprint: str
    """16 hex digits: of class and file names for folders, of labels, keys and sizes else; not of where they lie."""
    notes: tuple[str, ...] = ()
    """One line each: what is not as published, or left out."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A listing without its splits' samples."""

    class_names: Sequence[str]
    fingerprint: str
    notes: Sequence[str] = ()


# ----------------------------------------------------------------------------------------------------------- kept on disk


def kept(cache: Path, *, root: str, layout: Layout, stamp: Any, build: Callable[[Path], Summary]) -> Listing:
    """The listing of ``root`` as it is by ``stamp`` (plain values): the one kept in ``cache``, else ``build``'s, kept.

    ``build`` writes train.index and val.index into the folder it is given. It must not let an OSError of its own reading
    out: those are taken for the cache's, and end in a ConfigError.
    """
    name = re.sub(r"[^\w.-]", "_", Path(root).name) or "root"
    place = cache / f"{name}-{hashlib.sha256(root.encode(errors='surrogateescape')).hexdigest()[:12]}"
    folder = place / hashlib.sha256(json.dumps([_VERSION, layout, stamp]).encode()).hexdigest()[:16]
    part = place / f".{folder.name}.{os.uname().nodename}.{os.getpid()}.part"
    try:
        found = _opened(folder, layout)
        if found is not None:
            return found
        place.mkdir(parents=True, exist_ok=True)
        with (place / "lock").open("w") as lock:
            _hold(lock)
            found = _opened(folder, layout)  # by the rank that held the lock before
            if found is not None:
                return found
            shutil.rmtree(part, ignore_errors=True)  # of a process of the same number that was killed
            part.mkdir()
            summary = build(part)
            content = {
                "class_names": list(summary.class_names),
                "fingerprint": summary.fingerprint,
                "notes": list(summary.notes),
            }
            text = json.dumps(content)
            (part / "listing.json").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n")
            shutil.rmtree(folder, ignore_errors=True)  # one that is damaged
            with _taken(errno.ENOTEMPTY, errno.EEXIST):  # where there are no locks, another rank may have been quicker
                part.rename(folder)
            _forget(place)
        found = _opened(folder, layout)
    except OSError as error:
        raise ConfigError(
            f"the folder of kept indices must be one that can be written, got {str(cache)!r}: {error.strerror or error}"
        ) from None
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
    if found is None:
        raise ConfigError(
            f"the index just written to {str(folder)!r} cannot be read back: is that disk full or failing?"
        )
    return found


def _opened(folder: Path, layout: Layout) -> Listing | None:
    try:
        checksum, _, text = (folder / "listing.json").read_text().partition("\n")
        if hashlib.sha256(text.rstrip("\n").encode()).hexdigest() != checksum:
            return None
        content = json.loads(text)
        splits = {split: SplitIndex(folder / f"{split}.index") for split in SPLITS}
    except (FileNotFoundError, NotADirectoryError, DamagedIndexError, UnicodeDecodeError):
        return None  # it is built again
    with suppress(OSError):  # a cache that may only be read
        os.utime(folder)
    return Listing(
        layout=layout,
        class_names=tuple(content["class_names"]),
        splits=splits,
        fingerprint=content["fingerprint"],
        notes=tuple(content["notes"]),
    )


def _hold(lock: IO[str]) -> None:
    # Some network file systems have no locks: then several ranks list at once, and the first one's is taken.
    with _taken(errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
        fcntl.flock(lock, fcntl.LOCK_EX)


@contextmanager
def _taken(*numbers: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


def _forget(place: Path) -> None:
    """Remove what has not been opened for a month, and the parts of processes that were killed."""
    for entry in place.iterdir():
        if entry.is_dir() and time.time() - entry.stat().st_mtime > _FORGOTTEN_DAYS * 24 * 3600:
            shutil.rmtree(entry, ignore_errors=True)


@contextmanager
def progress(what: str, total: int, *, after_s: float = 2.0) -> Iterator[Callable[[], None]]:
    """A bar with the time left on a terminal's stderr, once it has taken ``after_s``. Yields what to call after each step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task, began = bar.add_task(what, total=total), time.monotonic()

    def advance() -> None:
        if not bar.live.is_started and time.monotonic() - began >= after_s:
            bar.start()
        bar.advance(task)

    try:
        if after_s <= 0:
            bar.start()
        yield advance
    finally:
        bar.stop()


# ---------------------------------------------------------------------------------------------------------- files by name


def by_split(files: Mapping[str, int | None], *, root: str) -> dict[str, dict[str, int | None]]:
    """{"train": {name: size}, "val": ...}, in the order of their numbers. Raises ConfigError for a number that is missing."""
    found: dict[str, dict[str, int | None]] = {split: {} for split in SPLITS}
    for name in sorted(files, key=_natural):
        words = _SPLIT_WORD.findall(name.lower())
        if words:
            found["train" if words[-1] == "train" else "val"][name] = files[name]
    for split in SPLITS:
        if not found[split]:
            there = ", ".join(sorted(files, key=_natural)[:3])
            raise ConfigError(
                f"data.root must hold files named train... and val... (or validation), got {root!r}: none of {split} "
                f"among {len(files)} ({there}{' ...' if len(files) > 3 else ''})"
            )
        _refuse_gaps(list(found[split]), root)
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _refuse_gaps(names: Sequence[str], root: str) -> None:
    """Files are numbered from 0 (or 1) on: one that is missing is a download that has not ended."""
    groups: dict[tuple[str, str, int], dict[int, str]] = {}
    for name in names:
        stem = name.rpartition(".")[0]
        match = _OF.match(stem) or _LAST_NUMBER.fullmatch(stem)
        if match is None:
            continue
        parts = match.groupdict()
        numbered = groups.setdefault((parts["head"], parts.get("tail", ""), int(parts.get("of", 0))), {})
        number = int(parts["number"])
        if number in numbered and "of" in parts:
            raise ConfigError(
                f"data.root must hold each file once, got {numbered[number]} and {name} in {root!r}: remove the older one"
            )
        numbered[number] = match.group(0)
    for (_, _, of), numbered in groups.items():
        highest = of - 1 if of and max(numbered) < of else max(numbered)
        first = 1 if min(numbered) == 1 and (not of or highest == of) else 0
        missing = next((number for number in range(first, highest + 1) if number not in numbered), None)
        if missing is not None:
            like = numbered[min(numbered, key=lambda number: abs(number - missing))]
            match = _OF.match(like) or _LAST_NUMBER.fullmatch(like)
            assert match is not None
            begin, end = match.span("number")
            absent = f"{like[:begin]}{missing:0{end - begin}d}{like[end:]}"
            raise ConfigError(
                f"data.root must hold all files of a split, got {root!r}: {absent} is missing: "
                f"{len(numbered)} of {highest + 1 - first} files; download the others"
            )


def wrong_start(name: str, start: bytes, kind: str) -> ConfigError:
    """For a file whose first bytes are not of its kind."""
    if start.startswith(_LFS_POINTER):
        return ConfigError(f"data.root: {name} is a pointer of Git LFS, not the file itself: run git lfs pull")
    return ConfigError(f"data.root: {name} is not a {kind} file (it begins with {start[:8]!r}): download it again")


# -------------------------------------------------------------------------------------------------------- what is found


def imagenet_notes(class_names: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """A line for each split of ImageNet's 1000 classes that has another number of images than published."""
    if len(class_names) != 1000 or tuple(class_names) != _synsets():
        return []
    return [
        f"{split} has {counts[split]:,} images, ImageNet-1K has {published:,}"
        for split, published in _IMAGENET_1K.items()
        if counts[split] != published
    ]


def summary_of_packed(folder: Path, names: Mapping[int, str], notes: Sequence[str] = ()) -> Summary:
    """Of tar or parquet files whose train.index and val.index are in ``folder``; ``names`` as far as the files tell them."""
    splits = {split: SplitIndex(folder / f"{split}.index") for split in SPLITS}
    labels = {split: set(index.label.tolist()) for split, index in splits.items()}
    highest = max(max(labels[split]) for split in SPLITS)
    if not names and highest == 999:  # as published: ImageNet's, by number
        names = dict(enumerate(_synsets()))
    num_classes = max([highest, *names]) + 1
    class_names = [names.get(label, str(label)) for label in range(num_classes)]
    if len(set(class_names)) < num_classes:
        twice = next(name for name in class_names if class_names.count(name) > 1)
        raise ConfigError(f"data.root must name each class once, got {twice!r} more than once")
    digest = hashlib.sha256("\n".join(class_names).encode())
    for index in splits.values():
        digest.update(index.label.tobytes() + index.size.tobytes() + "\n".join(index.keys()).encode())
    more = list(notes)
    for split in SPLITS:
        without = [class_names[label] for label in range(num_classes) if label not in labels[split]]
        if without:
            some = ", ".join(without[:3]) + (" ..." if len(without) > 3 else "")
            more.append(f"{split} has no image of {len(without)} of {num_classes} classes: {some}")
    more += imagenet_notes(class_names, {split: len(index) for split, index in splits.items()})
    return Summary(class_names=class_names, fingerprint=digest.hexdigest()[:16], notes=more)


def _synsets() -> tuple[str, ...]:
    from eit_lab.data.variants import synsets

    return synsets()
