"""One launcher at work on a search: asks for trials as there is room, follows their runs, tells what they were worth.

Everything that matters is on disk: trials and values in Optuna's journal, runs and who has them in the folder's manifest. A
launcher may be killed at any moment; the next one goes on with the trials that it left, with the same values and from their
checkpoints, and several at once share the trials: whoever asks or takes over does so inside the folder's lock.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from eit_lab.command import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED, RunError
from eit_lab.config import ConfigError
from eit_lab.launchers import Launcher
from eit_lab.loading import dump
from eit_lab.manifest import FINAL, Journal, Manifest, add_jobs, is_alive, locked, read_manifest
from eit_lab.runs import holder, write_text
from eit_lab.search.board import Board
from eit_lab.search.curves import mean_curve, run_value
from eit_lab.search.request import Request
from eit_lab.search.study import RETRY_OF, ArmStudy, is_impossible
from eit_lab.search.trials import Runs, Trial, has_diverged, is_finished, record_of
from eit_lab.sweep.engine import Ended, Engine, Job
from eit_lab.sweep.stopping import Signals

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_POLL_S = 0.2
_QUEUED_AT_ONCE = 8
"""Trials at work at once where a cluster would take any number: those that are asked for together know nothing of each other."""
_ELSEWHERE_S = 1.0
_MOST_IMPOSSIBLE = 50
"""Points in a row that make no valid config, after which a search gives up."""


class Searching:
    """The launcher."""

    def __init__(
        self,
        request: Request,
        runs: Runs,
        studies: Sequence[ArmStudy],
        folder: Path,
        engine: Engine,
        launcher: Launcher,
    ) -> None:
        self.request, self.runs, self.studies, self.folder = request, runs, studies, folder
        self.engine, self.launcher = engine, launcher
        self.trials: list[Trial] = []
        """At work here."""
        self.waiting: deque[Job] = deque()
        self.active: dict[str, Job] = {}
        self.queued: set[str] = set()
        """Submitted, and not seen to run yet."""
        self.ended: dict[str, str] = {}
        """How each run ended that has: finished, diverged, failed, stopped."""
        self.why: dict[str, str] = {}
        self.stopping: set[str] = set()
        """Runs that were told to stop because their trial is over."""
        self.looked_for_orphans = -_ELSEWHERE_S
        self.left: set[tuple[str, int]] = set()
        """Trials that were stopped and are for a later command."""
        self.stopped_by_others = False
        self.broken = False
        """A trial failed, and the search is not to go on."""
        self.most = request.options.trials_at_once or (
            _QUEUED_AT_ONCE if engine.survives else request.trials * len(studies)
        )
        self.held: set[str] = set()
        """Runs that something else is busy with, and that this was said of."""
        self.journal = Journal(folder)

    def run(self) -> int:
        """Until every arm has its trials, or the search was asked to stop; returns the exit status."""
        try:
            with Signals() as signals, Board(self.request, self.studies, self.folder) as board:
                self._begin(board)
                self._loop(signals, board)
        finally:
            self.journal.close()
        if signals.received is not None:
            return signals.exit_status()
        failed = any(trial.state.name == "FAIL" for study in self.studies for trial in _standing(study))
        return EXIT_FAILED if failed else EXIT_PREEMPTED if self.stopped_by_others else 0

    def _loop(self, signals: Signals, board: Board) -> None:
        looked = 0.0
        while True:
            for signum in signals.take():
                if not self.engine.survives:
                    for job in self.active.values():
                        self.engine.stop(job, signum)
            stopping = self.broken or signals.received is not None
            moved = False
            if not stopping:
                moved = self._fill(board)
                moved |= self._start(board)
            for job, ended in self.engine.poll():
                self._end(job, ended, signals, board)
                moved = True
            self._note_begun()
            for trial in list(self.trials):
                self._follow(trial, board)
            if stopping and (self.engine.survives or not self.active):
                break
            if not stopping and not self._has_work():
                break
            if time.monotonic() - looked > _ELSEWHERE_S:
                self._look_elsewhere()
                looked = time.monotonic()
            self.journal.beat()
            board.refresh(self.trials)
            if not moved:
                self.engine.wait(_POLL_S)

    def _has_work(self) -> bool:
        return bool(self.trials or self.active) or any(
            self._wants(study) or any(self._is_open(study, trial) for trial in study.trials()) for study in self.studies
        )

    def _wants(self, study: ArmStudy) -> bool:
        return study.counted() < self.request.trials or study.is_waiting()

    def _is_open(self, study: ArmStudy, trial: FrozenTrial) -> bool:
        """At work, here or at another launcher; not one that this launcher was made to leave."""
        return trial.state.name == "RUNNING" and (study.arm.label, trial.number) not in self.left

    # ------------------------------------------------------------------------------------------------------- which trials

    def _begin(self, board: Board) -> None:
        """Ask again for the trials that failed before; stop what is still running of trials that are over."""
        with locked(self.folder):
            manifest = read_manifest(self.folder)
            for study in self.studies:
                trials = study.trials()
                again = {trial.user_attrs.get(RETRY_OF) for trial in trials}
                failed = [
                    trial
                    for trial in trials
                    if trial.state.name == "FAIL" and trial.number not in again and not is_impossible(trial)
                ]
                for trial in failed if self.launcher.retry_failed else ():
                    study.retry(trial)
                    board.say(f"{study.arm.label} trial {trial.number + 1} failed before: it is done again".strip())
                for trial in trials:
                    if trial.state.name == "PRUNED":
                        self._end_survivors(study, trial, manifest)

    def _end_survivors(self, study: ArmStudy, frozen: FrozenTrial, manifest: Manifest) -> None:
        """Jobs of a cluster go on when their launcher dies between telling that a trial is pruned and stopping it."""
        if not self.engine.survives:
            return
        trial = self.runs.trial(study, frozen.number, frozen.params)
        for identity, job in trial.jobs.items():
            known = manifest.jobs.get(identity)
            if known is None or known.state not in ("submitted", "running") or is_alive(self.folder, known.by):
                continue
            if self.engine.adopt(job, known.handle):
                self.active[identity] = job
                self.engine.stop(job, signal.SIGTERM)

    def _fill(self, board: Board) -> bool:
        """Take over or ask for trials while there is room for their runs. One at a time: each is thought of with all known."""
        moved = False
        impossible = 0
        while self.engine.capacity() > len(self.waiting) and len(self.trials) < self.most and not self.broken:
            with locked(self.folder):
                trial = self._take_over()
                if trial is None:
                    study = min(self.studies, key=lambda study: (not self._wants(study), study.counted()))
                    if not self._wants(study):
                        break
                    number, values = study.ask()
                    try:
                        trial = self.runs.trial(study, number, values)
                    except ConfigError as error:
                        study.refuse(number, str(error))
                        board.say(f"{study.arm.label} trial {number + 1} is not possible: {error}".strip())
                        impossible += 1
                        if impossible >= _MOST_IMPOSSIBLE:
                            raise RunError(
                                f"{impossible} points in a row make no valid config, the last one: {error}"
                            ) from None
                        continue
                self._accept(trial)
            moved = True
            self._follow(trial, board)
        return moved

    def _take_over(self) -> Trial | None:
        """A trial whose launcher is gone: with the same values, its runs from where they were."""
        if time.monotonic() - self.looked_for_orphans < _ELSEWHERE_S:
            return None
        mine = {(trial.study.arm.label, trial.number) for trial in self.trials} | self.left
        manifest = None
        for study in self.studies:
            for frozen in study.trials():
                if frozen.state.name != "RUNNING" or (study.arm.label, frozen.number) in mine:
                    continue
                manifest = manifest or read_manifest(self.folder)
                trial = self.runs.trial(study, frozen.number, frozen.params)
                if not any(self._is_elsewhere(manifest, identity) for identity in trial.jobs):
                    trial.found = False
                    # The last report once more: its launcher may have died before it judged by it.
                    trial.reported = max(frozen.intermediate_values, default=1) - 1
                    return trial
        self.looked_for_orphans = time.monotonic()
        return None

    def _is_elsewhere(self, manifest: Manifest, identity: str) -> bool:
        known = manifest.jobs.get(identity)
        return known is not None and known.by not in ("", self.journal.name) and is_alive(self.folder, known.by)

    def _accept(self, trial: Trial) -> None:
        """Put a trial's runs on the list, and those that nobody has into the queue. Call inside the lock."""
        manifest = add_jobs(self.folder, trial.entries, declaration=None, launch=None)
        events: list[dict[str, Any]] = []
        for identity, job in trial.jobs.items():
            known = manifest.jobs[identity]
            if identity in self.active or job in self.waiting:
                continue
            if is_finished(job):
                self.ended[identity] = "finished"
                if known.state != "finished":
                    events.append({"job": identity, "state": "finished", "said": "by an earlier command"})
            elif has_diverged(job):
                self.ended[identity], self.why[identity] = "diverged", record_of(job).get("error") or ""
            elif not self._is_elsewhere(manifest, identity):
                self._queue(job, known.state, known.handle, events)
        self.journal.write(events)
        self.trials.append(trial)

    def _queue(self, job: Job, state: str, handle: str, events: list[dict[str, Any]]) -> None:
        """Take a job: one that an earlier launcher has left with a cluster, or one to start."""
        self.ended.pop(job.identity, None)
        if state in ("submitted", "running") and self.engine.adopt(job, handle):
            self.active[job.identity] = job
            self.queued.add(job.identity)
            events.append({"job": job.identity, "state": state, "handle": handle})
            return
        write_text(job.frozen, json.dumps(dump(job.config), indent=1) + "\n")
        self.waiting.append(job)
        events.append({"job": job.identity, "state": "waiting"})  # which says who has it

    def _look_elsewhere(self) -> None:
        """Runs of our trials that another launcher has: what became of them, and those whose launcher is gone."""
        others = [
            job
            for trial in self.trials
            for identity, job in trial.jobs.items()
            if identity not in self.active and identity not in self.ended and job not in self.waiting
        ]
        if not others:
            return
        with locked(self.folder):
            manifest = read_manifest(self.folder)
            events: list[dict[str, Any]] = []
            for job in others:
                known = manifest.jobs[job.identity]
                if known.state in FINAL and is_finished(job):
                    self.ended[job.identity] = "finished"
                elif known.state in FINAL and has_diverged(job):
                    self.ended[job.identity] = "diverged"
                elif known.state in FINAL or not self._is_elsewhere(manifest, job.identity):
                    self._queue(job, known.state, known.handle, events)
            self.journal.write(events)

    # --------------------------------------------------------------------------------------------------------- their runs

    def _start(self, board: Board) -> bool:
        """Start the runs that are due, but for those that another sweep, or a command of its own, is busy with."""
        batch: list[Job] = []
        for job in list(self.waiting)[: self.engine.capacity()]:
            if (who := holder(job.folder)) is None:
                self.waiting.remove(job)
                batch.append(job)
            elif job.identity not in self.held:
                self.held.add(job.identity)
                board.say(f"{job.label}: its run is being run by {who}: waiting for it")
        if not batch:
            return False
        for job in batch:
            job.announced.unlink(missing_ok=True)
            job.attempts += 1
        handles = self.engine.start(batch)
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
        return True

    def _note_begun(self) -> None:
        begun = [i for i in self.queued if self.engine.is_running(self.active[i])]
        self.queued.difference_update(begun)
        self.journal.write([{"job": i, "state": "running"} for i in begun])

    def _end(self, job: Job, ended: Ended, signals: Signals, board: Board) -> None:
        """A run's process has ended: how, and whether the run is tried again."""
        identity = job.identity
        del self.active[identity]
        self.queued.discard(identity)
        job.find_folder()
        wanted = any(identity in trial.jobs for trial in self.trials)
        was_stopping = identity in self.stopping
        self.stopping.discard(identity)
        if is_finished(job) and ended.status in (0, None):
            self._note(job, "finished", ended, "")
        elif was_stopping and wanted:  # meanwhile another trial came to be the same run
            self._note(job, "pruned", ended, self.why.pop(identity, ""))
            del self.ended[identity]
            self.waiting.append(job)
        elif not wanted:
            self._note(job, "pruned", ended, self.why.get(identity, "its trial is over"))
        elif ended.status in (EXIT_INTERRUPTED, EXIT_PREEMPTED) or (
            (self.broken or signals.received is not None) and ended.status == -(signals.received or signal.SIGTERM)
        ):
            self.stopped_by_others |= signals.received is None
            state = "interrupted" if ended.status == EXIT_INTERRUPTED else "preempted"
            self._note(job, state, ended, "stopped as asked, the same command goes on")
            self.ended[identity] = "stopped"
        elif has_diverged(job):
            self.why[identity] = str(record_of(job).get("error"))
            self._note(job, "failed", ended, self.why[identity])
            self.ended[identity] = "diverged"
        else:
            said = _why(job, ended)
            self._note(job, "failed", ended, said)
            if job.attempts <= self.launcher.retries and not self.broken and signals.received is None:
                board.say(f"{job.label}: failed, tried again: {said}")
                del self.ended[identity]
                self.waiting.appendleft(job)
            else:
                self.why[identity] = said

    def _note(self, job: Job, state: str, ended: Ended, said: str) -> None:
        self.ended[job.identity] = state
        self.journal.write([{"job": job.identity, "state": state, "status": ended.status, "said": said}])

    # ------------------------------------------------------------------------------------------------- what they are worth

    def _follow(self, trial: Trial, board: Board) -> None:
        """Report the epochs that came, stop the trial if it is not worth going on, tell its value once its runs have ended.

        Whether a trial is pruned is decided epoch by epoch from the numbers alone, however late they are read.
        """
        study = trial.study
        trial.curve = mean_curve([self.runs.curve(job) for job in trial.jobs.values()])
        for epoch, value in trial.curve.items():
            if epoch <= trial.reported or not math.isfinite(value):
                continue
            study.report(trial.number, epoch, value)
            trial.reported = epoch
            if self._judges(trial, epoch) and study.should_prune(trial.number):
                why = f"pruned after epoch {epoch}: {self.request.options.objective} {value:.4f}"
                self._give_up(trial, why, board, pruned=True)
                return
        how = [self.ended.get(identity) for identity in trial.jobs]
        if "diverged" in how:
            self._give_up(trial, "diverged: the loss was not finite", board, pruned=True)
        elif "failed" in how:
            self._fail(trial, board)
        elif "stopped" in how:
            if not any(identity in self.active for identity in trial.jobs):
                self._leave(trial)
        elif all(state == "finished" for state in how):
            self._finish(trial, board)

    def _judges(self, trial: Trial, epoch: int) -> bool:
        """Not where nothing would be saved: all its runs were there already, or this was their last epoch."""
        return self.request.options.pruner != "none" and not trial.found and epoch != self.request.epochs

    def _finish(self, trial: Trial, board: Board) -> None:
        o = self.request.options
        values = [
            run_value(self.runs.curve(job), record_of(job), o.objective, at=self.request.at, maximize=o.maximize)
            for job in trial.jobs.values()
        ]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            self._give_up(trial, f"diverged: {o.objective} was never a finite number", board, pruned=True)
            return
        value = fmean(known)
        trial.study.finish(trial.number, value)
        self.trials.remove(trial)
        board.over(trial, f"{o.objective} {value:.4f}{', from runs that were there' if trial.found else ''}")

    def _give_up(self, trial: Trial, why: str, board: Board, *, pruned: bool) -> None:
        """A trial without a value: its runs that are at work are stopped, unless another trial has them too."""
        trial.study.give_up(trial.number, why, pruned=pruned)
        self.trials.remove(trial)
        for identity, job in trial.jobs.items():
            if any(identity in other.jobs for other in self.trials):
                continue
            if job in self.waiting:
                self.waiting.remove(job)
                self.journal.write([{"job": identity, "state": "pruned", "said": why}])
            elif identity in self.active:
                self.why[identity] = why
                self.stopping.add(identity)
                self.engine.stop(job, signal.SIGTERM)
        board.over(trial, why, style="yellow" if pruned else "red")

    def _fail(self, trial: Trial, board: Board) -> None:
        why = next(self.why.get(identity, "") for identity in trial.jobs if self.ended.get(identity) == "failed")
        self._give_up(trial, f"failed: {why}", board, pruned=False)
        for identity, job in trial.jobs.items():
            if self.ended.get(identity) == "failed":
                board.say(f"    log {job.log}")
        if not self.launcher.keep_going and not self.broken:
            self.broken = True
            board.say(
                "hydra.launcher.keep_going=false: no further trial starts, running ones save their state and stop"
            )
            for job in self.active.values():
                self.engine.stop(job, signal.SIGTERM)

    def _leave(self, trial: Trial) -> None:
        """A trial whose runs were stopped, state saved: the same command goes on with it."""
        self.left.add((trial.study.arm.label, trial.number))
        self.trials.remove(trial)


def _standing(study: ArmStudy) -> list[FrozenTrial]:
    """The trials of an arm, without those that another one did again and those that were not possible."""
    trials = study.trials()
    again = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    return [trial for trial in trials if trial.number not in again and not is_impossible(trial)]


def _why(job: Job, ended: Ended) -> str:
    """Why a run failed, in one line."""
    record: Mapping[str, Any] = record_of(job)
    if ended.said:
        return ended.said
    if record.get("status") == "failed" and record.get("error"):
        return str(record["error"]).splitlines()[0]
    lines = job.log.read_text(errors="replace").splitlines() if job.log.is_file() else []
    ours = [line for line in lines if line.startswith("eit_lab: ")]
    return ours[-1].removeprefix("eit_lab: ") if ours else f"exit status {ended.status}"
