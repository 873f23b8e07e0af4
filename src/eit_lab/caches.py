"""Where this user's caches lie: compiled kernels and graphs, costs, lists of files."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """EIT_LAB_CACHE, or eit_lab in the user's own folder for caches. It need not exist."""
    told = os.environ.get("EIT_LAB_CACHE")
    if told:
        return Path(told).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eit_lab"
