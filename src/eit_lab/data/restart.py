"""JPEGs that can be decoded in part: restart markers every few MCUs, and a crop cut out of the bytes. No torch.

Entropy decoding is most of the work of decoding a JPEG, and without restart markers (ITU-T T.81, B.2.4.4 and F.1.2.3) it has
to begin at the first byte. With them each *segment* between two markers decodes alone, so a crop becomes a smaller, valid
JPEG: the segments that cover it, the size in the frame header changed, the markers numbered anew. Any decoder reads it, and
its pixels are those of the whole image.

The rewrite that puts markers in is lossless: jpegtran (libjpeg-turbo, or the IJG's) codes the same coefficients again, with
Huffman tables made for the image, which pays for the markers: the files get smaller.

An MCU (minimum coded unit) is 16x16 px with 4:2:0 chroma, 8x8 px without subsampling.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eit_lab.command import RunError

# Width of a segment: 2 MCUs with 4:2:0. A crop of a 500 px photograph takes 581 us to decode and resize, with 64 px, whose
# margins are wider, 622, with 16 px 580; the files are 0.971 of the originals, with 64 px 0.964, with 16 px 0.983.
SEGMENT_PX = 32
_MARGIN = 2  # px around a crop, so that smooth chroma upsampling finds its neighbours
_SEQUENTIAL = (0xC0, 0xC1)
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_ALONE = (0x01, *range(0xD0, 0xD8))  # markers without a length
_LONGEST_SEGMENT = 0xFFFF
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_END = b"\xff\xd9"


Bytes: TypeAlias = bytes | bytearray | memoryview


class NotAJpegError(ValueError):
    """Bytes whose markers are not those of a JPEG."""


class Header(NamedTuple):
    """What the markers before the first scan say."""

    width: int
    height: int
    components: int
    sequential: bool
    """Huffman-coded in one pass, 8 bits: what a crop can be cut from. Not so: progressive, arithmetic, 12-bit."""
    size_at: int
    """Byte where the frame header has height and width, two bytes each."""
    mcu_width: int
    mcu_height: int
    interval: int
    """MCUs between restart markers, 0: none."""
    scan_at: int
    """Byte where the entropy-coded data of the first scan begins."""
    scan_components: int


def read_header(data: Bytes) -> Header:
    """Read the markers of a JPEG up to its first scan. Raises NotAJpegError."""
    if bytes(data[:3]) != b"\xff\xd8\xff":
        raise NotAJpegError("no JPEG: it does not begin with FF D8 FF")
    place, interval, frame = 2, 0, None
    try:
        while True:
            while data[place + 1] == 0xFF:  # fill bytes
                place += 1
            if data[place] != 0xFF:
                raise NotAJpegError(f"no marker at byte {place}")
            marker = data[place + 1]
            if marker in _ALONE:
                place += 2
                continue
            length = (data[place + 2] << 8) | data[place + 3]
            if marker in _FRAMES:
                bits, height, width, components = struct.unpack_from(">BHHB", data, place + 4)
                factors = [data[place + 11 + 3 * n] for n in range(components)]
                frame = (marker, bits, height, width, factors, place + 5)
            elif marker == 0xDD:
                interval = (data[place + 4] << 8) | data[place + 5]
            elif marker == 0xDA:
                scan_components = data[place + 4]
                break
            place += 2 + length
    except (IndexError, struct.error):
        raise NotAJpegError("cut short before its first scan") from None
    if frame is None:
        raise NotAJpegError("a scan without a frame")
    marker, bits, height, width, factors, size_at = frame
    # NOTE: the scan of a single component is not interleaved: its MCU is one block, whatever its sampling factors say.
    single = len(factors) == 1
    return Header(
        width=width,
        height=height,
        components=len(factors),
        sequential=marker in _SEQUENTIAL and bits == 8,
        size_at=size_at,
        mcu_width=8 if single else 8 * max(f >> 4 for f in factors),
        mcu_height=8 if single else 8 * max(f & 15 for f in factors),
        interval=interval,
        scan_at=place + 2 + length,
        scan_components=scan_components,
    )


@dataclass(frozen=True)
class Segments:
    """Where the restart segments of a JPEG lie, one row of them after another; what ``cut`` needs."""

    width: int
    height: int
    size_at: int
    segment_width: int
    """px; a segment is one MCU high. Rows of segments end where rows of MCUs do."""
    segment_height: int
    offsets: NDArray[np.int64]
    """(segments + 1,): where each begins, marker before it not counted; the last entry is the end plus one marker."""

    @property
    def per_row(self) -> int:
        """Segments side by side."""
        return -(-self.width // self.segment_width)


def find_segments(data: bytes) -> Segments | None:
    """The segments of a JPEG whose restart markers allow crops to be cut, else None. Raises NotAJpegError."""
    header = read_header(data)
    if not (header.sequential and header.interval and header.scan_components == header.components):
        return None
    if not data.endswith(_END):
        return None
    per_row = -(-header.width // header.mcu_width)
    rows = -(-header.height // header.mcu_height)
    if per_row % header.interval:
        return None
    starts = [header.scan_at, *(match.end() for match in _RESTART.finditer(data, header.scan_at)), len(data)]
    offsets = np.array(starts, dtype=np.int64)
    if len(offsets) != per_row // header.interval * rows + 1 or np.diff(offsets).max() > _LONGEST_SEGMENT:
        return None
    return Segments(
        width=header.width,
        height=header.height,
        size_at=header.size_at,
        segment_width=header.interval * header.mcu_width,
        segment_height=header.mcu_height,
        offsets=offsets,
    )


class Cutout(NamedTuple):
    """A part of an image, as a JPEG of its own; px."""

    data: bytearray
    left: int
    top: int
    width: int
    height: int


def cut(data: Bytes, segments: Segments, *, x: int, y: int, w: int, h: int) -> Cutout:
    """The segments that cover the box of w x h px at (x, y). In the box its pixels are the whole image's, to the last bit."""
    sw, sh, per_row = segments.segment_width, segments.segment_height, segments.per_row
    left, right = max(0, x - _MARGIN) // sw, -(-min(segments.width, x + w + _MARGIN) // sw)
    top, bottom = max(0, y - _MARGIN) // sh, -(-min(segments.height, y + h + _MARGIN) // sh)
    width = min(segments.width, right * sw) - left * sw
    height = min(segments.height, bottom * sh) - top * sh
    # Rows of segments as they lie, markers between them included; then each marker gets its number in the new order.
    begins = segments.offsets[:-1].reshape(-1, per_row)[top:bottom, left]
    ends = segments.offsets[1:].reshape(-1, per_row)[top:bottom, left:right]
    head = int(segments.offsets[0])
    view = memoryview(data)
    rows = [view[begin:end] for begin, end in zip(begins.tolist(), ends[:, -1].tolist(), strict=True)]
    cutout = bytearray().join([view[:head], *rows])
    struct.pack_into(">HH", cutout, segments.size_at, height, width)
    lengths = ends[:, -1] - begins
    moved = head + np.cumsum(lengths) - lengths - begins  # how far each row lies from where it lay
    array = np.frombuffer(cutout, dtype=np.uint8)
    array[(ends + (moved - 1)[:, None]).ravel()] = 0xD0 + (np.arange(ends.size) & 7)
    array[-1] = 0xD9  # where the next marker would be, the image ends
    return Cutout(cutout, left * sw, top * sh, width, height)


# ------------------------------------------------------------------------------------------------------------- rewriting


def jpegtran() -> str | None:
    """The program that rewrites, or None where it is not installed."""
    return shutil.which("jpegtran")


def interval_for(header: Header) -> int:
    """MCUs of a segment: the number that divides a row of MCUs and whose width is nearest to SEGMENT_PX."""
    per_row = -(-header.width // header.mcu_width)
    divisors = [n for n in range(1, per_row + 1) if per_row % n == 0]
    wanted = SEGMENT_PX / header.mcu_width
    return min(divisors, key=lambda n: (max(n / wanted, wanted / n), -n))


def rewrite(data: bytes, *, program: str) -> bytes | None:
    """The same image with restart markers, losslessly; None where that is not possible. Raises NotAJpegError, OSError, RunError.

    Metadata goes (EXIF, colour profiles: no reader of this package looks at them). Not possible: four components (CMYK),
    progressive or arithmetic coding, 12 bits, and whatever jpegtran warns about.
    """
    header = read_header(data)
    if not header.sequential or header.components not in (1, 3) or header.scan_components != header.components:
        return None
    words = [program, "-copy", "none", "-optimize", "-restart", f"{interval_for(header)}B"]
    done = subprocess.run(words, input=data, capture_output=True, check=False)
    if done.returncode < 0:
        raise RunError(f"{program} was ended by signal {-done.returncode}; the same command goes on")
    if done.returncode or done.stderr or find_segments(done.stdout) is None:
        return None
    return done.stdout
