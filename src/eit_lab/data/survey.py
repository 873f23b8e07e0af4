"""What a data set holds, of any layout: counts, bytes, sizes of images, and a sheet of samples to look at. No torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from eit_lab.data.decode import DecodeError, Decoder
from eit_lab.data.reading import SampleError, SampleReader
from eit_lab.data.restart import Bytes, NotAJpegError, read_header
from eit_lab.data.roots import OpenRoot, Split

_LOOKED_AT = 256  # images that are read for what the index does not tell
_SEED = 0
PERCENTILES = (0, 5, 50, 95, 100)
_CELL_PX = 160
_CAPTION_PX = 30
_FONT_PX = 11
_GAP_PX = 6
_INK, _FAINT, _PAPER = (20, 20, 20), (120, 120, 120), (255, 255, 255)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """One split."""

    split: Split
    num_images: int
    num_classes: int
    """With images."""
    fewest: int
    """Images of the smallest class."""
    most: int
    num_files: int
    """Or folders, that hold the images."""
    bytes_per_image: float
    widths: NDArray[np.int64]
    """px, of all images where the index tells them, else of some."""
    heights: NDArray[np.int64]
    segments: float | None
    """Mean number of restart segments of those that have any; None: none has."""
    segmented_share: float
    """Of the images looked at: those that crops can be cut from."""
    looked_at: int
    """Images that were read for this, 0: all is from the index."""


def survey(root: OpenRoot, split: Split) -> Survey:
    """Look at one split. Images that cannot be read are passed over here: ``verify`` and ``build`` name them."""
    index, reader = root.listing.splits[split], root.reader(split)
    some = np.sort(np.random.Generator(np.random.Philox(key=_SEED)).permutation(len(index))[:_LOOKED_AT])
    looked = [seen for sample in some.tolist() if (seen := _look(reader, sample)) is not None]
    sizes, widths, heights, segments = np.array(looked, dtype=np.int64).reshape(-1, 4).T
    told = index.width > 0
    per_class = np.bincount(index.label, minlength=len(root.listing.class_names))
    return Survey(
        split=split,
        num_images=len(index),
        num_classes=int(np.count_nonzero(per_class)),
        fewest=int(per_class.min()),
        most=int(per_class.max()),
        num_files=len(index.containers),
        bytes_per_image=float(index.size.mean() if index.size.any() else sizes.mean() if len(sizes) else 0),
        widths=index.width[told].astype(np.int64) if told.any() else widths,
        heights=index.height[told].astype(np.int64) if told.any() else heights,
        segments=float(segments[segments > 0].mean()) if segments.any() else None,
        segmented_share=float((segments > 0).mean()) if len(segments) else 0.0,
        looked_at=0 if told.any() else len(looked),
    )


def _look(reader: SampleReader, sample: int) -> tuple[int, int, int, int] | None:
    """(bytes, width, height, segments) of an image."""
    try:
        data, segments = reader.read(sample)
        width, height = _size(data)
    except (SampleError, UnidentifiedImageError, OSError):
        return None
    return len(data), width, height, 0 if segments is None else len(segments.offsets) - 1


def _size(data: Bytes) -> tuple[int, int]:
    try:
        header = read_header(data)
    except NotAJpegError:
        with Image.open(io.BytesIO(data)) as image:
            return image.size
    return header.width, header.height


# --------------------------------------------------------------------------------------------------------- contact sheet


def contact_sheet(root: OpenRoot, split: Split, *, columns: int = 8, rows: int = 5, seed: int = 0) -> Image.Image:
    """A sheet of ``columns`` x ``rows`` images of as many classes as there are, with their classes' names below."""
    index, reader, decoder = root.listing.splits[split], root.reader(split), Decoder()
    cell, line = _CELL_PX + _GAP_PX, _CELL_PX + _CAPTION_PX + _GAP_PX
    sheet = Image.new("RGB", (columns * cell + _GAP_PX, rows * line + _GAP_PX), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_PX)
    words = _in_words(root.listing.class_names)
    for place, sample in enumerate(spread(index.label, columns * rows, seed=seed)):
        x, y = _GAP_PX + place % columns * cell, _GAP_PX + place // columns * line
        label = int(index.label[sample])
        try:
            image = Image.fromarray(decoder.decode(reader.read(sample).data))
            width, height = image.size
            fitted = ImageOps.contain(image, (_CELL_PX, _CELL_PX), Image.Resampling.BICUBIC)
            sheet.paste(fitted, (x + (_CELL_PX - fitted.width) // 2, y + _CELL_PX - fitted.height))
            under = f"{width} x {height} px, no. {sample}"
        except (SampleError, DecodeError) as error:
            draw.rectangle((x, y, x + _CELL_PX - 1, y + _CELL_PX - 1), outline=_FAINT)
            under = f"no. {sample}: {error.reason if isinstance(error, SampleError) else error}"
        draw.text((x, y + _CELL_PX + 2), _fitted(words[label], draw, font), fill=_INK, font=font)
        draw.text((x, y + _CELL_PX + 15), _fitted(under, draw, font), fill=_FAINT, font=font)
    return sheet


def spread(labels: NDArray[np.int32], count: int, *, seed: int) -> list[int]:
    """Up to ``count`` samples, drawn at random, of as many classes as possible, in the order of their labels."""
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(len(labels))
    by_label = order[np.argsort(labels[order], kind="stable")]
    found = labels[by_label]
    starts = np.flatnonzero(np.r_[True, found[1:] != found[:-1]]) if len(found) else np.zeros(0, dtype=np.int64)
    turn = np.arange(len(found)) - np.repeat(starts, np.diff(np.r_[starts, len(found)]))
    # First one of each class, in a random order of classes, then a second one.
    place = np.empty(len(labels), dtype=np.int64)
    place[order] = np.arange(len(labels))
    chosen = by_label[np.lexsort((place[by_label], turn))][:count]
    return sorted(chosen.tolist(), key=lambda sample: (int(labels[sample]), int(place[sample])))


def _in_words(class_names: Sequence[str]) -> Sequence[str]:
    """WordNet ids as words, where the table of them is installed."""
    from eit_lab.config import ConfigError
    from eit_lab.data.variants import lemmas

    try:
        known = lemmas()
    except ConfigError:
        return class_names
    return [known.get(name, name) for name in class_names]


def _fitted(text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if draw.textlength(text, font=font) <= _CELL_PX:
        return text
    while text and draw.textlength(f"{text}…", font=font) > _CELL_PX:
        text = text[:-1]
    return f"{text.rstrip(' ,')}…"
