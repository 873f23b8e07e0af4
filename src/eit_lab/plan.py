"""How a run is cut: epochs into optimizer steps, steps into micro-batches of each device. Arithmetic only, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from eit_lab.config import Config, ConfigError, micro_batches
from eit_lab.runs import DataFacts

_MOST_ANALYSED = 512
_DEFAULT_EVERY = 10
_ANALYSIS_SHARE = 0.01
# Forward passes that an image costs, in training and in an analysis (benchmarks/records/analysis.md).
_TRAINED, _ANALYSED = 3.0, 1.6

# What trainer.compile=auto reckons with on a GPU. ASSUMED, until `python -m eit_lab.bench step` and `bench startup` have put them on
# record there: compiling takes so long with an empty cache; a compiled step saves so much of each MAC of a forward pass (a quarter of
# what an eager one takes: 1,608 images/s of 4.6 GMACs on one H100, nvSubquadratic's benchmark page, beside 8,003 compiled), and of
# each micro-batch at least what its launches cost.
COMPILE_S = 180.0
_SAVED_S_PER_MAC = 3e-14
_SAVED_S_PER_BATCH = 2e-3
_PAYS = 2.0  # compiling must save so many times what it takes


@dataclass(frozen=True, kw_only=True)
class Looks:
    """When a run looks inside its network, and at how many images. The same on any number of processes."""

    every: int
    """Epochs between two; one more comes after the last epoch."""
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The counts of one run on a number of processes. Steps are optimizer steps; they do not depend on the processes."""

    world_size: int
    batch_size: int
    """GLOBAL batch, images."""
    micro_batch: int
    """Images of one device at once."""
    accumulate: int
    """Micro-batches of one device and step."""
    batches_per_epoch: int
    """Micro-batches of one device and epoch, limits taken into account."""
    steps_per_epoch: int
    total_steps: int
    tail: int = 0
    """Images of the last, shorter step of an epoch; 0 where there is none."""
    tail_batches: int = 0
    """Micro-batches of one device in it."""
    looks: Looks | None = None
    """None: never."""

    def images(self, step: int) -> int:
        """Images trained on after so many steps."""
        epochs = step // max(1, self.steps_per_epoch)
        return step * self.batch_size - epochs * (self.batch_size - self.tail if self.tail else 0)

    @property
    def epochs(self) -> int:
        """Epochs begun."""
        return math.ceil(self.total_steps / max(1, self.steps_per_epoch))

    def compile_saves(self, macs: int) -> float:
        """Seconds of each GPU that torch.compile would save in the whole run, of a model of ``macs`` an image.

        Of the whole run, also where a part of it is left: a run that is resumed must decide as it did before.
        """
        by_images = self.images(self.total_steps) / self.world_size * macs * _SAVED_S_PER_MAC
        return max(by_images, self.total_steps * self.accumulate * _SAVED_S_PER_BATCH)

    def compile_pays(self, macs: int) -> bool:
        """Whether that is clearly more than compiling takes."""
        return self.compile_saves(macs) >= _PAYS * COMPILE_S


def plan(config: Config, facts: DataFacts, *, world_size: int = 1) -> Plan:
    """The counts of a run. max_steps alone may go on past the recipe's epochs; with max_epochs the smaller one holds."""
    micro_batch, accumulate = micro_batches(config, world_size=world_size)
    t = config.trainer
    whole, tail = divmod(facts.num_train, config.recipe.batch_size)
    if config.recipe.last_batch == "drop" or t.overfit_batches:
        tail = 0
    steps = whole = whole + (tail > 0)
    limit = t.overfit_batches or t.limit_train_batches
    steps = min(steps, limit) if isinstance(limit, int) else int(steps * limit)
    if steps < 1:
        raise ConfigError(
            f"trainer.limit_train_batches must leave one of the {whole} batches of an epoch, got {limit}; nearest: 1"
        )
    tail = tail if steps == whole else 0
    group = 2 if config.recipe.mixes else 1
    last = count_tail_batches(tail, micro_batch=micro_batch, world_size=world_size, group=group)
    epochs = t.max_epochs or (None if t.max_steps else config.recipe.epochs)
    by_epochs = steps * epochs if epochs else None
    cut = Plan(
        world_size=world_size,
        batch_size=config.recipe.batch_size,
        micro_batch=micro_batch,
        accumulate=accumulate,
        batches_per_epoch=(steps - (tail > 0)) * accumulate + last,
        steps_per_epoch=steps,
        total_steps=min(count for count in (by_epochs, t.max_steps) if count is not None),
        tail=tail,
        tail_batches=last,
    )
    return replace(cut, looks=_looks(config, facts, cut))


def _looks(config: Config, facts: DataFacts, cut: Plan) -> Looks | None:
    """When to look inside. How many images follows from counts and not from a clock, so that all seeds and machines have the same."""
    every, num_images = config.analysis.every_n_epochs, config.analysis.num_images
    if every == 0 or config.trainer.strategy == "fsdp":  # where only the default can have come this far
        return None
    every = every or _DEFAULT_EVERY
    if num_images is None:
        budget = _ANALYSIS_SHARE * _TRAINED * cut.images(cut.total_steps)
        affordable = int(budget / (_ANALYSED * math.ceil(cut.epochs / every)))
        num_images = max(1, min(affordable, facts.num_val, _MOST_ANALYSED))
    elif num_images > facts.num_val:
        raise ConfigError(
            f"analysis.num_images must be at most the {facts.num_val:,} images that are held out of train, got {num_images}; "
            f"nearest: {facts.num_val}"
        )
    return Looks(every=every, num_images=num_images)


def count_tail_batches(tail: int, *, micro_batch: int, world_size: int, group: int) -> int:
    """Micro-batches of one device that the last ``tail`` images of an epoch take, ``group`` of them never parted."""
    groups = math.ceil(math.ceil(tail / group) / world_size)  # of the device that has most
    return math.ceil(groups * group / micro_batch)
