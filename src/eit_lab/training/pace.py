"""How fast a run goes, against what its device could do, and whether its loader keeps up: every n-th step's row of metrics.

perf/img_per_s and perf/mfu are means over the run so far; perf/data_wait_share is the share of the training time since the row before
in which the device had nothing to do because the loop waited for the loader's next batch, of the process that waited most;
perf/memory_gb is the most memory that a process has had, in 1e9 bytes. Validations, looks inside and checkpoints are in none of
them. A loader that starves the device is one line, with what to change.

No step waits for its row: what other processes add to it is asked for and written when it has come (ranks.Answer).
"""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from eit_lab.plan import Plan
from eit_lab.training.callbacks import Clock, progress_of
from eit_lab.training.module import Classifier, StepFacts
from eit_lab.training.peak import Peak, measure_peak
from eit_lab.training.ranks import Answer, Ranks

STARVED_SHARE = 0.1
"""Waiting above this is said: below, no loader could make the run 1.11 times as fast."""
_FIRST_STEPS = (
    20  # of a part, not judged: workers start, caches fill, and then batches that were made meanwhile are used up
)
_LEAST_S = 10.0  # of training that is judged
_LEAST_AT_END_S = 3.0  # by the end of a run; a shorter one is nobody's problem


# ------------------------------------------------------------------------------------------------------------ the loader


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What feeds a process its images, and what it could have more of."""

    workers: int = 0
    """Loader processes of a training process; 0: it loads by itself, between steps."""
    cores: int
    """Of this machine, that may be used."""
    local: int
    """Training processes on this machine."""
    training_threads: int
    """That compute the model on the same cores: 0 with a GPU."""
    layout: str | None = None
    """How images lie, as data/layouts names it; None: in memory."""
    decode: str | None = None
    """data.decode, where images are decoded."""
    fetched: bool = False
    """Whether files come from a server, each once."""

    @property
    def most_workers(self) -> int:
        """That have a core each."""
        return max(0, self.cores // self.local - self.training_threads)


def starved_line(feed: Feed, *, share: float, img_per_s: float, first_epoch: bool) -> str:
    """What a loader that is too slow does, and what to change. ``img_per_s``: as it goes, of all devices."""
    gives, takes = _rate(img_per_s), _rate(img_per_s / (1 - share))
    one = feed.local == 1
    if feed.workers == 0:
        rates = f"loading between the steps (data.num_workers=0) leaves {gives} img/s of {takes}"
    else:
        who = f"{feed.workers} worker{'s' * (feed.workers > 1)}" + " of each device" * (not one)
        verb = "gives" if one and feed.workers == 1 else "give"
        rates = f"{who} {verb} {gives} img/s, the device{'s' * (not one)} take{'s' * one} {takes}"
    advice = "; ".join(_advice(feed, share=share, first_epoch=first_epoch))
    return f"eit_lab: the device waits for data {share:.0%} of the time: {rates}; {advice}"


def _rate(img_per_s: float) -> str:
    return f"{img_per_s:,.0f}" if img_per_s >= 10 else f"{img_per_s:.2g}"


def _advice(feed: Feed, *, share: float, first_epoch: bool) -> list[str]:
    """What would feed it: more workers where cores are left, else what makes an image cheaper."""
    if feed.workers:
        wanted = ceil(feed.workers / (1 - share))
    elif feed.training_threads:  # loading and training take turns
        wanted = ceil(share / (1 - share))
    else:
        wanted = ceil(1 / (1 - share))
    machine = f"this machine has {feed.cores} core{'s' * (feed.cores > 1)}"
    machine += f" for {feed.local} devices" * (feed.local > 1)
    if feed.fetched and first_epoch:
        return ["in this first epoch each file comes from its server once: the next one reads data.cache_dir"]
    if feed.workers < wanted <= feed.most_workers:
        return [f"data.num_workers={wanted} would feed it ({machine})"]
    found = []
    if feed.decode == "pil":
        found.append("data.decode=fast decodes only what a crop needs")
    if feed.layout not in (None, "shards"):
        found.append(
            "shards, in which crops decode alone, are read faster (python -m eit_lab.shards build, then data.root)"
        )
    if feed.workers < feed.most_workers:
        found.append(f"data.num_workers={feed.most_workers} is what {machine} can do")
    if not found:
        taken = "the training" if feed.training_threads else "the loader"
        found.append(
            f"{taken} has all cores already: {machine}, and it takes about {1 / (1 - share):.1f} times as many"
        )
    return found


# --------------------------------------------------------------------------------------------------------------- waiting


class Waits:
    """Seconds in which the device had nothing to do because its loop waited for a batch.

    A GPU goes on with the steps that are enqueued while the loop waits: of each wait only that counts in which it stood
    still, by the device's own time stamps, read when they are there.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.seconds = 0.0
        self._began = 0.0
        self._idle_from: torch.cuda.Event | None = None
        self._open: deque[tuple[float, torch.cuda.Event, torch.cuda.Event]] = deque()

    def watch(self, trainer: Trainer) -> None:
        """Time each batch that the loop takes from its fetcher.

        NOTE: private names of Lightning's, called right before and after ``next`` of the loader's iterator; a test measures them.
        """
        loop: Any = trainer.fit_loop.epoch_loop
        before: Callable[[], None] = loop._on_before_fetch
        after: Callable[[], None] = loop._on_after_fetch

        def begin() -> None:
            before()
            self._began = time.perf_counter()

        def end() -> None:
            self._waited(time.perf_counter() - self._began)
            after()

        loop._on_before_fetch, loop._on_after_fetch = begin, end

    def _waited(self, seconds: float) -> None:
        if not self._clock.is_running:
            return
        if self._idle_from is None:
            self.seconds += seconds
            return
        begins = torch.cuda.Event(enable_timing=True)
        begins.record()
        self._open.append((seconds, self._idle_from, begins))
        self._idle_from = None

    def step_enqueued(self, device: torch.device) -> None:
        """All of a micro-batch is on its way to the device."""
        if device.type != "cuda":
            return
        while self._open and self._open[0][2].query():
            seconds, ended, begins = self._open.popleft()
            self.seconds += min(seconds, ended.elapsed_time(begins) / 1e3)
        self._idle_from = torch.cuda.Event(enable_timing=True)
        self._idle_from.record()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has had at once, in 1e9 bytes: of its GPU as torch allocated it, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    status = Path("/proc/self/status")
    if status.is_file():  # of this process alone: what getrusage says begins with the process that started it
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# -------------------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True, kw_only=True)
class _Mark:
    """Where a span of training begins."""

    step: int
    trained_s: float
    waited_s: float


@dataclass(kw_only=True)
class _Row:
    """What is known of a logged step, and what is still to come."""

    step: int
    values: dict[str, float]
    shares: tuple[float, float, float]
    """This process's waiting since the row before, in the span that is judged, and in the whole run."""
    judged_s: float
    judged_images: float
    first_epoch: bool
    facts: StepFacts | None = None
    others: Answer | None = None


class StepLog(Callback):
    """The numbers of every n-th optimizer step, to every logger; the last ones of perf in the record."""

    def __init__(
        self,
        plan: Plan,
        clock: Clock,
        ranks: Ranks,
        record: dict[str, Any],
        *,
        every: int,
        flops_per_image: float,
        peak: Peak | None,
        feed: Feed,
    ) -> None:
        """``flops_per_image``: of training one; ``peak``: None is measured; ``feed``: its workers are counted at the start."""
        self.plan, self.clock, self.ranks, self.record, self.every = plan, clock, ranks, record, every
        self.flops_per_image, self.peak, self.feed = flops_per_image, peak, feed
        self._waits = Waits(clock)
        self._memory_gb = 0.0
        self._step = self._first_step = 0
        self._last = _Mark(step=0, trained_s=0.0, waited_s=0.0)
        self._judged: _Mark | None = None
        self._row: _Row | None = None

    def state_dict(self) -> dict[str, Any]:
        """What was waited so far, and the most memory."""
        return {"waited_s": self._waits.seconds, "memory_gb": self._memory_gb, "starved": self.record["starved"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._waits.seconds, self._memory_gb = state_dict["waited_s"], state_dict["memory_gb"]
        self.record["starved"] = state_dict["starved"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from where the run is."""
        self._step = self._first_step = trainer.global_step
        self._last = self._mark()
        self.feed = replace(self.feed, workers=cast(Any, trainer.train_dataloader).num_workers)
        self._waits.watch(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Log the step that has just ended, once all of it is known."""
        assert isinstance(pl_module, Classifier)
        self._waits.step_enqueued(pl_module.device)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._go_on(trainer, pl_module)
        if self._judged is None and self._step - self._first_step >= _FIRST_STEPS:
            self._judged = self._mark()
        if self._step % self.every and self._step != self.plan.total_steps:
            return
        self._go_on(
            trainer, pl_module, wait=True
        )  # the row before: its step has been read by now, only answers may be missing
        if self.peak is None and self.clock.steps:
            began = time.perf_counter()
            self.peak = measure_peak(pl_module.device, precision=str(trainer.precision))
            self.clock.leave_out(time.perf_counter() - began)
        self._row = self._begin(trainer)
        self._go_on(trainer, pl_module)

    def _mark(self) -> _Mark:
        return _Mark(step=self._step, trained_s=3600 * self.clock.hours, waited_s=self._waits.seconds)

    def _begin(self, trainer: Trainer) -> _Row:
        """What this process knows of the step without reading anything from the device."""
        now = self._mark()
        values = {"perf/hours": self.clock.hours, **progress_of(trainer, self.plan)}
        if speed := self.clock.img_per_s:
            values["perf/img_per_s"] = speed
        device = trainer.strategy.root_device
        self._memory_gb = max(self._memory_gb, peak_memory_gb(device))
        judged = self._judged or now
        row = _Row(
            step=self._step,
            values=values,
            shares=(
                _share(self._last, now),
                _share(judged, now),
                now.waited_s / now.trained_s if now.trained_s else 0.0,
            ),
            judged_s=now.trained_s - judged.trained_s,
            judged_images=self.plan.images(now.step) - self.plan.images(judged.step),
            first_epoch=trainer.current_epoch == 0,
        )
        self._last = now
        return row

    def _go_on(self, trainer: Trainer, module: Classifier, *, wait: bool = False) -> None:
        """Do what can be done for the row by now: ask the other processes once the step is known, write once they have answered.

        All processes come to know a step at the same call; they may write at different ones.
        """
        row = self._row
        if row is None:
            return
        if row.facts is None and module.last_step is not None and module.last_step.step == row.step:
            row.facts = module.last_step
            peak = self.peak.flops if self.peak is not None else 0.0
            row.others = self.ranks.ask_all(row.facts.loss, self._memory_gb, peak, *row.shares)
        if row.others is not None and (wait or row.others.is_there):
            self._row = None
            self._write(trainer, module, row, row.others.take())

    def flush(self, trainer: Trainer, module: Classifier) -> None:
        """Write what is still to be written, waiting for it. All processes must call.

        Each of them reads its last steps, whether or not its own row is written already: what is asked next must be the same question.
        """
        module.settle()
        self._go_on(trainer, module, wait=True)

    def _write(self, trainer: Trainer, module: Classifier, row: _Row, table: torch.Tensor) -> None:
        assert row.facts is not None
        losses, _, peaks, *_ = table.unbind(1)
        _, memory_gb, _, since, judged, whole = table.amax(0).tolist()
        loss, peak = float(losses.mean()), float(peaks.sum())
        module.mean_loss = loss
        speed = row.values.get("perf/img_per_s")
        found = {"data_wait_share": since, "memory_gb": memory_gb}
        if speed and peak:
            found["mfu"] = speed * self.flops_per_image / peak
        facts = row.facts
        shown = {"train/loss": loss, "optim/lr": facts.lr, "optim/grad_norm": facts.grad_norm, **row.values}
        for logger in trainer.loggers:
            logger.log_metrics(shown | {f"perf/{name}": value for name, value in found.items()}, step=row.step)
            logger.save()
        self.record |= {**found, "data_wait_share": whole}
        if self.peak is not None:
            self.record["peak"] = {"tflops": self.peak.flops / 1e12, "source": self.peak.source}
        self._judge(row, judged)

    def _judge(self, row: _Row, share: float) -> None:
        """Say once that the loader is too slow, where it is."""
        least = _LEAST_AT_END_S if row.step == self.plan.total_steps else _LEAST_S
        if self.record["starved"] or row.judged_s < least or share <= STARVED_SHARE:
            return
        # A process whose loader gives nothing at all would wait the whole time; the rest is what it is set against.
        share = min(share, 0.99)
        line = starved_line(
            self.feed, share=share, img_per_s=row.judged_images / row.judged_s, first_epoch=row.first_epoch
        )
        self.record["starved"] = line
        if self.ranks.is_main:
            print(line, flush=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The epoch's last row stands before its validation."""
        assert isinstance(pl_module, Classifier)
        self.flush(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run that resumes from this state must find the rows up to it."""
        assert isinstance(pl_module, Classifier)
        self.flush(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing is left unwritten."""
        assert isinstance(pl_module, Classifier)
        self.flush(trainer, pl_module)


def _share(then: _Mark, now: _Mark) -> float:
    """Of the time between, waited."""
    trained_s = now.trained_s - then.trained_s
    return (now.waited_s - then.waited_s) / trained_s if trained_s > 0 else 0.0
