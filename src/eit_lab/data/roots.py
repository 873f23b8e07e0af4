"""A config's ``data.root``, opened: what is there, where it is read from, and the facts that a run is known by. No torch."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eit_lab.caches import user_cache
from eit_lab.config import ConfigError, ImageNetData
from eit_lab.data.cache import FileCache
from eit_lab.data.layouts import Listing, open_root
from eit_lab.data.reading import SampleReader
from eit_lab.data.store import Store

Split = Literal["train", "val"]


@dataclass(frozen=True, kw_only=True)
class OpenRoot:
    """A data set whose samples can be read."""

    listing: Listing
    store: Store
    files: FileCache | None
    """Where files are kept that cannot be read in place: of a server, and parquet files. Else None."""

    @property
    def windowed(self) -> bool:
        """Whether training goes through the files window by window."""
        return self.files is not None

    def reader(self, split: Split) -> SampleReader:
        """Of one split's samples."""
        return SampleReader(self.listing.splits[split], store=self.store, files=self.files, layout=self.listing.layout)

    def file_order(self, split: Split, samples: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Places in ``samples`` by the files they lie in, where files are fetched whole; else None."""
        if not self.windowed:
            return None
        index = self.listing.splits[split]
        order: NDArray[np.int64] = np.lexsort((index.offset[samples], index.container[samples]))
        return order


def open_data(config: ImageNetData) -> OpenRoot:
    """List ``data.root``, or find it listed already. Raises ConfigError where it is not as expected, RunError."""
    if not config.root:
        raise ConfigError(
            "data.root must name the ImageNet folder (with train/ and val/), got null: give data.root=PATH"
            f"{' or set EIT_LAB_IMAGENET' if config.name == 'imagenet' else ''}; without any files, experiment=demo or "
            "data=digits runs at once"
        )
    root = open_at(config.root, cache=cache_folder(config.cache_dir), cache_gb=config.cache_gb)
    names = root.listing.class_names
    if config.num_classes is not None and config.num_classes != len(names):
        raise ConfigError(
            f"data.num_classes must be the number of classes in data.root ({len(names)}), got {config.num_classes}"
        )
    if root.windowed:
        _check_cache(config, root.listing)
    return root


def open_at(root: str, *, cache: Path, cache_gb: float) -> OpenRoot:
    """What is at an address, listed and ready to be read; ``cache`` keeps lists and fetched files. Raises as open_root."""
    store = Store(root)
    files = None if store.is_local else FileCache(cache / "files", limit_bytes=round(cache_gb * 1e9), store=store)
    listing = open_root(root, cache=cache, files=files)
    if listing.layout == "parquet" and files is None:
        files = FileCache(cache / "files", limit_bytes=round(cache_gb * 1e9), store=store)
    return OpenRoot(listing=listing, store=store, files=files)


def _check_cache(config: ImageNetData, listing: Listing) -> None:
    """What is shuffled together, and what comes next, must lie in the cache at the same time."""
    index = listing.splits["train"]
    files = [container for container in index.containers if container.num_samples]
    largest = max(container.size for container in files)
    per_sample = sum(container.size for container in files) / len(index)
    window = min(config.shuffle_window * per_sample, sum(container.size for container in files))
    need = 2 * (window + largest) / 1e9
    if need > config.cache_gb:
        least = math.ceil(need * 100) / 100
        raise ConfigError(
            f"data.cache_gb must hold two windows of data.shuffle_window={config.shuffle_window} images, got "
            f"{config.cache_gb:g}; nearest: {least:g}"
        )


def notes(config: ImageNetData, root: OpenRoot) -> list[str]:
    """What a user should know of the data set: a line each."""
    lines = list(root.listing.notes)
    if not root.windowed:
        return lines
    index = root.listing.splits["train"]
    window = min(config.shuffle_window, len(index))
    lines.append(
        f"files are fetched whole and kept in {cache_folder(config.cache_dir)}: shuffled {window:,} images at a time"
    )
    # Shards that hold a class each, or files in the order of classes, shuffle badly.
    counts = np.bincount(index.container)
    together = np.flatnonzero(np.cumsum(counts) >= window)[0]
    found = len(np.unique(index.label[index.container <= together]))
    share = np.bincount(index.label) / len(index)
    expected = float((1 - (1 - share) ** window).sum())
    if found < 0.5 * expected:
        lines.append(
            f"warning: {window:,} images of neighbouring files have {found} classes instead of about {expected:.0f}: "
            "training would see them class after class; python -m eit_lab.shards build mixes them"
        )
    return lines


def cache_folder(cache_dir: str | None) -> Path:
    """data.cache_dir, or the user's own folder for caches."""
    return Path(cache_dir).expanduser() if cache_dir else user_cache()


def fingerprint(config: ImageNetData, root: OpenRoot) -> str:
    """What the order and content of samples depend on: names and labels, and with windows how samples lie in files."""
    listing = root.listing
    if not root.windowed:
        return listing.fingerprint
    digest = hashlib.sha256(f"{listing.fingerprint} {config.shuffle_window}".encode())
    for split in ("train", "val"):
        index = listing.splits[split]
        digest.update(index.container.tobytes())
        digest.update(index.offset.tobytes())
    return digest.hexdigest()[:16]
