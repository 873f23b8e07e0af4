"""The text of ``python -m eit_lab.train --help``: groups with their options, and every key with its help and default."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator

from eit_lab.config_groups import conf_dir
from eit_lab.declaration import SweepOptions, experiment_names
from eit_lab.loading import field_help

_GROUPS = (
    "model", "model/size", "model/ib", "model/stem", "data", "recipe", "trainer", "logger", "experiment", "debug",
)  # fmt: skip
_HEAD = """\
Train a ViT, an LSRA or an EIT: one run, or with -m every point of a sweep.

  python -m eit_lab.train model=eit_base trainer.devices=8 data.root=PATH       one run on ImageNet
  python -m eit_lab.train data=digits model=eit_nano                            one run that needs no files
  python -m eit_lab.train -m model=vit_base,lsra_base,eit_base seed=0,1,2       a sweep: each job its own process
  python -m eit_lab.train -m model/ib=lsra,eit model.ib.strength=0.5,1          any axis, any key
  python -m eit_lab.train -m experiment=000-digits-demo                         a declared ablation

  --cfg job [--resolve]   show the config instead of running      -m, --multirun    run every point
  --config-dir DIR        a folder of your own configs            --hydra-help      Hydra's flags
"""


def train_help() -> str:
    """The whole text, wrapped to the terminal."""
    width = min(120, max(80, shutil.get_terminal_size().columns))
    return "\n".join([_HEAD, *_group_lines(width), "", *_sweep_lines(width), "", *_key_lines(width)])


def _group_lines(width: int) -> Iterator[str]:
    yield "GROUPS  (group=option)"
    for group in _GROUPS:
        options = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
        options += experiment_names() if group == "experiment" else []
        yield from textwrap.wrap(
            f"  {group:<12}{', '.join(options)}", width, subsequent_indent=" " * 14, break_on_hyphens=False
        )


def _sweep_lines(width: int) -> Iterator[str]:
    yield "OF A SWEEP  (with -m; of all its jobs together, so no axes)"
    keys = list(field_help(SweepOptions))
    column = 2 + max(len(key) for key, _, _ in keys) + 2
    for key, text, default in keys:
        yield from textwrap.wrap(
            f"  {key:<{column - 2}}{text}  [{_show(default)}]",
            width,
            subsequent_indent=" " * column,
            break_on_hyphens=False,
        )


def _key_lines(width: int) -> Iterator[str]:
    yield "KEYS  (key=value)"
    seen: dict[str, tuple[str, str]] = {}
    for key, text, default in field_help():
        shown = "" if default is dataclasses.MISSING else f"  [{_show(default)}]"
        if key not in seen:
            seen[key] = (text, shown)
        elif key.endswith(".kind"):  # one line for each kind of stem, data, logger
            seen[key] = (f"{seen[key][0]}; or {text}", "")
    column = 2 + max(len(key) for key in seen) + 2
    for key, (text, shown) in seen.items():
        yield from textwrap.wrap(
            f"  {key:<{column - 2}}{text}{shown}", width, subsequent_indent=" " * column, break_on_hyphens=False
        )


def _show(default: object) -> str:
    """A default as one would type it."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return "[]" if default == () else str(default)
