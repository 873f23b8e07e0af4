"""timm's RandAugment operations (timm.data.auto_augment 1.0.31, arXiv:1909.13719) on uint8 images, in numpy and OpenCV.

Every operation takes pixels (H, W, C), C 1 or 3 (RGB), C-contiguous, and gives an image of the same shape: a new one, or the
one it was given where nothing changes. They agree with Pillow's, which timm calls:
- what maps each value by itself (AutoContrast to Brightness) is equal to the last bit, but for the mean grey of Contrast,
  where Pillow and OpenCV round one grey value in a thousand differently;
- Color and Sharpness are blended without rounding the grey or smooth image first: within 2 levels and 1;
- shears and translations take Pillow's own cubic (a = -1, edges repeated, fill only where the pixel's centre lies outside,
  truncated), shears with places and weights of 1/128: a row or a column is shifted by a constant, so 4 taps do the work of 16;
- Rotate is OpenCV's cubic (a = -0.75, places of 1/32 pixel, the fill blended into the edge), with Pillow's pixel centres;
- GaussianBlur is a Gaussian, which Pillow approaches with three boxes each way: 0.5 levels apart on average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Op = Literal[
    "AutoContrast",
    "Equalize",
    "Invert",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "GaussianBlur",
    "Rotate",
    "ShearX",
    "ShearY",
    "TranslateXRel",
    "TranslateYRel",
]

_TRUNCATED = -0.499  # added before OpenCV rounds, so that it truncates as Pillow does; what is whole stays so
_FINE_BITS = 7
_FINE = 1 << _FINE_BITS  # places between two pixels, and the unit of the weights: 1.5 x 128 x 128 is still an int16


def hold_one_thread() -> None:
    """OpenCV's own threads off in this process: loader workers share the cores already.

    NOTE: before workers are forked, not in them: a fork has no copy of the threads, and waits for them when told to stop them.
    """
    if cv2.getNumThreads() != 1:
        cv2.setNumThreads(1)


def apply(op: Op, pixels: Pixels, argument: float, *, fill: Sequence[int]) -> Pixels:
    """One operation; ``argument`` in its own unit (see each below), ``fill`` (C,) where the image does not reach."""
    match op:
        case "AutoContrast":
            return auto_contrast(pixels)
        case "Equalize":
            return equalize(pixels)
        case "Invert":
            return ~pixels
        case "Posterize":
            return posterize(pixels, int(argument))
        case "Solarize":
            return solarize(pixels, int(argument))
        case "SolarizeAdd":
            return solarize_add(pixels, int(argument))
        case "Color":
            return color(pixels, argument)
        case "Contrast":
            return contrast(pixels, argument)
        case "Brightness":
            return brightness(pixels, argument)
        case "Sharpness":
            return sharpness(pixels, argument)
        case "GaussianBlur":
            return gaussian_blur(pixels, argument)
        case "Rotate":
            return rotate(pixels, argument, fill=fill)
        case "ShearX":
            return shear_x(pixels, argument, fill=fill)
        case "ShearY":
            return _transposed(shear_x(_transposed(pixels), argument, fill=fill))
        case "TranslateXRel":
            return translate(pixels, argument * pixels.shape[1], axis=1, fill=fill)
        case "TranslateYRel":
            return translate(pixels, argument * pixels.shape[0], axis=0, fill=fill)


# ---------------------------------------------------------------------------------------------------- each value by itself


def auto_contrast(pixels: Pixels) -> Pixels:
    """Each channel stretched to [0, 255]."""
    height, width, chans = pixels.shape
    rows = pixels.reshape(height, width * chans)  # by rows first: the short last axis would be slow
    low, high = (
        extreme(extreme(rows, axis=0).reshape(width, chans), axis=0).astype(np.float64) for extreme in (np.min, np.max)
    )
    spread = high - low
    if np.all((spread == 255) | (spread == 0)):
        return pixels
    scale = np.where(spread > 0, 255.0 / np.maximum(spread, 1), 1.0)
    offset = np.where(spread > 0, -low * scale, 0.0)
    values = (np.arange(256)[:, None] * scale + offset).astype(np.int64)
    return _look_up(pixels, values.clip(0, 255).astype(np.uint8))


def equalize(pixels: Pixels) -> Pixels:
    """Each channel's histogram made flat."""
    chans = pixels.shape[2]
    counts = np.empty((256, chans), dtype=np.int64)
    for channel in range(chans):
        counts[:, channel] = cv2.calcHist([pixels], [channel], None, [256], [0, 256]).ravel()
    last = 255 - np.argmax(counts[::-1] > 0, axis=0)
    step = (pixels.shape[0] * pixels.shape[1] - counts[last, np.arange(chans)]) // 255
    below = np.cumsum(counts, axis=0) - counts
    values = np.where(step > 0, (step // 2 + below) // np.maximum(step, 1), np.arange(256)[:, None])
    return _look_up(pixels, values.clip(0, 255).astype(np.uint8))


def posterize(pixels: Pixels, num_bits: int) -> Pixels:
    """The leading bits of each value; none, or the fewer than none that magnitudes above 10 ask for, leave black."""
    return pixels if num_bits >= 8 else pixels & np.uint8(256 - (1 << (8 - max(0, num_bits))))


def solarize(pixels: Pixels, threshold: int) -> Pixels:
    """Values from ``threshold`` (0 to 256) on inverted."""
    if threshold > 255:  # which no value reaches, and numpy is slow to find out
        return pixels
    return pixels ^ np.negative((pixels >= threshold).view(np.uint8))


def solarize_add(pixels: Pixels, add: int) -> Pixels:
    """``add`` (0 to 128) on top of the values below 128."""
    assert 0 <= add <= 128, "more than 255 cannot be"
    return pixels + (pixels < 128).view(np.uint8) * np.uint8(add)


def contrast(pixels: Pixels, factor: float) -> Pixels:
    """Away from (factor above 1) or towards (below 1) the mean grey."""
    mean = cv2.mean(_grey(pixels))[0]
    return _look_up(pixels, _blend_table(int(mean + 0.5), factor))


def brightness(pixels: Pixels, factor: float) -> Pixels:
    """Times ``factor``."""
    return _look_up(pixels, _blend_table(0, factor))


def _look_up(pixels: Pixels, table: Pixels) -> Pixels:
    """Each value v of channel c as table[v, c], or as table[v]."""
    return _as(cv2.LUT(pixels, table if table.ndim == 1 else table[None]), pixels)


def _blend_table(base: int, factor: float) -> Pixels:
    """As Pillow's blend of ``base`` with each value: in single precision, truncated."""
    values = np.float32(base) + np.float32(factor) * np.arange(-base, 256 - base, dtype=np.float32)
    return values.clip(0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------- with its colour or neighbours


def color(pixels: Pixels, factor: float) -> Pixels:
    """Away from (factor above 1) or towards (below 1) each pixel's own grey."""
    if pixels.shape[2] == 1:
        return pixels
    grey = cv2.cvtColor(_grey(pixels), cv2.COLOR_GRAY2RGB)
    return _as(cv2.addWeighted(pixels, factor, grey, 1 - factor, _TRUNCATED), pixels)


def sharpness(pixels: Pixels, factor: float) -> Pixels:
    """Away from (factor above 1) or towards (below 1) the smooth image: 3x3, the middle 5 times; the rim stays as it is."""
    mean_share = (1 - factor) * 9 / 13  # (9 mean + 4 middle) / 13 is Pillow's SMOOTH
    result = _as(cv2.addWeighted(pixels, 1 - mean_share, cv2.blur(pixels, (3, 3)), mean_share, _TRUNCATED), pixels)
    result[0], result[-1], result[:, 0], result[:, -1] = pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]
    return result


def gaussian_blur(pixels: Pixels, radius: float) -> Pixels:
    """Smooth, with a standard deviation of ``radius`` pixels."""
    return _as(cv2.GaussianBlur(pixels, (0, 0), radius, borderType=cv2.BORDER_REPLICATE), pixels)


def _grey(pixels: Pixels) -> Pixels:
    """(H, W, C) to (H, W)."""
    return pixels[..., 0] if pixels.shape[2] == 1 else np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), np.uint8)


# ------------------------------------------------------------------------------------------------------- from another place


def rotate(pixels: Pixels, degrees: float, *, fill: Sequence[int]) -> Pixels:
    """Counter-clockwise about the middle."""
    height, width, _ = pixels.shape
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = (width - 1) / 2, (height - 1) / 2  # the middle, where the centre of the first pixel is 0
    to_source = np.array([[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])
    return _as(
        cv2.warpAffine(
            pixels,
            to_source,
            (width, height),
            flags=cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=tuple(fill),
        ),
        pixels,
    )


def translate(pixels: Pixels, px: float, *, axis: Literal[0, 1], fill: Sequence[int]) -> Pixels:
    """The value at x (axis 1) or y (axis 0) from there + ``px``."""
    length, whole = pixels.shape[axis], math.floor(px)
    taps = np.expand_dims(np.array(_taps(px - whole), dtype=np.float32), 1 - axis)
    # One place more before the first: filtered[..., 1 + i] is the value at i + the fraction of px, and i begins at -1.
    padded = cv2.copyMakeBorder(pixels, 1 - axis, 0, axis, 0, cv2.BORDER_REPLICATE)
    filtered = cv2.filter2D(
        padded, -1, taps, anchor=(axis, 1 - axis), delta=_TRUNCATED, borderType=cv2.BORDER_REPLICATE
    )
    result = _plain(pixels.shape, tuple(fill)).copy()
    first, end = (min(max(math.ceil(x - 0.5 - px), 0), length) for x in (0, length))  # whose centre is in the image
    source = filtered.reshape(*padded.shape[:2], -1).swapaxes(0, axis)
    result.swapaxes(0, axis)[first:end] = source[first + whole + 1 : end + whole + 1]
    return result


def shear_x(pixels: Pixels, factor: float, *, fill: Sequence[int]) -> Pixels:
    """The value at x, in row y, from x + ``factor`` (y + 1/2)."""
    height, width, chans = pixels.shape
    shift = factor * (np.arange(height) + 0.5)
    place = np.rint(shift * _FINE).astype(np.int64)
    whole, taps = place >> _FINE_BITS, _fine_taps()[place & (_FINE - 1)]
    ends = int(whole[0]), int(whole[-1])
    left, right = max(0, 1 - min(ends)), max(0, 2 + max(ends))
    # The edges twice more on both sides, as far as the taps of a place inside reach; what lies beyond is masked below.
    padded = np.empty((height, left + width + right, chans), dtype=np.uint8)
    padded[:, left : left + width] = pixels
    padded[:, max(0, left - 2) : left] = pixels[:, :1]
    padded[:, left + width : left + width + 2] = pixels[:, -1:]
    rows = _windows(padded.reshape(height, -1), whole - 1 + left, (width + 3) * chans, step=chans)
    rows = (rows ^ 0x80).view(np.int8).astype(np.int16)  # centred, so that the sum of four products is an int16
    total = rows[:, : width * chans] * taps[:, :1]
    for tap in (1, 2, 3):
        total += rows[:, tap * chans : (tap + width) * chans] * taps[:, tap : tap + 1]
    total >>= _FINE_BITS
    result = total.clip(-128, 127).astype(np.int8).view(np.uint8) ^ 0x80
    return _filled(result.reshape(pixels.shape), np.floor(shift + 0.5).astype(np.int64), fill)


def _taps(d: float) -> tuple[float, float, float, float]:
    """The weights of the values at -1, 0, 1 and 2 for one at ``d`` in [0, 1): the cubic of a = -1."""
    return 2 * d**2 - d - d**3, 1 - 2 * d**2 + d**3, d + d**2 - d**3, d**3 - d**2


@cache
def _fine_taps() -> NDArray[np.int16]:
    """(_FINE, 4): the weights for every place between two pixels, times _FINE and whole; each row comes to _FINE."""
    taps = np.rint([[_FINE * weight for weight in _taps(k / _FINE)] for k in range(_FINE)]).astype(np.int16)
    taps[:, 1] += _FINE - taps.sum(axis=1, dtype=np.int16)
    return taps


def _windows(rows: Pixels, start: NDArray[np.int64], width: int, *, step: int) -> Pixels:
    """(H, width): from place ``step * start[y]`` on in row y. One row serves them all where there is just one."""
    count = (rows.shape[1] - width) // step + 1
    pitch = rows.strides[0] if len(rows) > 1 else 0
    every = np.ndarray((len(start), count, width), np.uint8, rows, strides=(pitch, step, 1))
    return every[np.arange(len(start)), start]


def _filled(pixels: Pixels, shift: NDArray[np.int64], fill: Sequence[int]) -> Pixels:
    """The same pixels, with ``fill`` written where x + ``shift[y]``, which goes one way only, is outside [0, W)."""
    width = pixels.shape[1]
    ends = int(shift[0]), int(shift[-1])
    before, after = max(0, -min(ends)), max(0, max(ends))
    outside = np.zeros((1, before + width + after), dtype=np.uint8)
    outside[:, :before], outside[:, before + width :] = 255, 255
    mask = _windows(outside, shift + before, width, step=1)
    return _as(cv2.copyTo(_plain(pixels.shape, tuple(fill)), mask, pixels), pixels)


@lru_cache(maxsize=2)  # an image and its transpose; three values each take longer to write than to copy
def _plain(shape: tuple[int, ...], value: tuple[int, ...]) -> Pixels:
    return np.full(shape, value, dtype=np.uint8)


def _transposed(pixels: Pixels) -> Pixels:
    height, width, chans = pixels.shape
    return np.asarray(cv2.transpose(pixels), np.uint8).reshape(width, height, chans)


def _as(result: object, pixels: Pixels) -> Pixels:
    """OpenCV drops the last axis of one channel."""
    return np.asarray(result, np.uint8).reshape(pixels.shape)
