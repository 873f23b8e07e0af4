"""Bytes of an image file to pixels, strictly: damaged bytes are an error here, never a grey patch. No torch.

Baseline and progressive JPEGs go through simplejpeg (libjpeg-turbo), whose strict mode takes each warning of the decoder for
what it is; PIL, torchvision and OpenCV decode on silently. Everything else (PNG, CMYK) is PIL's. Both give the same pixels:
the same integer DCT and the same smooth chroma upsampling.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from eit_lab.data.restart import Bytes, NotAJpegError, Segments, cut, read_header

Pixels = NDArray[np.uint8]
"""(H, W, 3) RGB."""


_MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS if Image.MAX_IMAGE_PIXELS else 2**28  # where PIL refuses too
_KEPT = 1 << 26  # bytes of the largest image whose memory is kept for the next one


class DecodeError(ValueError):
    """Bytes that are not, or no longer, an image. The message is a few words."""


def decode_pil(data: Bytes) -> Pixels:
    """Any image file as RGB, as torchvision's ImageFolder reads it. Raises DecodeError.

    NOTE: PIL goes on over damaged entropy-coded data without a word; ``decode`` does not.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of metadata, such as broken EXIF, that nobody looks at
            with Image.open(io.BytesIO(data)) as file:
                return np.array(file.convert("RGB"))
    except UnidentifiedImageError:  # whose text has an address of memory, another one each time
        raise DecodeError("no kind of image that is known") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DecodeError(_words(error) if str(error) else type(error).__name__) from None


class Decoder:
    """Decodes into a buffer of its own: an image is valid until the next one is asked for. One for each process."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, dtype=np.uint8)

    def decode(self, data: Bytes) -> Pixels:
        """A whole image, (H, W, 3) RGB. Raises DecodeError."""
        try:
            header = read_header(data)
        except NotAJpegError as error:
            if bytes(data[:2]) == b"\xff\xd8":
                raise DecodeError(str(error)) from None
            return decode_pil(data)
        if header.width * header.height > _MOST_PIXELS:
            raise DecodeError(f"its header says {header.width:,} x {header.height:,} px")
        if header.components not in (1, 3):
            self._check(data)
            return decode_pil(data)
        return self._jpeg(data, header.width, header.height)

    def crop(self, data: Bytes, segments: Segments | None, *, box: tuple[int, int, int, int]) -> Pixels:
        """The box (top, left, height, width) of an image, (height, width, 3) RGB. Raises DecodeError.

        With ``segments`` only what covers the box is decoded; the pixels are the same.
        """
        y, x, h, w = box
        if segments is None:
            return self.decode(data)[y : y + h, x : x + w]
        part = cut(data, segments, x=x, y=y, w=w, h=h)
        y, x = y - part.top, x - part.left
        return self._jpeg(part.data, part.width, part.height)[y : y + h, x : x + w]

    def _check(self, data: Bytes) -> None:
        """CMYK: its colours are PIL's to convert, but whether it is damaged only the strict decoder says."""
        try:
            simplejpeg.decode_jpeg(data, "CMYK", strict=True)
        except ValueError as error:
            raise DecodeError(_words(error)) from None

    def _jpeg(self, data: Bytes, width: int, height: int) -> Pixels:
        room = width * height * 3
        if room > _KEPT:
            buffer = np.empty(room, dtype=np.uint8)
        else:
            if room > len(self._buffer):
                self._buffer = np.empty(room, dtype=np.uint8)
            buffer = self._buffer
        try:
            pixels: Any = simplejpeg.decode_jpeg(data, "RGB", buffer=buffer, strict=True)
        except ValueError as error:
            raise DecodeError(_words(error)) from None
        return pixels


def _words(error: Exception) -> str:
    return str(error).splitlines()[0]
