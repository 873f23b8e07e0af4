"""A run from its claimed folder to its result: build, summarise, train, test the best weights, write the record."""

from __future__ import annotations

import logging
import math
import os
import shlex
import sys
import time
import traceback
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import Strategy

from eit_lab.config import Config, ConfigError, WandbLogger, per_device_batch
from eit_lab.data.module import ImageData
from eit_lab.models.backbone import Backbone
from eit_lab.models.cost import Cost, count_cost
from eit_lab.runs import RECORD_SCHEMA, DataFacts, Run, is_main_process, versions, write_manifest, write_record
from eit_lab.training.callbacks import MetricsFile, ProgressLine, RecordKeeper, Speed
from eit_lab.training.module import Classifier
from eit_lab.units import si


def fit(config: Config, facts: DataFacts, run: Run, argv: list[str]) -> dict[str, Any]:
    """Train and test one run in its folder; returns its record. Whatever is raised is on record before it goes on."""
    quiet_lightning()
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
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "best": None,
        "result": None,
    }
    began = time.monotonic()
    try:
        if is_main_process():
            write_manifest(run, config, argv)
            write_record(run.folder, record)
        _fit(config, facts, run, cost, record)
        record["status"] = "finished"
    except BaseException as error:
        record["status"] = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        record["error"] = traceback.format_exception_only(error)[-1].strip()
        record["error_lines"] = traceback.format_exc().splitlines()[-12:]
        raise
    finally:
        record["seconds"] = round(time.monotonic() - began, 3)
        record["ended"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if is_main_process():
            write_record(run.folder, record)
    return record


def _fit(config: Config, facts: DataFacts, run: Run, cost: Cost, record: dict[str, Any]) -> None:
    seed_everything(config.seed, workers=True, verbose=False)
    model = build_backbone(config, facts)
    if config.trainer.compile:
        model.compile()
    classifier = Classifier(model, config.recipe)
    data = ImageData(config)
    speed = Speed(global_batch=config.recipe.batch_size)
    best = ModelCheckpoint(
        run.folder / "checkpoints", filename="best", monitor="val/acc1", mode="max", enable_version_counter=False
    )
    last = ModelCheckpoint(
        run.folder / "checkpoints", filename="last", save_on_train_epoch_end=True, enable_version_counter=False
    )
    keeper = RecordKeeper(run.folder, record, speed)
    callbacks: list[Callback] = [speed, keeper, best, last, LearningRateMonitor("step")]
    if config.trainer.progress_bar:
        callbacks.append(ProgressLine(speed))
    trainer = build_trainer(
        config,
        folder=run.folder,
        callbacks=callbacks,
        logger=build_loggers(config, run),
        max_epochs=math.ceil(planned_steps(config, facts) / max(1, steps_per_epoch(config, facts))),
    )
    per_device = per_device_batch(config, world_size=trainer.world_size)
    record["placement"] = {
        "accelerator": trainer.strategy.root_device.type,
        "device": device_name(trainer.strategy.root_device),
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "per_device_batch": per_device,
    }
    if trainer.is_global_zero:
        print(summary(config, facts, run, cost, record["placement"]), flush=True)
    resume = str(run.last_checkpoint) if run.state == "resume" else None
    if resume is not None and not zipfile.is_zipfile(resume):  # cut short: the directory at its end is missing
        raise ConfigError(f"{resume} is damaged and cannot be resumed from; run.overwrite=true starts anew")
    for key, count in (("data.val_size", facts.num_val), ("the test set", facts.num_test)):
        if count < trainer.world_size:
            raise ConfigError(f"{key} must give each of the {trainer.world_size} devices an image, got {count}")
    # Our own file: it holds the training state of Lightning, not tensors alone.
    try:
        trainer.fit(classifier, datamodule=data, ckpt_path=resume, weights_only=False)
    except SystemExit:  # what Lightning makes of Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    record["img_per_s"] = speed.img_per_s
    record["steps"] = trainer.global_step
    if not run.best_checkpoint.exists():  # stopped by max_steps before the first validation: what there is, is the best
        (validated,) = trainer.validate(classifier, datamodule=data, verbose=False)
        record["best"] = {"epoch": trainer.current_epoch, "step": trainer.global_step, **validated}
        trainer.save_checkpoint(run.best_checkpoint)
    if config.trainer.max_steps:  # which may end between two validations
        trainer.save_checkpoint(run.last_checkpoint)
    weights = str(run.best_checkpoint) if config.recipe.select == "best" else None  # None: the weights of the last step
    metrics = trainer.test(classifier, datamodule=data, ckpt_path=weights, verbose=False, weights_only=False)
    record["result"] = dict(metrics[0])
    _save_predictions(run.folder / "predictions.npz", trainer, classifier)


def build_backbone(config: Config, facts: DataFacts) -> Backbone:
    """The configured model for the configured images."""
    return Backbone(
        config.model, num_classes=facts.num_classes, img_size=config.data.img_size, in_chans=config.data.in_chans
    )


def build_trainer(
    config: Config, *, folder: Path, callbacks: list[Callback], logger: list[Logger], max_epochs: int = 1
) -> Trainer:
    """Lightning's Trainer: our keys passed on, ``auto`` precision resolved for the accelerator."""
    t = config.trainer
    devices: Any = list(t.devices) if isinstance(t.devices, tuple) else t.devices
    strategy: str | Strategy = t.strategy
    if t.accelerator in ("auto", "cpu") and not torch.cuda.is_available() and devices == "auto":
        devices = 1
    cuda = t.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    bf16 = cuda and torch.cuda.is_bf16_supported()
    precision: Any = t.precision if t.precision != "auto" else ("bf16-mixed" if bf16 else "32-true")
    try:
        return Trainer(
            accelerator=t.accelerator,
            devices=devices,
            num_nodes=t.num_nodes,
            strategy=strategy,
            precision=precision,
            accumulate_grad_batches=t.accumulate_grad_batches,
            gradient_clip_val=t.gradient_clip_val,
            max_epochs=max_epochs,
            max_steps=t.max_steps or -1,
            check_val_every_n_epoch=t.check_val_every_n_epoch,
            log_every_n_steps=t.log_every_n_steps,
            limit_train_batches=t.overfit_batches or t.limit_train_batches,  # the data module then repeats one epoch
            limit_val_batches=t.limit_val_batches,
            limit_test_batches=t.limit_test_batches,
            deterministic=t.deterministic,
            profiler=_build_profiler(t.profiler, folder),
            default_root_dir=folder,
            logger=logger,
            callbacks=callbacks,
            num_sanity_val_steps=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,  # the data module hands each rank its own share
        )
    except (
        MisconfigurationException,
        ValueError,
        ImportError,
    ) as error:  # what only the machine itself can tell, such as a missing GPU
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"trainer: Lightning refuses accelerator={t.accelerator}, devices={t.devices}: {reason}"
        ) from None


def _build_profiler(name: str | None, folder: Path) -> Profiler | None:
    """Lightning's profiler, its report in the run folder: profile*.txt, or a trace for pytorch."""
    profilers = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
    return profilers[name](dirpath=folder, filename="profile") if name else None


def build_loggers(config: Config, run: Run) -> list[Logger]:
    """metrics.csv always; W&B when configured, offline unless asked."""
    loggers: list[Logger] = [MetricsFile(run.folder / "metrics.csv")]
    if isinstance(config.logger, WandbLogger):
        from lightning.pytorch.loggers import WandbLogger as LightningWandb

        mode = config.logger.mode or os.environ.get("WANDB_MODE", "offline")
        os.environ["WANDB_MODE"] = mode  # else an exported one would win over logger.mode
        loggers.append(
            LightningWandb(
                name=run.folder.name,
                id=run.run_id,
                save_dir=run.folder,
                offline=mode == "offline",
                project=config.logger.project,
                entity=config.logger.entity,
                group=config.run.sweep,
                job_type=config.model.name,
                tags=list(config.logger.tags),
                config=dump(config),
                resume="allow",
            )
        )
    return loggers


def quiet_lightning() -> None:
    """Lightning's hints off: what they say is in our own summary, or is decided already."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        r".*does not have many workers.*",
        r".*exists and is not empty.*",
        r".*The number of training batches .* is smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def device_name(device: torch.device) -> str:
    """The accelerator's own name, or the CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def summary(config: Config, facts: DataFacts, run: Run, cost: Cost, placement: dict[str, Any]) -> str:
    """Model, data and cost in a few lines, before the first step."""
    model, data, recipe = config.model, config.data, config.recipe
    splits = model.layer_splits()
    total = planned_steps(config, facts)
    images = total * recipe.batch_size
    h, w = cost.grid
    rows = [
        ("model", f"{model.name}: {model.size.embed_dim} wide, {model.size.depth} deep, {model.size.num_heads} heads; "
                  f"stem {model.stem.kind}, {h}x{w} tokens; position embedding {model.pos_embed}"),
        ("mixer", f"{model.ib.rule}, strength {model.ib.strength:g}: attention channels "
                  f"{' '.join(str(split.attn_dim) for split in splits)} of {model.size.embed_dim}"),
        ("cost", f"{cost.params:,} parameters; {si(cost.macs, digits=3)} MACs an image ({si(cost.macs_thop, digits=3)} as thop counts)"),
        ("data", f"{data.name}: {facts.num_train:,} train, {facts.num_val:,} held out of train, {facts.num_test:,} test; "
                 f"{facts.num_classes} classes; {_size(data.img_size)} px"),
        ("recipe", f"{recipe.name}: {total:,} steps of {recipe.batch_size} images ({images / facts.num_train:.3g} epochs), "
                   f"peak learning rate {recipe.lr:g}; {si(3 * cost.macs * images)} MACs in all"),
        ("on", f"{placement['world_size']} x {placement['device']}, {placement['precision']}, "
               f"{placement['per_device_batch']} images a device and micro-batch"),
        ("run", f"{run.folder}  ({'resumed' if run.state == 'resume' else 'new'}, seed {config.seed})"),
    ]  # fmt: skip
    return "\n".join(f"{name:>7}  {text}" for name, text in rows)


def steps_per_epoch(config: Config, facts: DataFacts) -> int:
    """Optimizer steps of one epoch, limits taken into account."""
    t = config.trainer
    batches = facts.num_train // config.recipe.batch_size * t.accumulate_grad_batches
    limit = t.overfit_batches or t.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return math.ceil(batches / t.accumulate_grad_batches)


def planned_steps(config: Config, facts: DataFacts) -> int:
    """Optimizer steps of the whole training: max_steps alone may go on past the recipe's epochs."""
    t = config.trainer
    epochs = t.max_epochs or (None if t.max_steps else config.recipe.epochs)
    by_epochs = steps_per_epoch(config, facts) * epochs if epochs else None
    return min(count for count in (by_epochs, t.max_steps) if count is not None)


def _size(img_size: Any) -> str:
    return f"{img_size}x{img_size}" if isinstance(img_size, int) else "x".join(map(str, img_size))


def _save_predictions(path: Path, trainer: Trainer, classifier: Classifier) -> None:
    """(index, label, predicted) of every test image, by index, from all ranks, for per-image tests between arms."""
    mine = torch.cat(classifier.test_predictions)
    if trainer.world_size > 1:
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, mine)
        mine = torch.cat(parts)
    if trainer.is_global_zero:
        index, label, predicted = mine[mine[:, 0].argsort()].T.numpy()
        np.savez_compressed(path, index=index, label=label, predicted=predicted)


def closing_line(record: dict[str, Any], run: Run) -> str:
    """Result, folder, how to look, how to go on."""
    result = record["result"]
    n = record["data"]["num_test"]
    error = 100 * math.sqrt(max(1e-12, result["test/acc1"] * (1 - result["test/acc1"])) / n)
    return (
        f"test top-1 {100 * result['test/acc1']:.2f}% (+-{error:.2f} binomial, {n} images), "
        f"top-5 {100 * result['test/acc5']:.2f}%, {_which_weights(record)}\n"
        f"folder {run.folder}\n"
        f"look:   python -m eit_lab.report {run.folder}\n"
        f"again:  python -m eit_lab.evaluate run={run.folder}\n"
        "resume: nothing left to do; the same command finds this run, more epochs make another"
    )


def _which_weights(record: dict[str, Any]) -> str:
    if record["config"]["recipe"]["select"] == "last":
        return "last epoch"
    return f"best epoch {record['best']['epoch'] + 1} on the held-out slice"


def stop_line(run: Run, argv: list[str]) -> str:
    """How to go on with a run that did not end."""
    same = shlex.join(word for word in argv if not word.startswith("run.overwrite="))  # which would start anew
    return f"resume: {Path(sys.executable).name} -m eit_lab.train {same}   (folder {run.folder})"
