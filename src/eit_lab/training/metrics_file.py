"""metrics.csv: every logged number of a run, on disk, whatever else listens."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from eit_lab.runs import write_text

_FLUSH_S = 10.0
_WHOLE = ("epoch", "images")  # numbers that are counts


class MetricsFile(Logger):
    """metrics.csv, one row a logged step; a resumed run keeps the rows of its first part.

    Lightning's CSVLogger deletes an existing file when it starts on it, which a run that resumes must not.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: list[dict[str, str]] = []
        self._names: frozenset[str] = frozenset()
        self._lines: list[str] = []  # of the first rows, as they stand in the file under these names
        self._written_at = time.monotonic()
        if path.is_file():
            with path.open(newline="") as handle:
                self._rows = list(csv.DictReader(handle))

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """One file, so one version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved config lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values at a step; values of the same step share a row."""
        values = {name: str(int(value)) if name in _WHOLE else repr(float(value)) for name, value in metrics.items()}
        step = 0 if step is None else step
        while self._rows and int(self._rows[-1]["step"]) > step:  # of steps that are redone after a resume
            self._rows.pop()
        del self._lines[max(0, len(self._rows) - 1) :]  # the last row may be about to change
        if not self._rows or int(self._rows[-1]["step"]) != step:
            self._rows.append({"step": str(step)})
        self._rows[-1].update(values)

    @rank_zero_only
    def save(self) -> None:
        """Write the file whole, but not more than once in some seconds: Lightning calls this at every logged step."""
        if time.monotonic() - self._written_at > _FLUSH_S:
            self._write()

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """A run that resumes from this checkpoint must find the rows up to it."""
        self._write()

    @rank_zero_only
    def flush(self) -> None:
        """Write the file whole now."""
        self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is there, however the run ended."""
        if self._rows:
            self._write()

    def _write(self) -> None:
        # A row is put into words once: there may be tens of thousands of them, with hundreds of columns.
        names = self._names.union(*self._rows[len(self._lines) :])
        if names != self._names:
            self._names, self._lines = names, []
        columns = ["step", "epoch", *sorted(names - {"step", "epoch"})]
        self._lines += [",".join(row.get(name, "") for name in columns) for row in self._rows[len(self._lines) :]]
        write_text(self.path, "\n".join([",".join(columns), *self._lines]) + "\n")
        self._written_at = time.monotonic()
