"""From a command line to typed configs, through Hydra's groups and overrides: one run, or every point of a sweep.

Everything wrong is found here, before torch is imported and before the first job starts. ``compose_one`` and
``compose_points`` return checked Config objects or raise ConfigError: one line, exit status 2.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from eit_lab.config import (
    Config,
    ConfigError,
    IBConfig,
    ModelConfig,
    RecipeConfig,
    RunConfig,
    TrainerConfig,
)
from eit_lab.finetune import follow_checkpoint
from eit_lab.loading import defaults, load, load_model, nearest, unknown_key
from eit_lab.published import GLOBAL_BATCH

VERSION_BASE = "1.3"
_DEFAULT_BATCH = 512  # of a size that has no published run
# What a recipe's YAML may ask: ${scale_lr:PEAK,AT_BATCH,BATCH}, ${published_batch:SIZE}, ${published_curve:SIZE}.
_RESOLVERS: dict[str, Callable[..., Any]] = {
    "scale_lr": lambda peak, at_batch, batch: peak * batch / at_batch,
    "published_batch": lambda size: GLOBAL_BATCH.get(size, _DEFAULT_BATCH),
    "published_curve": lambda size: size if size in GLOBAL_BATCH else None,
}


@dataclass(frozen=True)
class Point:
    """One point of a sweep: the overrides that name it, and its checked config."""

    overrides: tuple[str, ...]
    config: Config


def conf_dir() -> Path:
    """The folder of the config groups: inside the installed package, or at the root of a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def register_schema() -> None:
    """Give Hydra every key that has a default, so that YAML needs to hold the chosen values only; and our resolvers."""
    for name, resolve in _RESOLVERS.items():
        OmegaConf.register_new_resolver(name, resolve, replace=True)
    ConfigStore.instance().store(
        name="schema",
        node={
            "seed": 0,
            "checkpoint": None,
            "checkpoint_weights": "raw",
            "model": {**defaults(ModelConfig), "ib": defaults(IBConfig)},
            "recipe": defaults(RecipeConfig),
            "trainer": defaults(TrainerConfig),
            "run": defaults(RunConfig),
        },
    )


@contextmanager
def _hydra(config_dirs: Sequence[str] = ()) -> Iterator[None]:
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


def compose_one(overrides: Sequence[str], *, config_name: str = "train", config_dirs: Sequence[str] = ()) -> Config:
    """The checked config of a single run."""
    with _hydra(config_dirs):
        for override in _parse(overrides):
            if override.is_sweep_override():
                raise ConfigError(f"{override.input_line}: a list of values is a sweep, and needs -m")
        return load(_compose(overrides, config_name, config_dirs)[0])


def compose_model(name: str) -> ModelConfig:
    """The checked config of a named model (a file of ``conf/model``), for create_model."""
    with _hydra():
        try:
            plain, _ = _compose([f"model={name}"], "train", ())
        except ConfigError as error:
            raise ConfigError(f"create_model: {error}") from None
        return load_model(plain["model"])


def compose_points(
    overrides: Sequence[str], *, config_name: str = "train", config_dirs: Sequence[str] = ()
) -> tuple[list[Point], dict[str, Any]]:
    """Every point of a multirun, all of them checked, and the ``hydra.launcher`` mapping that says how to run them.

    The axes are those on the command line and those of ``hydra.sweeper.params`` (an experiment's own), the command line
    first. The last axis varies fastest.
    """
    with _hydra(config_dirs):
        given = _parse(overrides)
        fixed = [o.input_line or "" for o in given if not o.is_sweep_override()]
        # Not resolved: this is no point yet, so nothing can follow from a checkpoint.
        _, hydra_node = _compose(fixed, config_name, config_dirs, resolve=False)
        named = {o.get_key_element() for o in given}
        params = [f"{key}={value}" for key, value in (hydra_node["sweeper"].get("params") or {}).items()]
        given += [o for o in _parse(params) if o.get_key_element() not in named]
        space = _Space(given, config_name, config_dirs)
        # One point per value first, plain values before groups (which take Hydra 0.1 s each): a sweep of thousands with
        # one bad value fails at once, not at its place in the order.
        starts = [axis[0] for axis in space.axes]
        for place in sorted(range(len(starts)), key=lambda place: not space.is_value[place]):
            for value in space.axes[place]:
                space.config((*starts[:place], value, *starts[place + 1 :]))
        points = []
        for combination in itertools.product(*space.axes):
            label = tuple(o for o, axis in zip(combination, space.axes, strict=True) if len(axis) > 1)
            points.append(Point(overrides=label, config=space.config(combination)))
        return points, dict(hydra_node["launcher"])


class _Space:
    """The points of a sweep. Hydra composes once per choice of groups (0.1 s); plain values are laid on top of that."""

    def __init__(self, given: Sequence[Override], config_name: str, config_dirs: Sequence[str]) -> None:
        self.axes = [_axis(override) for override in given]
        self.is_value = [_is_value_axis(override) for override in given]
        self._config_name, self._config_dirs = config_name, config_dirs
        self._composed: dict[tuple[str, ...], dict[str, Any]] = {}
        self._seen: dict[tuple[str, ...], Config] = {}

    def config(self, combination: tuple[str, ...]) -> Config:
        """The checked config of one combination, one override of each axis."""
        if combination not in self._seen:
            try:
                self._seen[combination] = self._load(combination)
            except ConfigError as error:
                raise ConfigError(f"{error}  [at {' '.join(combination)}]") from None
        return self._seen[combination]

    def _load(self, combination: tuple[str, ...]) -> Config:
        groups = tuple(o for o, is_value in zip(combination, self.is_value, strict=True) if not is_value)
        values = [o for o, is_value in zip(combination, self.is_value, strict=True) if is_value]
        if groups not in self._composed:
            self._composed[groups] = _compose(groups, self._config_name, self._config_dirs, resolve=False)[0]
        job = OmegaConf.create(self._composed[groups])
        OmegaConf.set_struct(job, True)
        try:
            for override in _parse(values):
                OmegaConf.update(job, override.key_or_group, override.value(), merge=True)
            follow_checkpoint(job, [override.key_or_group for override in _parse(combination)])
            plain = OmegaConf.to_container(job, resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(error, values, self._config_name)) from None
        assert isinstance(plain, dict)
        return load({str(k): v for k, v in plain.items()})


def _is_value_axis(override: Override) -> bool:
    """A sweep over plain values: not over options of a config group, not adding (+) or deleting (~) a key."""
    if not override.is_sweep_override() or override.type is not OverrideType.CHANGE or override.package:
        return False
    return not GlobalHydra.instance().config_loader().get_group_options(override.key_or_group)


def _axis(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [override.input_line or ""]
    if override.is_discrete_sweep():
        return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
    raise ConfigError(f"{override.input_line}: an interval has no list of values; write choice(...) or range(...)")


def _parse(overrides: Sequence[str]) -> list[Override]:
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


def _compose(
    overrides: Sequence[str], config_name: str, config_dirs: Sequence[str], *, resolve: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(job mapping, hydra mapping), plain."""
    search = (
        [f"hydra.searchpath=[{','.join(f'file://{Path(d).absolute()}' for d in config_dirs)}]"] if config_dirs else []
    )
    try:
        composed = compose(config_name, overrides=[*overrides, *search], return_hydra_config=True)
        hydra_node = OmegaConf.to_container(OmegaConf.create({k: composed.hydra[k] for k in ("launcher", "sweeper")}))
        job = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        if resolve:
            follow_checkpoint(job, [override.key_or_group for override in _parse(overrides)])
        plain = OmegaConf.to_container(job, resolve=resolve)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(_explain(error, overrides, config_name)) from None
    assert isinstance(plain, dict)
    assert isinstance(hydra_node, dict)
    return {str(k): v for k, v in plain.items()}, {str(k): v for k, v in hydra_node.items()}


def _explain(error: Exception, overrides: Sequence[str], config_name: str) -> str:
    """Hydra's message in one line, with the nearest valid name."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = [str(name) for name in error.options or ()]
        if not options and (there := conf_dir() / group).is_dir():
            options = sorted(path.stem for path in there.glob("*.yaml"))
        if not options:
            return f"{error.missing_cfg_file} is not a config group"
        return f"{group} must be one of {', '.join(options)}, got {option!r}{nearest(option, options)}"
    message = f"{error}\n{error.__cause__ or ''}"
    if not isinstance(error, InterpolationResolutionError | GrammarParseError):
        for override in _parse(overrides):
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
        here: Any = compose(config_name, overrides=list(rest), return_hydra_config=key.startswith("hydra"))
    except (HydraException, OmegaConfBaseException):
        here = compose(config_name, return_hydra_config=key.startswith("hydra"))
    good: list[str] = []
    for part in key.replace("/", ".").split("."):
        if not isinstance(here, DictConfig):
            break
        if part not in here:
            groups = (
                [p.name for p in conf_dir().joinpath(*good).glob("*") if p.is_dir()] if "/" in key or not good else []
            )
            siblings = list(dict.fromkeys([*(str(name) for name in here), *groups]))
            return unknown_key(".".join([*good, part]), value, siblings)
        good.append(part)
        here = here[part]
    return f"{key} is not a key, got {value!r}; {'.'.join(good)} is a single value"


# -------------------------------------------------------------------------------------------------------- command line


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A command line taken apart by Hydra's own parser."""

    overrides: list[str]
    multirun: bool
    wants_hydra: bool
    """Something that Hydra answers itself: --cfg, --info, --hydra-help, shell completion."""
    config_name: str
    config_dirs: tuple[str, ...]


def parse_flags(argv: Sequence[str]) -> Flags:
    """Hydra's flags, with one line for what it does not know."""
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"command line: {message}")

    parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_intermixed_args(list(argv))
    if args.config_path:
        raise ConfigError("--config-path is not ours to change; --config-dir adds a folder of configs")
    if args.experimental_rerun:
        raise ConfigError("--experimental-rerun is not supported; the same command finds its run again")
    if args.cfg and args.multirun:
        raise ConfigError("--cfg shows the config of one run; leave out -m and the lists of values")
    if args.config_name and not (conf_dir() / f"{args.config_name}.yaml").is_file() and not args.config_dir:
        raise ConfigError(f"--config-name must be train, got {args.config_name!r}")
    return Flags(
        overrides=list(args.overrides),
        multirun=args.multirun,
        wants_hydra=bool(args.cfg or args.info or args.hydra_help or args.shell_completion),
        config_name=args.config_name or "train",
        config_dirs=(args.config_dir,) if args.config_dir else (),
    )


def hand_over_to_hydra(argv: Sequence[str]) -> int:
    """Let Hydra answer what is Hydra's to answer, once the config itself is known to be good."""
    flags = parse_flags(argv)
    if any(flag in argv for flag in ("--cfg", "-c")):
        compose_one(flags.overrides, config_name=flags.config_name, config_dirs=flags.config_dirs)
    register_schema()

    @hydra.main(version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=flags.config_name)
    def show(_: DictConfig) -> None:
        raise AssertionError("Hydra was asked to show something and ran instead")

    before = sys.argv
    sys.argv = [before[0], *argv]
    try:
        show()
    finally:
        sys.argv = before
    return 0
