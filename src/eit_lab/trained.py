"""Trained weights as a command line names them: ``run=FOLDER [checkpoint=best|last|FILE|a,b,c] [weights=raw|ema]``, or
``checkpoint=FILE model=NAME`` for a file that belongs to no run. Shared by evaluate, predict and export. No torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from eit_lab.compose import compose_one
from eit_lab.config import Config, ConfigError, ImageNetData
from eit_lab.data.variants import synsets
from eit_lab.finetune import origin_of, read_metadata, resolve, run_folder_of
from eit_lab.loading import load, nearest, unknown_key
from eit_lab.runs import PLACEMENT, read_record

_NAMED = ("best", "last", "previous")
_OF_WEIGHTS = {"run": None, "checkpoint": None, "model": None, "model.timm_name": None, "weights": ("raw", "ema")}
# What is tested or exported gives the same on any device, so where it was trained says nothing about where it is tested.
_ANY_PLACE = ("trainer.devices=auto", "trainer.num_nodes=1", "trainer.strategy=auto")
CLASSES_FILE = "classes.json"
"""In a run folder: the names of the classes in label order, where they have names."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model with weights, not yet built."""

    config: Config
    files: tuple[Path, ...]
    """Their mean in float64 where there are several."""
    weights: Literal["raw", "ema"]
    run: Path | None
    num_classes: int | None
    """None: as many as the file's classifier has."""
    class_names: tuple[str, ...] | None
    """In label order, where they are known."""
    as_recorded: bool
    """Whether these are the weights, and the config, of the number in the run's record."""

    def describe(self) -> str:
        """In a few words, for the output."""
        kind = "averaged weights (EMA)" if self.weights == "ema" else "weights"
        if len(self.files) == 1:
            return f"{self.config.model.name}, {kind} of {self.files[0]}"
        return f"{self.config.model.name}, mean of the {kind} of {len(self.files)} files, {self.files[0]} to {self.files[-1].name}"


@dataclass(frozen=True, kw_only=True)
class Words:
    """A command line, taken apart."""

    options: Mapping[str, str]
    overrides: tuple[str, ...]
    """Of the run's config: data.*, trainer.*"""
    rest: tuple[str, ...]
    """What is not key=value."""

    def without(self, option: str, override: str) -> Words:
        """An override in place of an option."""
        options = {key: value for key, value in self.options.items() if key != option}
        return dataclasses.replace(self, options=options, overrides=(*self.overrides, override))


def take_apart(
    argv: Sequence[str],
    *,
    command: str,
    options: Mapping[str, Sequence[str] | None],
    takes_files: bool = False,
) -> Words:
    """Options of weights and the command's own (with their choices, or None for any value), overrides, and other words.

    Raises ConfigError for a key that is none of these, and for a word without ``=`` unless ``takes_files``.
    """
    known = {**_OF_WEIGHTS, **options}
    found: dict[str, str] = {}
    overrides, rest = [], []
    for word in argv:
        key, equals, value = word.partition("=")
        if equals and key in known:
            found[key] = value
        elif equals and key.partition(".")[0] in ("data", "trainer") and "." in key:
            overrides.append(word)
        elif takes_files and (not equals or Path(word).is_file()):
            rest.append(word)
        elif not equals:
            raise ConfigError(f"{command} takes key=value, got {word!r}")
        else:
            valid = (*known, "data.root", "trainer.devices")
            raise ConfigError(
                f"{key} must be one of {', '.join((*known, 'data.*', 'trainer.*'))}, got {value!r}{nearest(key, valid)}"
            )
    for key, choices in known.items():
        if choices is not None and key in found and found[key] not in choices:
            raise ConfigError(
                f"{key} must be one of {', '.join(choices)}, got {found[key]!r}{nearest(found[key], choices)}"
            )
    return Words(options=found, overrides=tuple(overrides), rest=tuple(rest))


def find(words: Words, *, command: str, data: str = "imagenet") -> Trained:
    """What the options name; ``data``: the group that goes with a file of weights. Raises ConfigError in one line for what does not exist, with what there is."""
    options = words.options
    weights: Literal["raw", "ema"] = "ema" if options.get("weights") == "ema" else "raw"
    if "run" in options:
        for key in ("model", "model.timm_name"):
            if key in options:
                raise ConfigError(f"{key} is the run's own with run=..., got {options[key]!r}; leave it out")
        return _of_run(Path(options["run"]).expanduser(), options.get("checkpoint"), weights, words.overrides)
    if options.get("checkpoint", "best") in (*_NAMED, "epochs"):
        raise ConfigError(f"run must be given: {command} run=FOLDER, or checkpoint=FILE model=NAME")
    files = tuple(resolve(name) for name in options["checkpoint"].split(","))
    run = run_folder_of(files[0])
    if run is not None and "model" not in options:
        return _of_run(run, options["checkpoint"], weights, words.overrides)
    model = [f"{key}={options[key]}" for key in ("model", "model.timm_name") if key in options]
    return _of_file(files, model, weights, words.overrides, command=command, data=data)


def _of_run(run: Path, checkpoint: str | None, weights: Literal["raw", "ema"], overrides: Sequence[str]) -> Trained:
    config = load_run(run, [*_ANY_PLACE, *map(_as_many_devices, overrides)])
    record = read_record(run)
    chosen = checkpoint or config.recipe.select
    files = tuple(file for name in chosen.split(",") for file in _in_run(run, name))
    placed = all(any(word.startswith((f"{key}=", f"{key}.")) for key in PLACEMENT) for word in overrides)
    data = (record or {}).get("data") or {}
    num_classes = data.get("num_classes") or config.data.num_classes
    return Trained(
        config=config,
        files=files,
        weights=weights,
        run=run,
        num_classes=num_classes,
        class_names=_class_names(run, config, num_classes),
        as_recorded=placed and chosen == config.recipe.select,
    )


def _of_file(
    files: tuple[Path, ...],
    model: Sequence[str],
    weights: Literal["raw", "ema"],
    overrides: Sequence[str],
    *,
    command: str,
    data: str,
) -> Trained:
    if not model and origin_of(files[0]) is None:
        raise ConfigError(
            f"model must be given with a file that does not tell it: {command} checkpoint=FILE model=eit_base ..."
        )
    told = read_metadata(files[0]) if files[0].suffix == ".safetensors" else None
    told = told or {}
    given = [word.partition("=")[0] for word in overrides]
    preset = [
        f"data.{key}={json.dumps(told[key])}"
        for key in ("img_size", "in_chans", "mean", "std", "eval_resize_share")
        if key in told and f"data.{key}" not in given
    ]
    path = str(files[0]).replace("\\", "\\\\").replace("'", "\\'")
    config = compose_one(
        [
            *model, f"checkpoint='{path}'", f"data={data}", "logger=none",
            *preset, *map(_as_many_devices, overrides),
        ]
    )  # fmt: skip
    names = told.get("class_names")
    return Trained(
        config=config,
        files=files,
        weights=weights,
        run=None,
        num_classes=told.get("num_classes"),
        class_names=tuple(names) if names else None,
        as_recorded=False,
    )


def _as_many_devices(word: str) -> str:
    """A number of devices need not divide the batch of training here: as text it is not held against it."""
    key, _, value = word.partition("=")
    return f"{key}='{value}'" if key == "trainer.devices" and value.isdecimal() and int(value) > 0 else word


def load_run(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a run folder, single values of it replaced."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run must be the folder of a run (with config.yaml), got {str(folder)!r}")
    try:
        config = OmegaConf.load(folder / "config.yaml")
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"run: {folder / 'config.yaml'} is damaged: {str(error).splitlines()[0]}") from None
    OmegaConf.set_struct(config, True)
    for word in overrides:
        key, _, value = word.partition("=")
        try:
            is_path = key == "data.root" and value != "null"  # which may look like a number, or hold a #
            OmegaConf.update(config, key, value if is_path else OmegaConf.from_dotlist([f"x={value}"]).x, merge=True)
        except YAMLError:
            raise ConfigError(f"{key} must be a value as YAML writes it, got {value!r}") from None
        except OmegaConfBaseException:
            parent = OmegaConf.select(config, key.rpartition(".")[0])
            raise ConfigError(unknown_key(key, value, list(parent) if parent else [])) from None
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict), "a run's config is a mapping"
    return load({str(key): value for key, value in plain.items()})


def _in_run(run: Path, name: str) -> Collection[Path]:
    """best, last, epochs (all that were kept), epoch-0007, or any file."""
    folder = run / "checkpoints"
    if name == "epochs":
        kept = sorted(folder.glob("epoch-*.ckpt"))
        if not kept:
            raise ConfigError(f"checkpoint=epochs: {run} has no epoch-*.ckpt; trainer.keep_epochs=N keeps the last N")
        return kept
    if Path(name).expanduser().is_dir():  # a run: its best or last, as its recipe selects
        return (resolve(name),)
    inside = folder / f"{name}.ckpt"
    if inside.is_file():
        return (inside,)
    if Path(name).expanduser().is_file():
        return (Path(name).expanduser(),)
    if name in _NAMED:
        raise ConfigError(f"run: {run} has no {inside.name} in checkpoints/; has it trained for an epoch?")
    there = sorted(path.stem for path in folder.glob("*.ckpt"))
    raise ConfigError(
        f"checkpoint must be one of {', '.join([*there, 'epochs'])}, or a file, got {name!r}{nearest(name, there)}"
    )


def _class_names(run: Path, config: Config, num_classes: int | None) -> tuple[str, ...] | None:
    """From the run folder; else, for ImageNet's layout, the folders of train/ where they lie now."""
    path = run / CLASSES_FILE
    names: Any = None
    if path.is_file():
        try:
            names = json.loads(path.read_text())
        except ValueError:
            raise ConfigError(f"{path} is damaged: it must be the list of the run's class names") from None
    elif isinstance(config.data, ImageNetData) and config.data.root:
        train = Path(config.data.root).expanduser() / "train"
        names = sorted(p.name for p in train.iterdir() if p.is_dir()) if train.is_dir() else None
    if names is not None and num_classes in (None, len(names)):
        return tuple(names)
    return synsets() if isinstance(config.data, ImageNetData) and num_classes == len(synsets()) else None
