"""Runs on disk -> TensorBoard's event files, and what is new in them while they go on.

A run logs once, to its metrics.csv and record.json; this reads them again and again and writes down what has come since. Each
run is ``ARM/seed N`` there. Beside the runs of an arm stands the mean over its finished seeds, as a run of its own.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from eit_lab.config import ConfigError
from eit_lab.dashboard.events import EventFile, Scalar
from eit_lab.manifest import is_sweep, read_manifest
from eit_lab.runs import PLACEMENT, RECORD_SCHEMA, read_record

COLUMNS = ("arm", "seed", "model.size.name", "model.ib.rule", "model.ib.strength")
"""Of the table of runs, always; beside them the keys of the config in which the runs differ."""
_MOST_COLUMNS = 20
COSTS = ("params", "macs", "img_per_s", "hours", "device_hours", "energy_wh")
METRICS = ("test/acc1", "val/acc1", *(f"cost/{name}" for name in COSTS))
BANDS = ("val/acc1", "val/acc1_ema", "val/loss", "train/loss", "test/acc1")
"""Tags whose mean over an arm's finished seeds is drawn with a band of one standard deviation."""
_PICTURES = ("mistakes.png", "curve.png")
_AXES = ("step", "epoch", "images")
_LABELS = ("seed", "model.name", "model.size.name", "model.ib.name", "recipe.name")  # they tell nothing of what is run
_OVER = ("finished", "failed", "interrupted", "preempted", "pruned")
_LONGEST_NAME = 80


def run_folders(folder: Path) -> Iterator[Path]:
    """The folders of the runs in a run, a folder of runs, or a sweep; those that have not begun have no record yet."""
    if is_sweep(folder):
        yield from (folder / job.entry.folder for job in read_manifest(folder).jobs.values())
    elif (folder / "record.json").is_file():
        yield folder
    else:
        yield from sorted(path.parent for path in folder.glob("*/record.json"))


def plain_name(text: str) -> str:
    """A text as the name of a folder, which is what TensorBoard calls a run by; what it cannot be is replaced by ``_``."""
    name = "".join("_" if letter in "/\\" or not letter.isprintable() else letter for letter in text)
    name = name[:_LONGEST_NAME].strip(" .")
    return name or "_"


def arm_of(record: Mapping[str, Any]) -> str:
    """The label of a run's arm."""
    return str(record["config"]["run"].get("arm") or record["name"])


def arm_key(record: Mapping[str, Any]) -> str:
    """A hash of what the runs of an arm have in common: the config without seed, labels and placement; the data."""
    plain = json.loads(json.dumps(record["config"]))
    for key in (*PLACEMENT, *_LABELS):
        *parents, last = key.split(".")
        node = plain
        for parent in parents:
            node = node.get(parent, {})
        node.pop(last, None)
    content = [arm_of(record), plain, record["data"]["fingerprint"]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:6]


Row: TypeAlias = tuple[int, float, dict[str, float]]
"""Step, wall time in s, values by tag."""


@dataclass
class Series:
    """A run's rows so far."""

    rows: list[Row] = field(default_factory=list)

    def at(self, tag: str) -> dict[int, float]:
        """Step -> value of a tag."""
        return {step: row[tag] for step, _, row in self.rows if tag in row}


class RunReplay:
    """One run: what of it has been written."""

    def __init__(self, folder: Path, record: Mapping[str, Any], target: Path, *, group: str) -> None:
        self.folder, self.record, self.group = folder, record, group
        self.began = _seconds(record.get("started"))
        self.series = Series()
        self._file = EventFile(target)
        self._stamps: dict[str, tuple[int, int, int]] = {}
        self._over: str | None = None
        self._written: set[str] = set()
        """Tags of the last row that are written: more of them may come."""
        values = dict(_scalars(record["config"]))
        self.hparams: dict[str, Scalar] = {
            "arm": arm_of(record),
            **{key: value for key, value in values.items() if not any(_is_below(key, place) for place in PLACEMENT)},
        }
        self._file.add_session(self.hparams, group=group, at=self.began)

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return bool(self.record["status"] == "finished")

    def follow(self) -> int:
        """Write what is new; the number of new rows."""
        if self._changed("record.json"):
            with suppress(ConfigError):  # damaged: what was known of it stays
                self.record = read_record(self.folder) or self.record
        new = self._rows() if self._changed("metrics.csv") else []
        self._add(new)
        if self.record["status"] in _OVER and self._over != self.record["status"]:
            self._over = self.record["status"]
            self._end()
            return len(new) + 1
        return len(new)

    def _add(self, rows: list[Row]) -> None:
        self._file.add_scalars(rows)
        self.series.rows += rows

    def _changed(self, name: str) -> bool:
        try:
            found = (self.folder / name).stat()
        except FileNotFoundError:
            return False
        stamp = found.st_mtime_ns, found.st_size, found.st_ino
        changed = self._stamps.get(name) != stamp
        self._stamps[name] = stamp
        return changed

    def _rows(self) -> list[Row]:
        """The rows of metrics.csv that have not been written, and what is new in the last one that was.

        A run that resumes does some steps again, with the same values: they are left as they are.
        """
        last, at, _ = self.series.rows[-1] if self.series.rows else (-1, self.began, {})
        rows: list[Row] = []
        with (self.folder / "metrics.csv").open(newline="", errors="replace") as handle:
            for plain in csv.DictReader(handle):
                step = _number(plain.get("step"))
                if step is None or step < last:
                    continue
                values = {tag: value for tag, text in plain.items() if tag and (value := _number(text)) is not None}
                if "perf/hours" in values:  # the axis "relative" is then the time of training
                    at = max(at, self.began + 3600 * values["perf/hours"])
                known = self._written if step == last else set()
                new = {tag: value for tag, value in values.items() if tag not in known and tag not in _AXES}
                if new:
                    rows.append((int(step), at, new))
                last, self._written = int(step), known | set(values)
        return rows

    def _end(self) -> None:
        """Result, cost, pictures and how it ended."""
        step, at, _ = self.series.rows[-1] if self.series.rows else (0, self.began, {})
        record, result = self.record, self.record.get("result") or {}
        costs = {**record.get("cost", {}), **{name: record.get(name) for name in COSTS[2:]}}
        values = {**result, **{f"cost/{name}": costs.get(name) for name in COSTS}}
        row = {tag: float(v) for tag, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._add([(step, at, row)])
        for name in _PICTURES:
            with suppress(OSError):  # not there, or not a picture
                self._file.add_image(name.partition(".")[0], (self.folder / name).read_bytes(), step=step, at=at)
        facts = {
            "folder": str(self.folder),
            "status": record["status"],
            "error": record.get("error"),
            "command": " ".join(map(str, record.get("command", []))),
            "device": record.get("placement", {}).get("device"),
        }
        text = "\n".join(f"{name}: {value}" for name, value in facts.items() if value)
        self._file.add_text("run", text, step=step, at=at)
        self._file.end_session(succeeded=record["status"] == "finished", at=_seconds(record.get("ended")))


class Replay:
    """All runs of some folders, written below ``target``; ``follow`` again and again."""

    def __init__(self, folders: Sequence[Path], target: Path) -> None:
        self.folders, self.target = folders, target
        self.runs: dict[str, RunReplay] = {}
        """By identity."""
        self.means: dict[str, tuple[tuple[str, ...], Path]] = {}
        """Arm -> the identities whose mean is written, and where."""
        self.left_out: set[Path] = set()
        """Folders whose record cannot be read, or is another schema's."""
        self._labels: dict[str, str] = {}
        self._columns: tuple[str, ...] = ()
        self._root = EventFile(target)
        self._root.add_bands("mean over seeds, one standard deviation", {tag: _band(tag) for tag in BANDS})

    def find(self) -> None:
        """Take in the runs that are new."""
        for folder in (path for root in self.folders for path in run_folders(root)):
            self._discover(folder)
        if self.runs and not self._columns:
            self._columns = self._write_columns()

    def follow(self) -> int:
        """Write what is new in all runs; the number of new rows."""
        self.find()
        new = sum(run.follow() for run in self.runs.values())
        for group in {run.group for run in self.runs.values()}:
            new += self._write_mean(group)
        return new

    def _write_columns(self) -> tuple[str, ...]:
        """Say which columns the table of runs has: TensorBoard takes it once, so it is by the runs that are there now."""
        found: dict[str, dict[Scalar, None]] = {}
        for run in self.runs.values():
            for key, value in run.hparams.items():
                found.setdefault(key, {})[value] = None
        label = ("model.name", "model.ib.name")  # say what arm and rule say
        differ = [key for key, values in found.items() if len(values) > 1 and key not in (*COLUMNS, *label)]
        columns = (*(key for key in COLUMNS if key in found), *differ[:_MOST_COLUMNS])
        self._root.add_experiment({key: type(next(iter(found[key]))) for key in columns}, METRICS)
        return columns

    def _discover(self, folder: Path) -> None:
        if any(run.folder == folder for run in self.runs.values()):
            return
        try:
            record = read_record(folder)
        except ConfigError:  # damaged: it may be whole the next time
            self.left_out.add(folder)
            return
        if record is None:
            return
        if record.get("schema") != RECORD_SCHEMA:
            self.left_out.add(folder)
        elif record["identity"] not in self.runs:
            self.left_out.discard(folder)
            label = self._label(arm_key(record), arm_of(record))
            target = self.target / label / f"seed {record['seed']}"
            self.runs[record["identity"]] = RunReplay(folder, record, target, group=label)

    def _label(self, key: str, arm: str) -> str:
        """The arm's name, with a number behind it where another arm has that name already."""
        if key not in self._labels:
            name, taken = plain_name(arm), set(self._labels.values())
            numbered = (f"{name} ({number})" for number in range(2, len(taken) + 3))
            self._labels[key] = next(label for label in (name, *numbered) if label not in taken)
        return self._labels[key]

    def _write_mean(self, group: str) -> int:
        """The mean over the finished seeds of an arm, written anew when there is one more; the number of its rows."""
        runs = {i: run for i, run in self.runs.items() if run.group == group and run.finished}
        members = tuple(sorted(runs))
        before = self.means.get(group)
        if len(members) < 2 or (before is not None and before[0] == members):
            return 0
        target = self.target / group / f"mean of {len(members)} seeds"
        file = EventFile(target)
        rows = list(mean_rows([run.series for run in runs.values()]))
        file.add_scalars(rows)
        if before is not None and before[1] != target:
            shutil.rmtree(before[1], ignore_errors=True)
        self.means[group] = members, target
        return len(rows)


def mean_rows(series: Sequence[Series]) -> Iterator[Row]:
    """Rows of the mean over seeds, at the steps that all of them have; with each tag of BANDS, its band."""
    tags = set.intersection(*({tag for _, _, row in one.rows for tag in row} for one in series))
    by_step: dict[int, dict[str, float]] = {}
    for tag in sorted(tags):
        curves = [one.at(tag) for one in series]
        for step in set.intersection(*(set(curve) for curve in curves)):
            values = [curve[step] for curve in curves]
            row = by_step.setdefault(step, {})
            row[tag] = mean(values)
            if tag in BANDS:
                lower, upper = _band(tag)
                row[lower], row[upper] = row[tag] - stdev(values), row[tag] + stdev(values)
    times = [{step: at for step, at, _ in one.rows} for one in series]
    for step in sorted(by_step):
        yield step, mean(time_of[step] for time_of in times), by_step[step]


def _band(tag: str) -> tuple[str, str]:
    return f"within one std/{tag} lower", f"within one std/{tag} upper"


def _scalars(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    """The values of a config that are no containers, by dotted key."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{key}.")
        elif isinstance(value, Scalar):
            yield prefix + key, value


def _is_below(key: str, place: str) -> bool:
    return key == place or key.startswith(f"{place}.")


def _number(text: Any) -> float | None:
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _seconds(stamp: Any) -> float:
    """Seconds since 1970 of a record's time; now where it has none."""
    try:
        return datetime.strptime(str(stamp), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return time.time()
