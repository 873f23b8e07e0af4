"""Position embeddings of another image size made to fit a model: learned ones on a grid, and timm's tables of relative positions.

A learned embedding is interpolated, bicubic and antialiased, the rows of CLS and the like kept (arXiv:2010.11929, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eit_lab.models.backbone import Backbone

Fitted = tuple[dict[str, Tensor], list[str]]
"""Weights, and a note of each kind of change."""


def resize_position(table: Tensor, *, grid: tuple[int, int], to: tuple[int, int], num_prefix_tokens: int = 1) -> Tensor:
    """A position embedding (1, n + h w, D) on another token grid; its n first rows and an equal grid stay to the last bit."""
    if grid == to:
        return table
    prefix, rest = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    image = rest.unflatten(1, grid).permute(0, 3, 1, 2)  # (1, D, h, w)
    resized = F.interpolate(image.float(), size=to, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([prefix, resized.to(table.dtype).permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def fit_backbone(state: Mapping[str, Tensor], model: Backbone, *, grid: tuple[int, int] | None) -> Fitted:
    """Weights under our names; ``grid`` is the (h, w) of tokens that they were trained with, where that is known."""
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
    return fitted, [_note(grid, model.grid)]


def fit_timm(state: Mapping[str, Tensor], model: nn.Module, *, img_hw: tuple[int, int] | None) -> Fitted:
    """Weights under timm's names; ``img_hw`` is the image size in px that they were trained with, where that is known.

    What is made to fit: a learned embedding of the patches, and tables of relative positions in a window (Swin).
    """
    fitted, notes, tables = dict(state), list[str](), 0
    own = model.state_dict()
    for key, table in state.items():
        if key == "pos_embed" and key in own:
            grids = _patch_grids(table, own[key], model, img_hw=img_hw)
            if grids is not None and grids[0] != grids[1]:
                old, new = grids
                num_prefix_tokens = own[key].shape[1] - new[0] * new[1]
                fitted[key] = resize_position(table, grid=old, to=new, num_prefix_tokens=num_prefix_tokens)
                notes.append(_note(old, new))
        elif key.endswith(".relative_position_bias_table") and key in own and table.shape != own[key].shape:
            window: Any = model.get_submodule(key.rpartition(".")[0])
            resized = _resize_offsets(table, rows=len(own[key]), window=window.window_size)
            if resized is not None:
                fitted[key] = resized
                tables += 1
    return fitted, notes + ([f"tables of relative positions resized: {tables}"] if tables else [])


def _resize_offsets(table: Tensor, *, rows: int, window: tuple[int, int]) -> Tensor | None:
    """A table (N, H) of all offsets inside a square window, for another window; rows of no offset (CLS) come last and stay.

    None where N is of no square window.
    """
    to = (2 * window[0] - 1, 2 * window[1] - 1)
    num_others = rows - to[0] * to[1]
    num_offsets = len(table) - num_others
    side = round(max(num_offsets, 0) ** 0.5)
    if num_others < 0 or side * side != num_offsets or side % 2 == 0:
        return None
    offsets = resize_position(table[None, :num_offsets], grid=(side, side), to=to, num_prefix_tokens=0)[0]
    return torch.cat([offsets, table[num_offsets:]])


def _patch_grids(
    table: Tensor, own: Tensor, model: nn.Module, *, img_hw: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """(h, w) of the patches that a table (1, N, D) was made for, and of the model's; None where there is no telling."""
    patches: Any = getattr(model, "patch_embed", None)
    grid_size, patch_size = getattr(patches, "grid_size", None), getattr(patches, "patch_size", None)
    if grid_size is None or patch_size is None or table.ndim != 3 or table.shape[-1] != own.shape[-1]:
        return None
    new = (int(grid_size[0]), int(grid_size[1]))
    num_patches = table.shape[1] - (own.shape[1] - new[0] * new[1])
    side = round(max(num_patches, 0) ** 0.5)
    old = new if table.shape == own.shape else (side, side)
    if img_hw is not None:
        old = (img_hw[0] // patch_size[0], img_hw[1] // patch_size[1])
    return (old, new) if old[0] * old[1] == num_patches else None


def _note(old: tuple[int, int], new: tuple[int, int]) -> str:
    return f"position embedding {old[0]}x{old[1]} -> {new[0]}x{new[1]}"
