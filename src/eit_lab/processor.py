"""The name of the processor that a record was made on. No torch."""

from __future__ import annotations

import platform
import re
from pathlib import Path


def machine() -> str:
    """As the system calls it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return found.group(1) if found else platform.processor() or platform.machine()
