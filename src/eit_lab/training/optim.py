"""AdamW with decay only where it belongs, and the learning rate of every step.

Source: arXiv:2012.12877 (DeiT) for which parameters decay; the schedule is linear warm-up, then one cosine.
"""

from __future__ import annotations

import math

import torch

from eit_lab.config import RecipeConfig
from eit_lab.models.backbone import Backbone


def parameter_groups(model: Backbone, *, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and convolution kernels decay; biases, norms, CLS token and position embedding do not."""
    spared = model.no_weight_decay()
    decay: list[torch.nn.Parameter] = []
    no_decay: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (no_decay if parameter.ndim <= 1 or name in spared else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]


def build_optimizer(model: Backbone, recipe: RecipeConfig, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW at the recipe's peak learning rate, one fused kernel a step where there is one."""
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay=recipe.weight_decay),
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=fused and next(model.parameters()).device.type in ("cpu", "cuda"),
    )


def learning_rate(step: int, recipe: RecipeConfig, *, steps_per_epoch: float, total_steps: int) -> float:
    """Learning rate of an optimizer step (0-based): warmup_lr -> lr linearly, then lr -> min_lr along a cosine."""
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total_steps)
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * progress))
