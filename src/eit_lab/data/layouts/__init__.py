"""What people have as ``data.root``, found out and listed: one index a split, whatever the layout. No torch.

The root is, in this order of recognition: the project's own shards (a manifest.json), class folders, tar files in
webdataset's layout, parquet files. What is none of these, or only half of one, is one line that says what was found and what
was expected. Class folders are read from a local or mounted folder only: a server is asked for packed files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from eit_lab.config import ConfigError
from eit_lab.data.cache import FileCache
from eit_lab.data.layouts.folder import holds_class_folders, list_folder, not_a_root
from eit_lab.data.layouts.listing import IMAGE_SUFFIXES, Listing
from eit_lab.data.layouts.parquet import list_parquet
from eit_lab.data.layouts.tars import CLASS_FILES, INFO, list_tars, published_shards
from eit_lab.data.store import Store

__all__ = ["IMAGE_SUFFIXES", "Listing", "is_packed", "open_root"]

_MANIFEST = "manifest.json"
# Where packed files lie: beside each other, in Hugging Face's data/, or in a folder a split.
_FOLDERS = [
    *("", "data", "default"),
    *(f"{above}{split}" for above in ("", "data/", "default/") for split in ("train", "val", "validation")),
]
_ARCHIVE = re.compile(r"ILSVRC2012_.*|n\d{8}\.tar")  # as image-net.org gives them: not shards, they have no labels


def open_root(root: str, *, cache: Path, files: FileCache | None = None) -> Listing:
    """What is at ``root``: a folder, or an address that ``Store`` knows. Raises ConfigError, in one line; RunError.

    The indices are kept in the folder ``cache``, by the root's name and state: a second start, and all ranks but one, open
    what is there. ``files`` is for an address: tar and parquet files are fetched there, each once, to be indexed.
    """
    store = Store(root)
    if store.is_local and not store.folder.is_dir():
        raise not_a_root(store.folder, root)
    if store.exists(_MANIFEST):
        # The project's own shards.
        from eit_lab.data.layouts.shards import list_shards

        return list_shards(store, cache)
    return _open_local(store, root, cache) if store.is_local else _open_remote(store, cache, files)


def is_packed(root: str) -> bool:
    """Whether a root is not a plain folder of images: an address, shards, tar or parquet files."""
    store = Store(root)
    if not store.is_local:
        return True
    return store.exists(_MANIFEST) or (store.folder.is_dir() and any(map(_is_packed, _packed(store.folder))))


def _open_local(store: Store, root: str, cache: Path) -> Listing:
    def opened(name: str) -> IO[bytes]:
        return (store.folder / name).open("rb")

    try:
        if not holds_class_folders(store.folder):
            entries = _packed(store.folder)
            files: dict[str, int | None] = {name: size for name, (size, _) in entries.items() if _is_packed(name)}
            if files:
                stamp = [(name, *entries[name]) for name in sorted(entries)]
                return _list_packed(
                    store, files, root=os.path.realpath(store.folder), stamp=stamp, cache=cache, opened=opened
                )
    except OSError as error:
        raise ConfigError(f"data.root: {error.filename} cannot be read: {error.strerror or error}") from None
    return list_folder(store.folder, cache=cache, shown=root)


def _open_remote(store: Store, cache: Path, files: FileCache | None) -> Listing:
    found = _names(store)
    # In these folders only: an address may have several data sets below it.
    packed = {n: size for n, size in found.items() if _is_packed(n) and n.rpartition("/")[0] in _FOLDERS}
    if not packed:
        there = sorted({name.partition("/")[0] for name in found})
        raise ConfigError(
            f"data.root must hold {_MANIFEST} (of eit_lab.shards build), tar or parquet files to be read from a server, got "
            f"{store.root!r}: found {', '.join(there[:5]) or 'no list of files'} there; single image files are read from a "
            "local or mounted folder only"
        )
    assert files is not None, "files of an address need a FileCache"
    if None in packed.values():  # the same name and size here as when they are read: they are kept by both
        packed.update(store.sizes(packed))
    fetched = files

    def opened(name: str) -> IO[bytes]:
        # Not by its path: other processes may drop it from the cache at any time.
        return os.fdopen(fetched.open(name, size=packed[name]), "rb")

    return _list_packed(store, packed, root=store.root, stamp=sorted(packed.items()), cache=cache, opened=opened)


def _names(store: Store) -> dict[str, int | None]:
    """Files of a server, as far as it tells them, and folders (with a slash at their end)."""
    try:
        found = store.names()
        for folder in _FOLDERS:
            if f"{folder}/" in found:  # of http, whose lists are of one folder each
                found.update(store.names(folder))
    except FileNotFoundError:
        found = {}
    if not any(map(_is_packed, found)) and store.exists(INFO):  # a server without lists
        shards = published_shards(store.read(INFO).decode())
        found.update(dict.fromkeys((name for names in shards.values() for name in names), None))
    return found


def _list_packed(
    store: Store,
    files: Mapping[str, int | None],
    *,
    root: str,
    stamp: object,
    cache: Path,
    opened: Callable[[str], IO[bytes]],
) -> Listing:
    """Of tar files where there are any, else of parquet files."""

    def there(name: str) -> IO[bytes]:
        try:
            return opened(name)
        except OSError as error:
            raise ConfigError(f"data.root: {store.address(name)} cannot be read: {error.strerror or error}") from None

    def text_of(name: str) -> str | None:
        try:
            return store.read(name).decode()
        except FileNotFoundError:
            return None

    tars = {name: size for name, size in files.items() if name.endswith(".tar")}
    if tars:
        return list_tars(tars, root=root, stamp=stamp, opened=there, text_of=text_of, cache=cache)
    return list_parquet(files, root=root, stamp=stamp, opened=there, cache=cache)


def _packed(root: Path) -> dict[str, tuple[int, int]]:
    """{name below the root: (bytes, time of change in ns)} of packed files, and of those that tell about them."""
    found = {}
    for folder in _FOLDERS:
        if not (root / folder).is_dir():
            continue
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if (_is_packed(name) or name in (INFO, *CLASS_FILES)) and entry.is_file():
                    state = entry.stat()
                    found[name] = (state.st_size, state.st_mtime_ns)
    return found


def _is_packed(name: str) -> bool:
    file = name.rpartition("/")[2]
    return file.endswith((".tar", ".parquet")) and file[0] != "." and not _ARCHIVE.fullmatch(file)
