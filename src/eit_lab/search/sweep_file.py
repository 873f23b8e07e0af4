"""The same search as a W&B sweep: ``wandb sweep FILE``, then ``wandb agent ID`` on as many machines as there are.

What W&B cannot say is said otherwise: a range that does not start at a multiple of its step is a list of its values, arms
become one file each, and several seeds become one more parameter, because a sweep does not average over runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from eit_lab.config import ConfigError, WandbLogger
from eit_lab.runs import write_text
from eit_lab.search.request import Request
from eit_lab.search.space import Arm, Axis

_METHODS = {"tpe": "bayes", "random": "random", "grid": "grid"}
_OURS = ("logger=", "logger.mode=", "seed=", "hydra", "run.")  # what the sweep itself says, or what only a search has


def write_sweep_files(request: Request) -> list[Path]:
    """Write the sweep of every arm; returns the files. Raises ConfigError where they cannot be written."""
    assert request.options.wandb is not None
    path = Path(request.options.wandb)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"wandb must be a YAML file, got {str(path)!r}; nearest: {path.with_suffix('.yaml')}")
    written = []
    for arm in request.space.arms:
        name = "-".join(part for part in (path.stem, _plain(arm.label)) if part)
        target = path.with_name(f"{name}{path.suffix}")
        text = yaml.safe_dump(sweep_config(request, arm, name=name), sort_keys=False, width=10_000)
        try:
            write_text(target, f"# wandb sweep {target.name}\n{text}")
        except OSError as error:
            raise ConfigError(
                f"wandb must be a file that can be written, got {str(target)!r}: {error.strerror}"
            ) from None
        written.append(target)
    return written


def sweep_config(request: Request, arm: Arm, *, name: str) -> dict[str, Any]:
    """The sweep of one arm, as W&B's schema has it."""
    o, space = request.options, request.space
    fixed = [text for text in (*space.composed.fixed, *arm.overrides) if not text.startswith(_OURS)]
    parameters = {axis.key: parameter(axis) for axis in space.axes}
    if len(space.seeds) > 1:
        parameters["seed"] = {"values": list(space.seeds)}
    else:
        fixed.append(f"seed={space.seeds[0]}")
    logger = request.config.logger
    plain: dict[str, Any] = {
        "name": name,
        "project": logger.project if isinstance(logger, WandbLogger) else "eit_lab",
        "program": "eit_lab.train",
        "command": [
            "${env}", "python", "-m", "${program}", *fixed, "logger=wandb", "logger.mode=online", "${args_no_hyphens}",
        ],
        "method": _METHODS[o.sampler],
        "metric": {"name": o.objective, "goal": "maximize" if o.maximize else "minimize"},
        "run_cap": request.trials * len(space.seeds),
        "parameters": parameters,
    }  # fmt: skip
    if o.pruner != "none":  # the one early stop that W&B has
        plain["early_terminate"] = {"type": "hyperband", "min_iter": request.prune_after, "eta": 3}
    return plain


def parameter(axis: Axis) -> Mapping[str, Any]:
    """One searched key."""
    if axis.kind == "choice":
        return {"values": [_typed(text) for text in axis.choices]}
    ends = {"min": _number(axis, axis.low), "max": _number(axis, axis.high)}
    if axis.low == axis.high:
        return {"value": ends["min"]}
    if axis.kind == "int":
        if axis.log:
            return {"distribution": "q_log_uniform_values", "q": 1, **ends}
        if axis.step in (None, 1):
            return {"distribution": "int_uniform", **ends}
    if axis.step is None:
        return {"distribution": "log_uniform_values" if axis.log else "uniform", **ends}
    # W&B rounds to multiples of q: the same numbers only where the range starts at one.
    if abs(axis.low / axis.step - round(axis.low / axis.step)) < 1e-9 and axis.low % axis.step < 1e-9:
        return {"distribution": "q_uniform", "q": _number(axis, axis.step), **ends}
    values = axis.values()
    if values is None:
        raise ConfigError(
            f"{axis.key}: W&B has no range of this start and step, and its list of values would be too long"
        )
    return {"values": [_number(axis, float(value)) for value in values]}


def _number(axis: Axis, value: float) -> int | float:
    return int(value) if axis.kind == "int" else float(value)


def _typed(text: str) -> int | float | str:
    """A choice as a number where it is one; everything else as the word that one types, true and null among them."""
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _plain(label: str) -> str:
    """A label as a part of a file's name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label).strip("-")
