"""The project's own shards, as ``python -m eit_lab.shards build`` leaves them: manifest.json tells what there is. No torch.

The manifest has size and checksum of every file, and a checksum of itself. Opening compares the sizes of all shards with it,
and both indices; the shards' content is compared record by record as it is read, and as a whole by
``shards verify``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from eit_lab.config import ConfigError
from eit_lab.data.index import DamagedIndexError, SplitIndex
from eit_lab.data.layouts.listing import SPLITS, Listing
from eit_lab.data.store import Store

MANIFEST = "manifest.json"
FORMAT, VERSION = "eit_lab shards", 1
_ASKED_AGAIN_S = 3600.0
_MEND = "build or copy the shards again, or mend them: the command that built them writes what is missing or damaged"


def list_shards(store: Store, cache: Path) -> Listing:
    """The listing of a root with a manifest; a server's indices are kept in ``cache``.

    Raises ConfigError for a shard that is missing or has another size, or a file that is not what was written; StoreError.
    """
    shown = store.address(MANIFEST)
    manifest = read_manifest(store.read(MANIFEST), shown)
    sizes = {name: size for name, (size, _) in manifest["files"].items()}
    if store.is_local:
        check_sizes(store.folder, sizes)
    else:
        _check_remote(store, sizes, noted=cache / "shards" / manifest["hash"] / "there")
    splits = {}
    for split in SPLITS:
        name = f"{split}.index"
        size, checksum = manifest["files"][name]
        path = store.folder / name if store.is_local else cache / "shards" / manifest["hash"] / name
        if not store.is_local and not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                store.fetch(name, path, size=size, checksum=checksum)
            except FileNotFoundError:
                raise ConfigError(
                    f"data.root: {store.address(name)} is missing, which {MANIFEST} names; {_MEND}"
                ) from None
            except OSError as error:
                raise ConfigError(f"{path} cannot be written: {error.strerror or error}; is that disk full?") from None
        try:
            splits[split] = SplitIndex(path)
        except DamagedIndexError as error:
            if not store.is_local:
                path.unlink(missing_ok=True)  # the next start fetches it again
            raise ConfigError(f"data.root: {error}") from None
        told = {container.name: [container.size, container.checksum] for container in splits[split].containers}
        if any(manifest["files"].get(file) != entry for file, entry in told.items()):
            raise ConfigError(f"data.root: {path} is of another build than {shown}: copy both again")
    return Listing(
        layout="shards",
        class_names=tuple(manifest["class_names"]),
        splits=splits,
        fingerprint=manifest["fingerprint"],
        notes=tuple(manifest["notes"]),
    )


def _check_remote(store: Store, sizes: Mapping[str, int], *, noted: Path) -> None:
    """The same for a server, which is asked again after an hour: ``noted`` is touched when all was there."""
    if noted.is_file() and time.time() - noted.stat().st_mtime < _ASKED_AGAIN_S:
        return
    wanted = {name: size for name, size in sizes.items() if not name.startswith("originals/")}
    there = store.sizes(wanted)
    for name, size in wanted.items():
        shown = store.address(name)
        if name not in there:
            raise ConfigError(f"data.root: {shown} is missing ({size:,} bytes); {_MEND}")
        if there[name] not in (size, None):
            raise ConfigError(f"data.root: {shown} has {there[name]:,} bytes, must have {size:,}; {_MEND}")
    noted.parent.mkdir(parents=True, exist_ok=True)
    noted.touch()


def check_sizes(folder: Path, sizes: Mapping[str, int]) -> None:
    """Raise ConfigError for the first file that is missing or has another size."""
    for name, size in sizes.items():
        if name.startswith("originals/"):
            continue  # nobody reads them but extract and verify
        try:
            there = (folder / name).stat().st_size
        except FileNotFoundError:
            raise ConfigError(f"data.root: {folder / name} is missing ({size:,} bytes); {_MEND}") from None
        if there != size:
            raise ConfigError(f"data.root: {folder / name} has {there:,} bytes, must have {size:,}; {_MEND}")


def read_manifest(content: bytes, shown: str) -> dict[str, Any]:
    """A manifest, found to be what was written. Raises ConfigError, which names it as ``shown``."""
    try:
        manifest = json.loads(content)
    except ValueError:
        raise ConfigError(f"data.root: {shown} is damaged, or cut short: copy it again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ConfigError(f"data.root: {shown} is not the manifest of shards that eit_lab built")
    if manifest["version"] != VERSION:
        raise ConfigError(
            f"data.root: {shown} is of version {manifest['version']} of the format, this program reads version {VERSION}"
        )
    if sealed(manifest)["checksum"] != manifest.get("checksum"):
        raise ConfigError(f"data.root: {shown} is damaged (its checksum differs): copy it again")
    return manifest


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with its own checksum."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return {**rest, "checksum": xxhash.xxh3_128_hexdigest(json.dumps(rest, sort_keys=True).encode())}


def hash_of_files(files: Mapping[str, tuple[int, str]]) -> str:
    """Hash of the whole: of name, size and checksum of each file."""
    return xxhash.xxh3_128_hexdigest(json.dumps([[name, *files[name]] for name in sorted(files)]).encode())
