"""What is watched while a run trains: the clock, the record, the samples, the progress bar. Rows of metrics: pace.py."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eit_lab import published
from eit_lab.plan import Plan
from eit_lab.runs import write_record
from eit_lab.training.energy import NOT_READ, Energy
from eit_lab.training.module import Classifier
from eit_lab.training.ranks import Ranks
from eit_lab.units import duration

_TIMES = ("seconds", "steps", "training_seconds", "device_hours", "restarts")  # of the clock, in a checkpoint
_WARMUP_STEPS = 3  # not timed: allocation, first touches, compilation


def progress_of(trainer: Trainer, plan: Plan) -> dict[str, int]:
    """Where a run is: what every row of metrics carries."""
    return {"epoch": trainer.current_epoch, "images": plan.images(trainer.global_step)}


class Clock(Callback):
    """Time and energy spent on training; it goes on where it was when a run resumes."""

    def __init__(self, plan: Plan, *, energy: Energy | None = None) -> None:
        self.plan, self.energy = plan, energy
        self.seconds = 0.0
        """Of timed steps, over the whole run; the first steps of a part, validation and checkpoints left out."""
        self.steps = 0
        self.training_seconds = 0.0
        """Of all training, the first steps too; validation and checkpoints left out."""
        self.device_hours = 0.0
        """Of everything between start and end of training, on all devices."""
        self.restarts = 0
        self._last: float | None = None
        self._last_step = 0
        self._first_step = 0
        self._began = 0.0
        self._since: float | None = None  # from when on training_seconds are still to be added

    @property
    def hours(self) -> float:
        """Hours of training so far, over all parts of the run, validation and checkpoints left out."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return (self.training_seconds + running) / 3600

    @property
    def is_running(self) -> bool:
        """Whether what passes now is training, and no validation or whatever lies between two epochs."""
        return self._since is not None

    @property
    def img_per_s(self) -> float | None:
        """Training images per second over all devices; None before enough steps have run."""
        per_step = self.plan.images(self.plan.total_steps) / self.plan.total_steps
        return self.steps * per_step / self.seconds if self.steps else None

    def seconds_left(self, step: int) -> float | None:
        """Seconds of training left after a step, at the mean speed of the whole run."""
        return (self.plan.total_steps - step) * self.seconds / self.steps if self.steps else None

    def leave_out(self, seconds: float) -> None:
        """What was spent between two steps on something else, such as a checkpoint."""
        if self._last is not None:
            self._last += seconds
        if self._since is not None:
            self._since += seconds

    def state_dict(self) -> dict[str, Any]:
        """The clock so far. All ranks must call: energy is added up over them."""
        self._charge()
        self._count_training(go_on=self._since is not None)
        times = {key: getattr(self, key) for key in _TIMES}
        return times if self.energy is None else {**times, "energy": self.energy.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's clock."""
        for key in _TIMES:
            setattr(self, key, state_dict[key])
        if self.energy is not None:
            self.energy.load(state_dict["energy"])
        self.restarts += 1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start."""
        self._began, self._first_step = time.monotonic(), trainer.global_step
        if self.energy is not None:
            self.energy.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop."""
        self._charge()
        self._began = 0.0
        self._count_training(go_on=False)
        if self.energy is not None:
            self.energy.stop()

    def _count_training(self, *, go_on: bool) -> None:
        now = time.perf_counter()
        if self._since is not None:
            self.training_seconds += now - self._since
        self._since = now if go_on else None

    def _charge(self) -> None:
        if self._began:
            now = time.monotonic()
            self.device_hours += (now - self._began) * self.plan.world_size / 3600
            self._began = now

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What lies between two epochs does not count."""
        self._last, self._last_step = None, trainer.global_step
        self._count_training(go_on=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """In the middle of an epoch, training that goes on."""
        if self._since is None:
            self._count_training(go_on=True)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Add the time since the last optimizer step ended."""
        if self.energy is not None:
            self.energy.keep_up()
        if trainer.global_step == self._last_step:
            return
        now = time.perf_counter()
        if self._last is not None and trainer.global_step - self._first_step > _WARMUP_STEPS:
            self.seconds += now - self._last
            self.steps += 1
        self._last, self._last_step = now, trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._last = None
        self._count_training(go_on=False)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Keep up with the energy."""
        if self.energy is not None:
            self.energy.keep_up()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch without a validation ends here."""
        self._count_training(go_on=False)


class RecordKeeper(Callback):
    """Keeps record.json up to date while the run goes on: progress, best validation accuracy, speed; logs validations."""

    def __init__(
        self, folder: Path, record: dict[str, Any], clock: Clock, plan: Plan, *, reference: str | None = None
    ) -> None:
        self.folder, self.record, self.clock, self.plan = folder, record, clock, plan
        self.reference = published.curve(reference) if reference else ()
        self.improved = False
        """Whether the validation since the last checkpoint was the best so far."""

    def state_dict(self) -> dict[str, Any]:
        """The best so far goes into the checkpoint, and so survives a restart."""
        return {"best": self.record.get("best")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best so far from the checkpoint."""
        self.record["best"] = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note and log the epoch's validation."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        # From the steps, which are the run's own, also where a restart does a validation again.
        now = {"epoch": (trainer.global_step - 1) // self.plan.steps_per_epoch, "step": trainer.global_step}
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if now["epoch"] < len(self.reference):
            metrics["published/acc1"] = self.reference[now["epoch"]].test_acc1
            metrics["published/gap"] = metrics["val/acc1"] - metrics["published/acc1"]
        best = self.record.get("best")
        if best is None or metrics["val/acc1"] > best["val/acc1"]:
            self.record["best"] = {**now, **metrics}
            self.improved = True
        self.record["progress"] = {
            **now,
            "epochs": trainer.max_epochs,
            "steps": self.plan.total_steps,
            "images": self.plan.images(trainer.global_step),
            **metrics,
        }
        self.note_clock()
        costs = {"perf/hours": self.record["hours"], "perf/energy_wh": self.record["energy_wh"]}
        known = {name: value for name, value in costs.items() if value is not None}
        for logger in trainer.loggers:
            row = {**metrics, **known, "epoch": now["epoch"], "images": self.plan.images(trainer.global_step)}
            logger.log_metrics(row, step=trainer.global_step)
        if trainer.is_global_zero:
            write_record(self.folder, self.record)

    def note_clock(self) -> None:
        """Speed and cost so far. All ranks must call."""
        now = self.clock.state_dict()
        self.record["img_per_s"] = self.clock.img_per_s
        self.record["hours"] = self.clock.hours
        self.record["device_hours"] = now["device_hours"]
        self.record["restarts"] = self.clock.restarts
        self.record |= now.get("energy", {"energy_wh": None, "energy_source": NOT_READ})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run that resumes from this state must find the rows of metrics up to it."""
        for logger in trainer.loggers:
            logger.after_save_checkpoint(cast(Any, None))


class SampleLog(Callback):
    """samples/rank0.csv, ...: the ids of every optimizer step's samples, for proofs and for hunting bad images."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.path = folder / "samples" / f"rank{ranks.rank}.csv"
        self._ids: list[torch.Tensor] = []
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut off the steps that are done again after a restart."""
        self._step = trainer.global_step
        self.path.parent.mkdir(exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        kept = [line for line in lines if line.count(",") and int(line.partition(",")[0]) <= self._step]
        self.path.write_text("".join(f"{line}\n" for line in kept))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Collect the micro-batches of a step."""
        self._ids.append(batch.index)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """One line a step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        ids = torch.cat(self._ids).tolist()
        self._ids.clear()
        with self.path.open("a") as handle:
            handle.write(f"{self._step},{' '.join(map(str, ids))}\n")


class ProgressLine(Callback):
    """One bar over the whole training with the time left; off a terminal, one line at each validation."""

    def __init__(self, clock: Clock, plan: Plan, records: RecordKeeper) -> None:
        self.clock, self.plan, self.records = clock, plan, records
        self.console = Console(stderr=True)
        self._bar: Progress | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the bar up."""
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("steps"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=self.plan.total_steps, completed=trainer.global_step, note="")
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, note=self._note(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Off a terminal, one line."""
        if trainer.sanity_checking or self._bar is not None or not trainer.is_global_zero:
            return
        if trainer.state.fn != TrainerFn.FITTING:
            return
        done = trainer.global_step
        seconds = self.clock.seconds_left(done)
        left = "?" if seconds is None else duration(seconds)
        print(
            f"epoch {(done - 1) // self.plan.steps_per_epoch + 1}/{trainer.max_epochs}  step {done}/{self.plan.total_steps}  "
            f"{self._note(trainer, pl_module)}  left {left}"
        )
        sys.stdout.flush()

    def _note(self, trainer: Trainer, pl_module: LightningModule) -> str:
        assert isinstance(pl_module, Classifier)
        metrics = self.records.record.get("progress") or {}
        parts = [f"loss {pl_module.mean_loss:.4f}"] if pl_module.mean_loss is not None else []
        parts += [f"val acc1 {100 * metrics['val/acc1']:.2f}%"] if "val/acc1" in metrics else []
        parts += [f"(ema {100 * metrics['val/acc1_ema']:.2f}%)"] if "val/acc1_ema" in metrics else []
        parts += [f"published {100 * metrics['published/acc1']:.2f}%"] if "published/acc1" in metrics else []
        parts += [f"{self.clock.img_per_s:,.0f} img/s"] if self.clock.img_per_s else []
        return "  ".join(parts)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the bar down, however the training ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
