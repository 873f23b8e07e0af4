"""What ``analyze`` looks into, as a command line names it: runs, sweeps, experiments, a file, earlier analyses. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eit_lab.config import ConfigError
from eit_lab.report.arms import collect
from eit_lab.report.inside import NUMBERS
from eit_lab.report.inside.numbers import load_inside
from eit_lab.report.metric import metric_of
from eit_lab.report.records import RunEntry, Source, read_sources
from eit_lab.runs import PLACEMENT
from eit_lab.trained import Words


@dataclass(frozen=True)
class Target:
    """One model to look into."""

    run: Path | None
    arm: str
    seed: int | None
    out: Path
    is_done: bool = False
    """Whether ``out`` was named itself: an analysis that is only put beside the others."""


def folders_of(words: Words) -> list[Path]:
    """The folders that were named, as run=A,B or by themselves."""
    named = words.options.get("run", "")
    several = [named] if Path(named).expanduser().exists() else named.split(",")
    folders = [Path(name).expanduser() for name in [*(several if named else []), *words.rest]]
    if folders:
        refuse_words(("data", "seed", "model"), words.options)
    elif "model" not in words.options and "checkpoint" not in words.options:
        raise ConfigError("analyze needs a run, a sweep or a model: analyze run=FOLDER, or checkpoint=FILE model=NAME")
    return folders


def refuse_words(keys: Sequence[str], options: Mapping[str, str]) -> None:
    """Raise ConfigError for the first of some words that a run says itself."""
    for key in keys:
        if key in options:
            raise ConfigError(f"{key} is the run's own, got {options[key]!r}; leave it out")


def file_of(words: Words) -> Target:
    """A model that is no run."""
    options = words.options
    name = options.get("model.timm_name") or options.get("model") or "model"
    return Target(None, name, None, Path(options.get("out", "analysis")))


def targets_of(folders: Sequence[Path], words: Words) -> tuple[list[Target], list[str]]:
    """Every finished run of the folders, arms in the order in which a report has them, then analyses; a line for what is left out."""
    analyses = [folder for folder in folders if (folder / NUMBERS).is_file() and not (folder / "record.json").is_file()]
    sources = _sources([folder for folder in folders if folder not in analyses])
    entries = [entry for source in sources for entry in source.entries]
    targets, left_out = [], []
    labels = _told_apart(entries)
    single = len(entries) + len(analyses) == 1
    for entry in entries:
        if entry.folder is None:
            raise ConfigError(
                f"analyze needs the runs themselves, with their checkpoints; {folders[0]} has records only"
            )
        if not single and entry.status != "finished":
            left_out.append(f"left out: {entry.label}, {entry.status}")
            continue
        run = _from_here(entry.folder)
        out = Path(words.options["out"]) if "out" in words.options and single else run / "analysis"
        targets.append(Target(run, labels[entry], entry.seed, out))
    order = {label: place for place, label in enumerate(_arms_of_a_report(sources))}
    targets.sort(key=lambda target: order.get(target.arm, len(order)))
    for folder in analyses:
        inside = load_inside(folder / NUMBERS)
        targets.append(Target(None, inside.arm, inside.seed, folder, is_done=True))
    if not targets:
        raise ConfigError(f"no run in {', '.join(map(str, folders))} has finished; {left_out[0]}")
    return targets, left_out


def _sources(folders: Sequence[Path]) -> list[Source]:
    try:
        return read_sources(folders)
    except ConfigError as error:
        said = str(error).removeprefix("report: ")
        hint = "; a model is named by model=NAME" if said.startswith("no folder") else ""
        raise ConfigError(f"analyze: {said}{hint}") from None


def _arms_of_a_report(sources: Sequence[Source]) -> list[str]:
    """The arms as a report has them, baseline first, so that an arm has one colour in both."""
    key = next(
        (str(source.declaration["metric"]) for source in sources if source.declaration.get("metric")), "test/acc1"
    )
    return [arm.label for arm in collect(sources, metric_of(key)).arms] if sources else []


def _told_apart(entries: Sequence[RunEntry]) -> dict[RunEntry, str]:
    """The arm of each run. Where the runs of an arm have different configurations, they are several: eit_base, eit_base (2)."""
    kinds: dict[str, list[str]] = {}
    labels = {}
    for entry in entries:
        config: dict[str, Any] = json.loads(json.dumps(entry.record.get("config") or {}))
        for key in ("seed", *PLACEMENT):
            *parents, last = key.split(".")
            node = config
            for parent in parents:
                node = node.get(parent) or {}
            node.pop(last, None)
        kind = json.dumps(config, sort_keys=True)
        known = kinds.setdefault(entry.arm, [])
        if kind not in known:
            known.append(kind)
        number = known.index(kind) + 1
        labels[entry] = entry.arm if number == 1 else f"{entry.arm} ({number})"
    return labels


def _from_here(folder: Path) -> Path:
    """As a user would type it."""
    whole, here = folder.resolve(), Path.cwd().resolve()
    return whole.relative_to(here) if whole.is_relative_to(here) else whole
