"""A look inside the network every so many epochs of its training: the figures of an analysis, of a fixed set of held-out images.

The images are the first ones of the held-out slice in the order of every analysis (``data.split_seed``), the same for all arms,
seeds and processes; the weights are the raw ones, in evaluation mode. A run trains to the same bits whether it is looked at or not.

The means go to all loggers as ``analysis/NAME``, each layer's figure as ``analysis/NAME/LL``; all of it is in the record
(the last look) and in ``analysis/history.jsonl`` (every look, a line each).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from eit_lab.analysis.layout import layout_of
from eit_lab.analysis.profile import Profile
from eit_lab.config import Config, as_hw
from eit_lab.data.batch import FILLER
from eit_lab.data.module import ImageData
from eit_lab.data.order import fixed_order
from eit_lab.models.image_model import ImageModel
from eit_lab.plan import Looks
from eit_lab.runs import Run, json_ready, write_record, write_text
from eit_lab.training.callbacks import Clock
from eit_lab.training.metrics import ExactMean
from eit_lab.training.module import Classifier
from eit_lab.training.ranks import Ranks
from eit_lab.training.trainer import device_name

SCHEMA = 1
HISTORY = Path("analysis", "history.jsonl")
"""In the run folder: the result of every look, and the epoch (from 0) and step after which it was taken."""
_MOST_AT_ONCE = 64  # images of a forward pass; a share of few images is spread over many processes
# Heads are not compared pair by pair: that costs more than all the rest (python -m eit_lab.analyze does).
_HEADS = ("attention_distance", "attention_entropy", "attention_nmi", "cls_mass")
_BY_LAYER = (*_HEADS, "head_diversity")


class InsideLog(Callback):
    """Looks inside at the end of epochs, while the clock of the training stands still. Before Keeper, which saves the epoch."""

    def __init__(
        self,
        config: Config,
        run: Run,
        record: dict[str, Any],
        clock: Clock,
        looks: Looks,
        *,
        data: ImageData,
        ranks: Ranks,
    ) -> None:
        self.config, self.run, self.record, self.clock, self.looks = config, run, record, clock, looks
        self.data, self.ranks = data, ranks
        self.seconds = 0.0
        """Of all looks of the run so far."""
        self._profile: Profile | None = None  # made once: it has some hundred sums

    @property
    def history(self) -> Path:
        """One JSON line a look."""
        return self.run.folder / HISTORY

    def state_dict(self) -> dict[str, Any]:
        """The last look and what all of them took go into the checkpoint, and so survive a restart."""
        return {"seconds": self.seconds, "last": self.record.get("analysis")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.seconds = state_dict["seconds"]
        self.record["analysis"] = state_dict["last"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut off the looks that are taken again after a restart."""
        if self.ranks.is_main:
            kept = list(_lines_up_to(self.history, trainer.global_step))
            if kept or self.history.exists():
                write_text(self.history, "".join(kept))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, where it is time."""
        assert isinstance(pl_module, Classifier)
        assert pl_module.plan is not None
        step, plan = trainer.global_step, pl_module.plan
        epoch = (step - 1) // plan.steps_per_epoch
        if (epoch + 1) % self.looks.every and step < plan.total_steps:
            return
        began = time.perf_counter()
        result = {**self._facts(trainer), "epoch": epoch, "step": step, **self._measure(trainer, pl_module)}
        seconds = time.perf_counter() - began
        self.seconds += seconds
        training = 3600 * self.clock.hours
        self.record["analysis"] = {
            **result,
            "seconds": self.seconds,
            "share_of_training": self.seconds / training if training else None,
        }
        row = {**scalars(result), "perf/analysis_seconds": self.seconds, "epoch": epoch, "images": plan.images(step)}
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
        if self.ranks.is_main:
            self._note({**result, "seconds": seconds})
            write_record(self.run.folder, self.record)

    def _facts(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.config.model.name,
            "arm": self.config.run.arm or self.config.model.name,
            "seed": self.config.seed,
            "weights": "raw",
            "identity": self.run.run_id,
            "device": device_name(trainer.strategy.root_device),
            "precision": str(trainer.precision),
            "settings": {"every_n_epochs": self.looks.every, "num_images": self.looks.num_images},
        }

    def _measure(self, trainer: Trainer, classifier: Classifier) -> dict[str, Any]:
        """The figures over all ranks' images. All ranks must call."""
        model = classifier.model
        self.ranks.copy_from_main(model.buffers())  # as before a validation: statistics of batch norms
        profile = self._profile = self._profile or Profile(model, self.config.data.img_size, heads=_HEADS)
        profile.reset()
        hits = ExactMean().to(classifier.device)
        with torch.no_grad(), _evaluating(model), trainer.precision_plugin.val_step_context():
            for images, labels in self._images(classifier):
                logits = profile.update(images)
                hits.update(logits.argmax(dim=-1) == labels)
                if self.clock.energy is not None:
                    self.clock.energy.keep_up()
            if (
                not profile.points
            ):  # no image is this rank's: it must have sums all the same, to add them up with the others
                profile.update(self._as_input(self.data.part("val")[[(0, FILLER, 0, 0)]].images, classifier))
                profile.reset()
            found = profile.result()
            acc1 = float(hits.compute())
        data = {
            "name": self.config.data.name,
            "part": "val",
            "images": self.looks.num_images,
            "img_size": list(profile.img_hw),
            "num_classes": model.num_classes,
            "acc1": acc1,
        }
        return {"data": data, **found}

    def _images(self, classifier: Classifier) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's images (B, C, H, W), normalised, and their labels (B,)."""
        chosen = fixed_order(len(self.data.part("val")), seed=self.config.data.split_seed)[: self.looks.num_images]
        batch_size = min(_MOST_AT_ONCE, self.config.trainer.eval_batch_size)
        for batch in self.data.some_of("val", chosen, batch_size=batch_size):
            counted = batch.index != FILLER
            if counted.any():
                yield self._as_input(batch.images[counted], classifier), batch.labels[counted].to(classifier.device)

    def _as_input(self, images: torch.Tensor, classifier: Classifier) -> torch.Tensor:
        """Bytes (B, C, H, W) as the network gets them."""
        return classifier.augment.normalise(images.to(classifier.device)).to(next(classifier.model.parameters()).dtype)

    def _note(self, result: Mapping[str, Any]) -> None:
        """One more line, in place of those of the same step and later: the file is whole at every moment."""
        self.history.parent.mkdir(exist_ok=True)
        kept = _lines_up_to(self.history, result["step"] - 1)
        write_text(self.history, "".join([*kept, json.dumps(json_ready(result)) + "\n"]))


class _evaluating:  # noqa: N801 - reads as a verb
    """Every module in evaluation mode, and afterwards each in the mode that it was in."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._modes = model, [(module, module.training) for module in model.modules()]

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training


def _lines_up_to(path: Path, step: int) -> Iterator[str]:
    """The whole lines of a history up to a step."""
    if not path.exists():
        return
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            yield line


def possible_looks(config: Config, model: ImageModel, looks: Looks | None) -> tuple[Looks | None, str]:
    """The looks that a model lets one have, and a line on what it does not show; empty where nothing is missing."""
    if looks is None:
        wanted = config.analysis.every_n_epochs is None
        return None, "not analysed while it trains: trainer.strategy=fsdp" if wanted else ""
    layout = layout_of(model, img_hw=as_hw(config.data.img_size))
    if not layout.depth:
        return None, f"not analysed while it trains: {layout.missing}"
    return looks, f"no figures of heads: {layout.missing}" if layout.missing else ""


def scalars(result: Mapping[str, Any]) -> dict[str, float]:
    """``analysis/NAME``: the means of a result; ``analysis/NAME/LL``: of layer LL, from 00. What it does not have is left out."""
    found = {name: value for name, value in result["means"].items() if value is not None}
    for name, values in _by_layer(result).items():
        found |= {f"{name}/{layer:02d}": value for layer, value in enumerate(values) if value is not None}
    return {f"analysis/{name}": value for name, value in found.items()}


def _by_layer(result: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """The figures of the blocks' outputs, and the means over the heads of each layer."""
    frequency, heads, points = result.get("frequency"), result.get("heads"), result["points"]
    found: dict[str, list[float | None]] = {}
    if frequency is not None:
        outputs = [place for place, name in enumerate(points) if name.endswith(".mlp")] or range(len(points))
        columns: dict[str, Sequence[float | None]] = {
            "hfd_share": frequency["hfd_share"][frequency["cutoffs"].index(1 / 2)],
            "log_amplitude": [curve[-1] if len(curve) > 1 else None for curve in frequency["log_amplitude"]],
            "hf_dc_ratio": frequency["hf_dc_ratio"],
            "feature_variance": frequency["feature_variance"],
        }
        found |= {name: [values[place] for place in outputs] for name, values in columns.items()}
    if heads is not None:
        for name in _BY_LAYER:
            found[name] = [None if layer is None else float(np.mean(layer)) for layer in heads[name]]
    return found


def summary(analysis: Mapping[str, Any]) -> dict[str, Any]:
    """What tables of runs have of the record of the last look: its means, and what all looks took."""
    cost = {"seconds": analysis["seconds"], "share_of_training": analysis["share_of_training"]}
    return {f"analysis/{name}": value for name, value in {**analysis["means"], **cost}.items() if value is not None}


def in_words(analysis: Mapping[str, Any]) -> str:
    """What the looks of a run were and what they took, in a line, from its record."""
    every, images = analysis["settings"]["every_n_epochs"], analysis["data"]["images"]
    share = analysis["share_of_training"]
    cost = "" if share is None else f", {100 * share:.1f}% of training"
    often = "epoch" if every == 1 else f"{every} epochs"
    return f"analysis: {images} image{'s' * (images != 1)} every {often}, {analysis['seconds']:.1f} s{cost}; {HISTORY}"
