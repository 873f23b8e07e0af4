"""Where this user's caches lie: compiled kernels and graphs, costs, lists of files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache() -> Path:
    """EIT_LAB_CACHE, or eit_lab in the user's own folder for caches. It need not exist."""
    told = os.environ.get("EIT_LAB_CACHE")
    if told:
        return Path(told).expanduser()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eit_lab"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"eit_lab-{os.getuid()}"


def private_folder(name: str) -> Path | None:
    """A folder in it that only this user can write, made where it is missing; None where there can be none: code is loaded from it."""
    folder = user_cache() / name
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = folder.stat()
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) and state.st_uid == os.getuid() and not state.st_mode & 0o022 else None
