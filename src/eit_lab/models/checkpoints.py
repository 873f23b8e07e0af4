"""Weights from files: this project's checkpoints, the authors' (arXiv:2203.07116), timm's names for plain ViTs; and timm's own
for its architectures.

No file is unpickled freely: torch.load runs with weights_only=True and one safe global, the argparse.Namespace that the
authors' files carry. The format is told by its keys, never by the file's name.

Position embeddings of another image size are made to fit (positions.py). Several files are one model: the mean of their
weights in float64 (arXiv:1803.05407).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from eit_lab.config import AnyModelConfig, ConfigError, ImageSize, ModelConfig, TimmConfig, as_hw
from eit_lab.finetune import origin_of, resolve
from eit_lab.loading import load_model
from eit_lab.models.backbone import Backbone
from eit_lab.models.build import build_model
from eit_lab.models.image_model import ImageModel
from eit_lab.models.positions import Fitted, fit_backbone, fit_timm
from eit_lab.models.positions import resize_position as resize_position
from eit_lab.models.stem import build_stem, token_grid

Weights: TypeAlias = Literal["raw", "ema"]
Files: TypeAlias = str | Path | Sequence[str | Path]

_MODULE_PREFIX = "model."  # of the model inside this project's LightningModule
# (pattern of the other side's key, our key). Keys not named here are the same on both sides.
_AUTHORS = (
    (r"^patch_embed\.eit_p\.conv\.", "stem.conv."),
    (r"^blocks\.(\d+)\.attn\.", r"blocks.\1.mixer.attn."),
    (r"^blocks\.(\d+)\.eit_t\.conv1\.", r"blocks.\1.mixer.conv.conv."),
)
_TIMM = (
    (r"^patch_embed\.proj\.", "stem.proj."),
    (r"^blocks\.(\d+)\.attn\.", r"blocks.\1.mixer.attn."),
)


class CheckpointError(ConfigError):
    """The file cannot be read, or its weights do not fit the model. The message lists keys and shapes."""


# ---------------------------------------------------------------------------------------------------------- into a model


def load_weights(model: ImageModel, path: Files, *, weights: Weights = "raw") -> str:
    """Fill a model from a checkpoint file, or with the mean of several; every weight of the model must be there.

    A position embedding of another grid is interpolated; all other shapes must be the model's. Returns the format found:
    "eit_lab", "authors" or "timm". Raises CheckpointError, and leaves the model as it was.
    """
    state, found, where = _read(path, weights=weights, ours=isinstance(model, Backbone))
    state, _ = _fit_positions(state, model, file=where[0])
    _refuse_mismatch(model, state, ", ".join(map(str, where)), found)
    model.load_state_dict(state)
    return found


def start_from(model: ImageModel, path: str | Path, *, weights: Weights = "raw") -> list[str]:
    """Fill a model for fine-tuning, from a run folder or a file; returns what a summary should say of it.

    A classifier with another number of classes stays as the model was initialised; see ``adapt``.
    """
    file = resolve(path)
    state, found, _ = _read(file, weights=weights, ours=isinstance(model, Backbone))
    adapted, notes = adapt(state, model, file=file, source=f"{file} ({found} format)")
    model.load_state_dict(adapted)
    return [f"{'averaged (EMA)' if weights == 'ema' else 'raw'} weights of {file} ({found} format)", *notes]


def load_backbone(
    config: AnyModelConfig,
    path: Files,
    *,
    img_size: ImageSize,
    in_chans: int = 3,
    num_classes: int | None = None,
    weights: Weights = "raw",
) -> ImageModel:
    """A model of a checkpoint's weights, in evaluation mode; ``num_classes`` null: as many as the file's classifier has."""
    if num_classes is None:
        num_classes = count_classes(path, config)
    model = build_model(config, num_classes=num_classes, img_size=img_size, in_chans=in_chans)
    load_weights(model, path, weights=weights)
    return model.eval()


def count_classes(path: Files, config: AnyModelConfig) -> int:
    """Rows of the configured model's classifier in a checkpoint file, or in the first of several."""
    state, _, where = _read(_as_paths(path)[0], weights="raw", ours=isinstance(config, ModelConfig))
    weight = f"{_classifiers(config)[0]}.weight"
    if weight not in state:
        raise CheckpointError(f"checkpoint: {where[0]} has no classifier ({weight})")
    return len(state[weight])


def _classifiers(model: AnyModelConfig | ImageModel) -> tuple[str, ...]:
    """The submodules of a model, or of what a config describes, that have an output for each class."""
    if isinstance(model, Backbone | ModelConfig):
        return ("head",)
    from eit_lab.models.baselines import classifier_names

    return classifier_names(model.timm_name if isinstance(model, TimmConfig) else model)


def adapt(
    state: Mapping[str, Tensor], model: ImageModel, *, file: Path | None = None, source: str = "the file"
) -> Fitted:
    """(weights that fit the model, what became of them) for a state dict under the model's names.

    A classifier with another number of classes is taken from the model as it is; a position embedding of another image size
    is made to fit. What ``file`` was trained at is asked where it tells; else it must have been square. Raises
    CheckpointError with keys and shapes for anything else that does not fit.
    """
    adapted, notes = dict(state), []
    names = _classifiers(model)
    weight = f"{names[0]}.weight"
    old = len(state[weight]) if weight in state else 0
    if old != model.num_classes:
        own = model.state_dict()
        heads = [key for key in {**own, **state} if key.startswith(tuple(f"{name}." for name in names))]
        for key in heads:
            adapted.pop(key, None)
            if key in own:
                adapted[key] = own[key]
        notes.append(f"classifier anew: {old} -> {model.num_classes} classes ({', '.join(heads)})")
    else:
        notes.append(f"classifier kept: {old} classes")
    adapted, resized = _fit_positions(adapted, model, file=file)
    _refuse_mismatch(model, adapted, source)
    return adapted, notes + resized


def average(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of state dicts, summed in float64 and cast back; what is not floating point comes from the last one.

    Raises CheckpointError where their keys or shapes differ.
    """
    assert states, "the mean of nothing"
    first, last = states[0], states[-1]
    for place, state in enumerate(states[1:], start=2):
        odd = sorted(first.keys() ^ state.keys())
        odd += [key for key in first if key in state and first[key].shape != state[key].shape]
        if odd:
            raise CheckpointError(
                f"checkpoint: weights of different models have no mean: the 1st and the {place}. of {len(states)} differ "
                f"in {len(odd)} keys or shapes: {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}"
            )

    def mean(key: str) -> Tensor:
        if not first[key].is_floating_point():
            return last[key].clone()
        total = torch.zeros_like(first[key], dtype=torch.float64)
        for state in states:
            total += state[key].double()
        return (total / len(states)).to(first[key].dtype)

    return {key: mean(key) for key in first}


def _fit_positions(state: Mapping[str, Tensor], model: ImageModel, *, file: Path | None) -> Fitted:
    """Position embeddings made to fit; what they were made for is asked of the file's run folder or metadata."""
    origin = origin_of(file) if file is not None else None
    img_hw: tuple[int, int] | None = None
    if origin is not None:
        size = origin.img_size
        img_hw = as_hw(size if isinstance(size, int) else (size[0], size[1]))
    if not isinstance(model, Backbone):
        return fit_timm(state, model, img_hw=img_hw)
    grid = None
    if origin is not None and img_hw is not None:
        config = load_model(origin.model)
        grid = _grid_of(config, img_hw, in_chans=origin.in_chans) if isinstance(config, ModelConfig) else None
    return fit_backbone(state, model, grid=grid)


def _grid_of(config: ModelConfig, img_hw: tuple[int, int], *, in_chans: int) -> tuple[int, int]:
    """(h, w) of the tokens that a configured model makes of images."""
    config = config.for_images(img_hw)
    with torch.device("meta"):
        stem = build_stem(config.stem, embed_dim=config.size.embed_dim, in_chans=in_chans)
    return token_grid(stem, img_hw, in_chans=in_chans)


# ------------------------------------------------------------------------------------------------------------ from a file


def _as_paths(path: Files) -> list[Path]:
    return [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]


def _read(path: Files, *, weights: Weights, ours: bool) -> tuple[dict[str, Tensor], str, list[Path]]:
    """(tensors under our names or timm's, format found, files) of one file, or the mean of several."""
    paths = _as_paths(path)
    renamed = to_our_names if ours else to_timm_names
    states, formats = zip(*(renamed(read_state_dict(one, weights=weights)) for one in paths), strict=True)
    return states[0] if len(states) == 1 else average(states), formats[0], paths


def read_state_dict(path: str | Path, *, weights: Weights = "raw") -> dict[str, Tensor]:
    """The tensors of a checkpoint file under the names they have there, on CPU: the raw weights, or their EMA."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint: no file at {path}")
    content = _read_content(path)
    state = content
    if weights == "ema":
        # Ours, the authors', timm's.
        averaged = [content.get("ema"), content.get("model_ema"), content.get("state_dict_ema")]
        kept = next((one for one in averaged if isinstance(one, Mapping)), None)
        if kept is None:
            raise CheckpointError(
                f"checkpoint: {path} holds no averaged weights (EMA), raw ones only; recipe.ema_decay keeps them in training"
            )
        state = kept
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), Mapping):
            state = state[key]
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"checkpoint: {path} holds no state dict (a mapping of names to tensors)")
    return dict(state)


def _read_content(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint: {path} cannot be read as safetensors: {error}") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - damaged files make torch's readers raise anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint: {path} cannot be read as a file of tensors: {first}") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint: {path} holds no state dict (a mapping of names to tensors)")
    return content


def to_our_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The same tensors under this project's names, and which format they came in."""
    state, is_ours = _unwrapped(state)
    if is_ours:
        return state, "eit_lab"
    if any(key.startswith("patch_embed.eit_p.") for key in state):
        return {_rename(key, _AUTHORS): value for key, value in state.items()}, "authors"
    if any(key.startswith("patch_embed.") for key in state):
        return {_rename(key, _TIMM): value for key, value in state.items()}, "timm"
    return dict(state), "eit_lab"


def to_timm_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The same for an architecture of timm, whose names are kept: only what a training wraps around them goes."""
    state, is_ours = _unwrapped(state)
    return state, "eit_lab" if is_ours else "timm"


def _unwrapped(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """Without the names of wrapping modules, and whether our own training wrapped them."""
    # n_averaged: the count that torch's and torchvision's averaged models keep beside the weights.
    state = {key.removeprefix("module."): value for key, value in state.items() if key != "n_averaged"}
    ours = {k.removeprefix(_MODULE_PREFIX): v for k, v in state.items() if k.startswith(_MODULE_PREFIX)}
    return (ours, True) if ours else (dict(state), False)


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in rules:
        key = re.sub(pattern, ours, key)
    return key


def _refuse_mismatch(model: ImageModel, state: Mapping[str, Tensor], source: str, found: str = "") -> None:
    wanted = model.state_dict()
    missing = [f"  missing in the file: {key} {tuple(wanted[key].shape)}" for key in wanted if key not in state]
    unknown = [f"  not in the model: {key} {tuple(state[key].shape)}" for key in state if key not in wanted]
    shapes = [
        f"  shape differs: {key} is {tuple(state[key].shape)} in the file, {tuple(wanted[key].shape)} in the model"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    problems = shapes + missing + unknown
    if problems:
        rest = len(problems) - 20
        listing = "\n".join(problems[:20]) + (f"\n  ... and {rest} more" if rest > 0 else "")
        raise CheckpointError(
            f"checkpoint: {source}{f' ({found} format)' if found else ''} does not fit the model: {len(shapes)} shapes "
            f"differ, {len(missing)} keys are missing, {len(unknown)} are not the model's\n{listing}"
        )
