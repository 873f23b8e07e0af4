"""AdamW with decay only where it belongs, and learning rates that fall from block to block for fine-tuning.

Sources: arXiv:2012.12877 (DeiT) for which parameters decay; arXiv:2106.08254 (BEiT) for layer-wise learning-rate decay.
"""

from __future__ import annotations

from typing import Any

import torch

from eit_lab.config import RecipeConfig
from eit_lab.models.backbone import Backbone

Grouping = dict[str, tuple[int, bool]]
"""Parameter name -> (times that the layer decay applies, whether weight decay does)."""
_WRAPPED = "_fsdp_wrapped_module."


def group_parameters(model: Backbone) -> Grouping:
    """Where each parameter belongs. To be asked before a strategy wraps the model: sharded parameters have lost their shape.

    Matrices and convolution kernels decay; biases, norms, CLS token and position embedding do not. With layer decay d the
    head and the last norm learn at lr, block l of L at lr d^(L - l), stem, CLS token and position embedding at lr d^(L + 1).
    """
    spared, depth = model.no_weight_decay(), len(model.blocks)
    return {
        name: (_blocks_above(name, depth=depth), parameter.ndim > 1 and name not in spared)
        for name, parameter in model.named_parameters()
    }


def _blocks_above(name: str, *, depth: int) -> int:
    """How many times the layer decay applies to a parameter."""
    if name.startswith("blocks."):
        return depth - int(name.split(".")[1])
    return 0 if name.startswith(("norm.", "head.")) else depth + 1


def parameter_groups(model: Backbone, grouping: Grouping, recipe: RecipeConfig) -> list[dict[str, Any]]:
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
    model: Backbone, recipe: RecipeConfig, *, grouping: Grouping | None = None, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW at the recipe's peak learning rate, one fused kernel a step where there is one."""
    return torch.optim.AdamW(
        parameter_groups(model, grouping or group_parameters(model), recipe),
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=fused and next(model.parameters()).device.type in ("cpu", "cuda"),
    )
