"""Run the points of a sweep, each in its own fresh process, its config frozen before the first one starts.

A job's process sees no sweep: it gets one resolved file. So a later edit of a YAML changes nothing, and nothing leaks from
job to job. The same command again goes on: what is finished is skipped, what is half done resumes, what is new is added.
Where the jobs run is the engine's business (engine.py); what became of them is on disk (manifest.py), so that launchers may
come and go, and two at once share the work.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eit_lab.command import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED, RunError
from eit_lab.compose import Point
from eit_lab.config import ConfigError
from eit_lab.data.prepare import prepare
from eit_lab.launchers import Launcher, SlurmLauncher, load_launcher
from eit_lab.loading import dump
from eit_lab.manifest import FINAL, Entry, Journal, Manifest, ManifestJob, add_jobs, is_alive, locked
from eit_lab.runs import DataFacts, code_state, holder, identity, read_record, run_name, versions, write_text
from eit_lab.sweep.arms import Sweep
from eit_lab.sweep.engine import Ended, Engine, Job
from eit_lab.sweep.engines import build_engine, placed
from eit_lab.sweep.guard import guard
from eit_lab.sweep.matched import match_arms
from eit_lab.sweep.probe import Probe
from eit_lab.sweep.screen import Screen
from eit_lab.sweep.stopping import Signals

_POLL_S = 0.2
_ELSEWHERE_S = 1.0
_ERROR_LINES = 8
_ANOTHER_SWEEP = ""  # who has a job whose run another sweep, or a command of its own, is busy with


def launch(sweep: Sweep, argv: Sequence[str], *, module: str = "eit_lab.train") -> int:
    """Run every point; returns 0 when all are finished, 1 when one failed, 130 or 75 when it was asked to stop.

    ``module`` is what each job runs (sweep/engines.py).
    """
    launcher = load_launcher(sweep.launcher)
    root = Path(sweep.points[0].config.run.root)
    folder = root / "sweeps" / sweep.id
    with Probe() as probe:
        sweep = match_arms(sweep, probe=probe)
        entries, jobs, facts = freeze(sweep.points, launcher, folder=folder, base=sweep.declaration.base)
        finished = {job.identity for job in jobs if _is_finished(job)}
        engine = build_engine(launcher, [job.config for job in jobs], folder=folder, module=module)
        guard(
            sweep,
            folder=folder,
            facts=facts,
            identities=[job.identity for job in jobs],
            finished=finished,
            threads=engine.threads(jobs[0].config),
            probe=probe,
        )
    try:
        manifest = _write(sweep, entries, [job for job in jobs if job.identity not in finished], argv, folder=folder)
        print(f"sweep {folder.name}: {len(jobs)} jobs, folder {folder}", flush=True)
        return _Launch(folder, manifest, jobs, engine, launcher).run(finished)
    except BrokenPipeError:  # the reader of our output has gone: command.run knows
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise RunError(f"sweep {folder.name} stopped: {error.strerror}{where}; the same command goes on") from error
    finally:
        engine.close()


def _write(
    sweep: Sweep, entries: Sequence[Entry], open_: Sequence[Job], argv: Sequence[str], *, folder: Path
) -> Manifest:
    """The sweep's files: the manifest, the frozen config of every job that is open, the state of the code."""
    try:
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
        commit, diff = code_state()
        write_text(folder / "code.diff", diff)
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        said = {"command": list(argv), "commit": commit, "time": started, "versions": versions()}
        for job in open_:
            write_text(job.frozen, json.dumps(dump(job.config), indent=1) + "\n")
        with locked(folder):
            return add_jobs(folder, entries, declaration=dump(sweep.declaration), launch=said)
    except OSError as error:
        root = str(folder.parents[1])
        raise ConfigError(f"run.root must be a folder that can be written, got {root!r}: {error.strerror}") from None


def freeze(
    points: Sequence[Point], launcher: Launcher, *, folder: Path, base: Sequence[str] = ()
) -> tuple[list[Entry], list[Job], list[DataFacts]]:
    """The jobs of a sweep, as its manifest lists them and as an engine takes them, and the facts of each one's data.

    Raises ConfigError where two points are the same run.
    """
    known: dict[object, DataFacts] = {}
    entries: list[Entry] = []
    jobs: list[Job] = []
    facts: list[DataFacts] = []
    labels: dict[str, str] = {}
    for number, point in enumerate(points, 1):
        config = placed(point.config, launcher)
        key = (config.data, config.recipe.batch_size)
        if key not in known:  # a folder of a million files is listed once, not once a point
            known[key] = prepare(config)
        run_id = identity(config, known[key])
        label = " ".join(point.overrides) or config.model.name
        if run_id in labels:
            raise ConfigError(
                f"the points of a sweep must be different runs; {labels[run_id]!r} and {label!r} (point {number}) "
                "are the same run"
            )
        labels[run_id] = label
        facts.append(known[key])
        name = run_name(config, run_id)
        frozen, log = Path("jobs", f"{name}.json"), Path("jobs", f"{name}.log")
        home = Path(config.run.root) / name
        entries.append(
            Entry(
                label=label, point=(*base, *point.key), arm=config.run.arm or config.model.name, seed=config.seed,
                identity=run_id, name=name, folder=os.path.relpath(home, folder), frozen=str(frozen), log=str(log),
            )
        )  # fmt: skip
        jobs.append(Job(label, config, run_id, home, folder / frozen, folder / log))
    return entries, jobs, facts


class _Launch:
    """One launcher at work on its jobs."""

    def __init__(
        self, folder: Path, manifest: Manifest, jobs: Sequence[Job], engine: Engine, launcher: Launcher
    ) -> None:
        self.folder, self.manifest, self.engine, self.launcher = folder, manifest, engine, launcher
        self.jobs = {job.identity: job for job in jobs}
        self.place = {job.identity: n for n, job in enumerate(jobs, 1)}
        self.waiting: deque[Job] = deque()
        self.active: dict[str, Job] = {}
        self.queued: set[str] = set()
        """Submitted, and not seen to run yet."""
        self.elsewhere: dict[str, str] = {}
        """Jobs that another launcher has, and which."""
        self.outcome: dict[str, str] = {}
        """How each job that has ended did so."""
        self.broken = False
        """A job failed, and the sweep is not to go on."""
        self.began = time.time()
        self.journal = Journal(folder)

    def run(self, finished: set[str]) -> int:
        """Until all jobs have ended, or the sweep was asked to stop."""
        began = time.monotonic()
        try:
            with Signals() as signals, Screen(self.manifest) as screen:
                self._sort(finished, screen)
                self._loop(signals, screen)
        finally:
            self.journal.close()
        return self._close(signals, time.monotonic() - began)

    # ------------------------------------------------------------------------------------------------ what is to be done

    def _sort(self, finished: set[str], screen: Screen) -> None:
        """Decide for each job: finished already, left as failed, another's, still running from before, or waiting."""
        skipped = 0
        events: list[dict[str, Any]] = []
        with locked(self.folder):
            self.manifest.refresh()
            for identity_, job in self.jobs.items():
                known = self.manifest.jobs[identity_]
                if identity_ in finished:
                    skipped += 1
                    self.outcome[identity_] = "finished"
                    if known.state != "finished":
                        events.append({"job": identity_, "state": "finished", "said": "by an earlier command"})
                elif known.state == "failed" and not self.launcher.retry_failed:
                    self.outcome[identity_] = "failed"
                    screen.say(f"{self._head(job)}: failed before, left as it is (hydra.launcher.retry_failed=false)")
                elif known.state in ("submitted", "running") and is_alive(self.folder, known.by):
                    self.elsewhere[identity_] = known.by
                elif known.state in ("submitted", "running") and self._adopt(job, known):
                    screen.say(f"{self._head(job)}: found {known.handle}, which an earlier command started")
                else:
                    self.waiting.append(job)
            self.journal.write(events)
        if skipped:
            screen.say(f"{skipped} of {len(self.jobs)} jobs finished already, skipped")

    def _loop(self, signals: Signals, screen: Screen) -> None:
        looked = 0.0
        while self.active or self.elsewhere or (self.waiting and not self._stopping(signals)):
            if self.waiting and not self._stopping(signals):
                self._start(screen)
            for signum in signals.take():
                self._hand_on(signum)
            if signals.out_of_patience():
                self._hand_on(signal.SIGKILL)
            for job, ended in self.engine.poll():
                self._end(job, ended, signals, screen)
            self._note_begun()
            if signals.received is not None and self.engine.survives:
                break
            if self._stopping(signals) and not self.active:
                break
            if self.elsewhere and time.monotonic() - looked > _ELSEWHERE_S:
                self._look_elsewhere(screen)
                looked = time.monotonic()
            self.journal.beat()
            screen.refresh()
            if not self._waits():
                break
            self.engine.wait(_POLL_S)
        screen.refresh(now=True)

    def _hand_on(self, signum: int) -> None:
        """Jobs of this machine get the signal, save their state and end; those of a cluster go on by themselves."""
        if not self.engine.survives:
            for job in self.active.values():
                self.engine.stop(job, signum)

    def _waits(self) -> bool:
        return not (isinstance(self.launcher, SlurmLauncher) and not self.launcher.wait and not self.waiting)

    def _stopping(self, signals: Signals) -> bool:
        return self.broken or signals.received is not None

    def _start(self, screen: Screen) -> None:
        """Start as many waiting jobs as the engine takes, unless another launcher has taken one meanwhile."""
        room = self.engine.capacity()
        if room < 1:
            return
        batch: list[Job] = []
        with locked(self.folder):
            self.manifest.refresh()
            while self.waiting and len(batch) < room:
                job = self.waiting.popleft()
                known = self.manifest.jobs[job.identity]
                others = known.by != self.journal.name
                meanwhile = others and known.since > self.began
                if others and known.state in ("submitted", "running") and is_alive(self.folder, known.by):
                    self.elsewhere[job.identity] = known.by
                elif others and known.state in ("submitted", "running") and self._adopt(job, known):
                    screen.say(f"{self._head(job)}: found {known.handle}, which another launcher started")
                elif others and known.state == "finished" and (meanwhile or _is_finished(job)):
                    self.outcome[job.identity] = "finished"
                    screen.say(f"{self._head(job)}: finished by another launcher")
                elif meanwhile and known.state == "failed":
                    self.outcome[job.identity] = "failed"
                    screen.say(f"{self._head(job)}: failed at another launcher: {known.said}", style="red")
                elif (who := holder(job.folder)) is not None:
                    self.elsewhere[job.identity] = _ANOTHER_SWEEP
                    screen.say(f"{self._head(job)}: is being run by {who}, not by this sweep: waiting for it")
                else:
                    batch.append(job)
            for job in batch:
                job.announced.unlink(missing_ok=True)
                job.attempts += 1
            handles = self.engine.start(batch) if batch else []
            state = "submitted" if self.engine.survives else "running"
            self.journal.write(
                [
                    {"job": job.identity, "state": state, "handle": handle, "attempt": True}
                    for job, handle in zip(batch, handles, strict=True)
                ]
            )
        for job in batch:
            self.active[job.identity] = job
            if self.engine.survives:
                self.queued.add(job.identity)

    def _adopt(self, job: Job, known: ManifestJob) -> bool:
        """Follow what another launcher, which is gone, has left with the engine. Call inside the lock."""
        if not self.engine.adopt(job, known.handle):
            return False
        self.journal.write([{"job": job.identity, "state": known.state, "handle": known.handle}])
        self.active[job.identity] = job
        self.queued.add(job.identity)
        return True

    def _note_begun(self) -> None:
        begun = [i for i in self.queued if self.engine.is_running(self.active[i])]
        self.queued.difference_update(begun)
        self.journal.write([{"job": i, "state": "running"} for i in begun])

    def _look_elsewhere(self, screen: Screen) -> None:
        """Jobs that another launcher has: take note of those that ended, and take over those whose launcher is gone."""
        self.manifest.refresh()
        alive = {launcher: is_alive(self.folder, launcher) for launcher in set(self.elsewhere.values())}
        for identity_, launcher in list(self.elsewhere.items()):
            known = self.manifest.jobs[identity_]
            if launcher == _ANOTHER_SWEEP:
                if holder(self.jobs[identity_].folder) is None:
                    del self.elsewhere[identity_]
                    self._take_back(self.jobs[identity_], screen)
            elif known.state in FINAL:
                del self.elsewhere[identity_]
                self.outcome[identity_] = known.state
                screen.say(f"{self._head(self.jobs[identity_])}: {known.state} at another launcher")
            elif not alive[launcher]:
                del self.elsewhere[identity_]
                job = self.jobs[identity_]
                self.waiting.append(job)  # _start() finds out, inside the lock, whether the engine still has it
                screen.say(f"{self._head(job)}: its launcher is gone, taken over")

    def _take_back(self, job: Job, screen: Screen) -> None:
        """What another sweep ran has ended: it is finished, or ours to go on with."""
        if _is_finished(job):
            self.outcome[job.identity] = "finished"
            self.journal.write([{"job": job.identity, "state": "finished", "said": "by another command"}])
            screen.say(f"{self._head(job)}: finished by another command")
        else:
            self.waiting.append(job)

    # ------------------------------------------------------------------------------------------------------- how it ended

    def _end(self, job: Job, ended: Ended, signals: Signals, screen: Screen) -> None:
        del self.active[job.identity]
        self.queued.discard(job.identity)
        job.find_folder()
        record = read_record(job.folder) if job.folder.is_dir() else None
        if record is not None and record["status"] == "finished" and ended.status in (0, None):
            self._note(job, "finished", ended, "")
            accuracy = 100 * record["result"]["test/acc1"]
            screen.say(f"{self._head(job)}: test top-1 {accuracy:.2f}%, {record['seconds']:.0f} s")
            return
        asked = signals.received is not None or self.broken
        told = {*signals.seen, *([signal.SIGTERM] if self.broken else []), *([signal.SIGKILL] if signals.out_of_patience() else [])}  # fmt: skip
        if ended.status in (EXIT_INTERRUPTED, EXIT_PREEMPTED) or -(ended.status or 0) in told:
            state = "interrupted" if ended.status in (EXIT_INTERRUPTED, -signal.SIGINT) else "preempted"
            at_once = "stopped at once" if signals.out_at is not None else "stopped before it began"
            saved = (ended.status or 0) > 0 and signals.out_at is None
            said = ended.said or ("stopped as asked, its state is saved" if saved else at_once)
            self._note(job, state, ended, said)
            screen.say(f"{self._head(job)}: {said}; the same command goes on")
            return
        said = _why(job, ended, record)
        again = job.attempts <= self.launcher.retries and not asked
        self._note(job, "failed", ended, said)
        screen.say(f"{self._head(job)}: FAILED: {said}{'; tried again' if again else ''}", style="red")
        if again:
            del self.outcome[job.identity]
            self.waiting.appendleft(job)
            return
        for line in _log_tail(job):
            screen.say(f"    {line}")
        if not self.launcher.keep_going and not self.broken:
            self.broken = True
            screen.say("hydra.launcher.keep_going=false: no further job starts, running ones save their state and stop")
            for other in self.active.values():
                self.engine.stop(other, signal.SIGTERM)

    def _note(self, job: Job, state: str, ended: Ended, said: str) -> None:
        self.outcome[job.identity] = state
        self.journal.write([{"job": job.identity, "state": state, "status": ended.status, "said": said}])

    def _head(self, job: Job) -> str:
        return f"job {self.place[job.identity]}/{len(self.jobs)}  {job.label}"

    def _close(self, signals: Signals, seconds: float) -> int:
        failed = [job for i, job in self.jobs.items() if self.outcome.get(i) == "failed"]
        finished = sum(state == "finished" for state in self.outcome.values())
        stopped = signals.exit_status() or (
            EXIT_PREEMPTED if any(state in ("preempted", "interrupted") for state in self.outcome.values()) else 0
        )
        from eit_lab.report.summary import write_summary  # matplotlib: not before there is something to draw

        print(write_summary(self.folder))
        alone = len(self.active) if self.engine.survives else 0
        open_ = len(self.jobs) - finished - len(failed) - alone
        rest = f", {alone} go on without this command (python -m eit_lab.sweep status {self.folder})" if alone else ""
        rest += (
            f", {'the rest' if finished or failed or alone else 'all'} not ended: the same command goes on"
            if open_
            else ""
        )
        print(f"{len(self.jobs)} jobs in {seconds:.0f} s: {finished} finished, {len(failed)} failed{rest}")
        for job in failed:
            print(f"failed: {self._head(job)}, log {job.log}", file=sys.stderr)
        runs = [self.folder / job.entry.folder for job in self.manifest.jobs.values()]  # of other launches too
        if (script := _write_sync(self.folder, [*runs, *(job.folder for job in self.jobs.values())])) is not None:
            print(f"W&B: not all is on the server yet; to send it: sh {script}")
        return signals.exit_status() or (EXIT_FAILED if failed else stopped)


def _is_finished(job: Job) -> bool:
    record = read_record(job.folder) if job.folder.is_dir() else None
    return record is not None and record["status"] == "finished" and not job.config.run.overwrite


def _why(job: Job, ended: Ended, record: Mapping[str, Any] | None) -> str:
    """Why a job failed, in one line: its own words where it had any."""
    if ended.said:
        return ended.said
    if record is not None and record["status"] == "failed" and record.get("error"):
        return str(record["error"]).splitlines()[0]
    ours = [line for line in _log_tail(job) if line.startswith("eit_lab: ")]
    if ours:
        return ours[-1].removeprefix("eit_lab: ")
    return f"exit status {ended.status}" if ended.status is not None else "it ended without a word"


def _log_tail(job: Job) -> list[str]:
    if not job.log.is_file():
        return []
    with job.log.open("rb") as handle:
        handle.seek(max(0, job.log.stat().st_size - 16_384))
        text = handle.read().decode(errors="replace")
    return [line for line in text.splitlines() if line.strip()][-_ERROR_LINES:]


def _write_sync(folder: Path, runs: Sequence[Path]) -> Path | None:
    """sync.sh, a line for each run whose W&B data is on disk only; None where there is no such run."""
    records = [read_record(run) for run in dict.fromkeys(run.resolve() for run in runs) if run.is_dir()]
    lines = [record["sync"].partition("to send it: ")[2] for record in records if record and record.get("sync")]
    script = folder / "sync.sh"
    if not lines:
        script.unlink(missing_ok=True)
        return None
    write_text(script, "".join(f"{line}\n" for line in lines))
    return script
