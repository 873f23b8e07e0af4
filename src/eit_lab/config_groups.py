"""The config groups of ``conf/`` as Hydra sees them: the schema below them, what YAML may compute, and Hydra's mistakes in words.

What is Hydra's own is here and in compose.py; nothing above them imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from eit_lab.config import (
    AnalysisConfig,
    ConfigError,
    IBConfig,
    ModelConfig,
    RecipeConfig,
    RunConfig,
    TimmConfig,
    TrainerConfig,
)
from eit_lab.declaration import OPTION_KEYS, experiment_names
from eit_lab.launchers import LAUNCHERS
from eit_lab.loading import defaults, nearest, unknown_key
from eit_lab.published import GLOBAL_BATCH

VERSION_BASE = "1.3"
_DEFAULT_BATCH = 512  # of a size that has no published run
# What a recipe's YAML may ask: ${scale_lr:PEAK,AT_BATCH,BATCH}, ${published_batch:SIZE}, ${published_curve:SIZE}.
_RESOLVERS: dict[str, Callable[..., Any]] = {
    "scale_lr": lambda peak, at_batch, batch: peak * batch / at_batch,
    "published_batch": lambda size: GLOBAL_BATCH.get(size, _DEFAULT_BATCH),
    "published_curve": lambda size: size if size in GLOBAL_BATCH else None,
}


def conf_dir() -> Path:
    """The folder of the config groups: inside the installed package, or at the root of a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def register_schema(model_kind: str = "backbone") -> None:
    """Give Hydra every key that has a default, so that YAML needs to hold the chosen values only; and our resolvers."""
    model = {**defaults(ModelConfig), "ib": defaults(IBConfig)}
    if model_kind == "timm":
        model = {"kind": "timm", **defaults(TimmConfig)}
    for name, resolve in _RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolve, replace=True)
    ConfigStore.instance().store(
        name="schema",
        node={
            "seed": 0,
            "checkpoint": None,
            "checkpoint_weights": "raw",
            "model": model,
            "recipe": defaults(RecipeConfig),
            "trainer": defaults(TrainerConfig),
            "analysis": defaults(AnalysisConfig),
            "run": defaults(RunConfig),
        },
    )
    for kind, cls in LAUNCHERS.items():
        ConfigStore.instance().store(group="hydra/launcher", name=f"schema_{kind}", node=defaults(cls))


@contextmanager
def hydra_groups(config_dirs: Sequence[str] = ()) -> Iterator[None]:
    """Hydra's compose API on our folder, whatever the caller's own Hydra state is; that state comes back."""
    for folder in config_dirs:
        if not Path(folder).is_dir():
            raise ConfigError(f"--config-dir must be a folder, got {folder!r}")
    register_schema()
    mine = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(conf_dir()), job_name="train"):
            yield
    finally:
        GlobalHydra.instance().hydra = mine


def compose_groups(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes, its own node included, the keys of ``model`` being those of the model's kind.

    Only a composition tells the kind, so a baseline of timm is composed a second time, on its own keys.
    """
    composed = compose(config_name, overrides=list(overrides), return_hydra_config=True)
    if OmegaConf.select(composed, "model.kind") != "timm":
        return composed
    register_schema("timm")
    try:
        return compose(config_name, overrides=list(overrides), return_hydra_config=True)
    finally:
        register_schema()


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Overrides as Hydra reads them. Raises ConfigError in one line."""
    parser = OverridesParser.create()
    parsed = []
    for text in overrides:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException:
            raise ConfigError(
                f"{text!r} is not an override: write key=value, group=option, or key=a,b with -m"
            ) from None
    return parsed


def explain(error: Exception, overrides: Sequence[str], config_name: str) -> str:
    """Hydra's message in one line, with the nearest valid name."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [name for name in map(str, error.options or ()) if name != "basic" and not name.startswith("schema_")]
        if not options and (there := conf_dir() / group).is_dir():
            options = sorted(path.stem for path in there.glob("*.yaml"))
        if not options:
            return f"{error.missing_cfg_file} is not a config group"
        if group == "experiment":
            options = sorted({*options, *experiment_names()})
        return f"{group} must be one of {', '.join(options)}, got {option!r}{nearest(option, options)}"
    message = f"{error}\n{error.__cause__ or ''}"
    if not isinstance(error, InterpolationResolutionError | GrammarParseError):
        for override in parse_overrides(overrides):
            key = override.key_or_group
            if f"'{key}'" in message or f"full_key: {key}\n" in message:
                rest = [text for text in overrides if text != override.input_line]
                return _explain_key(key, override.value(), config_name, rest)
            if isinstance(error, ValueError) and override.value() is None:
                return f"{key} must be the name of an option, got null"
    key = str(getattr(error, "full_key", None) or "")
    lines = [line.strip() for line in message.splitlines() if line.strip() and ": " not in line[:14]]
    return f"{key}: {lines[0]}" if key else " ".join(dict.fromkeys(lines[:2]))


def _explain_key(key: str, value: Any, config_name: str, rest: Sequence[str]) -> str:
    """A key or group that Hydra did not find: walk down the config without it as far as the key is good."""
    try:
        here: Any = compose_groups(config_name, rest)
    except (HydraException, OmegaConfBaseException):
        here = compose_groups(config_name, ())
    if not key.startswith("hydra"):
        here = OmegaConf.masked_copy(here, [str(name) for name in here if name != "hydra"])
    good: list[str] = []
    for part in key.replace("/", ".").split("."):
        if not isinstance(here, DictConfig):
            break
        if part not in here:
            groups = (
                [p.name for p in conf_dir().joinpath(*good).glob("*") if p.is_dir()] if "/" in key or not good else []
            )
            if part in groups and good == ["model"]:
                kind = OmegaConf.select(here, "kind")
                return f"{key} is no part of a model of model.kind={kind}, got {value!r}; nearest: model=eit_base"
            options = [] if good else list(dict.fromkeys(name.partition(".")[0] for name in OPTION_KEYS))
            siblings = list(dict.fromkeys([*(str(name) for name in here), *groups, *options]))
            return unknown_key(".".join([*good, part]), value, siblings)
        good.append(part)
        here = here[part]
    return f"{key} is not a key, got {value!r}; {'.'.join(good)} is a single value"


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A key with an interval, a range or a list of values, as it was typed."""

    key: str
    text: str
    """The whole override."""
    form: Literal["interval", "range", "list"]
    values: tuple[str, ...] = ()
    """All values of a range or a list, as one types them."""
    start: float = 0
    stop: float = 0
    step: float = 1
    """Integers where they were typed so."""
    tags: tuple[str, ...] = ()


def read_searched(override: Override) -> Searched:
    """An override with a sweep in it, in plain words. Raises ConfigError for a list that is not written out."""
    key, text, value = override.get_key_element(), override.input_line or "", override.value()
    tags = tuple(sorted(map(str, getattr(value, "tags", None) or ())))
    if isinstance(value, IntervalSweep):
        assert value.start is not None
        assert value.end is not None
        return Searched(key=key, text=text, form="interval", start=value.start, stop=value.end, tags=tags)
    try:
        values = tuple(override.sweep_string_iterator())
    except HydraException:
        raise ConfigError(f"{text}: write the values out, as in choice(a,b)") from None
    if isinstance(value, RangeSweep):
        start, stop = value.start or 0, value.stop or 0
        return Searched(
            key=key, text=text, form="range", values=values, start=start, stop=stop, step=value.step, tags=tags
        )
    return Searched(key=key, text=text, form="list", values=values, tags=tags)
