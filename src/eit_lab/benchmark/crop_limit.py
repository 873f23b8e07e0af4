"""libjpeg-turbo's crop-only rate: crop_limit.c, compiled where the benchmark runs, against the newest libjpeg-turbo at hand.

That is the one inside Pillow's wheel where there is one (its ABI is the 6.2 of Debian's header), else the system's.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray

_SOURCE = Path(__file__).with_name("crop_limit.c")
_VERSION = re.compile(rb"libjpeg-turbo version (\d+\.\d+\.\d+)")


class NoLimitError(Exception):
    """The limit cannot be measured here. The message says what is missing."""


class CropLimit:
    """The compiled loop."""

    def __init__(self, folder: Path) -> None:
        """Compile into ``folder``, or find it there. Raises NoLimitError."""
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise NoLimitError("no C compiler here (apt install gcc)")
        inside = sorted((Path(PIL.__file__).parents[1] / "pillow.libs").glob("libjpeg-*.so.62*"))
        library = [str(inside[0]), f"-Wl,-rpath,{inside[0].parent}"] if inside else ["-ljpeg"]
        words = [compiler, "-O3", "-shared", "-fPIC", str(_SOURCE)]
        key = hashlib.sha256(" ".join([*words, *library]).encode() + _SOURCE.read_bytes()).hexdigest()[:12]
        path = folder / f"crop_limit-{key}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            done = subprocess.run([*words, "-o", str(part), *library], capture_output=True, text=True, check=False)
            if done.returncode:
                wanted = "jpeglib.h is missing (apt install libjpeg62-turbo-dev)" if "jpeglib.h" in done.stderr else ""
                raise NoLimitError(wanted or f"{compiler}: {(done.stderr.strip() or 'failed').splitlines()[0]}")
            part.replace(path)
        try:
            library_here = ctypes.CDLL(str(path))
        except OSError as error:
            raise NoLimitError(str(error)) from None
        self._decode = library_here.decode_crops
        self._decode.restype = ctypes.c_double
        library_here.header_version.restype = ctypes.c_char_p
        found = _VERSION.search(inside[0].read_bytes()) if inside else None
        self.version = (found.group(1) if found else library_here.header_version()).decode()
        """Of libjpeg-turbo."""

    def run(self, images: Sequence[bytes], boxes: NDArray[np.int32]) -> tuple[float, NDArray[np.uint8], int]:
        """(seconds for all, the last crop with the columns that came along, its first column).

        ``boxes`` (images, 4): top, left, height, width, px. Several threads may call it: each runs on its own core.
        """
        data = (ctypes.c_char_p * len(images))(*images)
        sizes = (ctypes.c_ulong * len(images))(*map(len, images))
        boxes = np.ascontiguousarray(boxes, dtype=np.int32)
        room = max(int((box[2] * (box[3] + 64)) * 3) for box in boxes.astype(np.int64))
        pixels = np.zeros(room, dtype=np.uint8)
        left, width = ctypes.c_uint(), ctypes.c_uint()
        seconds = self._decode(
            len(images),
            data,
            sizes,
            ctypes.c_void_p(boxes.ctypes.data),
            ctypes.c_void_p(pixels.ctypes.data),
            ctypes.byref(left),
            ctypes.byref(width),
        )
        if seconds < 0:
            raise NoLimitError(f"libjpeg-turbo cannot decode image {round(-1 - seconds)}")
        height = int(boxes[-1, 2])
        return seconds, pixels[: height * width.value * 3].reshape(height, width.value, 3), left.value
