"""Runs as a report reads them: from run folders, sweeps and experiments, or from a ``records.jsonl`` made of them.

``records.jsonl`` has one JSON line a run with all that a report draws: the record, the figures of its analysis (digest.py), the rows of
metrics.csv at validations, and for every test image whether it was classified rightly, a bit an image. So an experiment's evidence
fits into its folder (some tens of kilobytes a run), and its report can be drawn anew where the runs are not. Where files lie, and on which
machine, is left out.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eit_lab import declaration
from eit_lab.config import ConfigError
from eit_lab.manifest import Entry, Manifest, is_sweep, read_manifest
from eit_lab.report.digest import TRAINING, digest, read_analysis
from eit_lab.report.metric import number
from eit_lab.runs import json_ready, read_record, write_text

SCHEMA = 1
RECORDS = "records.jsonl"
Curve = dict[str, list[float | None]]
"""Columns of metrics.csv by name, a value for each validation; None where the column has none there."""
_ENDED = ("failed", "interrupted", "preempted", "pruned", "lost")
_PLACES = ("run.root", "logger", "data.root", "data.cache_dir", "checkpoint")
"""Keys of a config that say where on a machine something lies, or where it is sent."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Which test images a run classified rightly."""

    of: str
    """Hash of the images' indices and labels, in order: only runs that share it can be compared image by image."""
    correct: NDArray[np.bool_]
    """(images,), with the weights as they are."""
    correct_ema: NDArray[np.bool_] | None
    """With the averaged weights, where a run has them."""


@dataclasses.dataclass(eq=False)
class RunEntry:
    """One run, or one that should be there: what its record says, and where the rest is read when it is needed."""

    record: Mapping[str, Any]
    """Empty for a run that has none yet. ``analysis``: the one made afterwards, else the run's own; where there are both, that one is ``analysis_in_training``."""
    arm: str
    seed: int | None
    status: str
    said: str
    """How it ended, in a line, where that was not by finishing."""
    name: str
    """Of its folder."""
    folder: Path | None = None
    unread: str = ""
    """What lies in its folder and is not used, with the reason."""
    stored: Mapping[str, Any] | None = None
    """The line of ``records.jsonl`` it comes from."""

    @cached_property
    def curve(self) -> Curve:
        """What was logged at each validation; empty where nothing was."""
        if self.stored is not None:
            return dict(self.stored["curve"])
        return {} if self.folder is None else _validations(self.folder / "metrics.csv")

    @cached_property
    def predictions(self) -> Predictions | None:
        """What it said of each test image; None where that was not kept, or cannot be read."""
        if self.stored is not None:
            return _unpack(self.stored["predictions"])
        return None if self.folder is None else _read_predictions(self.folder / "predictions.npz")

    @property
    def label(self) -> str:
        """Arm and seed."""
        return f"{self.arm} seed {'?' if self.seed is None else self.seed}"


@dataclasses.dataclass(frozen=True)
class Source:
    """What one argument of the command named."""

    name: str
    declaration: Mapping[str, Any]
    """Of the ablation; empty where the runs were not declared as one."""
    entries: Sequence[RunEntry]
    superseded: Sequence[RunEntry] = ()
    """Runs of points that have a newer version."""


def read_sources(paths: Sequence[Path]) -> list[Source]:
    """The runs of each folder or ``records.jsonl``. Raises ConfigError, in one line, for what has no runs."""
    found: list[Source] = []
    for path in dict.fromkeys(path.resolve() for path in paths):
        found += _read_jsonl(path) if path.is_file() else [_read_folder(path)]
    names: Counter[str] = Counter()
    for place, source in enumerate(found):  # two folders of one name are two sources
        names[source.name] += 1
        if names[source.name] > 1:
            found[place] = dataclasses.replace(source, name=f"{source.name}-{names[source.name]}")
    return found


def _read_folder(folder: Path) -> Source:
    if not folder.is_dir():
        raise ConfigError(f"report: no folder {_shown(folder)!r}")
    if is_sweep(folder):
        return _read_sweep(folder)
    if (folder / declaration.FILE).is_file():
        return _read_experiment(folder)
    if (folder / "record.json").is_file():
        return Source(folder.name, {}, [_entry(folder)])
    runs = sorted(path.parent for path in folder.glob("*/record.json"))
    if not runs and (folder / RECORDS).is_file():
        return _joined(_read_jsonl(folder / RECORDS))
    if not runs:
        sweeps = sorted(path.parent.name for path in folder.glob("*/sweep.json"))
        there = f"; name a sweep in it: {', '.join(sweeps[:8])}" if sweeps else ""
        raise ConfigError(f"report: no record.json of a run in {_shown(folder)!r}, nor one folder below{there}")
    return Source(folder.name, {}, [_entry(run) for run in runs])


def _joined(sources: Sequence[Source]) -> Source:
    """All runs under the name and the declaration of the first source."""
    entries = [entry for source in sources for entry in source.entries]
    return dataclasses.replace(sources[0], entries=entries, superseded=[e for s in sources for e in s.superseded])


def _shown(path: Path) -> str:
    """A path as it was most likely typed."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _read_sweep(folder: Path) -> Source:
    manifest: Manifest = read_manifest(folder)
    entries = []
    for job in manifest.jobs.values():
        entry = _entry(folder / job.entry.folder, listed=job.entry)
        state = manifest.state(job)
        if not entry.record or (entry.status == "running" and state in _ENDED):  # killed before it could say so
            entry.status, entry.said = state, job.said
        entries.append(entry)
    old = [_entry(folder / entry.folder, listed=entry) for entry in manifest.superseded]
    return Source(folder.name, manifest.declaration or {}, entries, [entry for entry in old if entry.record])


def _read_experiment(folder: Path) -> Source:
    """Its records.jsonl, or else the sweep of its name, under the run root of the current folder or beside experiments/."""
    declared = dataclasses.asdict(declaration.read_experiment(folder))
    if (folder / RECORDS).is_file():
        return dataclasses.replace(_joined(_read_jsonl(folder / RECORDS)), name=folder.name, declaration=declared)
    roots = [run_root(), folder.parent.parent / "runs"]
    sweep = next((root / "sweeps" / folder.name for root in roots if is_sweep(root / "sweeps" / folder.name)), None)
    if sweep is None:
        where = roots[0] / "sweeps" / folder.name
        trials = sorted(_shown(path.parent) for path in where.parent.glob(f"{folder.name}-*/sweep.json"))
        there = f"; of it with another configuration: {', '.join(trials[:8])}" if trials else ""
        raise ConfigError(
            f"report: {_shown(folder)!r} has no {RECORDS}, and there is no sweep {_shown(where)!r} of it yet{there}"
        )
    source = _read_sweep(sweep)
    return source if source.declaration else dataclasses.replace(source, declaration=declared)


def run_root() -> Path:
    """Where runs are put unless a command says otherwise (conf/train.yaml)."""
    return Path(os.environ.get("EIT_LAB_RUNS", "runs")).resolve()


def _entry(folder: Path, *, listed: Entry | None = None) -> RunEntry:
    try:
        record = read_record(folder) or {}
    except ConfigError:
        record = {"status": "damaged"}
    own = record.get("analysis")
    if isinstance(own, Mapping):
        record["analysis"] = digest({**own, "when": TRAINING})
    analysis, unread = read_analysis(folder, identity=record.get("identity"))
    if analysis is not None:
        record |= {"analysis_in_training": record["analysis"]} if isinstance(own, Mapping) else {}
        record["analysis"] = analysis
    return _from_record(record, folder=folder, listed=listed, unread=plain_text(unread))


def _from_record(record: Mapping[str, Any], *, folder: Path, listed: Entry | None, unread: str) -> RunEntry:
    config = record.get("config") or {}
    label = (config.get("run") or {}).get("arm") or (config.get("model") or {}).get("name") or record.get("name")
    error = str(record.get("error") or "").strip()
    return RunEntry(
        record=record,
        arm=plain_text((listed.arm if listed else None) or label or folder.name),
        seed=listed.seed if listed else record.get("seed"),
        status=str(record.get("status", "waiting")),
        said=plain_text(error.splitlines()[0]) if error else "",
        name=folder.name,
        folder=folder,
        unread=unread,
    )


def plain_text(text: object) -> str:
    """A name as one line of printable characters, whatever it was."""
    return " ".join(
        "".join(c if c.isprintable() or c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(text)).split()
    )


# ------------------------------------------------------------------------------------------------- curves and predictions


def _validations(path: Path) -> Curve:
    """The rows of metrics.csv at validations, as columns of numbers."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return {}
    head, _, body = text.partition("\n")
    names = head.split(",")
    lines = body.splitlines()
    if names[-1].startswith("val/"):  # most rows are of steps, and end in the empty cell of a validation
        lines = [line for line in lines if not line.endswith(",")]
    places = [place for place, name in enumerate(names) if name.startswith("val/")]
    rows = [row for row in csv.reader(lines) if len(row) == len(names) and any(row[place] for place in places)]
    # Those of single layers are in the record too, of the last look.
    left_out = [name for name in names if name.startswith(("train/", "optim/")) or name.count("/") > 1]
    kept = [(place, name) for place, name in enumerate(names) if name not in left_out]
    return {name: [_cell(row[place]) for row in rows] for place, name in kept}


def _cell(text: str) -> float | None:
    try:
        return number(float(text))
    except ValueError:
        return None


def _read_predictions(path: Path) -> Predictions | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {name: file[name] for name in ("index", "label", "predicted", "predicted_ema") if name in file}
        label = columns["label"]
        order = columns["index"].argsort(kind="stable")
        ema = columns.get("predicted_ema")
        pairs = np.stack([columns["index"][order], label[order]]).astype("<i8")
        return Predictions(
            of=hashlib.sha256(pairs.tobytes()).hexdigest()[:16],
            correct=(columns["predicted"] == label)[order],
            correct_ema=None if ema is None else (ema == label)[order],
        )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None  # none was kept, or it was cut short: the table of the tests per image says so


def _pack(found: Predictions | None) -> dict[str, Any] | None:
    if found is None:
        return None
    bits = {"correct": found.correct, "correct_ema": found.correct_ema}
    packed = {
        key: base64.b64encode(np.packbits(value).tobytes()).decode() for key, value in bits.items() if value is not None
    }
    return {"of": found.of, "images": len(found.correct), **packed}


def _unpack(stored: Mapping[str, Any] | None) -> Predictions | None:
    if stored is None:
        return None

    def bits(key: str) -> NDArray[np.bool_]:
        packed = np.frombuffer(base64.b64decode(stored[key]), np.uint8)
        return np.unpackbits(packed, count=stored["images"]).astype(bool)

    return Predictions(stored["of"], bits("correct"), bits("correct_ema") if "correct_ema" in stored else None)


# ------------------------------------------------------------------------------------------------------------ records.jsonl


def write_records(path: Path, sources: Sequence[Source]) -> int:
    """Write every run of the sources, a JSON line each; returns how many. Raises OSError with the file's name."""
    lines = [json.dumps(json_ready(line), separators=(",", ":")) for line in _lines(sources)]
    write_text(path, "".join(f"{line}\n" for line in lines))
    return len(lines)


def _lines(sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    for source in sources:
        for entry, superseded in [(e, False) for e in source.entries] + [(e, True) for e in source.superseded]:
            yield {
                "schema": SCHEMA,
                "source": source.name,
                "declaration": dict(source.declaration),
                "arm": entry.arm,
                "seed": entry.seed,
                "status": entry.status,
                "said": entry.said,
                "name": entry.name,
                "superseded": superseded,
                "unread": entry.unread,
                "record": _without_places(entry.record),
                "curve": entry.curve,
                "predictions": _pack(entry.predictions),
            }


def _without_places(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record for other eyes: without folders, hosts, trackers and tracebacks."""
    kept = {key: value for key, value in record.items() if key not in ("command", "error_lines", "sync", "wandb")}
    if "versions" in kept:
        kept["versions"] = {key: value for key, value in kept["versions"].items() if key != "host"}
    kept |= {
        key: digest(kept[key]) for key in ("analysis", "analysis_in_training") if isinstance(kept.get(key), Mapping)
    }
    if "config" not in kept:
        return kept
    config = kept["config"] = json.loads(json.dumps(record["config"]))
    for place in _PLACES:
        *parents, last = place.split(".")
        node = config
        for parent in parents:
            node = node.get(parent) or {}
        node.pop(last, None)
    return kept


def _read_jsonl(path: Path) -> list[Source]:
    """The sources of a file, each with its runs, in their order."""
    by_source: dict[str, tuple[Mapping[str, Any], list[RunEntry], list[RunEntry]]] = {}
    with path.open() as handle:
        for count, text in enumerate(handle, start=1):
            try:
                line = json.loads(text)
                assert line["schema"] == SCHEMA
                entry = RunEntry(
                    record=line["record"], arm=line["arm"], seed=line["seed"], status=line["status"], said=line["said"],
                    name=line["name"], unread=line.get("unread", ""), stored={"curve": line["curve"], "predictions": line["predictions"]},
                )  # fmt: skip
                _, current, old = by_source.setdefault(line["source"], (line["declaration"], [], []))
                (old if line["superseded"] else current).append(entry)
            except (ValueError, KeyError, TypeError, AssertionError):
                raise ConfigError(
                    f"{_shown(path)} must have one run a line as schema {SCHEMA} of {RECORDS} has it; line {count} has not"
                ) from None
    if not by_source:
        raise ConfigError(f"report: no run in {_shown(path)!r}")
    return [Source(name, declared, entries, old) for name, (declared, entries, old) in by_source.items()]
