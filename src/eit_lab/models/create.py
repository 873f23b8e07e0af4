"""``create_model``: a named point of the config space as an nn.Module, with or without trained weights."""

from __future__ import annotations

from pathlib import Path

from eit_lab.compose import compose_model
from eit_lab.config import ConfigError, ImageSize
from eit_lab.models.build import build_model
from eit_lab.models.checkpoints import load_weights
from eit_lab.models.image_model import ImageModel


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    img_size: ImageSize = 224,
    in_chans: int = 3,
    checkpoint: str | Path | None = None,
) -> ImageModel:
    """The model of ``conf/model/NAME.yaml``, e.g. ``create_model("eit_base", num_classes=1000, img_size=224)``.

    ``timm/NAME`` is an architecture of timm as a run with ``model=timm model.timm_name=NAME`` trains it, its weights drawn anew.
    ``img_size`` in px, a side or (height, width). ``checkpoint`` is a file of this project, of the authors of
    arXiv:2203.07116, or with timm's names (for the ViT models, and for ``timm/NAME``); see models/checkpoints.py.
    Raises ConfigError (a ValueError) for an unknown name and for images that an architecture of timm cannot take,
    CheckpointError with a list of keys and shapes on a mismatch.
    """
    if name == "timm":
        raise ConfigError("create_model: 'timm' must name an architecture, got none; nearest: timm/resnet50")
    model = build_model(compose_model(name), num_classes=num_classes, img_size=img_size, in_chans=in_chans)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model
