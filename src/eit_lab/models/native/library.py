"""The compiled kernels (attention.c, gelu.c), for the processor of this machine; built at their first use and kept for the next process.

A shared library in the user's folder of caches, under a name that tells source, compiler, flags and processor apart, so that a home
folder on many kinds of machines holds one for each. Where there is no compiler, or ``EIT_LAB_NATIVE=0`` says so, there are none:
torch's kernels compute the same function, in more time.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch  # its OpenMP must be in the process before ours is asked for: then both are one, with one pool of threads

from eit_lab.caches import private_folder

_SOURCES = sorted(Path(__file__).parent.glob("*.c"))
_HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# Straight-line code already fills the lanes; looking for more of them takes half the compiler's time and finds nothing.
_FLAGS = ("-O3", "-fno-tree-slp-vectorize", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-shared", "-fPIC")
_SECONDS = 120.0  # more than any compiler takes (3.5 s here)


@cache
def library() -> ctypes.CDLL | str:
    """The kernels, or in one line why there are none here. The first call of a machine compiles for some seconds."""
    if os.environ.get("EIT_LAB_NATIVE", "1") == "0":
        return "EIT_LAB_NATIVE=0"
    if platform.system() != "Linux":
        return f"not built on {platform.system()}"
    compiler = next(
        (found for name in (os.environ.get("CC") or "cc", "cc", "gcc", "clang") if (found := shutil.which(name))), None
    )
    if compiler is None:
        return "no C compiler (cc, gcc, clang)"
    try:
        built = _built(compiler)
        try:
            return _declare(ctypes.CDLL(str(built)))
        except OSError:  # half a file, of a machine that went down
            built.unlink()
            return _declare(ctypes.CDLL(str(_built(compiler))))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        return f"{compiler}: {(str(error).strip() or type(error).__name__).splitlines()[-1]}"


def kernels() -> ctypes.CDLL:
    """The kernels, where ``library`` has found that there are any."""
    found = library()
    assert not isinstance(found, str), found
    return found


def _built(compiler: str) -> Path:
    """The library of this machine; compiled now where it is not there yet. Raises OSError, SubprocessError."""
    words = [compiler, *_FLAGS, "-mcpu=native" if platform.machine() == "aarch64" else "-march=native"]
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True
    ).stdout
    key = "\n".join([*words, version, _processor(), *(path.read_text() for path in [*_HEADERS, *_SOURCES])])
    name = f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    folder = private_folder("native") or _own_folder()
    if not (folder / name).is_file():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / name
            done = subprocess.run(
                [*words, *map(str, _SOURCES), "-lm", "-o", str(made)],
                capture_output=True,
                text=True,
                timeout=_SECONDS,
                check=False,
            )
            if done.returncode:
                raise OSError((done.stderr.strip() or f"exit status {done.returncode}").splitlines()[0])
            made.rename(folder / name)  # whole or not at all, however many processes do this at once
    return folder / name


@cache
def _own_folder() -> Path:
    """Of this process alone, where nothing can be kept."""
    folder = Path(tempfile.mkdtemp(prefix="eit_lab-native-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _processor() -> str:
    """What tells one kind of processor from another: its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    named = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join(dict.fromkeys(named))


def _declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    pointer, size, real, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    kernels.eit_attention_forward.argtypes = [pointer] * 3 + [size] * 4 + [real, word, word]
    kernels.eit_attention_backward.argtypes = [pointer] * 5 + [size] * 4 + [real, word, word]
    kernels.eit_gelu.argtypes = [pointer] * 2 + [size, word, word]
    kernels.eit_gelu_backward.argtypes = [pointer] * 4 + [size, word, word]
    kernels.eit_gelu.restype = kernels.eit_gelu_backward.restype = None
    return kernels


def threads() -> int:
    """As many as torch's own operations take."""
    return torch.get_num_threads()
