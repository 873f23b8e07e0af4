"""What a configuration amounts to, drawn before anything is trained: ``debug=schedule`` and ``debug=batches``.

schedule: the learning rate of every epoch, the default and the published one, beside the authors' logs. No torch.
batches: some images of the first training steps as the network gets them, and their targets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eit_lab.config import Config, ConfigError, RecipeConfig
from eit_lab.learning_rate import learning_rate, published_learning_rate
from eit_lab.plan import Plan, plan
from eit_lab.published import curve
from eit_lab.report.figure import COLOURS, INK, save_figure
from eit_lab.runs import DataFacts

if TYPE_CHECKING:
    from torch import Tensor

    from eit_lab.data.batch import Batch

_POINTS = 2000  # of the curve by step: two for each pixel of the figure
_CLOSE_UP = 10  # epochs that are drawn once more, larger: the warm-up, and where the cosine sets in
_STEPS, _IMAGES = 4, 8  # optimizer steps that are shown, and images of each


def show(config: Config, facts: DataFacts) -> int:
    """Draw what ``run.show`` asks for into run.root/show/, print the numbers and where it is; returns the exit status."""
    if config.run.show == "batches":
        figure, lines = _batches(config, facts)
    else:
        counts = plan(config, facts)
        figure, lines = schedule_figure(config, counts), schedule_lines(config.recipe, counts)
    arm = f"{config.model.name}-{config.data.name}-{config.recipe.name}"
    stem = Path(config.run.root) / "show" / f"{config.run.show}-{arm}"
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, stem)
    except OSError as error:
        raise ConfigError(
            f"run.root must be a folder that can be written, got {config.run.root!r}: {error.strerror}"
        ) from None
    print("\n".join([*lines, f"{stem}.png", f"{stem}.svg"]))
    return 0


def _title(config: Config) -> str:
    return f"{config.model.name} on {config.data.name}, recipe {config.recipe.name}"


# ------------------------------------------------------------------------------------------------------------- schedule


def schedule_lines(recipe: RecipeConfig, counts: Plan) -> list[str]:
    """The numbers of the schedule that this configuration runs."""
    total, per_epoch = counts.total_steps, counts.steps_per_epoch
    rates = [learning_rate(step, recipe, steps_per_epoch=per_epoch, total_steps=total) for step in range(total)]
    peak = int(np.argmax(rates))
    kind = "as published, one an epoch" if recipe.published_lr else "by step"
    return [
        f"learning rate {kind}: first {rates[0]:g}, peak {rates[peak]:g} at step {peak:,}, last {rates[-1]:g}",
        f"warm-up: {recipe.warmup_epochs:g} epochs from {recipe.warmup_lr:g} to {recipe.lr:g}; cosine to {recipe.min_lr:g}",
        f"{per_epoch:,} steps of {recipe.batch_size} images an epoch; {total:,} steps, {total / per_epoch:g} epochs in all",
    ]


def schedule_figure(config: Config, counts: Plan) -> Figure:
    """Left: the whole training. Right, of a long one: its first epochs. What this configuration runs is the bold line."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    panels = [counts.epochs, _CLOSE_UP] if counts.epochs > _CLOSE_UP else [counts.epochs]
    row = figure.subplots(1, len(panels), width_ratios=(1.4, 1)[: len(panels)], squeeze=False)[0]
    for axes, last in zip(row, panels, strict=True):
        _draw_schedules(axes, config.recipe, counts, last=last)
        axes.set_xlabel("epoch")
        peak = max(config.recipe.lr, config.recipe.warmup_lr)
        axes.set_ylim(-0.025 * peak, 1.05 * peak)  # the first rates are next to nothing, and are to be seen
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    row[0].set_ylabel("learning rate")
    row[0].legend(frameon=False, fontsize=9, loc="upper right")
    for axes in row[1:]:
        axes.set_title("the first epochs", fontsize=10)
    figure.suptitle(f"{_title(config)}: {counts.epochs} epochs of {counts.steps_per_epoch:,} steps", fontsize=11)
    return figure


def _draw_schedules(axes: Axes, recipe: RecipeConfig, counts: Plan, *, last: int) -> None:
    per_epoch, total = counts.steps_per_epoch, counts.total_steps
    steps = np.unique(np.linspace(0, min(last * per_epoch, total - 1), _POINTS + 1).astype(int))
    default = replace(recipe, published_lr=False)
    by_step = [learning_rate(s, default, steps_per_epoch=per_epoch, total_steps=total) for s in steps.tolist()]
    by_epoch = [published_learning_rate(epoch, recipe) for epoch in range(last)]
    styles: list[dict[str, Any]] = [{"lw": 2.4, "zorder": 3}, {"lw": 1.2, "ls": "--", "zorder": 2}]
    labels = ["{} (this run)", "{}"]
    if recipe.published_lr:
        styles.reverse()
        labels.reverse()
    axes.plot(steps / per_epoch, by_step, color=COLOURS[0], label=labels[0].format("by step"), **styles[0])
    edges = np.arange(last + 1)
    axes.stairs(by_epoch, edges, baseline=None, color=COLOURS[1], label=labels[1].format("as published"), **styles[1])
    if recipe.reference is not None:
        logged = [row for row in curve(recipe.reference) if row.epoch < last][:: max(1, last // 60)]
        places, rates = [row.epoch + 0.5 for row in logged], [row.train_lr for row in logged]
        label = f"authors' log of EIT-{recipe.reference.title()}"
        axes.scatter(places, rates, s=9, color=INK, linewidths=0, zorder=4, label=label)
    axes.set_xlim(0, last)


# -------------------------------------------------------------------------------------------------------------- batches


def _batches(config: Config, facts: DataFacts) -> tuple[Figure, list[str]]:
    from eit_lab.data.augment import BatchAugment
    from eit_lab.data.module import ImageData

    data = ImageData(config)
    data.setup("fit")
    augment = BatchAugment(config.data, config.recipe, num_classes=facts.num_classes, seed=config.seed)
    counts = plan(config, facts)
    batches = iter(data.train_dataloader().sampler)
    rows, lines = [], list[str]()
    for _ in range(min(_STEPS, counts.steps_per_epoch)):
        items = [item for batch in islice(batches, counts.accumulate) for item in batch]
        # Images and their partners, spread over the step: those of one group are all mixed in the same way.
        pairs = max(1, min(len(items), _IMAGES) // 2)
        firsts = [2 * (k * (len(items) // 2) // pairs) for k in range(pairs)]
        batch: Batch = data.part("train")[[item for first in firsts for item in items[first : first + 2]]]
        images, targets = augment(batch)
        lines += [f"left out: {reason}" for _, reason in batch.unread]
        rows.append((_pictures(images, config), _target_texts(targets, config, facts, data.class_names)))
    recipe = config.recipe
    shown = sum(len(texts) for _, texts in rows)
    lines.insert(
        0,
        f"{shown} images, from the first {len(rows)} of {counts.steps_per_epoch:,} steps of an epoch; "
        f"{recipe.batch_size} images a step, of {math.ceil(recipe.batch_size / recipe.repeated_augment)} samples",
    )
    return batches_figure(rows, config), lines


def batches_figure(rows: list[tuple[NDArray[np.float32], list[str]]], config: Config) -> Figure:
    """A row of images for each step: (images (B, h, w, 3 or none) in [0, 1], text above each)."""
    columns = max(len(texts) for _, texts in rows)
    h, w = rows[0][0].shape[1:3]
    figure = Figure(
        figsize=(max(5, 1.3 * columns + 0.3), len(rows) * (1.22 * h / w + 0.24) + 0.5), layout="constrained"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for step, ((images, texts), axes_row) in enumerate(zip(rows, grid, strict=True)):
        for axes, image, text in zip(axes_row, images, texts, strict=True):
            axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axes.set_title(text, fontsize=7, pad=2.5)
        for axes in axes_row:
            axes.set_xticks([])
            axes.set_yticks([])
        axes_row[0].set_ylabel(f"step {step}", fontsize=8)
    smoothing = config.recipe.label_smoothing
    note = f"class and share; labels are smoothed by {smoothing:g} on top" if smoothing else "class and share"
    figure.suptitle(f"{_title(config)}\n{note}", fontsize=9)
    return figure


def _pictures(images: Tensor, config: Config) -> NDArray[np.float32]:
    """Normalised (B, C, H, W) to what a screen shows: (B, H, W, 3), or (B, H, W) of the first channel, in [0, 1]."""
    mean, std = (np.asarray(values, dtype=np.float32) for values in (config.data.mean, config.data.std))
    pixels: NDArray[np.float32] = np.clip(images.numpy().transpose(0, 2, 3, 1) * std + mean, 0, 1)
    return pixels if pixels.shape[-1] == 3 else pixels[..., 0]


def _target_texts(targets: Tensor, config: Config, facts: DataFacts, class_names: Sequence[str] | None) -> list[str]:
    """``class: share`` of each class in each target, the smoothing taken off again."""
    names = class_names or [str(label) for label in range(facts.num_classes)]
    if targets.ndim == 1:
        return [names[label] for label in targets.tolist()]
    smoothing = config.recipe.label_smoothing
    apart = ", " if class_names is None else "\n"
    shares = (targets.numpy() - smoothing / facts.num_classes) / (1 - smoothing)
    return [
        apart.join(f"{names[label]}: {row[label]:.0%}" for label in np.argsort(-row)[:2] if row[label] >= 0.005)
        for row in shares
    ]
