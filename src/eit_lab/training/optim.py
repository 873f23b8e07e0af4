"""AdamW with decay only where it belongs, and learning rates that fall from block to block for fine-tuning.

Sources: arXiv:2012.12877 (DeiT) for which parameters decay; arXiv:2106.08254 (BEiT) for layer-wise learning-rate decay. An
architecture of timm says itself which parameters do not decay and in which order its layers lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import nn

from eit_lab.config import ConfigError, RecipeConfig
from eit_lab.models.backbone import Backbone

Grouping = dict[str, tuple[int, bool]]
"""Parameter name -> (times that the layer decay applies, whether weight decay does)."""
_WRAPPED = "_fsdp_wrapped_module."


def group_parameters(model: nn.Module, *, layer_decay: float = 1.0) -> Grouping:
    """Where each parameter belongs. To be asked before a strategy wraps the model: sharded parameters have lost their shape.

    Matrices and convolution kernels decay; biases, norms, CLS token and position embedding do not. With layer decay d the
    head and the last norm learn at lr, block l of L at lr d^(L - l), stem, CLS token and position embedding at lr d^(L + 1).
    For an architecture of timm: ConfigError where ``layer_decay`` is not 1 and it has no order of layers.
    """
    if not isinstance(model, Backbone):
        return _group_timm(model, layer_decay=layer_decay)
    spared, depth = model.no_weight_decay(), len(model.blocks)
    return {
        name: (_blocks_above(name, depth=depth), parameter.ndim > 1 and name not in spared)
        for name, parameter in model.named_parameters()
    }


def _group_timm(model: nn.Module, *, layer_decay: float) -> Grouping:
    """By timm's own no_weight_decay (names, or patterns of names) and group_matcher (names -> place from the stem upwards)."""
    theirs: Any = model
    spared = set(theirs.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    layers: Mapping[str, int] = {}
    if layer_decay != 1:
        if not hasattr(model, "group_matcher"):
            raise ConfigError(
                f"recipe.layer_decay must be 1 for {type(model).__name__} of timm, which has no order of layers, got "
                f"{layer_decay:g}; nearest: 1"
            )
        from timm.models import group_parameters as place_parameters

        layers = place_parameters(model, theirs.group_matcher(coarse=False), reverse=True)
    top = max(layers.values(), default=0)
    return {
        name: (
            top - layers.get(name, top),
            parameter.ndim > 1 and not name.endswith(".bias") and not any(fnmatch(name, one) for one in spared),
        )
        for name, parameter in model.named_parameters()
    }


def _blocks_above(name: str, *, depth: int) -> int:
    """How many times the layer decay applies to a parameter."""
    if name.startswith("blocks."):
        return depth - int(name.split(".")[1])
    return 0 if name.startswith(("norm.", "head.")) else depth + 1


def parameter_groups(model: nn.Module, grouping: Grouping, recipe: RecipeConfig) -> list[dict[str, Any]]:
    """The optimizer's groups, by learning rate from the top down, decaying ones first; without layer decay two of them."""
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        above, decays = grouping[name.replace(_WRAPPED, "")]
        key = (above if recipe.layer_decay != 1 else 0, decays)
        start = {
            "params": [],
            "weight_decay": recipe.weight_decay if decays else 0.0,
            "lr": recipe.lr * recipe.layer_decay ** key[0],
        }
        groups.setdefault(key, start)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def build_optimizer(
    model: nn.Module, recipe: RecipeConfig, *, grouping: Grouping | None = None, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW at the recipe's peak learning rate, one fused kernel a step where there is one."""
    return torch.optim.AdamW(
        parameter_groups(model, grouping or group_parameters(model, layer_decay=recipe.layer_decay), recipe),
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=fused and next(model.parameters()).device.type in ("cpu", "cuda"),
    )
