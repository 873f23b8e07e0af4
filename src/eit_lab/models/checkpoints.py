"""Weights from files: this project's checkpoints, the authors' (arXiv:2203.07116), and timm's names for plain ViTs.

No file is unpickled freely: torch.load runs with weights_only=True and one safe global, the argparse.Namespace that the
authors' files carry. The format is told by its keys, never by the file's name.

A learned position embedding of another token grid is interpolated, bicubic and antialiased, its CLS row kept
(arXiv:2010.11929, section 3.2). Several files are one model: the mean of their weights in float64 (arXiv:1803.05407).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from eit_lab.config import ConfigError, ImageSize, ModelConfig, as_hw
from eit_lab.finetune import origin_of, resolve
from eit_lab.loading import load_model
from eit_lab.models.backbone import Backbone
from eit_lab.models.stem import build_stem, token_grid

Weights: TypeAlias = Literal["raw", "ema"]
Files: TypeAlias = str | Path | Sequence[str | Path]

_MODULE_PREFIX = "model."  # of the backbone inside this project's LightningModule
_HEAD = ("head.weight", "head.bias")
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


def load_weights(model: Backbone, path: Files, *, weights: Weights = "raw") -> str:
    """Fill a Backbone from a checkpoint file, or with the mean of several; every weight of the model must be there.

    A position embedding of another grid is interpolated; all other shapes must be the model's. Returns the format found:
    "eit_lab", "authors" or "timm". Raises CheckpointError, and leaves the model as it was.
    """
    state, found, where = _read(path, weights=weights)
    state, _ = _fit_position(state, model, grid=_grid_of(where[0]))
    _refuse_mismatch(model, state, ", ".join(map(str, where)), found)
    model.load_state_dict(state)
    return found


def start_from(model: Backbone, path: str | Path, *, weights: Weights = "raw") -> list[str]:
    """Fill a Backbone for fine-tuning, from a run folder or a file; returns what a summary should say of it.

    A classifier with another number of classes stays as the model was initialised; see ``adapt``.
    """
    file = resolve(path)
    state, found, _ = _read(file, weights=weights)
    adapted, notes = adapt(state, model, grid=_grid_of(file), source=f"{file} ({found} format)")
    model.load_state_dict(adapted)
    return [f"{'averaged (EMA)' if weights == 'ema' else 'raw'} weights of {file} ({found} format)", *notes]


def load_backbone(
    config: ModelConfig,
    path: Files,
    *,
    img_size: ImageSize,
    in_chans: int = 3,
    num_classes: int | None = None,
    weights: Weights = "raw",
) -> Backbone:
    """A Backbone of a checkpoint's weights, in evaluation mode; ``num_classes`` null: as many as the file's classifier has."""
    if num_classes is None:
        num_classes = count_classes(path)
    model = Backbone(config, num_classes=num_classes, img_size=img_size, in_chans=in_chans)
    load_weights(model, path, weights=weights)
    return model.eval()


def count_classes(path: Files) -> int:
    """Rows of the classifier in a checkpoint file, or in the first of several."""
    state, _, where = _read(_as_paths(path)[0], weights="raw")
    if "head.weight" not in state:
        raise CheckpointError(f"checkpoint: {where[0]} has no classifier (head.weight)")
    return len(state["head.weight"])


def adapt(
    state: Mapping[str, Tensor], model: Backbone, *, grid: tuple[int, int] | None = None, source: str = "the file"
) -> tuple[dict[str, Tensor], list[str]]:
    """(weights that fit the model, what became of them) for a state dict under our names.

    A classifier with another number of classes is taken from the model as it is; a position embedding of another token grid
    is interpolated. ``grid`` is the (h, w) it was made for, where that is known; else it must be square. Raises
    CheckpointError with keys and shapes for anything else that does not fit.
    """
    adapted, notes = dict(state), []
    old = len(state["head.weight"]) if "head.weight" in state else 0
    if old != model.num_classes:
        own = model.state_dict()
        for key in _HEAD:
            adapted.pop(key, None)
            if key in own:
                adapted[key] = own[key]
        notes.append(f"classifier anew: {old} -> {model.num_classes} classes ({', '.join(_HEAD)})")
    else:
        notes.append(f"classifier kept: {old} classes")
    adapted, resized = _fit_position(adapted, model, grid=grid)
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


def resize_position(table: Tensor, *, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """A position embedding (1, 1 + h w, D) on another token grid; the CLS row and an equal grid stay to the last bit."""
    if grid == to:
        return table
    image = table[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, h, w)
    resized = F.interpolate(image.float(), size=to, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([table[:, :1], resized.to(table.dtype).permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _fit_position(
    state: Mapping[str, Tensor], model: Backbone, *, grid: tuple[int, int] | None
) -> tuple[dict[str, Tensor], list[str]]:
    fitted = dict(state)
    table, own = state.get("pos_embed"), model.pos_embed
    if own is None or table is None or table.ndim != 3 or table.shape[-1] != own.shape[-1]:
        return fitted, []
    num_tokens = table.shape[1] - 1
    if grid is None or grid[0] * grid[1] != num_tokens:
        side = round(num_tokens**0.5)
        if table.shape == own.shape:
            grid = model.grid
        elif side * side == num_tokens:
            grid = (side, side)
        else:
            return fitted, []  # no telling how its tokens lie: a mismatch
    if grid == model.grid:
        return fitted, []
    fitted["pos_embed"] = resize_position(table, grid=grid, to=model.grid)
    return fitted, [f"position embedding {grid[0]}x{grid[1]} -> {model.grid[0]}x{model.grid[1]}"]


def _grid_of(path: Path) -> tuple[int, int] | None:
    """(h, w) of the tokens that a checkpoint was trained with, where its run folder or its metadata tell; else None."""
    origin = origin_of(path)
    if origin is None:
        return None
    img_size = origin.img_size if isinstance(origin.img_size, int) else (origin.img_size[0], origin.img_size[1])
    config = load_model(origin.model).for_images(img_size)
    with torch.device("meta"):
        stem = build_stem(config.stem, embed_dim=config.size.embed_dim, in_chans=origin.in_chans)
    return token_grid(stem, as_hw(img_size), in_chans=origin.in_chans)


# ------------------------------------------------------------------------------------------------------------ from a file


def _as_paths(path: Files) -> list[Path]:
    return [Path(path)] if isinstance(path, str | Path) else [Path(one) for one in path]


def _read(path: Files, *, weights: Weights) -> tuple[dict[str, Tensor], str, list[Path]]:
    """(tensors under our names, format found, files) of one file, or the mean of several."""
    paths = _as_paths(path)
    states, formats = zip(*(to_our_names(read_state_dict(one, weights=weights)) for one in paths), strict=True)
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
    # n_averaged: the count that torch's and torchvision's averaged models keep beside the weights.
    state = {key.removeprefix("module."): value for key, value in state.items() if key != "n_averaged"}
    if any(key.startswith(_MODULE_PREFIX) for key in state):
        ours = {k.removeprefix(_MODULE_PREFIX): v for k, v in state.items() if k.startswith(_MODULE_PREFIX)}
        return ours, "eit_lab"
    if any(key.startswith("patch_embed.eit_p.") for key in state):
        return {_rename(key, _AUTHORS): value for key, value in state.items()}, "authors"
    if any(key.startswith("patch_embed.") for key in state):
        return {_rename(key, _TIMM): value for key, value in state.items()}, "timm"
    return dict(state), "eit_lab"


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, ours in rules:
        key = re.sub(pattern, ours, key)
    return key


def _refuse_mismatch(model: Backbone, state: Mapping[str, Tensor], source: str, found: str = "") -> None:
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
