"""Images that could not be read: counted once each over all ranks, epochs and restarts, named, and at most as many as allowed.

They are kept in a file of the run, a line each, to which every rank appends. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from eit_lab.command import RunError


class Unread:
    """What was left out so far; ``limit`` is data.max_unread."""

    def __init__(self, limit: int, *, path: Path | None = None) -> None:
        """Without ``path`` they are counted in this process alone."""
        self.limit, self.path = limit, path
        self.texts: list[str] = []
        """Where each lies and what is wrong with it, as far as this process knows."""
        self.refresh()

    def refresh(self) -> list[str]:
        """Read what all ranks have noted."""
        if self.path is not None and self.path.is_file():
            known = dict.fromkeys(self.texts)
            for line in self.path.read_text().splitlines():
                known.setdefault(json.loads(line), None)
            self.texts[:] = known
        return self.texts

    def note(self, reasons: Iterable[str]) -> None:
        """Count images that were left out. Raises RunError once there are more than allowed."""
        for reason in reasons:
            if reason in self.refresh():
                continue
            self.texts.append(reason)
            if self.path is not None:
                number = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    os.write(number, (json.dumps(reason) + "\n").encode())  # one write: lines of ranks do not mix
                finally:
                    os.close(number)
            if len(self.texts) > self.limit:
                advice = (
                    f"data.max_unread lets images be left out, now {self.limit}: mend the file, or allow more, and the "
                    "same command goes on"
                )
                raise RunError(f"{reason}; {advice}")
            print(
                f"eit_lab: warning: {reason}; left out ({len(self.texts)} of data.max_unread={self.limit})", flush=True
            )
