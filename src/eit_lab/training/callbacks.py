"""What is watched while a run trains: the metrics file, the speed, the record, the progress bar."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eit_lab.runs import write_record, write_text

_FLUSH_S = 10.0
_WARMUP_STEPS = 3  # not timed: allocation, first touches, compilation


class MetricsFile(Logger):
    """metrics.csv, one row a logged step; a resumed run keeps the rows of its first part.

    Lightning's CSVLogger deletes an existing file when it starts on it, which a run that resumes must not.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._rows: list[dict[str, str]] = []
        self._written_at = time.monotonic()
        if path.is_file():
            with path.open(newline="") as handle:
                self._rows = list(csv.DictReader(handle))

    @property
    def name(self) -> str:
        """Lightning's name of this logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """One file, so one version."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved config lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values at a step; values of the same step share a row."""
        values = {name: repr(float(value)) if name != "epoch" else str(int(value)) for name, value in metrics.items()}
        step = 0 if step is None else step
        while self._rows and int(self._rows[-1]["step"]) > step:  # of steps that are redone after a resume
            self._rows.pop()
        if not self._rows or int(self._rows[-1]["step"]) != step:
            self._rows.append({"step": str(step)})
        self._rows[-1].update(values)

    @rank_zero_only
    def save(self) -> None:
        """Write the file whole, but not more than once in some seconds: Lightning calls this at every logged step."""
        if time.monotonic() - self._written_at > _FLUSH_S:
            self._write()

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """A run that resumes from this checkpoint must find the rows up to it."""
        self._write()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what is there, however the run ended."""
        if self._rows:
            self._write()

    def _write(self) -> None:
        names = sorted({name for row in self._rows for name in row} - {"step", "epoch"})
        lines = [",".join(["step", "epoch", *names])]
        lines += [",".join(row.get(name, "") for name in ("step", "epoch", *names)) for row in self._rows]
        write_text(self.path, "\n".join(lines) + "\n")
        self._written_at = time.monotonic()


class Speed(Callback):
    """Training images per second, validation and the first steps left out."""

    def __init__(self, *, global_batch: int) -> None:
        self.images_per_step = global_batch
        self.seconds = 0.0
        self.steps = 0
        self._last: float | None = None
        self._last_step = 0

    @property
    def img_per_s(self) -> float | None:
        """Images per second over all devices; None before enough steps have run."""
        return self.steps * self.images_per_step / self.seconds if self.steps else None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock; what lies between two epochs does not count."""
        self._last, self._last_step = None, trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Add the time since the last optimizer step ended."""
        if trainer.global_step == self._last_step:
            return
        now = time.perf_counter()
        if self._last is not None and trainer.global_step > _WARMUP_STEPS:
            self.seconds += now - self._last
            self.steps += 1
        self._last, self._last_step = now, trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._last = None


class RecordKeeper(Callback):
    """Keeps record.json up to date while the run goes on: progress, best validation accuracy, speed."""

    def __init__(self, folder: Path, record: dict[str, Any], speed: Speed) -> None:
        self.folder, self.record, self.speed = folder, record, speed

    def state_dict(self) -> dict[str, Any]:
        """The best so far goes into the checkpoint, and so survives a restart."""
        return {"best": self.record.get("best")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best so far from the checkpoint."""
        self.record["best"] = state_dict["best"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the epoch's validation accuracy."""
        if trainer.sanity_checking:
            return
        now = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        best = self.record.get("best")
        if best is None or metrics["val/acc1"] > best["val/acc1"]:
            self.record["best"] = {**now, **metrics}
        self.record["progress"] = {
            **now,
            "epochs": trainer.max_epochs,
            "steps": int(trainer.estimated_stepping_batches),
            **metrics,
        }
        self.record["img_per_s"] = self.speed.img_per_s
        if trainer.is_global_zero:
            write_record(self.folder, self.record)


class ProgressLine(Callback):
    """One bar over the whole training with the time left; off a terminal, one line at each validation."""

    def __init__(self, speed: Speed) -> None:
        self.speed = speed
        self.console = Console(stderr=True)
        self._bar: Progress | None = None
        self._started = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the bar up."""
        self._started, self._start_step = time.monotonic(), trainer.global_step
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
            total = int(trainer.estimated_stepping_batches)
            self._task = self._bar.add_task("", total=total, completed=trainer.global_step, note="")
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, note=self._note(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Off a terminal, one line."""
        if trainer.sanity_checking or self._bar is not None or not trainer.is_global_zero:
            return
        total, done = int(trainer.estimated_stepping_batches), trainer.global_step
        per_step = (time.monotonic() - self._started) / max(1, done - self._start_step)
        left = time.strftime("%H:%M:%S", time.gmtime((total - done) * per_step))
        print(
            f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  step {done}/{total}  {self._note(trainer)}  left {left}"
        )
        sys.stdout.flush()

    def _note(self, trainer: Trainer) -> str:
        metrics = trainer.callback_metrics
        parts = [f"loss {metrics['train/loss']:.4f}"] if "train/loss" in metrics else []
        parts += [f"val acc1 {100 * float(metrics['val/acc1']):.2f}%"] if "val/acc1" in metrics else []
        parts += [f"{self.speed.img_per_s:,.0f} img/s"] if self.speed.img_per_s else []
        return "  ".join(parts)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the bar down, however the training ended."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
