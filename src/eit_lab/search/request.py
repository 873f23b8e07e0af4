"""What a command asks for: the options of the search itself, apart from the overrides that it shares with train. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic.dataclasses import dataclass

from eit_lab.compose import Flags, OpenSpace
from eit_lab.config import _CHECKED, Config, ConfigError, NonNegInt, PosInt, Text, _opt
from eit_lab.declaration import PLAIN_NAME, Declaration, check_arm, find_experiment, override_key, read_experiment
from eit_lab.loading import load_part, nearest
from eit_lab.search.space import SearchSpace, read_space

_METRICS = tuple(f"val/{name}{suffix}" for name in ("acc1", "acc5", "loss") for suffix in ("", "_ema"))
# What an override can begin with besides: a word that is none of these and close to an option is a typo of it.
_CONFIG_KEYS = (
    "seed", "checkpoint", "checkpoint_weights", "model", "data", "recipe", "trainer", "analysis", "logger", "run",
    "debug", "experiment", "hydra",
)  # fmt: skip
# Distributions as other tools write them, and what they are here.
_FOREIGN = re.compile(r"(log|loguniform|log_uniform|uniform|int|quniform|logspace)\(([^()]*)\)")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class SearchOptions:
    """The search's own keys."""

    trials: PosInt | None = _opt(None, "trials of every arm; null: 20, or with sampler=grid the whole grid")
    name: Text | None = _opt(None, "name of the search's folder; null: a hash of what is searched")
    objective: Text = _opt("val/acc1", "what is searched for: a metric of the held-out slice of the training images")
    at: Literal["best", "last"] | None = _opt(
        None, "epoch whose objective is a run's value, best or last; null: as recipe.select chooses the weights"
    )
    direction: Literal["maximize", "minimize"] | None = _opt(None, "maximize or minimize; null: a loss is minimized")
    sampler: Literal["tpe", "random", "grid"] = _opt("tpe", "what says which trial comes next: tpe, random, grid")
    sampler_seed: NonNegInt = _opt(0, "seed of the sampler, the same for every arm")
    startup: PosInt = _opt(10, "trials of every arm that sampler=tpe draws at random before it models them")
    trials_at_once: PosInt | None = _opt(
        None, "most trials at work at once; null: as many as the machine has room for, 8 on a cluster"
    )
    pruner: Literal["none", "median", "hyperband"] = _opt("none", "what stops a trial early: none, median, hyperband")
    prune_after: PosInt | None = _opt(None, "epochs after which a trial is first judged; null: a third of them")
    per: tuple[Text, ...] = _opt(
        (), "keys whose values are arms: each is searched apart, with the same trials; arms: a declared experiment's"
    )
    arms: tuple[Text, ...] | None = _opt(None, "only these arms of the experiment that per=arms searches")
    space: Text | None = _opt(None, "YAML file with overrides and options, one a line; the command line goes over it")
    wandb: Text | None = _opt(None, "write the same search as a W&B sweep into this file, and run nothing")

    def __post_init__(self) -> None:
        if self.arms is not None and not self.arms:
            raise ValueError("arms must name one arm at least, got []; nearest: leave it out")
        if self.name is not None and not PLAIN_NAME.fullmatch(self.name):
            raise ValueError(f"name must be a plain file name (letters, digits, - _ .), got {self.name!r}")
        if self.objective.startswith("test/"):
            ours = self.objective.replace("test/", "val/", 1)
            close = ours if ours in _METRICS else "val/acc1"
            raise ValueError(
                "objective must be a metric of the held-out slice of the training images: the test set gives the final "
                f"number only, got {self.objective!r}; nearest: {close}"
            )
        if self.objective not in _METRICS:
            raise ValueError(
                f"objective must be one of {', '.join(_METRICS)}, got {self.objective!r}"
                f"{nearest(self.objective, _METRICS)}"
            )

    @property
    def maximize(self) -> bool:
        """Whether more is better."""
        if self.direction is not None:
            return self.direction == "maximize"
        return not self.objective.startswith("val/loss")


OPTIONS = tuple(field.name for field in dataclasses.fields(SearchOptions))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A search, all of it checked and nothing of it started."""

    options: SearchOptions
    space: SearchSpace
    config: Config
    """Of the space's first corner and the first arm: what all runs have in common."""
    at: Literal["best", "last"]
    trials: int
    """Of every arm."""
    epochs: int | None
    """Of a trial; None where they are not the same for all."""
    prune_after: int
    experiment: str | None = None
    declared: Declaration | None = None
    """The declared experiment whose arms are searched, as it was named and as it says."""


def read_request(flags: Flags) -> Request:
    """The search of a command line. Raises ConfigError in one line for whatever is wrong with it or with a corner of it."""
    overrides, options = take_options(flags.overrides)
    name, declared, overrides = _declared(overrides, options)
    composed = OpenSpace(overrides, config_name=flags.config_name, config_dirs=flags.config_dirs)
    arms = (
        {label: (*declared.base, *declared.arms[label]) for label in _wanted(declared, options)} if declared else None
    )
    per = () if declared else options.per
    space = read_space(composed, per=per, arms=_typed_goes_over(arms, overrides) if arms is not None else None)
    space.check()
    return dataclasses.replace(_complete(options, space), experiment=name, declared=declared)


def _complete(options: SearchOptions, space: SearchSpace) -> Request:
    corners = [config for arm in space.arms for config in space.configs(arm, _few(space), space.seeds[0])]
    config = corners[0]
    _refuse_what_no_search_has(config)
    if options.objective.endswith("_ema") and any(corner.recipe.ema_decay is None for corner in corners):
        raise ConfigError(
            f"objective={options.objective} needs averaged weights (recipe.ema_decay) in every trial; "
            f"nearest: {options.objective.removesuffix('_ema')}"
        )
    lengths = {_length(corner) for corner in corners}
    epochs = config.trainer.max_epochs or config.recipe.epochs
    _check_pruner(options, config, epochs, same=len(lengths) == 1)
    return Request(
        options=options,
        space=space,
        config=config,
        at=options.at or config.recipe.select,
        trials=_count_trials(options, space),
        epochs=epochs if len(lengths) == 1 and config.trainer.max_steps is None else None,
        prune_after=options.prune_after or max(1, -(-epochs // 3)),
    )


def _check_pruner(options: SearchOptions, config: Config, epochs: int, *, same: bool) -> None:
    if options.pruner == "none":
        if options.prune_after is not None:
            raise ConfigError(f"prune_after={options.prune_after} needs pruner=median or pruner=hyperband")
        return
    if not same:
        raise ConfigError(
            f"pruner={options.pruner} compares trials at the same epoch, and these differ in how long they train; "
            "nearest: none"
        )
    if config.trainer.max_steps is not None:
        raise ConfigError(
            f"pruner={options.pruner} counts in epochs, and trainer.max_steps={config.trainer.max_steps} ends a trial "
            "within one; nearest: trainer.max_steps=null"
        )
    if (options.prune_after or 1) >= epochs:
        raise ConfigError(
            f"prune_after must be below the {epochs} epochs of a trial, got {options.prune_after or 1}; "
            f"nearest: {'pruner=none' if epochs == 1 else epochs - 1}"
        )


def _few(space: SearchSpace) -> list[dict[str, Any]]:
    start = space.start()
    return [{**start, axis.key: value} for axis in space.axes for value in axis.corners()]


def _length(config: Config) -> tuple[Any, ...]:
    t = config.trainer
    return t.max_epochs or config.recipe.epochs, t.max_steps, t.limit_train_batches, t.check_val_every_n_epoch


def _refuse_what_no_search_has(config: Config) -> None:
    if config.run.overwrite:
        raise ConfigError("run.overwrite must be false: a search goes on where it was, and name=OTHER starts a new one")
    if config.run.show is not None:
        raise ConfigError(f"debug={config.run.show} draws and trains nothing; leave it out of a search")
    if config.run.sweep is not None:
        raise ConfigError(f"run.sweep is set by the search; its name is name=, got {config.run.sweep!r}")


def _count_trials(options: SearchOptions, space: SearchSpace) -> int:
    if options.sampler != "grid":
        return options.trials or 20
    size = 1
    for axis in space.axes:
        values = axis.values()
        if values is None:
            raise ConfigError(
                f"sampler=grid needs a list of values for every key, and {axis.key} has an interval; "
                "nearest: range(low,high,step) or choice(...)"
            )
        size *= len(values)
    return min(size, options.trials or size)


# ------------------------------------------------------------------------------------------------------- words to options


def take_options(words: Sequence[str]) -> tuple[list[str], SearchOptions]:
    """A command line's overrides, and the search's own options. Those of the file ``space=FILE`` come first."""
    typed = [text.partition("=") for text in words]
    files = [value for key, _, value in typed if key == "space"]
    words = [*(_from_file(Path(files[-1])) if files else ()), *words]
    rest, plain = [], {}
    for text in words:
        key, equals, value = text.partition("=")
        if key in OPTIONS and equals:
            plain[key] = _list(value) if key in ("per", "arms") else _scalar(value)
            continue
        _refuse_typo(key, value)
        rest.append(_translated(text))
    options: SearchOptions = load_part(SearchOptions, plain, prefix="")
    return rest, options


def _refuse_typo(key: str, value: str) -> None:
    if not key.isidentifier() or key in _CONFIG_KEYS:
        return
    close = difflib.get_close_matches(key, [*OPTIONS, *_CONFIG_KEYS], n=1, cutoff=0.5)
    found = f"nearest: {close[0]}" if close else f"there are: {', '.join(OPTIONS)}, and train's keys"
    raise ConfigError(f"{key} is not a key, got {value!r}; {found}")


def _translated(text: str) -> str:
    """The override, unless its value is a distribution of another tool: one line with how it is written here."""
    key, _, value = text.partition("=")
    found = _FOREIGN.fullmatch(value.strip())
    if found is None:
        return text
    name, inner = found.groups()
    ours = f"interval({inner})"
    ours = f"int({ours})" if name == "int" else f"tag(log,{ours})" if name.startswith("log") else ours
    raise ConfigError(f"{text}: {name}(...) is not of Hydra's grammar; nearest: {key}={ours}")


def _from_file(path: Path) -> list[str]:
    """The words of a YAML file: ``recipe.lr: tag(log,interval(1e-4,1e-2))`` is what one types with ``=``."""
    try:
        plain = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"space must be a YAML file, got {str(path)!r}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(plain, dict) or not all(isinstance(key, str) for key in plain):
        raise ConfigError(f"{path} must hold lines of KEY: VALUE")
    if "space" in plain:
        raise ConfigError(f"{path}: space belongs on the command line")
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in plain.items()]


def _list(text: str) -> list[str]:
    return [word.strip().strip("\"'") for word in text.strip().strip("[]").split(",") if word.strip()]


def _scalar(text: str) -> Any:
    """A value as YAML has it; what is not a plain one is text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if value is None or isinstance(value, bool | int | float) else text


# ---------------------------------------------------------------------------------------------------- declared experiments


def _declared(overrides: Sequence[str], options: SearchOptions) -> tuple[str | None, Declaration | None, list[str]]:
    """The experiment whose arms are to be searched (``per=arms``): its name, what it says, the overrides without it."""
    named = [text.partition("=")[2] for text in overrides if override_key(text) == "experiment"][-1:]
    folder = find_experiment(named[0]) if named else None
    if folder is None:
        if options.arms is not None:
            raise ConfigError("arms=... names arms of a declared experiment, and needs experiment=NAME per=arms")
        if options.per == ("arms",):
            raise ConfigError("per=arms searches the arms of a declared experiment, and needs experiment=NAME")
        return None, None, list(overrides)
    if options.per != ("arms",):
        raise ConfigError(f"experiment={named[0]} declares arms, each of which is searched apart: per=arms")
    rest = [text for text in overrides if override_key(text) != "experiment"]
    return named[0], read_experiment(folder), rest


def _wanted(declared: Declaration, options: SearchOptions) -> list[str]:
    for arm in options.arms or ():
        check_arm(arm, declared.arms, key="arms")
    return [arm for arm in declared.arms if options.arms is None or arm in options.arms]


def _typed_goes_over(arms: Mapping[str, Sequence[str]], overrides: Sequence[str]) -> dict[str, list[str]]:
    """Arms without what the command line says or searches: it goes over them."""
    typed = {override_key(text) for text in overrides}
    return {label: [text for text in own if override_key(text) not in typed | {"seed"}] for label, own in arms.items()}
