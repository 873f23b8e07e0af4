"""AdamW with decay only where it belongs, and learning rates that fall from block to block for fine-tuning.

Sources: arXiv:2012.12877 (DeiT) for which parameters decay; arXiv:2106.08254 (BEiT) for layer-wise learning-rate decay.
"""

from __future__ import annotations

from typing import Any

import torch

from eit_lab.config import RecipeConfig
from eit_lab.models.backbone import Backbone


def parameter_groups(
    model: Backbone, *, weight_decay: float, lr: float, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Groups by (learning rate, decay or not), in the model's own order.

    Matrices and convolution kernels decay; biases, norms, CLS token and position embedding do not. With ``layer_decay`` d
    the head and the last norm learn at lr, block l of L at lr d^(L - l), stem, CLS token and position embedding at lr d^(L + 1).
    """
    spared = model.no_weight_decay()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        below = _blocks_above(name, depth=len(model.blocks)) if layer_decay != 1 else 0
        decays = parameter.ndim > 1 and name not in spared
        group = groups.setdefault(
            (below, decays),
            {"params": [], "weight_decay": weight_decay if decays else 0.0, "lr": lr * layer_decay**below},
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], not key[1]))]


def _blocks_above(name: str, *, depth: int) -> int:
    """How many times the layer decay applies to a parameter."""
    if name.startswith("blocks."):
        return depth - int(name.split(".")[1])
    return 0 if name.startswith(("norm.", "head.")) else depth + 1


def build_optimizer(model: Backbone, recipe: RecipeConfig, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW at the recipe's peak learning rate, one fused kernel a step where there is one."""
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay=recipe.weight_decay, lr=recipe.lr, layer_decay=recipe.layer_decay),
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=fused and next(model.parameters()).device.type in ("cpu", "cuda"),
    )
