"""A run's state on disk: written whole, the last two and the best kept, resumed from any step.

A file holds Lightning's state (weights, optimizer, schedule, loops, callbacks with best metric and clock), the averaged
weights in a section ``ema``, and a section ``eit_lab``: identity, place in the run, random states of every rank.

The place in the run is one number of the run, its optimizer step; the order of samples follows from it (data/order.py).
Lightning's own counters are of one process's micro-batches and tell "before" from "after" a validation by how they differ, so
they are written anew from the step when a run resumes; that is what lets a run go on with another number of devices.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from eit_lab.command import RunError, StoppedError
from eit_lab.config import ConfigError
from eit_lab.plan import Plan
from eit_lab.runs import Run
from eit_lab.signals import STOP
from eit_lab.training.callbacks import RecordKeeper
from eit_lab.training.ranks import Ranks, Watch

Moment = Literal["step", "validation", "epoch"]
"""When a state was saved: inside an epoch; after its last step, the validation still to come; after the whole epoch."""


# ------------------------------------------------------------------------------------------------------ files on disk


class WholeFiles(CheckpointIO):
    """torch.save into a new file, flushed to the disk, which then takes its name: a reader finds the old file or the new.

    ``last.ckpt`` becomes ``previous.ckpt`` as the new one takes its place.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.loaded: dict[str, Any] | None = None
        """What the next load returns: the state that pick() has read already."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises RunError, the earlier files intact, where the disk is full or the folder cannot be written."""
        path = Path(path)
        part = path.with_name(f".{path.name}.part")
        content = io.BytesIO()
        torch.save(checkpoint, content)
        try:
            with part.open("wb") as handle:
                handle.write(content.getbuffer())
                handle.flush()
                os.fsync(handle.fileno())
            if path == self.run.last_checkpoint and path.exists():
                _link(path, self.run.previous_checkpoint)
            part.replace(path)
        except OSError as error:
            with_reason = f"{path} cannot be written: {error.strerror or error}"
            try:
                part.unlink(missing_ok=True)
            except OSError:
                with_reason += f" (a part of it is left in {part.name})"
            good = next((p.name for p in self.run.resume_candidates() if p.exists()), None)
            raise RunError(f"{with_reason}; {f'{good} is intact' if good else 'there is no earlier one'}") from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The state that pick() has read, or the file."""
        if self.loaded is not None:
            content, self.loaded = self.loaded, None
            return content
        return read(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file."""
        Path(path).unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """A whole checkpoint, on the CPU. Raises RunError where it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            if (bad := archive.testzip()) is not None:
                raise RunError(f"{path} is damaged in {bad}")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except RunError:
        raise
    except Exception as error:  # noqa: BLE001 - a flipped bit can make either reader raise anything
        raise RunError(f"{path} is damaged: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    return content


def pick(run: Run, ranks: Ranks, *, keep_epochs: int) -> tuple[Path, dict[str, Any]] | None:
    """The newest readable state of a run and its file; None for a new one. All ranks must call.

    The main process looks: it moves a damaged file aside with a warning, and gives a state its other names again where a
    run was ended before it could (best.ckpt, epoch-0007.ckpt).
    Raises ConfigError where there are states and none is readable, or where one belongs to another run.
    """
    content = None
    if ranks.is_main and run.state == "resume":
        content = _newest(run)
        if content is not None:
            name_again(content[0], content[1], run, keep_epochs=keep_epochs)
    path = ranks.from_main(content and content[0])
    if path is None:
        return None
    return content or (path, read(path))


def _newest(run: Run) -> tuple[Path, dict[str, Any]]:
    present = [path for path in run.resume_candidates() if path.exists()]
    for place, path in enumerate(present):
        try:
            content = read(path)
        except RunError as error:
            if place + 1 == len(present):
                raise ConfigError(
                    f"{path} is damaged and cannot be resumed from, nor is there a good one before it; "
                    "move the run's folder away to start anew"
                ) from None
            print(f"eit_lab: warning: {error}; going back to the one before", file=sys.stderr, flush=True)
            path.replace(path.with_name(f"{path.name}.damaged"))  # else it would become the one before of the next
            continue
        if content["eit_lab"]["identity"] != run.run_id:
            raise ConfigError(
                f"{path} is of the run {content['eit_lab']['identity']}, not of {run.run_id}; move it away"
            )
        return path, content
    raise AssertionError("a run to be resumed has a state")


def name_again(path: Path, content: dict[str, Any], run: Run, *, keep_epochs: int) -> None:
    """Give a state of a whole epoch the names that it was to have."""
    lab, best = content["eit_lab"], content["callbacks"]["RecordKeeper"]["best"]
    if lab["moment"] != "epoch":
        return
    if best is not None and best["step"] == lab["step"]:
        _link(path, run.best_checkpoint)
    if keep_epochs:
        _keep_epoch(path, lab["epoch"], keep=keep_epochs)


def _keep_epoch(path: Path, epoch: int, *, keep: int) -> None:
    """epoch-0007.ckpt, and only the last so many of them."""
    _link(path, path.parent / f"epoch-{epoch:04d}.ckpt")
    for old in sorted(path.parent.glob("epoch-*.ckpt"))[:-keep]:
        old.unlink()


# --------------------------------------------------------------------------------------------------- place in the run


def position(content: dict[str, Any] | None, plan: Plan) -> tuple[int, int]:
    """(epoch, micro-batches of it taken) where the training data goes on."""
    if content is None:
        return 0, 0
    lab = content["eit_lab"]
    if lab["moment"] == "epoch":
        return lab["epoch"] + 1, 0
    return lab["epoch"], min(lab["steps_in_epoch"] * plan.accumulate, plan.batches_per_epoch)


def place_loops(content: dict[str, Any], plan: Plan) -> None:
    """Write Lightning's counters anew for the place where the state was saved and the micro-batches of today."""
    lab, loop = content["eit_lab"], content["loops"]["fit_loop"]
    epoch, moment = lab["epoch"], lab["moment"]
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = lab["step"]
    if moment == "epoch":
        return  # Lightning starts the next epoch from counters of zero
    _, taken = position(content, plan)
    loop["epoch_progress"] = _both(ready=epoch + 1, started=epoch + 1, processed=epoch, completed=epoch)
    same = _counts(taken, taken, taken, taken)
    total = _counts(*[epoch * plan.batches_per_epoch + taken] * 4)
    loop["epoch_loop.batch_progress"] = {"total": total, "current": same, "is_last_batch": moment == "validation"}
    # A validation loop that has begun its first batch and not ended it is run from its beginning.
    begun = _counts(1, 1, 0, 0) if moment == "validation" else _counts(0, 0, 0, 0)
    loop["epoch_loop.val_loop.batch_progress"] = {"total": dict(begun), "current": dict(begun), "is_last_batch": False}


def _counts(ready: int, started: int, processed: int, completed: int) -> dict[str, int]:
    return {"ready": ready, "started": started, "processed": processed, "completed": completed}


def _both(**counts: int) -> dict[str, dict[str, int]]:
    return {"total": dict(counts), "current": dict(counts)}


# -------------------------------------------------------------------------------------------------------- random state


def random_state() -> dict[str, Any]:
    """The state of every global generator of this process, in types that torch.load takes without unpickling freely."""
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937"
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), int(place), int(has_gauss), float(cached)],
        "python": [version, list(internal), gauss],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), place, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


# ------------------------------------------------------------------------------------------------------------ callback


class Keeper(Callback):
    """Saves after every epoch, by time and by steps inside one, and once more when a signal asks the run to stop.

    A signal to any process and the clock of any are acted on by all of them after the same step, for which none waits (Watch).
    """

    def __init__(
        self,
        run: Run,
        plan: Plan,
        ranks: Ranks,
        records: RecordKeeper,
        *,
        minutes: float,
        steps: int | None,
        epochs: int,
    ) -> None:
        self.run, self.plan, self.ranks, self.records = run, plan, ranks, records
        self.minutes, self.steps, self.epochs = minutes, steps, epochs
        self._watch = Watch(ranks)
        self._moment: Moment = "step"
        self._saved_at = time.monotonic()
        self._saved_step = self._step = 0
        self._random: list[dict[str, Any]] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ranks after the first that have no saved state get random numbers of their own, the published seed 0 + rank."""
        self._step = trainer.global_step
        if self.ranks.rank > 0 and (self._random is None or self.ranks.rank >= len(self._random)):
            torch.manual_seed(torch.initial_seed() + self.ranks.rank + self._step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A resumed run: random numbers go on where they were, now that nothing else draws before the step."""
        if self._random is not None:
            if self.ranks.rank < len(self._random):
                set_random_state(self._random[self.ranks.rank])
            self._random = None

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """After an optimizer step: save when it is time, or stop."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        epoch_ended = trainer.fit_loop.epoch_loop.batch_progress.current.ready >= self.plan.batches_per_epoch
        late = time.monotonic() - self._saved_at > 60 * self.minutes
        due = self.steps is not None and self._step % self.steps == 0
        stop, late_step = self._watch.look(STOP.requested, self._step if late else 0) or (0, 0)
        # One that was late before the last save is not late any more.
        if stop or ((late_step > self._saved_step or due) and not epoch_ended):
            self.save(trainer, "validation" if epoch_ended else "step")
        if stop:
            self._stop()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Asked to stop during a validation: the weights are those of the epoch's last step; it is done again later."""
        if trainer.state.fn == TrainerFn.FITTING:
            stop, _ = self._watch.look(STOP.requested, 0) or (0, 0)
            if stop:
                self.save(trainer, "validation")
                self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch is whole: save, and keep the file under other names too where it is the best, or one to average."""
        self.save(trainer, "epoch")
        if self.ranks.is_main:
            if self.records.improved:
                _link(self.run.last_checkpoint, self.run.best_checkpoint)
            if self.epochs:
                _keep_epoch(self.run.last_checkpoint, trainer.current_epoch, keep=self.epochs)
        self.records.improved = False
        stop, _ = self._watch.look(STOP.requested, 0, now=True) or (0, 0)
        if stop and trainer.global_step < self.plan.total_steps:
            self._stop()

    def save(self, trainer: Trainer, moment: Moment) -> None:
        """Write last.ckpt; all ranks must call."""
        self._moment = moment
        began = time.perf_counter()
        trainer.save_checkpoint(self.run.last_checkpoint)
        self.records.clock.leave_out(time.perf_counter() - began)
        self._saved_at, self._saved_step = time.monotonic(), self._step

    def _stop(self) -> None:
        (signum,) = self.ranks.largest(STOP.signum or 0)
        raise StoppedError(signum, self._step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the section ``eit_lab``."""
        step = trainer.global_step
        epoch = trainer.current_epoch
        checkpoint["eit_lab"] = {
            "identity": self.run.run_id,
            "wandb_id": self.run.run_id,
            "moment": self._moment,
            "step": step,
            "epoch": epoch,
            "steps_in_epoch": step - epoch * self.plan.steps_per_epoch,
            "images": self.plan.images(step),
            "world_size": self.plan.world_size,
            "random": self.ranks.gather(self._run_random()),
        }

    def _run_random(self) -> dict[str, Any]:
        """This rank's random state; before the first step after a restart, when nothing has set it yet, the one on file."""
        if self._random is not None and self.ranks.rank < len(self._random):
            return self._random[self.ranks.rank]
        return random_state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put Lightning's counters right, and take the random states over; they are set before the first step."""
        if trainer.state.fn == TrainerFn.FITTING:
            place_loops(checkpoint, self.plan)
            self._random = checkpoint["eit_lab"]["random"]


class StopInTest(Callback):
    """Asked to stop during the final test: nothing is lost, since the last epoch is saved and the test is done again."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Stop on all ranks at once."""
        (signum,) = self.ranks.largest(STOP.signum or 0)
        if signum:
            raise StoppedError(signum, trainer.global_step)


def _link(source: Path, target: Path) -> None:
    """The same file under another name too, in place of what was there; a copy where the disk knows no hard links."""
    part = target.with_name(f".{target.name}.part")
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    part.replace(target)
