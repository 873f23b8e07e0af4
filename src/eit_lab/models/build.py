"""A model of either kind from its config: our backbone, or a baseline of timm."""

from __future__ import annotations

from eit_lab.config import AnyModelConfig, ImageSize, TimmConfig
from eit_lab.models.backbone import Backbone
from eit_lab.models.image_model import ImageModel


def build_model(config: AnyModelConfig, *, num_classes: int, img_size: ImageSize, in_chans: int = 3) -> ImageModel:
    """Images (B, in_chans, H, W) of ``img_size`` px -> logits (B, num_classes); weights from torch's global generator.

    Raises ConfigError in one line where an architecture of timm cannot take such images.
    """
    if isinstance(config, TimmConfig):
        from eit_lab.models.baselines import build_timm  # timm takes a second to import, and few runs need it

        return build_timm(config, num_classes=num_classes, img_size=img_size, in_chans=in_chans)
    return Backbone(config, num_classes=num_classes, img_size=img_size, in_chans=in_chans)
