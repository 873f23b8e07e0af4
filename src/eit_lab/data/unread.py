"""Images that could not be read: counted once each over all ranks, epochs and restarts, named, and at most as many as allowed.

They are kept in a file of the run, a line each, to which every rank appends. No torch.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from eit_lab.command import RunError


class Unread:
    """What was left out so far; ``limit`` is data.max_unread."""

    def __init__(self, limit: int, *, path: Path | None = None) -> None:
        """Without ``path`` they are counted in this process alone."""
        self.limit, self.path = limit, path
        self.texts: list[str] = []
        """Where each lies and what is wrong with it, as far as this process knows."""
        self._told: set[str] = set()
        self.refresh()
        self._told.update(self.texts)  # by an earlier start

    def refresh(self) -> list[str]:
        """Read what all ranks have noted."""
        if self.path is not None and self.path.is_file():
            self._take(self.path.read_text())
        return self.texts

    def report(self) -> None:
        """Tell of each once, also of what other ranks have noted; for the main process, whose output is seen."""
        for number, reason in enumerate(self.refresh(), start=1):
            if reason not in self._told:
                self._told.add(reason)
                print(f"eit_lab: warning: {reason}; left out ({number} of data.max_unread={self.limit})", flush=True)

    def note(self, reasons: Iterable[str]) -> None:
        """Count images that were left out. Raises RunError for the first that is one too many; that one is not noted."""
        with self._file() as file:
            for reason in reasons:
                if reason in self.texts and len(self.texts) <= self.limit:
                    continue
                if len(self.texts) >= self.limit:
                    raise RunError(
                        f"{reason}; data.max_unread lets images be left out, now {self.limit}: mend the file, or allow more"
                    )
                self.texts.append(reason)
                if file is not None:
                    file.write(json.dumps(reason) + "\n")

    @contextmanager
    def _file(self) -> Iterator[IO[str] | None]:
        """The file, read so far and open to append; ranks of a machine take turns."""
        if self.path is None:
            yield None
            return
        with self.path.open("a+") as file:
            with suppress(OSError):  # of a disk without locks, where ranks may pass the limit together
                fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            lines = file.read()
            self._take(lines)
            if lines and not lines.endswith("\n"):
                file.write("\n")
            yield file

    def _take(self, lines: str) -> None:
        known = dict.fromkeys(self.texts)
        for line in lines.splitlines():
            with suppress(ValueError):  # half a line, as a full disk or a kill leaves it: it is met and noted again
                known.setdefault(json.loads(line), None)
        self.texts[:] = known
