"""Pictures to measure with: JPEGs cut from photographs, in ImageNet's layout, and the project's own shards of them.

As ImageNet's: 500x375 px, 4:2:0, quality 91 to 97, about 100 KB, baseline, standard Huffman tables. Everything is drawn from
a fixed seed; what is there already, by its parameters, is used again.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eit_lab.config import ConfigError
from eit_lab.data.building import Options, build
from eit_lab.data.layouts import IMAGE_SUFFIXES, open_root
from eit_lab.data.layouts.shards import MANIFEST
from eit_lab.data.roots import OpenRoot
from eit_lab.data.store import Store

WIDTH, HEIGHT = 500, 375
NUM_CLASSES = 100
_QUALITIES = range(91, 98)
_WANTED_BYTES, _NEAR = 100_000, 5_000
_LOOKED_AT = 48  # cuts that the range of qualities is chosen by
_NATURAL_PX = (
    1250  # a photograph is reduced, at most 4 times, to about this width: then 500 px of it have a photo's detail
)
_LARGEST = 1.5  # times 500 px, of a cut that is reduced: more of it would be no photograph's detail
_CHINA_SHARE = 0.85  # of scikit-learn's pair: china.jpg has the detail of ImageNet's files, flower.jpg half of it
_VERSION = 1

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Material:
    """What is measured with."""

    files: Path
    """Root of class folders."""
    shards: Path
    facts: dict[str, Any]
    """For the record: number, bytes, qualities, photographs."""


def prepare(
    cache: Path, *, images: int, photos: str | None, fresh: bool, workers: int, on_image: Progress, on_packed: Progress
) -> Material:
    """Make the files and the shards in ``cache``, or find them there; both calls get a number of images so far.

    Raises ConfigError for ``photos`` without photographs, and what building shards raises.
    """
    named = _named(photos)
    words = json.dumps([_VERSION, images, [(name, len(content)) for name, content in named]])
    folder = cache / f"photographs-{images}-{hashlib.sha256(words.encode()).hexdigest()[:10]}"
    files, shards, facts = folder / "files", folder / "shards", folder / "facts.json"
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if not facts.exists():
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        shutil.rmtree(part, ignore_errors=True)
        opened = [_opened(name, content) for name, content in named]
        shares = [_CHINA_SHARE, 1 - _CHINA_SHARE] if photos is None else [1 / len(opened)] * len(opened)
        found = _make(part / "files", images, opened, shares, on_image)
        (part / "facts.json").write_text(json.dumps({**found, "photographs": [name for name, _ in named]}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    on_image(images)
    source = OpenRoot(listing=open_root(str(files), cache=cache), store=Store(str(files)), files=None)
    there = (shards / MANIFEST).exists()  # then it is only looked at, and processes would take longer to start
    built = build(source, shards, Options(), workers=1 if there else workers, on_progress=on_packed)
    told = json.loads(facts.read_text())
    told["shard_bytes"] = sum(split["bytes"] for split in built.manifest["splits"].values())
    return Material(files, shards, told)


def _named(photos: str | None) -> list[tuple[str, bytes]]:
    """(name, content) of the photographs."""
    if photos is None:
        import sklearn.datasets

        folder = Path(sklearn.datasets.__file__).parent / "images"
        return [(f"scikit-learn: {path.name}", path.read_bytes()) for path in sorted(folder.glob("*.jpg"))]
    folder = Path(photos).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"photos must be a folder of photographs, got {photos!r}")
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    if not found:
        raise ConfigError(f"photos must hold photographs (JPEG or PNG), got {photos!r} without any")
    return [(path.name, path.read_bytes()) for path in found]


def _opened(name: str, content: bytes) -> Image.Image:
    try:
        photo: Image.Image = Image.open(io.BytesIO(content)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        raise ConfigError(f"photos: {name} cannot be read as a photograph; take it out of the folder") from None
    factor = min(4, max(1, round(photo.width / _NATURAL_PX)))
    photo = photo.reduce(factor)
    if photo.width < WIDTH or photo.height < HEIGHT:
        raise ConfigError(f"photos must be larger than {WIDTH}x{HEIGHT} px, got {name} of {photo.width}x{photo.height}")
    return photo


def _make(
    root: Path, images: int, photos: Sequence[Image.Image], shares: Sequence[float], on_image: Progress
) -> dict[str, Any]:
    random = np.random.default_rng(0)

    def cut() -> Image.Image:
        return _cut(photos[int(random.choice(len(photos), p=shares))], random)

    low, high = _qualities([cut() for _ in range(_LOOKED_AT)])
    total = 0
    for split, count in (("train", images), ("val", NUM_CLASSES)):
        for number in range(count):
            name = f"n{number % NUM_CLASSES:08d}"
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            content = _jpeg(cut(), int(random.integers(low, high + 1)))
            (folder / f"{name}_{number // NUM_CLASSES:05d}.JPEG").write_bytes(content)
            if split == "train":
                total += len(content)
                on_image(number + 1)
    return {"images": images, "size": [WIDTH, HEIGHT], "mean_bytes": round(total / images), "qualities": [low, high]}


def _cut(photo: Image.Image, random: np.random.Generator) -> Image.Image:
    """A part of a photograph, larger than needed where there is more, reduced to 500x375 px; mirrored or not."""
    largest = min(photo.width / WIDTH, photo.height / HEIGHT)
    scale = 1 + (0.7 + 0.3 * random.random()) * (min(largest, _LARGEST) - 1)
    w, h = round(WIDTH * scale), round(HEIGHT * scale)
    x, y = int(random.integers(photo.width - w + 1)), int(random.integers(photo.height - h + 1))
    part = photo.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS, box=(x, y, x + w, y + h))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else part


def _jpeg(image: Image.Image, quality: int) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, subsampling="4:2:0")
    return content.getvalue()


def _qualities(cuts: Sequence[Image.Image]) -> tuple[int, int]:
    """The widest range of qualities whose files have about 100 KB on average, or that comes nearest."""
    mean = {quality: float(np.mean([len(_jpeg(cut, quality)) for cut in cuts])) for quality in _QUALITIES}

    def miss(bounds: tuple[int, int]) -> tuple[float, int]:
        low, high = bounds
        size = float(np.mean([mean[quality] for quality in range(low, high + 1)]))
        return max(0.0, abs(size - _WANTED_BYTES) - _NEAR), low - high

    return min(((low, high) for low in _QUALITIES for high in _QUALITIES if low <= high), key=miss)
