"""A command line as an ablation: its arms, its seeds, what may differ between the arms, and the name of the sweep.

``read_sweep`` is the door: a declared experiment (``experiment=NNN-slug``) or any multirun comes out as the same ``Sweep``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

from eit_lab.compose import Flags, Point, Space, compose_space
from eit_lab.config import Config, ConfigError
from eit_lab.declaration import (
    PLAIN_NAME,
    Declaration,
    SweepOptions,
    apply_options,
    check_arm,
    find_experiment,
    override_key,
    read_experiment,
    take_options,
)
from eit_lab.loading import dump, nearest
from eit_lab.runs import PLACEMENT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a command asks for, all of it checked and nothing of it started."""

    id: str
    """Name of its folder: the same for the same command with more seeds or arms."""
    points: list[Point]
    """Each with its arm, which its config has too (``run.arm``), as well as the sweep's id (``run.sweep``)."""
    launcher: dict[str, Any]
    """The ``hydra.launcher`` mapping."""
    declaration: Declaration
    options: SweepOptions
    reference: Config | None = None
    """The config whose budget the arms are matched to, where they are; its arm need not be among the points."""

    def arms(self) -> dict[str, list[int]]:
        """Arm -> places of its points, both in order."""
        found: dict[str, list[int]] = {}
        for place, point in enumerate(self.points):
            found.setdefault(point.arm, []).append(place)
        return found


def read_sweep(flags: Flags) -> Sweep:
    """The sweep of a multirun's command line. Raises ConfigError in one line."""
    overrides, options, given = take_options(flags.overrides)
    named = [text.partition("=")[2] for text in overrides if override_key(text) == "experiment"][-1:]
    folder = find_experiment(named[0]) if named else None
    if folder is None:
        return _read_ad_hoc(flags, overrides, options, given, experiment=_plain_name(named))
    declared = apply_options(read_experiment(folder), options, given)
    overrides = [text for text in overrides if override_key(text) != "experiment"]
    for arm in options.arms or ():
        check_arm(arm, declared.arms, key="arms")
    reference = _reference_arm(declared, list(declared.arms))
    wanted = [arm for arm in declared.arms if options.arms is None or arm in options.arms]
    extra = [reference] if reference is not None and reference not in wanted else []
    space = compose_space(
        overrides,
        arms={arm: declared.arms[arm] for arm in (*wanted, *extra)},
        base=declared.base,
        seeds=declared.seeds,
        config_name=flags.config_name,
        config_dirs=flags.config_dirs,
    )
    _refuse_same_arms(space, overrides, declared)
    points = [dataclasses.replace(point, arm=_with_axes(point)) for point in space.points if point.arm in wanted]
    seeds = tuple(dict.fromkeys(point.config.seed for point in space.points))
    declared = dataclasses.replace(declared, seeds=seeds)
    return _sweep(
        space, points, declared, options, experiment=declared.name, reference=_config_of(space.points, reference)
    )


def _read_ad_hoc(
    flags: Flags, overrides: Sequence[str], options: SweepOptions, given: Iterable[str], *, experiment: str | None
) -> Sweep:
    space = compose_space(overrides, config_name=flags.config_name, config_dirs=flags.config_dirs)
    points = _label(space)
    labels = list(dict.fromkeys(point.arm for point in points))
    for arm in options.arms or ():
        check_arm(arm, labels, key="arms")
    declared = Declaration(
        name=sweep_id(space, options, experiment=experiment),
        factor=tuple(key.replace("/", ".") for key in space.axes if key != "seed"),
        base=space.fixed,
        seeds=tuple(dict.fromkeys(point.config.seed for point in points)),
    )
    declared = apply_options(declared, options, list(given))
    reference = _reference_arm(declared, labels)
    config = _config_of(points, reference)
    points = [point for point in points if options.arms is None or point.arm in options.arms]
    return _sweep(space, points, declared, options, experiment=experiment, reference=config)


def _plain_name(named: Sequence[str]) -> str | None:
    return next((name for name in named if PLAIN_NAME.fullmatch(name)), None)


def _sweep(
    space: Space,
    points: Sequence[Point],
    declaration: Declaration,
    options: SweepOptions,
    *,
    experiment: str | None,
    reference: Config | None,
) -> Sweep:
    _check_factor(declaration, points)
    name = sweep_id(space, options, experiment=experiment)
    return Sweep(
        id=name,
        points=_place(points, name),
        launcher=space.launcher,
        declaration=declaration,
        options=options,
        reference=reference,
    )


def _reference_arm(declaration: Declaration, arms: Sequence[str]) -> str | None:
    """The arm that the others are matched to; None where nothing is matched."""
    if declaration.match is None:
        if declaration.reference is not None and not declaration.arms:
            raise ConfigError(f"reference={declaration.reference} needs match=params or match=macs")
        return None
    reference = declaration.reference or declaration.baseline
    if reference is None:
        raise ConfigError(f"match={declaration.match} needs reference=ARM, one of {', '.join(arms)}")
    check_arm(reference, arms, key="reference")
    return reference


def _config_of(points: Iterable[Point], arm: str | None) -> Config | None:
    return None if arm is None else next(point.config for point in points if point.arm == arm)


def _refuse_same_arms(space: Space, overrides: Sequence[str], declaration: Declaration) -> None:
    """The command line goes over what the arms say: it must leave them different."""
    first: dict[str, str] = {}
    for point in {point.key[:-1]: point for point in space.points}.values():  # one seed of each
        other = first.setdefault(_without_seed(point.config), point.arm)
        if other != point.arm:
            theirs = {override_key(text) for arm in (other, point.arm) for text in declaration.arms[arm]}
            said = " ".join(text for text in overrides if override_key(text) in theirs)
            raise ConfigError(
                f"{said}: this would make the arms {other} and {point.arm} of {declaration.name} the same"
                if said
                else f"the arms {other} and {point.arm} of {declaration.name} are the same"
            )


def _without_seed(config: Config) -> str:
    return json.dumps({key: value for key, value in dump(config).items() if key != "seed"}, sort_keys=True)


def _with_axes(point: Point) -> str:
    """A declared arm's label, with what else the command line sweeps."""
    more = [text for text in point.key if not text.startswith(("arms=", "seed="))]
    return " ".join([point.arm, *more])


def _label(space: Space) -> list[Point]:
    """The points of an ad-hoc multirun with their arms: what they are but for the seed, by model's name where that tells."""
    swept = [tuple(text for text in point.key if not text.startswith("seed=")) for point in space.points]
    names = dict(zip(swept, (point.config.model.name for point in space.points), strict=True))
    only_models = all(key.replace("/", ".").startswith("model") for key in space.axes if key != "seed")
    if only_models and len(set(names.values())) == len(names):
        return [dataclasses.replace(point, arm=names[which]) for point, which in zip(space.points, swept, strict=True)]
    return [
        dataclasses.replace(point, arm=" ".join(which) or point.config.model.name)
        for point, which in zip(space.points, swept, strict=True)
    ]


def _check_factor(declaration: Declaration, points: Sequence[Point]) -> None:
    """A declared factor must be a key, or the beginning of keys, of an arm."""
    keys: dict[str, None] = {}
    for config in {point.arm: point.config for point in points}.values():
        keys |= dict.fromkeys(_beginnings(dump(config)))
    for key in declaration.factor:
        if key not in keys and not key.startswith(("checkpoint", "hydra.")):
            parent = key.rpartition(".")[0]
            near = [name for name in keys if name.rpartition(".")[0] == parent] or [
                name for name in keys if "." not in name
            ]
            raise ConfigError(f"factor must be a key, or the beginning of some, got {key!r}{nearest(key, near)}")


def _beginnings(node: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _beginnings(value, f"{prefix}{name}.")


def _place(points: Sequence[Point], sweep: str) -> list[Point]:
    """The points, each config with the sweep and the arm that it belongs to."""
    placed = []
    for point in points:
        run = dataclasses.replace(point.config.run, sweep=sweep, arm=point.arm)
        placed.append(dataclasses.replace(point, config=dataclasses.replace(point.config, run=run)))
    return placed


# ------------------------------------------------------------------------------------------------------------- the name


def sweep_id(space: Space, options: SweepOptions, *, experiment: str | None = None) -> str:
    """The name of a sweep's folder.

    ``run.sweep`` where it is given; else the experiment's name; else ten hex digits of what all points have in common and of
    the keys that are swept, not their values. Seeds never count, nor does where a run is placed, so the same command with
    more seeds or arms adds to the same sweep. An experiment of which anything else is changed on the command line
    (``recipe.epochs=1``) is another sweep: its name and six hex digits.
    """
    chosen = {point.config.run.sweep for point in space.points}
    if len(chosen) > 1:
        raise ConfigError(
            f"run.sweep must be the same for all points, got {', '.join(map(str, sorted(map(str, chosen))))}"
        )
    (name,) = chosen
    if name is not None:
        if not PLAIN_NAME.fullmatch(name):
            raise ConfigError(f"run.sweep must be a plain file name (letters, digits, - _ .), got {name!r}")
        return name
    said = {"experiment": experiment}
    fixed = sorted({text for text in space.fixed if _counts(override_key(text)) and override_key(text) not in said})
    swept = sorted({key for key in space.typed_axes if _counts(key)})
    matched = [f"{key}={value}" for key, value in (("match", options.match), ("reference", options.reference)) if value]
    digits = hashlib.sha256(json.dumps([fixed, swept, matched]).encode()).hexdigest()
    if experiment is None:
        return digits[:10]
    return experiment if not (fixed or swept or matched) else f"{experiment}-{digits[:6]}"


def _counts(key: str) -> bool:
    """Whether a key can change what a sweep is about."""
    dotted = key.replace("/", ".")
    if dotted == "checkpoint":  # a place of runs as a path; what is there counts
        return True
    return dotted != "seed" and not any(dotted == p or dotted.startswith(f"{p}.") for p in (*PLACEMENT, "hydra"))
