"""Files of a store, kept on a local disk up to a limit: one folder for all processes of a machine, and for several data sets. No torch.

All agreement is by files and flock(2), which a killed process lets go of by itself and a forked one does not share by
mistake. In the folder:

    lock          bookkeeping; its content bounds from above how many bytes are kept and on their way
    slots/        one process fetches a file, the others wait: a lock for each of 1024 groups of names
    work/ID/      what is on its way: ``lock``, held and with the bytes it may take in all; ``source``; ``made``
    ROOT/         files that are whole, by the hash of the store's root; their time of change is that of their last use

A file is moved out of work/ only when it is whole, and its name says of which version it is: nobody sees half a file, and no
shard of a data set that was built anew is mistaken for the old one.

The limit holds for what has a name here. A file that is dropped while a process reads it stays readable, and takes its
space until it is closed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import xxhash

from eit_lab.command import RunError
from eit_lab.data.store import LOG, Store

Make = Callable[[Path, Path], None]
"""Writes what is kept (second path) from the file that was fetched (first path)."""

_SLOTS = 1024
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TRIES_WHEN_FULL = 5
_SLACK = 64  # this part of the limit is freed beyond what is needed: looking through the folder takes time
_WAIT_S = 0.05


@dataclass
class _Work:
    """A transfer on its way."""

    folder: Path
    lock: int
    reserved: int = 0
    """Bytes that it may take in all."""


class FileCache:
    """Local copies of a store's files, at most ``limit_bytes`` of them in ``folder``, the least recently used dropped first.

    It travels to other processes as it is. A file's last use is known to within ``touch_s`` seconds.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, store: Store, touch_s: float = 60.0) -> None:
        """Raises RunError where the folder cannot be used."""
        self.folder, self.limit_bytes, self.store, self.touch_s = folder, limit_bytes, store, touch_s
        self.kept = folder / xxhash.xxh3_64_hexdigest(store.root.encode())
        with self._usable():
            for path in (folder / "slots", folder / "work", self.kept):
                path.mkdir(parents=True, exist_ok=True)

    def path(
        self, name: str, *, size: int | None = None, checksum: str | None = None, make: Make | None = None
    ) -> Path:
        """As ``open``, but the file's path. NOTE: another process may drop it at any time; ``open`` is safe from that."""
        os.close(self.open(name, size=size, checksum=checksum, make=make))
        return self._place(name, size=size, checksum=checksum, make=make)

    def open(self, name: str, *, size: int | None = None, checksum: str | None = None, make: Make | None = None) -> int:
        """A file descriptor for reading the store's file ``name``, or what ``make`` makes of it; fetched where it is not here.

        ``size`` and ``checksum`` (xxh3-128, hex) are the file's in the store. The caller closes the descriptor. Raises
        FileNotFoundError, StoreError, RunError (no space), ConfigError (larger than the whole cache), what ``make`` raises.
        """
        place = self._place(name, size=size, checksum=checksum, make=make)
        whole = size if make is None else None
        with self._usable():
            file = self._opened(place, whole)
            if file is None:
                with self._slot(place):
                    file = self._opened(place, whole)
                    if file is None:
                        file = self._bring(name, place, size=size, checksum=checksum, make=make)
        return file

    def drop(self, name: str) -> None:
        """Throw the local copies of a file away, as for a damaged one; the next ``open`` fetches it again."""
        place = self._place(name)
        _, _, tail = place.name.partition("-")
        with self._usable(), contextlib.suppress(FileNotFoundError):
            for path in list(place.parent.iterdir()):
                if path.name.partition("-")[2] in (tail, f"{tail}.made"):
                    path.unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove what processes left that were killed while they fetched; the next transfer would do so as well."""
        with self._usable(), self._locked():
            self._on_its_way(None)

    def _place(
        self, name: str, *, size: int | None = None, checksum: str | None = None, make: Make | None = None
    ) -> Path:
        folder, _, tail = name.rpartition("/")
        if not tail or any(part in ("", ".", "..") for part in name.split("/")):
            raise RunError(f"{self.store.root}: {name!r} is no name of a file below it")
        version = checksum[:16] if checksum else f"{size or 0:016x}"
        return self.kept / folder / f"{version}-{tail}{'' if make is None else '.made'}"

    def _opened(self, place: Path, size: int | None) -> int | None:
        try:
            file = os.open(place, os.O_RDONLY)
        except FileNotFoundError:
            return None
        found = os.fstat(file)
        if size is not None and found.st_size != size:  # as a power cut leaves it
            os.close(file)
            LOG.warning("%s: %d bytes instead of %d: fetched again", place, found.st_size, size)
            place.unlink(missing_ok=True)
            return None
        if time.time() - found.st_mtime > self.touch_s:
            with contextlib.suppress(PermissionError):  # another user's: it is as old as that user says
                os.utime(file)
        return file

    def _bring(self, name: str, place: Path, *, size: int | None, checksum: str | None, make: Make | None) -> int:
        """Fetch (and make) a file and put it into its place; the caller holds its slot."""
        for _ in range(_TRIES_WHEN_FULL):
            try:
                with self._work() as work:
                    return self._brought(work, name, place, size=size, checksum=checksum, make=make)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
            with self._locked():
                if not (kept := sum(file.size for file in self._files())):
                    break
                self._drop_oldest(most=max(0, kept - max(size or 0, 1)))
        free = shutil.disk_usage(self.folder).free
        raise RunError(
            f"data.cache_dir: no space left for {place.name.partition('-')[2]} in {self.folder} ({free / 1e9:.3f} GB free "
            "after dropping what could be): choose another folder, or free space there and lower data.cache_gb"
        )

    def _brought(
        self, work: _Work, name: str, place: Path, *, size: int | None, checksum: str | None, make: Make | None
    ) -> int:
        copies = 1 if make is None else 2  # what is made takes about as much as what it is made of
        if size is not None:
            self._reserve(work, copies * size, name)
        whole = work.folder / "source"
        file = os.open(whole, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            self.store.fetch_into(
                name, file, size=size, checksum=checksum, announce=lambda n: self._reserve(work, copies * n, name)
            )
        finally:
            os.close(file)
        if make is not None:
            source, whole = whole, work.folder / "made"
            make(source, whole)
        self._reserve(work, whole.stat().st_size, name, wait=False)  # where nobody had said how much it would be
        place.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(whole, os.O_RDONLY)
        try:
            whole.replace(place)
        except OSError:
            os.close(file)
            raise
        return file

    def _reserve(self, work: _Work, need: int, name: str, *, wait: bool = True) -> None:
        """Make room for ``need`` bytes in all, dropping the oldest files, and note that they are taken.

        ``wait``: for room that others' transfers take; not for what is here already, or two could wait for each other.
        """
        if need <= work.reserved:
            return
        if need > self.limit_bytes:
            from eit_lab.config import ConfigError

            raise ConfigError(
                f"data.cache_gb must be at least what {name} takes ({need:,} bytes), got {self.limit_bytes / 1e9:g}; "
                f"nearest: {-(-need // 10**6) / 1000:g}"
            )
        warned = False
        while True:
            with self._locked() as ledger:
                on_its_way = self._on_its_way(work)
                noted = os.pread(ledger, 32, 0).strip()
                used = int(noted) - work.reserved if noted.isdigit() else self.limit_bytes
                if used + need > self.limit_bytes or self._free() < need:
                    most = self.limit_bytes - self.limit_bytes // _SLACK - need - on_its_way
                    used = on_its_way + self._drop_oldest(most=max(0, most), free=need)
                if used + need <= self.limit_bytes or not wait:
                    os.pwrite(ledger, b"%-32d" % (used + need), 0)
                    os.pwrite(work.lock, b"%-32d" % need, 0)
                    work.reserved = need
                    return
            if not warned:
                warned = True
                LOG.warning("data.cache_gb: all of it is taken by files on their way, %s waits for room", name)
            time.sleep(_WAIT_S)

    def _drop_oldest(self, *, most: int, free: int = 0) -> int:
        """Drop files until at most ``most`` bytes are kept and ``free`` are free on the disk, or none is left: bytes kept."""
        files = sorted(self._files())
        kept = sum(file.size for file in files)
        for file in files:
            if kept <= most and self._free() >= free:
                break
            file.path.unlink(missing_ok=True)
            kept -= file.size
        return kept

    def _files(self) -> Iterator[_Kept]:
        """All files that are kept, of all stores."""
        for top in self.folder.iterdir():
            if top.name in ("slots", "work") or not top.is_dir():
                continue
            for folder, _, names in os.walk(top):
                for name in names:
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        status = path.stat()
                        yield _Kept(status.st_mtime, status.st_size, path)

    def _on_its_way(self, mine: _Work | None) -> int:
        """Bytes that others' transfers may take; what is left of a process that was killed is removed."""
        total = 0
        for folder in (self.folder / "work").iterdir():
            if mine is not None and folder == mine.folder:
                continue
            sizes = 0
            with contextlib.suppress(FileNotFoundError):  # it has just come to its end
                sizes = sum(path.stat().st_size for path in folder.iterdir())
            try:
                lock = os.open(folder / "lock", os.O_RDWR)
            except FileNotFoundError:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                total += max(sizes, int(os.pread(lock, 32, 0).strip() or 0))
            finally:
                os.close(lock)
        return total

    def _free(self) -> float:
        disk = os.statvfs(self.folder)
        return disk.f_bavail * disk.f_frsize if disk.f_blocks else float("inf")

    @contextlib.contextmanager
    def _work(self) -> Iterator[_Work]:
        folder = self.folder / "work" / uuid.uuid4().hex
        with self._locked():  # or it would pass for one of a killed process
            folder.mkdir()
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield _Work(folder, lock)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            _let_go(lock)

    def _slot(self, place: Path) -> contextlib.AbstractContextManager[int]:
        number = xxhash.xxh3_64_intdigest(os.fsencode(place.relative_to(self.folder))) % _SLOTS
        return _holding(self.folder / "slots" / f"{number:03x}")

    def _locked(self) -> contextlib.AbstractContextManager[int]:
        return _holding(self.folder / "lock")

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno is None:  # the store's: no such file there
                raise
            raise RunError(
                f"data.cache_dir: {self.folder} cannot be used ({error.strerror}): choose a folder on a local disk"
            ) from None


class _Kept(NamedTuple):
    used: float
    """Seconds since 1970."""
    size: int
    path: Path


@contextlib.contextmanager
def _holding(path: Path) -> Iterator[int]:
    """The file of this path, locked: nobody else on this machine is in here with it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        _let_go(file)


def _let_go(lock: int) -> None:
    # NOTE: closing is not enough: a process that was forked in the meantime has the same open file.
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)
