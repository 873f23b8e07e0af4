"""External baselines: timm's architectures by name, for the images and classes of a run, their weights drawn anew.

``model=timm model.timm_name=resnet50`` trains one under the recipe that our own arms have. Nothing is loaded or fetched, and
timm's own initialisation stays. What a run sets is passed on where the architecture takes it: classes, channels, the image
size, stochastic depth; what it cannot take is one line, known from a forward pass without memory (meta device) before the
weights are drawn. The built model is timm's own class, so its weights carry timm's names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import timm
import torch
from torch import Tensor, nn

from eit_lab.config import ConfigError, ImageSize, TimmConfig, as_hw
from eit_lab.models.image_model import ImageModel


def build_timm(config: TimmConfig, *, num_classes: int, img_size: ImageSize, in_chans: int = 3) -> ImageModel:
    """The architecture for ``num_classes`` and images of ``img_size`` px, in training mode.

    Raises ConfigError in one line, with what the architecture was made for, where it cannot take these images.
    """
    accepted = _accepted(config, num_classes=num_classes, hw=as_hw(img_size), in_chans=in_chans)
    return cast(ImageModel, timm.create_model(config.timm_name, pretrained=False, **accepted))


def classifier_names(model: nn.Module | str) -> tuple[str, ...]:
    """The submodules that have an output for each class, of a model of timm or of an architecture's name; some have two."""
    if isinstance(model, str):
        made_for = timm.models.get_pretrained_cfg(model)
        named = made_for.classifier if made_for is not None else None
    else:
        named = cast(Any, model).pretrained_cfg.get("classifier")
    return (named,) if isinstance(named, str) else tuple(named or ("head",))


@cache
def _accepted(config: TimmConfig, *, num_classes: int, hw: tuple[int, int], in_chans: int) -> Mapping[str, Any]:
    """The arguments of timm.create_model that the architecture takes, tried out on the meta device. Draws nothing."""
    square = hw[0] == hw[1]
    wanted: dict[str, Any] = {
        "num_classes": num_classes,
        "in_chans": in_chans,
        "drop_path_rate": config.drop_path_rate,
        "img_size": hw[0] if square else hw,
    }
    with torch.device("meta"):
        try:
            model = _build_with_what_it_takes(config.timm_name, wanted)
            _refuse_what_was_left_out(config, wanted, model, num_classes=num_classes, in_chans=in_chans)
            for images, training in ((1, False), (2, True)):
                logits = model.train(training)(torch.empty(images, in_chans, *hw))
                if not isinstance(logits, Tensor) or logits.shape != (images, num_classes):
                    raise ConfigError(
                        f"model.timm_name={config.timm_name} gives no logits of (B, {num_classes}) in "
                        f"{'training' if training else 'evaluation'}, but {_shape(logits)}; it cannot be a baseline here"
                    )
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - an architecture may refuse an image in any way
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            made_for = "x".join(map(str, _input_size(config.timm_name)[1:]))
            raise ConfigError(
                f"model.timm_name={config.timm_name} must take images of data.img_size, {hw[0]}x{hw[1]} px with {in_chans} "
                f"channel{'s' * (in_chans != 1)}, and cannot ({reason}); it was made for {made_for} px"
            ) from None
    return wanted


def _build_with_what_it_takes(name: str, wanted: dict[str, Any]) -> nn.Module:
    """The model; what its constructor does not know is taken out of ``wanted``."""
    while True:
        try:
            return timm.create_model(name, pretrained=False, **wanted)
        except TypeError as error:
            unknown = next((key for key in wanted if f"'{key}'" in str(error)), None)
            if unknown is None:
                raise
            del wanted[unknown]


def _refuse_what_was_left_out(
    config: TimmConfig, wanted: Mapping[str, Any], model: nn.Module, *, num_classes: int, in_chans: int
) -> None:
    """One line for a setting that would have no effect; an architecture of any image size needs none."""
    name = config.timm_name
    if "num_classes" not in wanted:
        raise ConfigError(f"model.timm_name must be a classifier, got {name!r}, which takes no number of classes")
    if "in_chans" not in wanted and in_chans != _input_size(name)[0]:
        raise ConfigError(f"data.in_chans must be {_input_size(name)[0]} for model.timm_name={name}, got {in_chans}")
    has_drop_path = any("DropPath" in type(module).__name__ for module in model.modules())
    if config.drop_path_rate and not has_drop_path:
        raise ConfigError(
            f"model.drop_path_rate must be 0 for model.timm_name={name}, which has no stochastic depth, got "
            f"{config.drop_path_rate:g}; nearest: 0"
        )


def _input_size(name: str) -> Sequence[int]:
    """(channels, height, width) of the images that an architecture was made for."""
    made_for = timm.models.get_pretrained_cfg(name)
    return made_for.input_size if made_for is not None else (3, 224, 224)


def _shape(found: object) -> str:
    return f"a tensor of {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
