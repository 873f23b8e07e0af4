"""Run the points of a multirun, each in its own fresh process, its config frozen before the first one starts.

A job's process sees no sweep: it gets one resolved file. So a later edit of a YAML changes nothing, nothing leaks from job
to job, and DDP children re-execute their job, never the sweep. One job that fails is reported and the others go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eit_lab.command import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED
from eit_lab.compose import Point
from eit_lab.config import Config, ConfigError
from eit_lab.data.prepare import prepare
from eit_lab.loading import dump, nearest
from eit_lab.processes import LAUNCH_VARIABLES, PARENT
from eit_lab.report.summary import write_summary
from eit_lab.runs import DataFacts, code_state, identity, read_record, run_name, versions, write_text

_POLL_S = 0.2
_ERROR_LINES = 8


@dataclasses.dataclass
class Job:
    """One job of a sweep."""

    number: int
    label: str
    config: Config
    identity: str
    folder: Path
    """Of the run, as its identity names it now; the job itself makes it, and says if it came to be another."""
    frozen: Path
    log: Path
    status: str = "waiting"

    @property
    def announced(self) -> Path:
        """Where the job's process writes the identity and the folder of its run."""
        return self.frozen.with_suffix(".json")

    def find_folder(self) -> None:
        """Take over what the job's process said; code or data that changed since launch give a run another identity."""
        if self.announced.is_file():
            said = json.loads(self.announced.read_text())
            self.identity, self.folder = said["identity"], Path(said["folder"])


def launch(points: Sequence[Point], launcher: Mapping[str, Any], argv: Sequence[str]) -> int:
    """Run every point in order; returns 0 when all are finished, 1 when one failed, 130 or 75 when it was asked to stop."""
    if launcher.get("kind") != "process":
        kind = str(launcher.get("kind") or launcher.get("_target_"))
        raise ConfigError(f"hydra/launcher must be one of process, got {kind!r}{nearest(kind, ['process'])}")
    root = Path(points[0].config.run.root)
    folder, jobs = _freeze(points, root)
    commit, diff = code_state()
    manifest = {"schema": 1, "id": folder.name, "command": list(argv), "commit": commit, "versions": versions()}
    write_text(folder / "code.diff", diff)
    print(f"sweep {folder.name}: {len(jobs)} jobs, folder {folder}", flush=True)
    began = time.monotonic()
    with _Signals() as signals, _progress() as progress:
        whole = progress.add_task("jobs", total=len(jobs), note="")
        for job in jobs:
            _write_manifest(folder, manifest, jobs)
            if _is_finished(job):
                job.status = "finished"
                _say(progress, f"job {job.number + 1}/{len(jobs)}  {job.label}: finished already, skipped")
            else:
                _run_job(job, jobs, progress, signals)
                _write_manifest(folder, manifest, jobs)
                if signals.received is not None:
                    break
            progress.advance(whole)
    _write_manifest(folder, manifest, jobs)
    failed = [job for job in jobs if job.status == "failed"]
    status = signals.exit_status() or (EXIT_PREEMPTED if any(job.status == "preempted" for job in jobs) else 0)
    print(write_summary(folder))
    print(f"{len(jobs)} jobs in {time.monotonic() - began:.0f} s: {sum(j.status == 'finished' for j in jobs)} finished, "
          f"{len(failed)} failed{', the rest not ended: the same command goes on' if status else ''}")  # fmt: skip
    for job in failed:
        print(f"failed: job {job.number + 1} ({job.label}), log {job.log}", file=sys.stderr)
    if (script := _write_sync(folder, jobs)) is not None:
        print(f"W&B: not all is on the server yet; to send it: sh {script}")
    return signals.exit_status() or (EXIT_FAILED if failed else status)


def _write_sync(folder: Path, jobs: Sequence[Job]) -> Path | None:
    """sync.sh, a line for each job whose W&B data is on disk only; None where there is no such job."""
    records = [read_record(job.folder) for job in jobs if job.folder.is_dir()]
    lines = [record["sync"].partition("to send it: ")[2] for record in records if record and record.get("sync")]
    script = folder / "sync.sh"
    if not lines:
        script.unlink(missing_ok=True)
        return None
    write_text(script, "".join(f"{line}\n" for line in lines))
    return script


def _freeze(points: Sequence[Point], root: Path) -> tuple[Path, list[Job]]:
    """The sweep's folder, named by the runs it holds, and its jobs with their configs on disk."""
    known: dict[object, DataFacts] = {}
    for config in (point.config for point in points):
        key = (config.data, config.recipe.batch_size)
        if key not in known:  # a folder of a million files is listed once, not once a point
            known[key] = prepare(config)
    ids = [identity(p.config, known[p.config.data, p.config.recipe.batch_size]) for p in points]
    for number, run_id in enumerate(ids):
        if (first := ids.index(run_id)) != number:
            raise ConfigError(
                f"the points of a sweep must be different runs; {' '.join(points[first].overrides) or 'point 1'!r} and "
                f"{' '.join(points[number].overrides) or f'point {number + 1}'!r} are the same run"
            )
    sweep_id = hashlib.sha256("".join(sorted(ids)).encode()).hexdigest()[:10]
    folder = root / "sweeps" / sweep_id
    try:
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"run.root must be a folder that can be written, got {str(root)!r}: {error.strerror}"
        ) from None
    jobs = []
    for number, (point, run_id) in enumerate(zip(points, ids, strict=True)):
        config = dataclasses.replace(point.config, run=dataclasses.replace(point.config.run, sweep=sweep_id))
        frozen = folder / "jobs" / f"{number:03d}.yaml"
        write_text(frozen, OmegaConf.to_yaml(OmegaConf.create(dump(config))))
        job = Job(
            number=number,
            label=" ".join(point.overrides) or config.model.name,
            config=config,
            identity=run_id,
            folder=Path(config.run.root) / run_name(config, run_id),
            frozen=frozen,
            log=frozen.with_suffix(".log"),
        )
        jobs.append(job)
    return folder, jobs


class _Signals:
    """Asked to stop, a sweep hands the signal on to its job, which saves its state and ends; then the sweep ends too."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.job: subprocess.Popen[bytes] | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        self._before = {n: signal.signal(n, self._hand_on) for n in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _hand_on(self, signum: int, _: FrameType | None) -> None:
        self.received = signum
        if self.job is not None and self.job.poll() is None:
            self.job.send_signal(signum)

    def exit_status(self) -> int:
        """130 after Ctrl-C, 75 after another signal, 0 without."""
        if self.received is None:
            return 0
        return EXIT_INTERRUPTED if self.received == signal.SIGINT else EXIT_PREEMPTED


def _run_job(job: Job, jobs: Sequence[Job], progress: Progress, signals: _Signals) -> None:
    """Run one job to its end."""
    job.status = "running"
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES}
    task = progress.add_task(job.label, total=None, note="starting")
    head = f"job {job.number + 1}/{len(jobs)}  {job.label}"
    began = time.monotonic()
    job.announced.unlink(missing_ok=True)
    with job.log.open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "eit_lab.train", "--frozen", str(job.frozen)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**environment, PARENT: str(os.getpid())},
            start_new_session=True,  # the terminal's Ctrl-C reaches the sweep only, which hands it on
        )
        signals.job = process
        if signals.received is not None:  # it came while the job was being started
            process.send_signal(signals.received)
        while process.poll() is None:
            job.find_folder()
            _show_progress(job, progress, task)
            time.sleep(_POLL_S)
    progress.remove_task(task)
    job.find_folder()
    record = read_record(job.folder)
    if process.returncode == 0 and record is not None and record["status"] == "finished":
        job.status = "finished"
        accuracy = 100 * record["result"]["test/acc1"]
        _say(progress, f"{head}: test top-1 {accuracy:.2f}%, {time.monotonic() - began:.0f} s")
    elif process.returncode in (EXIT_INTERRUPTED, EXIT_PREEMPTED):
        job.status = "interrupted" if process.returncode == EXIT_INTERRUPTED else "preempted"
        _say(progress, f"{head}: stopped as asked, its state is saved")
    elif signals.received is not None and process.returncode == -signals.received:  # before it could save anything
        job.status = "interrupted"
    else:
        job.status = "failed"
        lines = [line for line in job.log.read_text(errors="replace").splitlines() if line.strip()]
        _say(progress, f"{head}: FAILED (exit status {process.returncode})")
        for line in lines[-_ERROR_LINES:]:
            _say(progress, f"    {line}")


def _show_progress(job: Job, progress: Progress, task: Any) -> None:
    record = read_record(job.folder) if job.folder.is_dir() else None
    if record is not None and record["status"] == "running" and (now := record.get("progress")):
        note = f"val top-1 {100 * now['val/acc1']:.1f}%"
        progress.update(task, completed=now["step"], total=now["steps"], note=note)


def _is_finished(job: Job) -> bool:
    record = read_record(job.folder) if job.folder.is_dir() else None
    return record is not None and record["status"] == "finished" and not job.config.run.overwrite


def _write_manifest(folder: Path, manifest: Mapping[str, Any], jobs: Sequence[Job]) -> None:
    listed = [
        {
            "label": job.label,
            "identity": job.identity,
            "status": job.status,
            "folder": os.path.relpath(job.folder, folder),
            "frozen": f"jobs/{job.frozen.name}",
            "log": f"jobs/{job.log.name}",
            "arm": job.config.model.name,
            "seed": job.config.seed,
        }
        for job in jobs
    ]
    write_text(folder / "sweep.json", json.dumps({**manifest, "jobs": listed}, indent=2) + "\n")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=True,
    )


def _say(progress: Progress, line: str) -> None:
    progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
