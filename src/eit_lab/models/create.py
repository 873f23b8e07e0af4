"""``create_model``: a named point of the config space as an nn.Module, with or without trained weights."""

from __future__ import annotations

from pathlib import Path

from eit_lab.compose import compose_model
from eit_lab.config import ImageSize
from eit_lab.models.backbone import Backbone
from eit_lab.models.checkpoints import load_weights


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    img_size: ImageSize = 224,
    in_chans: int = 3,
    checkpoint: str | Path | None = None,
) -> Backbone:
    """The model of ``conf/model/NAME.yaml``, e.g. ``create_model("eit_base", num_classes=1000, img_size=224)``.

    ``img_size`` in px, a side or (height, width). ``checkpoint`` is a file of this project, of the authors of
    arXiv:2203.07116, or (for the ViT models) with timm's names; see models/checkpoints.py.
    Raises ConfigError (a ValueError) for an unknown name, CheckpointError with a list of keys and shapes on a mismatch.
    """
    model = Backbone(compose_model(name), num_classes=num_classes, img_size=img_size, in_chans=in_chans)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model
