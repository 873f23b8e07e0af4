"""A sweep on disk: which jobs it has, what became of each, and who runs which now. No torch.

``sweep.json`` lists the jobs; it changes when a command adds some. ``events.jsonl`` has a line for each change of a job's
state and is only ever added to, so that ten thousand jobs cost ten thousand lines, not ten thousand rewritten files.
Both change under one lock (``.lock``), which is what keeps two launchers from running a job twice: whoever takes a job says
so in the events before it starts. A launcher is known to be alive by the lock that it holds in ``launchers/``, and on
machines that do not share locks by the time at which it last touched that file.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from eit_lab.config import ConfigError
from eit_lab.runs import write_text

SCHEMA = 2
FINAL = ("finished", "failed", "interrupted", "preempted", "pruned")
"""States in which nobody works on a job."""
_SILENT_S = 120.0  # a launcher on another machine that has not touched its file for so long is gone
_BEAT_S = 20.0
_ASK_S = 2.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A job as ``sweep.json`` lists it; paths are relative to the sweep's folder."""

    label: str
    """What tells it from the other jobs: its overrides, or arm and seed."""
    point: tuple[str, ...]
    """Every override that makes it: two entries with the same are the same point of the sweep."""
    arm: str
    seed: int
    identity: str
    name: str
    """Of the run's folder."""
    folder: str
    frozen: str
    log: str


@dataclasses.dataclass(kw_only=True)
class ManifestJob:
    """A job and what became of it."""

    entry: Entry
    state: str = "waiting"
    said: str = ""
    """How it ended, in words."""
    attempts: int = 0
    """Times it was started or submitted."""
    handle: str = ""
    """What its engine knows it by: ``local:1234``, ``slurm:17_3``."""
    by: str = ""
    """The launcher that has it."""
    since: float = 0.0
    """When it came into this state, in seconds since 1970."""
    started: float = 0.0
    """When it was last started."""


@dataclasses.dataclass(kw_only=True)
class Manifest:
    """What ``sweep.json`` and ``events.jsonl`` say together."""

    folder: Path
    declaration: dict[str, Any] | None
    launches: list[dict[str, Any]]
    jobs: dict[str, ManifestJob]
    """By identity, in the order in which they were added."""
    superseded: list[Entry]
    """Earlier versions of a point: its code, data or configuration has changed since."""
    read_to: int = 0
    """Bytes of the events that are in here."""
    _alive: dict[str, tuple[float, bool]] = dataclasses.field(default_factory=dict)

    def state(self, job: ManifestJob) -> str:
        """A job's state; ``lost`` where its launcher is gone without a word and its engine's jobs go with it."""
        if job.state != "running" or job.handle.startswith("slurm:"):
            return job.state
        asked, answer = self._alive.get(job.by, (-math.inf, False))
        if time.monotonic() - asked > _ASK_S:
            answer = is_alive(self.folder, job.by)
            self._alive[job.by] = (time.monotonic(), answer)
        return job.state if answer else "lost"

    def refresh(self) -> None:
        """Read the events that came since."""
        path = self.folder / "events.jsonl"
        if not path.is_file() or path.stat().st_size <= self.read_to:
            return
        with path.open("rb") as handle:
            handle.seek(self.read_to)
            new = handle.read()
        whole = new[: new.rfind(b"\n") + 1]  # a line that is being written has no end yet
        self.read_to += len(whole)
        for line in whole.splitlines():
            try:
                event = json.loads(line)
                job = self.jobs.get(event["job"])
                if job is not None:
                    _apply(job, event)
            except (ValueError, TypeError, KeyError):
                continue  # cut short by a full disk, or lost with the machine: the job's next event says how it went on


def _apply(job: ManifestJob, event: Mapping[str, Any]) -> None:
    job.state, job.since = str(event["state"]), float(event["time"])
    job.said, job.by = event.get("said", ""), event.get("by", "")
    job.handle = event.get("handle") or (job.handle if job.state in ("submitted", "running") else "")
    if event.get("attempt"):
        job.attempts += 1
    if job.state == "running":
        job.started = job.since


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / "sweep.json").is_file()


def read_manifest(folder: Path) -> Manifest:
    """The sweep in a folder. Raises ConfigError where there is none, or a damaged or older one."""
    path = folder / "sweep.json"
    try:
        plain = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{str(folder)!r} must be the folder of a sweep, and has no sweep.json") from None
    except ValueError:  # no JSON, or no text
        plain = None
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} is damaged; move it away, and the same command writes it anew")
    if plain.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path} must have schema {SCHEMA}, got {plain.get('schema')!r}: it is of another version of eit_lab; "
            "move the sweep's folder away, its runs stay"
        )
    entries = [_entry(job) for job in plain["jobs"]]
    manifest = Manifest(
        folder=folder,
        declaration=plain["declaration"],
        launches=plain["launches"],
        jobs={entry.identity: ManifestJob(entry=entry) for entry in entries},
        superseded=[_entry(job) for job in plain["superseded"]],
    )
    manifest.refresh()
    return manifest


def _entry(plain: Mapping[str, Any]) -> Entry:
    return Entry(**{**plain, "point": tuple(plain["point"])})


def add_jobs(
    folder: Path, entries: Sequence[Entry], *, declaration: Mapping[str, Any] | None, launch: Mapping[str, Any] | None
) -> Manifest:
    """Write ``sweep.json`` with these jobs added to those it has; an earlier version of a point is superseded by the new.

    ``launch`` is None where a launch that is listed already adds to its jobs. Call inside ``locked(folder)``.
    """
    before = read_manifest(folder) if is_sweep(folder) else None
    known = {i: job.entry for i, job in before.jobs.items()} if before else {}
    superseded = list(before.superseded) if before else []
    declared = bool((declaration or {}).get("arms"))
    by_place = {_place(entry, declared): entry for entry in known.values()}
    for entry in entries:
        old = by_place.get(_place(entry, declared))
        if old is not None and old.identity != entry.identity and known.pop(old.identity, None) is not None:
            superseded.append(old)
        known[entry.identity] = entry
    superseded = [entry for entry in superseded if entry.identity not in known]
    launches = [*(before.launches if before else []), *([dict(launch)] if launch is not None else [])]
    plain = {
        "schema": SCHEMA,
        "id": folder.name,
        "declaration": dict(declaration) if declaration is not None else None,
        "launches": launches,
        "jobs": [_plain(entry) for entry in known.values()],
        "superseded": [_plain(entry) for entry in superseded],
    }
    lines = ",\n".join(f"{json.dumps(key)}: {_by_line(value)}" for key, value in plain.items())
    write_text(folder / "sweep.json", f"{{\n{lines}\n}}\n")
    return read_manifest(folder)


def _place(entry: Entry, declared: bool) -> Hashable:
    """What an earlier version of a job has in common with it: where arms are declared, a change of what all share is one."""
    return (entry.arm, entry.seed) if declared else entry.point


def _plain(entry: Entry) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}


def _by_line(value: Any) -> str:
    """JSON with one line an item of a list: a job is a line, which `grep` finds."""
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n]"
    return json.dumps(value)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Alone with the sweep's files; waits while another launcher is."""
    with (folder / ".lock").open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing lets go


class Journal:
    """One launcher's hand on a sweep: writes events under its own name, and is seen to be alive until it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"{socket.gethostname()}-{os.getpid()}-{time.time_ns() % 10**9:09d}"
        (folder / "launchers").mkdir(exist_ok=True)
        self._path = folder / "launchers" / self.name
        self._held: IO[str] = self._path.open("w")
        fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._beat_at = time.monotonic()

    def write(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Add events, {"job", "state", "handle", "status", "said", "attempt"}, all but two optional.

        Raises OSError where the disk is full.
        """
        now = round(time.time(), 3)
        text = "".join(f"{json.dumps({'time': now, **event, 'by': self.name})}\n" for event in events)
        if not text:
            return
        path = self.folder / "events.jsonl"
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            # Whoever was cut short before us has left a line without an end, which ours must not become a part of.
            size = os.fstat(handle).st_size
            torn = size > 0 and os.pread(handle, 1, size - 1) not in (b"\n", b"")
            data = f"{chr(10) if torn else ''}{text}".encode()
            if os.write(handle, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None  # a failing write does not name its file
        finally:
            os.close(handle)

    def beat(self) -> None:
        """Say now and then that this launcher is alive."""
        if time.monotonic() - self._beat_at > _BEAT_S:
            self._beat_at = time.monotonic()
            with suppress(OSError):
                os.utime(self._path)

    def close(self) -> None:
        """Let go."""
        self._path.unlink(missing_ok=True)
        self._held.close()


def is_alive(folder: Path, launcher: str) -> bool:
    """Whether a launcher, by its name in the events, still runs."""
    path = folder / "launchers" / launcher
    try:
        with path.open() as handle:  # shared: two that ask at once must not take each other for the launcher
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    # Nobody holds it, as far as this machine's file system knows.
    elsewhere = not launcher.startswith(f"{socket.gethostname()}-")
    with suppress(FileNotFoundError):
        return elsewhere and time.time() - path.stat().st_mtime < _SILENT_S
    return False


def any_alive(folder: Path) -> bool:
    """Whether some launcher works on a sweep."""
    return any(is_alive(folder, path.name) for path in (folder / "launchers").glob("*"))
