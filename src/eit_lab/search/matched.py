"""The arms of an experiment at the widths that its ``match`` gives them, before they are searched.

The widths are those of the experiment's own run: nothing that is searched may move a model's budget.
"""

from __future__ import annotations

import dataclasses

from eit_lab.compose import Flags
from eit_lab.config import ConfigError, ModelConfig
from eit_lab.search.request import Request
from eit_lab.sweep.arms import read_sweep
from eit_lab.sweep.matched import match_arms

_MOVES_A_BUDGET = ("model", "data")


def check_match(request: Request) -> None:
    """Raises ConfigError in one line where a key that is searched would move the arms' budgets."""
    if request.declared is None or request.declared.match is None:
        return
    for axis in request.space.axes:
        if axis.key.lstrip("+").replace("/", ".").partition(".")[0] in _MOVES_A_BUDGET:
            raise ConfigError(
                f"{axis.key} cannot be searched with match={request.declared.match}: the arms of "
                f"{request.declared.name} have equal budgets, and it would move them"
            )


def match_request(request: Request, flags: Flags) -> Request:
    """The request, each arm with its matched width; itself where the experiment matches nothing. Prints the table of widths."""
    declared = request.declared
    if declared is None or declared.match is None:
        return request
    overrides = [f"experiment={request.experiment}", *request.space.composed.fixed]
    sweep = match_arms(read_sweep(dataclasses.replace(flags, overrides=overrides, multirun=True)))
    models = {arm: sweep.points[places[0]].config.model for arm, places in sweep.arms().items()}
    arms = []
    for arm in request.space.arms:
        model = models[arm.label]
        width = (f"model.size.embed_dim={model.size.embed_dim}",) if isinstance(model, ModelConfig) else ()
        others = tuple(text for text in arm.overrides if not width or not text.startswith("model.size.embed_dim="))
        arms.append(dataclasses.replace(arm, overrides=(*others, *width)))
    return dataclasses.replace(request, space=dataclasses.replace(request.space, arms=tuple(arms)))
