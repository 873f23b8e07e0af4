"""The learning rate of every optimizer step, a pure function of the recipe. No torch.

Two schedules. The default: linear warm-up by step, then one cosine down to ``min_lr`` at the last step. And the published one
(arXiv:2203.07116, the authors' logs; ``recipe.published_lr``): one rate an epoch, an epoch late (epochs 0 and 1 are both at
``warmup_lr``), and the cosine, which counts from epoch 0, is cut into after the warm-up rather than started there.
"""

from __future__ import annotations

import math

from eit_lab.config import RecipeConfig


def learning_rate(step: int, recipe: RecipeConfig, *, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of an optimizer step (0-based)."""
    if recipe.published_lr:
        return published_learning_rate(step // steps_per_epoch, recipe)
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total_steps)
    if step < warmup:
        return recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * progress))


def published_learning_rate(epoch: int, recipe: RecipeConfig) -> float:
    """Learning rate of a whole epoch (0-based) as the authors ran it; equal to their logs to 1e-15."""
    late = max(epoch - 1, 0)
    if late < recipe.warmup_epochs:
        return recipe.warmup_lr + late * (recipe.lr - recipe.warmup_lr) / recipe.warmup_epochs
    return recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (1 + math.cos(math.pi * late / recipe.epochs))
