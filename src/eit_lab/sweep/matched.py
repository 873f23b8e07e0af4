"""Arms of equal budget: ``match=params`` or ``match=macs`` gives each the width that comes nearest to the reference arm's.

The arithmetic is models/matching.py's, in a process that knows torch; here the widths are laid over the sweep's configs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from eit_lab.config import Config, ModelConfig
from eit_lab.data.prepare import prepare
from eit_lab.loading import dump
from eit_lab.runs import DataFacts
from eit_lab.sweep.arms import Sweep
from eit_lab.sweep.probe import Probe
from eit_lab.sweep.table import text_table


def match_arms(
    sweep: Sweep, *, probe: Probe | None = None, describe: Callable[[Config], DataFacts] = prepare, quiet: bool = False
) -> Sweep:
    """The sweep with its arms matched, and a table of what that took; itself where nothing is to be matched.

    ``describe`` says how many classes a config's data have; ``quiet``: no table. Raises ConfigError where a data set is not there, RunError where a width cannot be had.
    """
    budget, reference = sweep.declaration.match, sweep.reference
    if budget is None or reference is None:
        return sweep
    if probe is None:
        with Probe() as probe:
            return match_arms(sweep, probe=probe, describe=describe, quiet=quiet)
    counted = probe.cost(reference, num_classes=describe(reference).num_classes)
    target = counted[budget]
    points, rows = list(sweep.points), []
    for arm, places in sweep.arms().items():
        config = points[places[0]].config
        num_classes = describe(config).num_classes
        model = config.model
        if not isinstance(model, ModelConfig):
            cost, width = probe.cost(config, num_classes=num_classes), "fixed by name"
        elif _is_same(config, reference):
            cost, width = counted, f"{model.size.embed_dim}"
        else:
            cost = probe.match(config, num_classes=num_classes, budget=budget, target=target)
            width = f"{model.size.embed_dim} -> {cost['embed_dim']}"
            size = dataclasses.replace(model.size, embed_dim=cost["embed_dim"])
            for place in places:
                matched = dataclasses.replace(points[place].config, model=dataclasses.replace(model, size=size))
                points[place] = dataclasses.replace(points[place], config=matched)
        rows.append((arm, width, f"{cost['params']:,}", f"{cost['macs']:,}", f"{cost[budget] / target - 1:+.2%}"))
    if quiet:
        return dataclasses.replace(sweep, points=points)
    name = reference.run.arm or sweep.declaration.reference or sweep.declaration.baseline
    print(f"arms matched in {budget} to {name} ({target:,}):")
    print(text_table(("arm", "width", "parameters", "MACs", budget), rows))
    return dataclasses.replace(sweep, points=points)


def _is_same(config: Config, reference: Config) -> bool:
    return dump(config.model) == dump(reference.model) and config.data == reference.data
