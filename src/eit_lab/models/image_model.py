"""The type of every model here: an nn.Module with timm's manners."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class ImageModel(nn.Module):
    """Images (B, C, H, W) -> logits (B, num_classes). Our backbone is one; a model of timm is cast to one, by its manners."""

    num_classes: int
    num_features: int

    if TYPE_CHECKING:  # declared only: the classes that are cast to this one have their own

        def forward_features(self, x: Tensor) -> Tensor:
            """Images -> what the classifier's pooling gets."""

        def forward_head(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
            """What forward_features gives -> logits, or what the classifier sees with ``pre_logits``."""

        def get_classifier(self) -> nn.Module:
            """The classifier."""

        def reset_classifier(self, num_classes: int) -> None:
            """A fresh classifier; 0: none."""
