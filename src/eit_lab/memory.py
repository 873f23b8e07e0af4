"""Memory of a training process on CPU: kept for the next step, not given back to the system between two operations.

glibc gives large blocks back as soon as they are free. A training step allocates and frees the same ones again and again, and the
system hands each out anew, zeroed page by page: half of a step's time in float32 for a model that keeps its attention matrices.
Other allocators, and GPUs' own, keep what they have; here glibc is told to.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # of mallopt, malloc.h
_NEVER = 2**31 - 1
_LARGEST_KEPT = 2**30  # bytes; what is larger goes back, such as a copy of a whole data set


def keep_memory() -> bool:
    """Tell the C library; False where it is not glibc, or refuses. For the whole process, and for what it forks.

    The most that was in use at once stays with the process until it ends. One arena: the thread of the backward pass finds what the
    forward pass has freed.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # Older versions refuse so large a threshold. A trim threshold alone would make it worse: it ends glibc's own adapting.
    if not (libc.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) or libc.mallopt(_MMAP_MAX, 0)):
        return False
    return [libc.mallopt(_TRIM_THRESHOLD, _NEVER), libc.mallopt(_ARENA_MAX, 1)] == [1, 1]
