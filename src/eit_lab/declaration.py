"""What an ablation is, before any of it runs: arms, the one factor in which they differ, seeds, comparisons, budget.

``experiments/NNN-slug/experiment.yaml`` declares one; an ad-hoc multirun gets one from its command line (sweep/arms.py). It
travels in a sweep's ``sweep.json``, where the guard, the report and the dashboards read it. Nothing here imports torch or
Hydra.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic.dataclasses import dataclass

from eit_lab.config import _CHECKED, ConfigError, Flag, NonNegFloat, NonNegInt, PosFloat, Text, _opt, _req
from eit_lab.loading import dump, field_help, load_part, nearest, unknown_key

FILE = "experiment.yaml"
PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Of a sweep, and so of an experiment's folder: it becomes the name of a folder."""


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class Budget:
    """What the jobs of a sweep that are still to do may cost."""

    device_hours: PosFloat | None = _opt(None, "most hours of one device, over all jobs still to do; null: no limit")
    disk_gb: PosFloat | None = _opt(None, "most that the sweep's runs may take on disk, in 1e9 bytes; null: no limit")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class Declaration:
    """An ablation. ``arms`` is empty for an ad-hoc multirun: its axes are on its command line."""

    name: Text = _req("the experiment's folder name, or the sweep's id")
    question: Text = _opt("", "what the ablation is to answer")
    factor: tuple[Text, ...] = _opt((), "dotted keys, or the beginnings of keys, that may differ between arms")
    arms: dict[Text, tuple[Text, ...]] = field(
        default_factory=dict, metadata={"help": "label -> overrides that make the arm"}
    )
    base: tuple[Text, ...] = _opt((), "overrides that all arms have")
    seeds: tuple[NonNegInt, ...] = _opt((0,), "seeds of every arm")
    baseline: Text | None = _opt(None, "the arm that the others are held against")
    metric: Text = _opt("test/acc1", "what is compared: a key of a run's test result")
    compare: tuple[tuple[Text, Text], ...] = _opt(
        (), "planned comparisons (arm, against); empty: every arm against the baseline"
    )
    interactions: tuple[tuple[tuple[Text, Text], tuple[Text, Text]], ...] = _opt(
        (), "planned differences of differences ((a, b), (c, d)): (a - b) - (c - d)"
    )
    match: Literal["params", "macs"] | None = _opt(None, "budget in which the arms are made equal by their width")
    reference: Text | None = _opt(None, "the arm whose budget the others are matched to")
    budget: Budget = _opt(Budget(), "what it may cost")

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds must be different numbers, one at least, got {list(self.seeds)}")
        if not self.arms:
            return
        named: dict[str, tuple[Text | None, ...]] = {"baseline": (self.baseline,), "reference": (self.reference,)}
        named |= {f"compare[{n}]": pair for n, pair in enumerate(self.compare)}
        named |= {f"interactions[{n}]": (*first, *second) for n, (first, second) in enumerate(self.interactions)}
        for key, labels in named.items():
            for arm in labels:
                if arm is not None:
                    check_arm(arm, self.arms, key=key)


def check_arm(arm: str, arms: Collection[str], *, key: str) -> None:
    """Raises ConfigError in one line where there is no such arm."""
    if arm not in arms:
        raise ConfigError(f"{key} must be one of the arms {', '.join(arms)}, got {arm!r}{nearest(arm, list(arms))}")


# ---------------------------------------------------------------------------------------------------------- experiments


def load_declaration(plain: Mapping[str, Any]) -> Declaration:
    """The declaration in a sweep's ``sweep.json``. Raises ConfigError in one line."""
    declaration: Declaration = load_part(Declaration, plain, prefix="")
    return declaration


def read_experiment(folder: Path) -> Declaration:
    """The ablation that a folder declares. Raises ConfigError in one line, which names the file."""
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{str(folder)!r} must be the folder of an experiment, and has no {FILE}")
    try:
        plain = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    name = folder.resolve().name
    if not PLAIN_NAME.fullmatch(name):
        raise ConfigError(f"{path}: the folder's name must be plain (letters, digits, - _ .), got {name!r}")
    if not isinstance(plain, dict) or not plain.get("arms"):
        raise ConfigError(f"{path} must declare arms: a mapping of labels to overrides")
    try:
        if "name" in plain:  # it would be a second truth beside the folder's
            raise ConfigError(unknown_key("name", plain["name"], [f.name for f in dataclasses.fields(Declaration)][1:]))
        if not plain.get("factor"):
            raise ConfigError("factor must be given: the dotted key, or its beginning, in which the arms differ")
        lists: dict[str, Any] = {key: _list(plain[key]) for key in ("factor", "base") if key in plain}
        arms = plain["arms"]
        if isinstance(arms, dict):
            lists["arms"] = {label: _list(overrides) for label, overrides in arms.items()}
        declaration = load_declaration({**plain, **lists, "name": name})
        for key, overrides in {"base": declaration.base, **_by_key(declaration.arms)}.items():
            for override in overrides:
                _check_override(override, key=key)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return dataclasses.replace(declaration, factor=tuple(key.replace("/", ".") for key in declaration.factor))


def _by_key(arms: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {f"arms.{label}": overrides for label, overrides in arms.items()}


def _list(value: Any) -> Any:
    """One override is a list of one."""
    return [value] if isinstance(value, str) else ([] if value is None else value)


def _check_override(text: str, *, key: str) -> None:
    name = override_key(text)
    if name in ("seed", "experiment", "run.sweep", "run.arm"):
        rule = {"seed": "seeds belong into seeds", "experiment": "an experiment holds no other"}.get(name, "-m sets it")
        raise ConfigError(f"{key} cannot hold {text!r}: {rule}")


def override_key(text: str) -> str:
    """The key or group of an override as one types it: ``+model/ib@x=eit`` is ``model/ib``."""
    return text.partition("=")[0].strip().lstrip("+~").partition("@")[0]


def find_experiment(name: str, *, missing_ok: bool = False) -> Path | None:
    """The folder of a declared experiment, by its name or by a path; None for any other (``conf/experiment`` has some).

    Looked for in ``experiments/`` of the current folder, then of the checkout or the installed package.
    """
    if "/" in name:
        folder = Path(name).expanduser()
        if (folder / FILE).is_file() or missing_ok:
            return folder if (folder / FILE).is_file() else None
        near = [f"{folder.parent}/{known.parent.name}" for known in folder.parent.glob(f"*/{FILE}")]
        raise ConfigError(f"experiment must be a folder with {FILE}, got {name!r}{nearest(name, near)}")
    return next((root / name for root in _roots() if (root / name / FILE).is_file()), None)


def experiment_names() -> list[str]:
    """Names of the declared experiments within reach, sorted."""
    return sorted({path.parent.name for root in _roots() for path in root.glob(f"*/{FILE}")})


def _roots() -> tuple[Path, ...]:
    inside = Path(__file__).parent / "experiments"
    ours = inside if inside.is_dir() else Path(__file__).parents[2] / "experiments"
    return Path("experiments"), ours


# ---------------------------------------------------------------------------------------- what a command says of a sweep


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class GuardOptions:
    """How the guard looks at a sweep."""

    speed_s: NonNegFloat | None = _opt(
        None, "seconds to measure an arm's training speed for; 0: not at all; null: 1, and not for a cluster's jobs"
    )


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class SweepOptions:
    """What is said of a whole sweep on its command line: keys of no run's config."""

    arms: tuple[Text, ...] | None = _opt(None, "only these arms of the sweep")
    factor: tuple[Text, ...] = _opt((), "further keys, or their beginnings, that may differ between arms")
    match: Literal["params", "macs", "none"] | None = _opt(
        None, "give each arm the width that comes nearest to the reference arm's parameters or MACs; null: as declared"
    )
    reference: Text | None = _opt(None, "the arm whose budget the others are matched to; null: as declared")
    budget: Budget = _opt(Budget(), "what the sweep may cost")
    guard: GuardOptions = _opt(GuardOptions(), "how the guard looks")
    yes: Flag = _opt(False, "go on although the sweep is over its budget")


OPTION_KEYS = tuple(key for key, _, _ in field_help(SweepOptions))
_LISTS = ("arms", "factor")


def take_options(overrides: Sequence[str]) -> tuple[list[str], SweepOptions, frozenset[str]]:
    """A command line without what is said of the sweep as a whole; that; and which keys of it were given.

    Raises ConfigError in one line.
    """
    heads = {key.partition(".")[0] for key in OPTION_KEYS}
    rest: list[str] = []
    plain: dict[str, Any] = {}
    given: set[str] = set()
    for text in overrides:
        key, _, value = text.partition("=")
        head, _, last = key.partition(".")
        if head not in heads:
            rest.append(text)
            continue
        siblings = [name.removeprefix(f"{head}.") for name in OPTION_KEYS if name.startswith(f"{head}.")]
        if siblings and last not in siblings:
            raise ConfigError(unknown_key(f"{head}.{last}", value, siblings))
        if last and not siblings:
            raise ConfigError(f"{key} is not a key, got {value!r}; nearest: {head}")
        parsed = _words(value) if key in _LISTS else _scalar(value)
        if last:
            plain.setdefault(head, {})[last] = parsed
        else:
            plain[head] = parsed
        given.add(key)
    options: SweepOptions = load_part(SweepOptions, plain, prefix="")
    return rest, options, frozenset(given)


def apply_options(declaration: Declaration, options: SweepOptions, given: Collection[str]) -> Declaration:
    """The declaration with what the command line says of it; factors are added, the rest replaces what was declared."""
    new: dict[str, Any] = {"factor": (*declaration.factor, *(key.replace("/", ".") for key in options.factor))}
    if "match" in given:
        new["match"] = None if options.match == "none" else options.match
    if "reference" in given:
        new["reference"] = options.reference
    limits = [key.removeprefix("budget.") for key in given if key.startswith("budget.")]
    new["budget"] = {**dump(declaration.budget), **{key: getattr(options.budget, key) for key in limits}}
    return load_declaration({**dump(declaration), **new})


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.strip().strip("[]").split(",") if word.strip()]


def _scalar(text: str) -> Any:
    text = text.strip().strip("'\"")
    if text.lower() in ("true", "false", "null", ""):
        return {"true": True, "false": False}.get(text.lower())
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
