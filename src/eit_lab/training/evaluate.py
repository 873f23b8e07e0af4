"""The metrics of a checkpoint on one part of a data set."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning.pytorch import seed_everything

from eit_lab.config import Config
from eit_lab.data.module import ImageData
from eit_lab.models.checkpoints import load_weights
from eit_lab.runs import DataFacts
from eit_lab.training.fit import build_backbone, build_trainer, quiet_lightning
from eit_lab.training.module import Classifier


def evaluate(config: Config, facts: DataFacts, checkpoint: Path, *, part: str) -> dict[str, float]:
    """{part/loss, part/acc1, part/acc5} of a checkpoint's weights; accuracies in [0, 1]. Nothing is written."""
    quiet_lightning()
    seed_everything(config.seed, workers=True, verbose=False)
    model = build_backbone(config, facts)
    load_weights(model, checkpoint)
    classifier, data = Classifier(model, config.recipe), ImageData(config)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(config, folder=Path(scratch), callbacks=[], logger=[])
        run = trainer.test if part == "test" else trainer.validate
        (metrics,) = run(classifier, datamodule=data, verbose=False)
    return dict(metrics)
