"""What a sweep is doing: counts, the running jobs with their progress and time left, what failed and why. No torch.

The launcher shows it live, ``python -m eit_lab.sweep status FOLDER`` from anywhere: it is all on disk.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from eit_lab.config import ConfigError
from eit_lab.manifest import Manifest, ManifestJob, read_manifest
from eit_lab.runs import read_record
from eit_lab.units import duration

_ORDER = ("finished", "running", "submitted", "waiting", "preempted", "interrupted", "pruned", "failed", "lost")
_STYLES = {"finished": "green", "running": "cyan", "failed": "red", "lost": "red", "preempted": "yellow", "interrupted": "yellow"}  # fmt: skip
_SHOWN_JOBS, _SHOWN_FAILED = 16, 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a running job is."""

    label: str
    step: int
    steps: int
    """0 where it has not said yet."""
    seconds_left: float | None
    metric: str
    since: float
    """Seconds since it was started."""
    state: str

    @property
    def share(self) -> float:
        """Of its steps, in [0, 1]."""
        return self.step / self.steps if self.steps else 0.0


class Watch:
    """Looks at a sweep's folder again and again, and reads again only what can have changed."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._listed = _stamp(manifest.folder)
        self._first: dict[tuple[str, int], tuple[float, int]] = {}  # (identity, attempt) -> (time, step) seen first

    def refresh(self) -> None:
        """Read what came since: events, and jobs that another command has added."""
        if (listed := _stamp(self.manifest.folder)) != self._listed:
            self.manifest, self._listed = read_manifest(self.manifest.folder), listed
        self.manifest.refresh()

    def state(self, job: ManifestJob) -> str:
        """A job's state, ``lost`` among them."""
        return self.manifest.state(job)

    def is_over(self) -> bool:
        """Whether nothing changes any more by itself: no job is queued or running."""
        return not any(self.state(job) in ("running", "submitted") for job in self.manifest.jobs.values())

    def counts(self) -> Counter[str]:
        """Jobs by state."""
        return Counter(self.state(job) for job in self.manifest.jobs.values())

    def running(self) -> list[Progress]:
        """Where the running and the submitted jobs are, those that began first at the top."""
        at_work = [job for job in self.manifest.jobs.values() if self.state(job) in ("running", "submitted")]
        at_work.sort(key=lambda job: (job.state != "running", job.started))
        return [self._progress(job) for job in at_work[:_SHOWN_JOBS]]

    def _progress(self, job: ManifestJob) -> Progress:
        now = time.time()
        done, said_at = self._said_since(job) if job.state == "running" else ({}, now)
        step, steps = done.get("step", 0), done.get("steps", 0)
        left = None
        if step:
            # NOTE: of the moment at which the step was said: until it says the next one, time left falls with the clock.
            began, first = self._first.setdefault((job.entry.identity, job.attempts), (said_at, step))
            if step > first:
                left = max(0.0, (said_at - began) / (step - first) * (steps - step) - (now - said_at))
            elif job.started and job.attempts == 1:
                left = max(0.0, (said_at - job.started) / step * (steps - step) - (now - said_at))
        metric = f"val top-1 {100 * done['val/acc1']:.1f}%" if "val/acc1" in done else ""
        return Progress(
            label=job.entry.label,
            step=step,
            steps=steps,
            seconds_left=left,
            metric=metric,
            since=now - (job.started or job.since),
            state=job.state,
        )

    def _said_since(self, job: ManifestJob) -> tuple[Mapping[str, Any], float]:
        """(progress in a running job's record, when it was written); nothing where it is of an earlier part of the run."""
        folder = self.manifest.folder / job.entry.folder
        try:
            said_at = (folder / "record.json").stat().st_mtime
            if said_at < job.started:
                return {}, said_at
            return (read_record(folder) or {}).get("progress") or {}, said_at
        except (OSError, ConfigError):
            return {}, time.time()  # not there yet, or damaged: the job itself will say so

    def seconds_left(self, running: Sequence[Progress]) -> float | None:
        """Of the whole sweep, from what its finished jobs took; None before the first one."""
        jobs = self.manifest.jobs.values()
        took = [job.since - job.started for job in jobs if job.state == "finished" and job.started]
        if not took:
            return None
        each = median(took)
        counts = self.counts()
        ahead = each * (counts["waiting"] + counts["submitted"])
        ahead += sum(p.seconds_left if p.seconds_left is not None else max(0.0, each - p.since) for p in running)
        return ahead / max(1, counts["running"])

    def failed(self) -> list[ManifestJob]:
        """The failed and lost jobs, the last first."""
        bad = [job for job in self.manifest.jobs.values() if self.state(job) in ("failed", "lost")]
        return sorted(bad, key=lambda job: -job.since)


def _stamp(folder: Path) -> tuple[int, int]:
    try:
        stat = (folder / "sweep.json").stat()
    except FileNotFoundError:
        return 0, 0  # reading it says so in one line
    return stat.st_mtime_ns, stat.st_ino


def render(watch: Watch) -> RenderableType:
    """The state of a sweep as a block of text for rich."""
    running = watch.running()
    parts: list[RenderableType] = [_head(watch, running)]
    if running:
        parts.append(_running_table(running, watch.counts()["running"] + watch.counts()["submitted"]))
    if failed := watch.failed():
        parts.append(_failed_table(failed, watch))
    return Group(*parts)


def _head(watch: Watch, running: Sequence[Progress]) -> RenderableType:
    counts, total = watch.counts(), len(watch.manifest.jobs)
    done = counts["finished"] + counts["failed"] + counts["pruned"]
    line = Text(f"sweep {watch.manifest.folder.name}  ")
    for number, state in enumerate(state for state in _ORDER if counts[state]):
        line.append(f"{', ' if number else ''}{counts[state]} {state}", style=_STYLES.get(state, ""))
    left = watch.seconds_left(running)
    line.append(f"  of {total}")
    if done < total:
        line.append(f"  left {'?' if left is None else duration(left)}")
    table = Table.grid(padding=(0, 1))
    table.add_row(line)
    whole = done + sum(progress.share for progress in running)
    table.add_row(ProgressBar(total=max(1, total), completed=whole, width=60))
    return table


def _running_table(running: Sequence[Progress], count: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name, justify in (("job", "left"), ("", "left"), ("step", "right"), ("last metric", "left"), ("time", "right"), ("left", "right")):  # fmt: skip
        table.add_column(name, justify=justify, overflow="ellipsis", no_wrap=True)  # type: ignore[arg-type]
    for p in running:
        bar = ProgressBar(total=max(1, p.steps), completed=p.step, width=16) if p.steps else Text("")
        steps = f"{p.step}/{p.steps}" if p.steps else ("in the queue" if p.state == "submitted" else "starting")
        left = "" if p.seconds_left is None else duration(p.seconds_left)
        table.add_row(Text(p.label), bar, steps, p.metric, duration(p.since), left)
    if count > len(running):
        table.add_row(Text(f"and {count - len(running)} more", style="dim"))
    return table


def _failed_table(failed: Sequence[ManifestJob], watch: Watch) -> Table:
    table = Table(box=None, pad_edge=False, header_style="red")
    table.add_column("failed", no_wrap=True, overflow="ellipsis", max_width=48)
    table.add_column("", overflow="fold")
    for job in failed[:_SHOWN_FAILED]:
        why = job.said or ("its launcher is gone; the same command goes on" if watch.state(job) == "lost" else "?")
        table.add_row(Text(job.entry.label), Text(why))
    if len(failed) > _SHOWN_FAILED:
        table.add_row(Text(f"and {len(failed) - _SHOWN_FAILED} more", style="dim"), "")
    return table


def lines(watch: Watch) -> Iterable[str]:
    """The same for what is no terminal: one line of counts, one for each job that is not finished."""
    counts = watch.counts()
    left = watch.seconds_left(watch.running())
    said = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
    yield f"sweep {watch.manifest.folder.name}: {said} of {len(watch.manifest.jobs)}" + (
        f"; left {duration(left)}" if left else ""
    )
    for p in watch.running():
        where = f"step {p.step}/{p.steps}" if p.steps else ("in the queue" if p.state == "submitted" else "starting")
        parts = [where, p.metric, "" if p.seconds_left is None else f"left {duration(p.seconds_left)}"]
        yield f"{p.state}: {p.label}: {', '.join(part for part in parts if part)}"
    for job in watch.failed():
        yield f"{watch.state(job)}: {job.entry.label}: {job.said or 'its launcher is gone'} (log {_log(watch, job)})"


def _log(watch: Watch, job: ManifestJob) -> Path:
    return watch.manifest.folder / job.entry.log
