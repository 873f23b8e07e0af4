"""Arms of equal budget: the width at which a model comes nearest to another's parameters or MACs.

The number of heads stays, their width varies: widths are the multiples of ``num_heads``. Both counts are exact integers, of
the model built on the meta device (cost.py), and grow with the width, so the two widths on either side of the wanted budget are found by search.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import cache
from typing import Literal

from eit_lab.config import ConfigError, ImageSize, ModelConfig
from eit_lab.models.cost import Cost, count_cost

Budget = Literal["params", "macs"]
_GUESSES = 6
_WIDEST = 1 << 17  # channels; no model of this project's kind is near it


def match_width(
    config: ModelConfig,
    *,
    budget: Budget,
    target: int,
    num_classes: int,
    img_size: ImageSize,
    in_chans: int = 3,
) -> tuple[ModelConfig, Cost]:
    """The same model at the width whose ``budget`` is nearest to ``target``, and its cost; of two as near, the smaller.

    Raises ConfigError where no width can be had.
    """

    @cache
    def at(head_dim: int) -> tuple[ModelConfig, Cost] | None:
        """None for a width that the rest of the model does not allow: below the attention widths of rule custom."""
        try:
            size = dataclasses.replace(config.size, embed_dim=head_dim * config.size.num_heads)
            model = dataclasses.replace(config, size=size)
        except ValueError:
            return None
        return model, count_cost(model, num_classes=num_classes, img_size=img_size, in_chans=in_chans)

    def count(head_dim: int) -> int:
        found = at(head_dim)
        return 0 if found is None else int(getattr(found[1], budget))

    # count(low) < target < count(high). Budgets grow about as the square of the width, which gives the first few tries;
    # halving and doubling end it whatever they do.
    low: int = 0
    high: int | None = None
    here = config.size.embed_dim // config.size.num_heads
    for tries in itertools.count(1):
        if here * config.size.num_heads > _WIDEST:
            raise ConfigError(
                f"match={budget}: {config.name} has no width of up to {_WIDEST:,} channels with {target:,} {budget}"
            )
        found = count(here)
        if found == target:
            low = high = here
            break
        low, high = (low, here) if found > target else (here, high)
        if high is not None and high - low == 1:
            break
        guess = round(here * math.sqrt(target / found)) if found and tries <= _GUESSES else None
        here = _between(low, high, guess)
    candidates = [known for known in map(at, {low, high} - {0, None}) if known is not None]
    return min(candidates, key=lambda known: (abs(int(getattr(known[1], budget)) - target), known[1].params))


def _between(low: int, high: int | None, guess: int | None) -> int:
    """A number above low and below high, the guess where it is one; in the middle, or twice low, where there is no guess."""
    if high is None:
        return max(guess or 2 * low, low + 1)
    return min(max(guess or (low + high) // 2, low + 1), high - 1)
