"""From a command line to typed configs, through Hydra's groups and overrides: one run, or every point of a sweep.

Everything wrong is found here, before torch is imported and before the first job starts. ``compose_one`` and
``compose_space`` return checked Config objects or raise ConfigError: one line, exit status 2.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eit_lab.config import AnyModelConfig, Config, ConfigError
from eit_lab.config_groups import (
    VERSION_BASE,
    compose_groups,
    conf_dir,
    explain,
    hydra_groups,
    parse_overrides,
    read_searched,
    register_schema,
)
from eit_lab.declaration import OPTION_KEYS, find_experiment, override_key
from eit_lab.finetune import follow_checkpoint
from eit_lab.loading import dump, load, load_model


@dataclass(frozen=True)
class Point:
    """One point of a sweep: the overrides that name it, and its checked config."""

    overrides: tuple[str, ...]
    """Its label: what tells it from the other points."""
    config: Config
    arm: str = ""
    key: tuple[str, ...] = ()
    """Its place in the sweep, whatever else the sweep holds: its value of every swept key, the seed among them."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """All points of a multirun, and what its command line says of them."""

    points: list[Point]
    launcher: dict[str, Any]
    """The ``hydra.launcher`` mapping: how to run them."""
    fixed: tuple[str, ...]
    """Overrides that every point has, arms' own left out."""
    axes: tuple[str, ...]
    """Keys and groups that have a list of values."""
    typed_axes: tuple[str, ...]
    """Those of them that are on the command line itself."""


def compose_one(overrides: Sequence[str], *, config_name: str = "train", config_dirs: Sequence[str] = ()) -> Config:
    """The checked config of a single run."""
    _refuse_sweeps(overrides)
    with hydra_groups(config_dirs):
        for override in parse_overrides(overrides):
            if override.is_sweep_override():
                raise ConfigError(f"{override.input_line}: a list of values is a sweep, and needs -m")
        return load(_compose(overrides, config_name, config_dirs)[0])


def compose_model(name: str) -> AnyModelConfig:
    """The checked config of a named model (a file of ``conf/model``, or ``timm/NAME``), for create_model."""
    kind, _, architecture = name.partition("/")
    with hydra_groups():
        try:
            if kind == "timm" and architecture:
                return load_model({"kind": kind, "timm_name": architecture, "name": architecture})
            plain, _ = _compose([f"model={name}"], "train", ())
        except ConfigError as error:
            raise ConfigError(f"create_model: {error}") from None
        return load_model(plain["model"])


def _refuse_sweeps(overrides: Sequence[str]) -> None:
    """One line for what only a sweep can have."""
    for text in overrides:
        key, value = override_key(text), text.partition("=")[2]
        if key in OPTION_KEYS:
            raise ConfigError(f"{text}: this is said of a sweep, and needs -m")
        if key == "experiment" and find_experiment(value, missing_ok=True) is not None:
            raise ConfigError(f"{text}: a declared experiment is a sweep, and needs -m")


def compose_points(
    overrides: Sequence[str], *, config_name: str = "train", config_dirs: Sequence[str] = ()
) -> tuple[list[Point], dict[str, Any]]:
    """Every point of a multirun, all of them checked, and the ``hydra.launcher`` mapping that says how to run them."""
    space = compose_space(overrides, config_name=config_name, config_dirs=config_dirs)
    return space.points, space.launcher


def compose_space(
    overrides: Sequence[str],
    *,
    arms: Mapping[str, Sequence[str]] | None = None,
    base: Sequence[str] = (),
    seeds: Sequence[int] = (),
    config_name: str = "train",
    config_dirs: Sequence[str] = (),
) -> Space:
    """Every point of a multirun, all of them checked.

    Ad hoc: the axes are those on the command line and those of ``hydra.sweeper.params`` (a ``conf/experiment``'s own), the
    command line first. Declared: ``arms`` (label -> overrides), each with ``base`` and, where the command line has none,
    ``seeds``; the command line goes over both. The last axis varies fastest.
    """
    with hydra_groups(config_dirs):
        composer = _Composer(config_name, config_dirs)
        typed = parse_overrides(overrides)
        common = _latest([*parse_overrides(base), *typed])
        fixed = tuple(o.input_line or "" for o in (typed if arms is not None else common) if not o.is_sweep_override())
        if arms is None:
            grids = {"": [_axis(override) for override in common]}
        else:
            grids = {label: _arm_axes(common, typed, own, seeds=seeds) for label, own in arms.items()}
        # The first point's: where its jobs run, and a conf/experiment's own axes, hold for all.
        first = [axis[0] for axis in next(iter(grids.values()))]
        hydra_node = composer.composed([setting.text for setting in first if not setting.is_value]).hydra
        if arms is None:
            named = {o.get_key_element() for o in typed}
            params = [f"{key}={value}" for key, value in (hydra_node["sweeper"].get("params") or {}).items()]
            own_axes = [o for o in parse_overrides(params) if o.get_key_element() not in named]
            common += own_axes
            grids[""] += [_axis(override) for override in own_axes]
        # One point per value first, plain values before groups (which take Hydra 0.1 s each): a sweep of thousands with
        # one bad value fails at once, not at its place in the order.
        for label, axes in grids.items():
            starts = [axis[0] for axis in axes]
            for place in sorted(range(len(starts)), key=lambda place: not starts[place].is_value):
                for setting in axes[place]:
                    composer.config([*starts[:place], setting, *starts[place + 1 :]], arm=label)
        points = [
            _point(combination, axes, composer.config(combination, arm=label), label)
            for label, axes in grids.items()
            for combination in itertools.product(*axes)
        ]
        return Space(
            points=points,
            launcher=dict(hydra_node["launcher"]),
            fixed=fixed,
            axes=tuple(dict.fromkeys(o.key_or_group for o in common if o.is_sweep_override())),
            typed_axes=tuple(dict.fromkeys(o.key_or_group for o in typed if o.is_sweep_override())),
        )


def _latest(overrides: Sequence[Override]) -> list[Override]:
    """Of several overrides of a key the last; groups and keys that only look alike are apart."""
    return list({o.get_key_element(): o for o in overrides}.values())


def _arm_axes(
    common: Sequence[Override], typed: Sequence[Override], own: Sequence[str], *, seeds: Sequence[int]
) -> list[list[_Setting]]:
    """The axes of one declared arm: what all have, what is its own unless the command line has it, the seeds."""
    said = {o.get_key_element() for o in typed}
    mine = [o for o in parse_overrides(own) if o.get_key_element() not in said]
    for override in mine:
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: an arm is one configuration; write an arm for each value")
    keys = {o.get_key_element() for o in mine}
    axes = [_axis(o) for o in common if o.get_key_element() not in keys | {"seed"}]
    axes += [[_Setting(o.input_line or "", o, is_value=_is_value(o))] for o in mine]
    seed = (
        next((o for o in typed if o.get_key_element() == "seed"), None)
        or parse_overrides([f"seed={','.join(map(str, seeds))}"])[0]
    )
    return [*axes, [dataclasses.replace(setting, is_value=True) for setting in _axis(seed)]]


def _point(combination: Sequence[_Setting], axes: Sequence[Sequence[_Setting]], config: Config, arm: str) -> Point:
    label = [setting.text for setting, axis in zip(combination, axes, strict=True) if len(axis) > 1]
    key = [s.text for s in combination if s.swept and s.key != "seed"]
    if arm:
        label, key = [f"arms={arm}", *label], [f"arms={arm}", *key]
    return Point(tuple(label), config, arm, (*key, f"seed={config.seed}"))


# ------------------------------------------------------------------------------------------------- composing many points


@dataclass(frozen=True)
class _Setting:
    """One override of one point."""

    text: str
    override: Override
    is_value: bool
    """A plain value, which is laid over a composed config; else Hydra composes with it."""
    swept: bool = False

    @property
    def key(self) -> str:
        key: str = self.override.key_or_group
        return key


@dataclass(frozen=True)
class _Composed:
    """What Hydra made of a choice of groups: plain, its interpolations not resolved."""

    job: dict[str, Any]
    hydra: dict[str, Any]
    mentioned: frozenset[str] | None
    """Words in the interpolations, those among them that name keys; None where that cannot be told from their text."""

    def is_free(self, setting: _Setting) -> bool:
        """Whether a value can be put into the resolved config as well: it is plain, and nothing else follows from its key."""
        key, value = setting.key, setting.override.value()
        if self.mentioned is None or not _is_plain(value) or self.job.get("checkpoint") is not None:
            return False
        if key.startswith("checkpoint"):
            return False
        node: Any = self.job
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return not isinstance(node, dict) and not any(
            word == key or word.startswith(f"{key}.") or key.startswith(f"{word}.") for word in self.mentioned
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return "${" not in value and value != "???"
    if isinstance(value, list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float)


_INTERPOLATION_WORD = re.compile(r"[A-Za-z_][\w.]*")


def _mentioned(node: Any) -> frozenset[str] | None:
    """Every word of every interpolation below a node; None where one is relative or made of another."""
    if isinstance(node, Mapping | list):
        found = [_mentioned(item) for item in (node.values() if isinstance(node, Mapping) else node)]
        return None if None in found else frozenset().union(*(words for words in found if words is not None))
    if not isinstance(node, str) or "${" not in node:
        return frozenset()
    if "${." in node or "}." in node or "${${" in node or "}[" in node:
        return None
    return frozenset(_INTERPOLATION_WORD.findall(node))


class _Composer:
    """Configs from settings. Hydra composes once per choice of groups (0.1 s), interpolations are resolved once per choice of
    what they depend on (5 ms), and a point that differs in other values, or in its seed alone, is a checked copy (0.1 ms).
    """

    def __init__(self, config_name: str, config_dirs: Sequence[str]) -> None:
        self._config_name, self._config_dirs = config_name, config_dirs
        self._composed: dict[tuple[str, ...], _Composed] = {}
        self._resolved: dict[tuple[str, ...], dict[str, Any]] = {}
        self._loaded: dict[tuple[str, ...], Config] = {}
        self._free: dict[tuple[tuple[str, ...], str], bool] = {}

    def composed(self, groups: Sequence[str]) -> _Composed:
        """Hydra's part."""
        key = tuple(groups)
        if key not in self._composed:
            job, hydra_node = _compose(key, self._config_name, self._config_dirs, resolve=False)
            self._composed[key] = _Composed(job, hydra_node, _mentioned(job))
        return self._composed[key]

    def knows(self, settings: Sequence[_Setting]) -> bool:
        """Whether Hydra has done its part for these settings before."""
        return tuple(s.text for s in settings if not s.is_value) in self._composed

    def config(self, settings: Sequence[_Setting], *, arm: str = "") -> Config:
        """The checked config of one point."""
        try:
            return self._config(settings)
        except ConfigError as error:
            at = [s.text for s in settings if s.swept or not arm]
            raise ConfigError(f"{error}  [at {' '.join([f'arms={arm}', *at] if arm else at)}]") from None

    def _config(self, settings: Sequence[_Setting]) -> Config:
        groups = tuple(s.text for s in settings if not s.is_value)
        free: list[_Setting] = []
        bound: list[_Setting] = []
        values = [setting for setting in settings if setting.is_value]
        # A value that is itself computed (data.split_seed=${seed}) may follow from any other.
        computed = any("${" in str(setting.override.value()) for setting in values)
        for setting in values:
            (bound if computed or not self._is_free(groups, setting) else free).append(setting)
        texts = (*groups, "", *(s.text for s in bound))
        if texts not in self._resolved:
            self._resolved[texts] = self._resolve(groups, bound, settings)
        seed = next((s for s in free if s.key == "seed"), None)
        laid = [s for s in free if s is not seed]
        texts = (*texts, "", *(s.text for s in laid))
        if texts not in self._loaded:
            plain = self._resolved[(*groups, "", *(s.text for s in bound))]
            for setting in laid:
                plain = _lay(plain, setting.key.split("."), setting.override.value())
            self._loaded[texts] = load(plain)
        config = self._loaded[texts]
        if seed is None:
            return config
        value = seed.override.value()
        if type(value) is int and 0 <= value < 2**32:
            return dataclasses.replace(config, seed=value)
        return load(_lay(dump(config), ["seed"], value))  # which says what is wrong

    def _is_free(self, groups: tuple[str, ...], setting: _Setting) -> bool:
        known = self._free.get((groups, setting.text))
        if known is None:
            known = self._free[groups, setting.text] = self.composed(groups).is_free(setting)
        return known

    def _resolve(
        self, groups: tuple[str, ...], values: Sequence[_Setting], settings: Sequence[_Setting]
    ) -> dict[str, Any]:
        """The composed config with these values and what follows from them."""
        job = OmegaConf.create(self.composed(groups).job)
        OmegaConf.set_struct(job, True)
        try:
            for setting in values:
                OmegaConf.update(job, setting.key, setting.override.value(), merge=True)
            follow_checkpoint(job, [setting.key for setting in settings])
            plain = OmegaConf.to_container(job, resolve=True)
        except OmegaConfBaseException as error:
            with hydra_groups(self._config_dirs):
                raise ConfigError(explain(error, [s.text for s in settings], self._config_name)) from None
        assert isinstance(plain, dict)
        return {str(k): v for k, v in plain.items()}


class OpenSpace:
    """A space whose points a search thinks of one by one: each is composed and checked when it is asked for.

    ``searched`` are the overrides with an interval, a range or a list of values, those of ``hydra.sweeper.params`` among
    them; ``fixed`` are the others; ``launcher`` is the ``hydra.launcher`` mapping.
    """

    def __init__(
        self, overrides: Sequence[str], *, config_name: str = "train", config_dirs: Sequence[str] = ()
    ) -> None:
        self._config_dirs = tuple(config_dirs)
        with hydra_groups(config_dirs):
            self._composer = _Composer(config_name, config_dirs)
            typed = _latest(parse_overrides(overrides))
            fixed = [o.input_line or "" for o in typed if not o.is_sweep_override()]
            hydra_node = self._composer.composed(fixed).hydra
            named = {o.get_key_element() for o in typed}
            params = [f"{key}={value}" for key, value in (hydra_node["sweeper"].get("params") or {}).items()]
            given = [*typed, *(o for o in parse_overrides(params) if o.get_key_element() not in named)]
            # Hydra takes 50 ms to say whether a key is a group.
            self._parsed: dict[tuple[str, ...], dict[str, _Setting]] = {}
            self._is_value = {o.get_key_element(): _is_value(o) for o in given if o.is_sweep_override()}
        self.searched = [read_searched(o) for o in given if o.is_sweep_override()]
        self.fixed = tuple(o.input_line or "" for o in given if not o.is_sweep_override())
        self.launcher: dict[str, Any] = dict(hydra_node["launcher"])

    def configs(self, points: Sequence[Sequence[str]], *, arm: Sequence[str] = (), label: str = "") -> list[Config]:
        """The checked config of each point; ``arm``'s overrides and then the point's go over the fixed ones."""
        fixed = (*self.fixed, *arm)
        if fixed not in self._parsed:
            overrides = parse_overrides(fixed)
            settings = [_Setting(o.input_line or "", o, is_value=False) for o in overrides]
            self._parsed[fixed] = {setting.override.get_key_element(): setting for setting in settings}
        wanted = []
        for point in points:
            settings_by_key = dict(self._parsed[fixed])
            for o in parse_overrides(point):
                key = o.get_key_element()
                is_value = self._is_value.get(key, key == "seed")
                settings_by_key[key] = _Setting(o.input_line or "", o, is_value=is_value, swept=True)
            wanted.append(list(settings_by_key.values()))
        # Hydra takes 25 ms to begin with: only where it has not composed these groups yet.
        with nullcontext() if all(map(self._composer.knows, wanted)) else hydra_groups(self._config_dirs):
            return [self._composer.config(settings, arm=label) for settings in wanted]


def _lay(plain: dict[str, Any], parts: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of a nested mapping with one value changed; what is not on the way to it is shared."""
    first, *rest = parts
    return {**plain, first: _lay(plain[first], rest, value) if rest else value}


def _is_value(override: Override) -> bool:
    """A plain value: not an option of a config group, not adding (+) or deleting (~) a key."""
    if override.type is not OverrideType.CHANGE or override.package:
        return False
    return not GlobalHydra.instance().config_loader().get_group_options(override.key_or_group)


def _axis(override: Override) -> list[_Setting]:
    """What an override stands for: one setting, or one for each of its values."""
    if not override.is_sweep_override():
        return [_Setting(override.input_line or "", override, is_value=False)]
    if override.is_discrete_sweep():
        is_value = _is_value(override)
        texts = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if not texts:
            raise ConfigError(f"{override.input_line}: this has no values")
        return [
            _Setting(text, one, is_value=is_value, swept=True)
            for text, one in zip(texts, parse_overrides(texts), strict=True)
        ]
    raise ConfigError(f"{override.input_line}: an interval has no list of values; write choice(...) or range(...)")


def _compose(
    overrides: Sequence[str], config_name: str, config_dirs: Sequence[str], *, resolve: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(job mapping, hydra mapping), plain."""
    search = (
        [f"hydra.searchpath=[{','.join(f'file://{Path(d).absolute()}' for d in config_dirs)}]"] if config_dirs else []
    )
    try:
        composed = compose_groups(config_name, [*overrides, *search])
        hydra_node = OmegaConf.to_container(OmegaConf.create({k: composed.hydra[k] for k in ("launcher", "sweeper")}))
        job = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        if resolve:
            follow_checkpoint(job, [override.key_or_group for override in parse_overrides(overrides)])
        plain = OmegaConf.to_container(job, resolve=resolve)
    except ConfigError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, overrides, config_name)) from None
    assert isinstance(plain, dict)
    assert isinstance(hydra_node, dict)
    return {str(k): v for k, v in plain.items()}, {str(k): v for k, v in hydra_node.items()}


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
    model_kind = "backbone"
    if any(flag in argv for flag in ("--cfg", "-c")):
        config = compose_one(flags.overrides, config_name=flags.config_name, config_dirs=flags.config_dirs)
        model_kind = config.model.kind
    register_schema(model_kind)

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
