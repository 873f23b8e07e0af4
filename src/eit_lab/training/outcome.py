"""The end of a run: the chosen weights tested once, and what they said of every image, on disk and on the dashboard."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers.logger import Logger
from numpy.typing import NDArray

from eit_lab.config import Config, ImageNetData, WandbLogger
from eit_lab.data.batch import Batch
from eit_lab.data.module import ImageData
from eit_lab.runs import Run, write_text
from eit_lab.training import curve, inside
from eit_lab.training.checkpoint import StopInTest
from eit_lab.training.metrics_file import MetricsFile
from eit_lab.training.mistakes import count_confusion, save_mistakes, worst_mistakes, write_confusion
from eit_lab.training.module import Classifier
from eit_lab.training.ranks import Ranks
from eit_lab.training.trainer import set_callbacks
from eit_lab.training.wandb_log import WandbLog

# What W&B's tables and plots of runs have beside the test result.
_IN_SUMMARY = (
    "best", "img_per_s", "hours", "device_hours", "energy_wh", "energy_source", "mfu", "data_wait_share", "memory_gb",
)  # fmt: skip


def finish(
    config: Config,
    run: Run,
    trainer: Trainer,
    classifier: Classifier,
    data: ImageData,
    record: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Test the chosen weights; record their metrics, and keep predictions.npz, confusion.csv and the worst mistakes."""
    has_best = ranks.from_main(run.best_checkpoint.exists() and record["best"] is not None)
    if not has_best:  # stopped by max_steps before the first validation: what there is, is the best
        trainer.validate(classifier, datamodule=data, verbose=False)
        validated = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        assert classifier.plan is not None
        epoch = (trainer.global_step - 1) // classifier.plan.steps_per_epoch
        record["best"] = {"epoch": epoch, "step": trainer.global_step, **validated}
        trainer.save_checkpoint(run.best_checkpoint)
    set_callbacks(trainer, [StopInTest(ranks)])  # a load for the test must not set clock and record back
    weights = str(run.best_checkpoint) if config.recipe.select == "best" else None  # None: the weights of the last step
    trainer.test(classifier, datamodule=data, ckpt_path=weights, verbose=False, weights_only=True)
    record["result"] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
    rows = torch.cat(ranks.gather(torch.cat(classifier.test_predictions)))
    if ranks.is_main:
        columns = _columns(rows, averaged=classifier.ema is not None)
        np.savez_compressed(run.folder / "predictions.npz", **columns)  # type: ignore[arg-type]
        _show(config, run, trainer, data, record, columns)


def write_classes(config: Config, run: Run, data: ImageData) -> None:
    """classes.json: the class folders' names in the order of their labels, for evaluation on other folders."""
    if isinstance(config.data, ImageNetData):
        write_text(run.folder / "classes.json", json.dumps(data.class_names, indent=0) + "\n")


def _columns(rows: torch.Tensor, *, averaged: bool) -> dict[str, NDArray[Any]]:
    """index, label, predicted, loss (and predicted_ema) of every test image, by index, for per-image tests between arms."""
    index, label, predicted, loss, predicted_ema = rows[rows[:, 0].argsort()].T.numpy()
    columns = {"index": index, "label": label, "predicted": predicted}
    columns |= {"predicted_ema": predicted_ema} if averaged else {}
    return {**{name: column.astype(np.int64) for name, column in columns.items()}, "loss": loss.astype(np.float32)}


def _show(
    config: Config,
    run: Run,
    trainer: Trainer,
    data: ImageData,
    record: dict[str, Any],
    columns: dict[str, NDArray[Any]],
) -> None:
    result, names = record["result"], data.class_names
    counts = count_confusion(columns["label"], columns["predicted"])
    write_confusion(run.folder / "confusion.csv", counts, class_names=names)
    if config.reference is not None:
        flush(trainer.loggers)
        curve.draw(run.folder, config.reference, name=config.model.name, test_acc1=result["test/acc1"])
    for log in trainer.loggers:
        if isinstance(log, WandbLog):
            assert isinstance(config.logger, WandbLogger)
            costs = {f"cost/{name}": record["cost"][name] for name in ("params", "macs")}
            looks = inside.summary(record["analysis"]) if record["analysis"] else {}
            log.set_summary({**result, **costs, **looks, **{key: record.get(key) for key in _IN_SUMMARY}})
            log.log_confusion(counts, class_names=names)
            mistakes = worst_mistakes(
                index=columns["index"],
                label=columns["label"],
                predicted=columns["predicted"],
                loss=columns["loss"],
                image=lambda index: _raw_image(data, index),
                count=config.logger.mistakes,
            )
            figure = save_mistakes(run.folder, mistakes, class_names=names)
            log.log_mistakes(mistakes, figure=figure, class_names=names)
            log.save_checkpoints([path for path in (run.best_checkpoint, run.last_checkpoint) if path.exists()])


def _raw_image(data: ImageData, index: int) -> NDArray[np.uint8]:
    """(C, H, W) uint8 of a test image, as the network gets it but for the normalisation."""
    batch: Batch = data.part("test")[[(0, index, 0, 0)]]
    image: NDArray[np.uint8] = batch.images[0].numpy()
    return image


def flush(loggers: list[Logger]) -> None:
    """Write metrics.csv as it is now."""
    for log in loggers:
        if isinstance(log, MetricsFile):
            log.flush()
