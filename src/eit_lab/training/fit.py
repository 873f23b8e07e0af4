"""A run from its claimed folder to its result: build, summarise, train or go on, test the chosen weights, write the record."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
import traceback
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from torch.distributed import DistBackendError

from eit_lab.command import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PREEMPTED, RunError, StoppedError
from eit_lab.config import Config, WandbLogger
from eit_lab.data.augment import BatchAugment
from eit_lab.data.imagenet import StreamedImages
from eit_lab.data.module import ImageData
from eit_lab.finetune import checkpoint_hash
from eit_lab.loading import dump
from eit_lab.memory import keep_memory
from eit_lab.models.attention import attention_kernel
from eit_lab.models.build import build_model
from eit_lab.models.checkpoints import start_from
from eit_lab.models.cost import Cost, count_cost
from eit_lab.plan import plan
from eit_lab.processes import count_cores
from eit_lab.runs import (
    RECORD_SCHEMA,
    DataFacts,
    Run,
    is_main_process,
    json_ready,
    versions,
    write_manifest,
    write_record,
    write_text,
)
from eit_lab.training.callbacks import Clock, ProgressLine, RecordKeeper, SampleLog
from eit_lab.training.checkpoint import Keeper, WholeFiles, pick, position
from eit_lab.training.compiling import choose_compilation, compile_model, recompute_blocks
from eit_lab.training.curve import PublishedCurve
from eit_lab.training.ema import WeightAverage
from eit_lab.training.energy import NOT_READ, Energy, open_counter
from eit_lab.training.inside import InsideLog, possible_looks
from eit_lab.training.metrics_file import MetricsFile
from eit_lab.training.module import Classifier, NotFiniteError
from eit_lab.training.outcome import finish, write_classes
from eit_lab.training.pace import Feed, StepLog
from eit_lab.training.peak import known_peak
from eit_lab.training.ranks import Ranks
from eit_lab.training.summary import has_batch_norm, summary
from eit_lab.training.trainer import build_trainer, device_name, quiet_lightning, set_callbacks
from eit_lab.training.wandb_log import WandbLog

_LINES_OF_ERROR = 12
_OUR_ERROR = re.compile(r"^eit_lab\.[\w.]+Error: ")  # as a worker process of the loader hands it on
_EXIT_CODES = {"finished": 0, "interrupted": EXIT_INTERRUPTED, "preempted": EXIT_PREEMPTED}


def fit(config: Config, facts: DataFacts, run: Run, argv: list[str]) -> dict[str, Any]:
    """Train and test one run in its folder; returns its record. Whatever is raised is on record before it goes on."""
    quiet_lightning()
    keep_memory()
    cost = count_cost(
        config.model, num_classes=facts.num_classes, img_size=config.data.img_size, in_chans=config.data.in_chans
    )
    record: dict[str, Any] = {
        "schema": RECORD_SCHEMA,
        "identity": run.run_id,
        "status": "running",
        "name": config.model.name,
        "seed": config.seed,
        "command": argv,
        "config": dump(config),
        "cost": cost.as_dict(),
        "data": vars(facts),
        "checkpoint": checkpoint_hash(config),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "best": None,
        "analysis": None,
        "result": None,
        "energy_wh": None,
        "energy_source": NOT_READ,
        "starved": None,
    }
    began = time.monotonic()
    loggers: list[Logger] = []
    try:
        if is_main_process():
            write_manifest(run, config, argv)
            write_record(run.folder, record)
        _fit(config, facts, run, cost, record, loggers)
        record["status"] = "finished"
    except BaseException as error:
        record["status"] = _status(error)
        known = isinstance(error, RunError | OSError)
        if isinstance(error, StoppedError):
            record["error"] = str(error)
        else:
            record["error"] = _one_line(error, run) if known else traceback.format_exception_only(error)[-1].strip()
        record["error_lines"] = traceback.format_exc().splitlines()[-_LINES_OF_ERROR:]
        if isinstance(error, NotFiniteError) and is_main_process():
            record["nonfinite"] = error.facts
            write_text(run.folder / "nonfinite.json", json.dumps(json_ready(error.facts), indent=2) + "\n")
        if known:
            raise RunError(record["error"]) from error
        raise
    finally:
        record["seconds"] = round(time.monotonic() - began, 3)
        record["ended"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        record["sync"] = _close(loggers, record)
        if is_main_process():
            _write_last(run, record)
    return record


def _one_line(error: BaseException, run: Run) -> str:
    """What a full disk, a lost folder or a lost image is, without the traceback of the worker process that met it."""
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = _OUR_ERROR.sub("", (str(error).strip() or type(error).__name__).splitlines()[-1])
    good = next((path.name for path in run.resume_candidates() if path.exists()), None)
    return text if good is None or "is intact" in text else f"{text}; {good} is intact"


def _write_last(run: Run, record: dict[str, Any]) -> None:
    """The record of a run that has ended; where even that cannot be written, a line says so and the first error stays."""
    try:
        write_record(run.folder, record)
    except OSError as error:
        print(f"eit_lab: {run.folder / 'record.json'} cannot be written: {error.strerror}", file=sys.stderr)


def _status(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, StoppedError) and error.signum == signal.SIGINT):
        return "interrupted"
    return "preempted" if isinstance(error, StoppedError) else "failed"


def _close(loggers: list[Logger], record: dict[str, Any]) -> str | None:
    """End the trackers with the true exit code; the line that says how to sync what is not on their server."""
    exit_code = _EXIT_CODES.get(record["status"], EXIT_FAILED)
    sync = None
    for log in loggers:
        if isinstance(log, WandbLog):
            hurry = record["status"] == "interrupted" and "KeyboardInterrupt" in record["error"]  # Ctrl-C twice: out
            sync = log.close(exit_code, within_s=1.0 if hurry else None)
            seconds = {"start": log.start_s, "longest_call": log.longest_call_s, "close": log.close_s}
            record["wandb"] = {"mode": log.mode_now, "url": log.url, "seconds": seconds}
    return sync


def _fit(config: Config, facts: DataFacts, run: Run, cost: Cost, record: dict[str, Any], loggers: list[Logger]) -> None:
    files = WholeFiles(run)
    cut = plan(config, facts)  # of one process, until the trainer has counted the devices
    trainer = build_trainer(config, folder=run.folder, callbacks=[], logger=[], plan=cut, plugins=[files])
    cut = plan(config, facts, world_size=trainer.world_size)
    trainer.accumulate_grad_batches = cut.accumulate
    trainer.limit_train_batches = cut.batches_per_epoch
    trainer.fit_loop.max_epochs = cut.epochs
    ranks = Ranks(trainer, timeout_minutes=config.trainer.process_timeout_minutes)
    ranks.must_agree("configuration, data and code (run identity)", run.run_id)
    run.state = ranks.from_main(run.state)
    found = pick(run, ranks, keep_epochs=config.trainer.keep_epochs)
    content = found[1] if found else None

    seed_everything(config.seed, workers=True, verbose=False)
    model = build_model(
        config.model, num_classes=facts.num_classes, img_size=config.data.img_size, in_chans=config.data.in_chans
    )
    notes = []
    if config.checkpoint and content is None:  # a run that goes on has its own weights
        notes = start_from(model, config.checkpoint, weights=config.checkpoint_weights)
    wide = torch.float64 if trainer.precision == "64-true" else torch.float32
    ema = None if config.recipe.ema_decay is None else WeightAverage(model, decay=config.recipe.ema_decay, dtype=wide)
    recompute_blocks(model, config)
    compilation = choose_compilation(config, cut, macs=cost.macs, device=trainer.strategy.root_device)
    ranks.must_agree("whether and how the model is compiled", compilation.describe())
    compile_model(model, compilation)
    augment = BatchAugment(config.data, config.recipe, num_classes=facts.num_classes, seed=config.seed)
    classifier = Classifier(model, config.recipe, augment, ema=ema, plan=cut, ranks=ranks)
    place = ranks.rank, ranks.world_size
    data = ImageData(config, start=position(content, cut), place=place, folder=run.folder)
    data.setup("fit")
    check_shares(data, ranks)
    record["unread"] = data.unread.texts

    clock = Clock(cut, energy=Energy(open_counter(trainer.strategy.root_device), ranks))
    reference = config.reference
    keeper = RecordKeeper(run.folder, record, clock, cut, reference=reference)
    device = device_name(trainer.strategy.root_device)
    steps = StepLog(
        cut, clock, ranks, record,
        every=config.trainer.log_every_n_steps,
        flops_per_image=6.0 * cost.macs,  # two operations a MAC; the backward pass costs two forward passes
        peak=known_peak(device, config.trainer.peak_tflops),
        feed=_feed(config, data, trainer),
    )  # fmt: skip
    callbacks: list[Callback] = [clock, steps, keeper]
    if reference is not None:
        callbacks.append(PublishedCurve(run.folder, reference, name=config.model.name))
    if config.trainer.record_samples:
        callbacks.append(SampleLog(run.folder, ranks))
    looks, inside_note = possible_looks(config, model, cut.looks)
    if looks is not None:
        callbacks.append(InsideLog(config, run, record, clock, looks, data=data, ranks=ranks))
    if config.trainer.progress_bar:
        callbacks.append(ProgressLine(clock, cut, keeper))
    t = config.trainer
    callbacks.append(
        Keeper(
            run, cut, ranks, keeper,
            minutes=t.checkpoint_every_minutes, steps=t.checkpoint_every_n_steps, epochs=t.keep_epochs,
        )
    )  # fmt: skip
    set_callbacks(trainer, callbacks)
    batch_norm = has_batch_norm(model)
    record["placement"] = {
        "accelerator": trainer.strategy.root_device.type,
        "device": device,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "per_device_batch": cut.micro_batch,
        "accumulate": cut.accumulate,
        "batch_norm": batch_norm,
        "attention": attention_kernel(trainer.strategy.root_device),
        "compile": compilation.as_dict(),
        "activation_checkpointing": config.trainer.activation_checkpointing,
    }
    if ranks.is_main:
        write_classes(config, run, data)
        text = summary(
            config, facts, run, cost, cut, record["placement"],
            batch_norm=batch_norm, from_notes=notes, data_notes=data.notes, inside_note=inside_note,
            compile_note=compilation.describe(),
        )  # fmt: skip
        print(text, flush=True)
    loggers += build_loggers(config, run, ranks)
    trainer.loggers = loggers

    files.loaded = content
    try:
        trainer.fit(classifier, datamodule=data, ckpt_path=found and str(found[0]), weights_only=True)
        keeper.note_clock()
        record["steps"] = trainer.global_step
        finish(config, run, trainer, classifier, data, record, ranks)
        if ranks.is_main:
            data.unread.report()
    except SystemExit:  # what Lightning makes of Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    except RuntimeError as error:  # DistBackendError is one
        if ranks.world_size > 1 and _is_lost_connection(error):
            raise RunError("the connection to another process of this run broke") from error
        if "DataLoader worker" in str(error) and "Traceback" not in str(error):
            raise RunError(_lost_worker(str(error))) from error
        raise
    finally:
        data.unread.refresh()
    ranks.close()


def _feed(config: Config, data: ImageData, trainer: Trainer) -> Feed:
    """What may be changed where the loader is too slow."""
    computing = torch.get_num_threads() if trainer.strategy.root_device.type == "cpu" else 0
    feed = Feed(cores=count_cores(), local=trainer.num_devices, training_threads=computing)
    train = data.part("train")
    if not isinstance(train, StreamedImages):
        return feed
    reader, decode = train.reader, train.config.decode
    return replace(feed, layout=reader.layout, decode=decode, fetched=not reader.store.is_local)


def check_shares(data: ImageData, ranks: Ranks) -> None:
    """Every rank has as many micro-batches, and together they have each sample of an epoch once; else RunError."""
    batches = data.train_batches()
    epoch = batches.epoch
    shares = ranks.gather(batches.share(epoch))
    counts = [share[0] for share in shares]
    if len(set(counts)) > 1:
        raise RunError(f"every process must get as many batches of an epoch, got {counts}")
    found = sum(share[1] for share in shares), sum(share[2] for share in shares) % 2**64
    if found != batches.whole(epoch):
        raise RunError(
            f"the {ranks.world_size} processes must share an epoch's {batches.whole(epoch)[0]:,} samples, each once; "
            f"they have {found[0]:,}{' others' if found[0] == batches.whole(epoch)[0] else ''}"
        )


def _lost_worker(text: str) -> str:
    """What torch says of a worker process that has gone, and what to do."""
    said = text.strip().splitlines()[0].rstrip(". ")
    return f"{said}; if memory ran out, fewer data.num_workers take less; the same command goes on"


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, DistBackendError) or "gloo" in str(error).lower()


def build_loggers(config: Config, run: Run, ranks: Ranks) -> list[Logger]:
    """metrics.csv always; W&B when configured, offline unless asked. Only the main process writes."""
    if not ranks.is_main:
        return []
    loggers: list[Logger] = [MetricsFile(run.folder / "metrics.csv")]
    if isinstance(config.logger, WandbLogger):
        log = WandbLog(config, run, resumed=run.state == "resume")
        log.start()
        loggers.append(log)
    return loggers
