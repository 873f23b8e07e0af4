"""Weights from files: this project's checkpoints, the authors' (arXiv:2203.07116), and timm's names for plain ViTs.

No file is unpickled freely: torch.load runs with weights_only=True and one safe global, the argparse.Namespace that the
authors' files carry. The format is told by its keys, never by the file's name.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eit_lab.config import ConfigError

_MODULE_PREFIX = "model."  # of the backbone inside this project's LightningModule
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


def load_weights(model: nn.Module, path: str | Path) -> str:
    """Fill a Backbone from a checkpoint file; every weight of the model must be there, with its shape.

    Returns the format found: "eit_lab", "authors" or "timm". Raises CheckpointError, and leaves the model as it was.
    """
    state, found = to_our_names(read_state_dict(path))
    _refuse_mismatch(model, state, path, found)
    model.load_state_dict(state)
    return found


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file under the names they have there, on CPU."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint: no file at {path}")
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
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint: {path} cannot be read as a file of tensors: {first}") from None
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"checkpoint: {path} holds no state dict (a mapping of names to tensors)")
    return dict(content)


def to_our_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The same tensors under this project's names, and which format they came in."""
    state = {key.removeprefix("module."): value for key, value in state.items()}
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


def _refuse_mismatch(model: nn.Module, state: Mapping[str, Tensor], path: str | Path, found: str) -> None:
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
            f"checkpoint: {path} ({found} format) does not fit the model: {len(shapes)} shapes differ, "
            f"{len(missing)} keys are missing, {len(unknown)} are not the model's\n{listing}"
        )
