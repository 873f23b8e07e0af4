"""Test a finished run again: ``python -m eit_lab.evaluate run=FOLDER``. The same number must come back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eit_lab import command

_HELP = """\
Test the weights of a run folder again, on its own test set, and compare with its record.

  python -m eit_lab.evaluate run=FOLDER [checkpoint=best|last] [part=test|val] [data.root=PATH] [trainer.devices=N] ...

  run         folder of a run (python -m eit_lab.train prints it)
  checkpoint  best: best validation accuracy; last: the end of training          [recipe.select of the run]
  part        test, or val: the held-out slice of train                          [test]
  data.*, trainer.*   where the data lies and what to run on, as in train
"""
_CHOICES = {"checkpoint": ("best", "last"), "part": ("test", "val")}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, 1 when the number differs from the record, 2 for wrong input."""
    return command.run(_main, argv)


def _main(argv: list[str]) -> int:
    if not argv or "--help" in argv or "-h" in argv:
        print(_HELP)
        return 0
    options, overrides = _take_options(argv)
    config = _load_run(Path(options["run"]), overrides)

    from eit_lab.data.catalog import describe
    from eit_lab.runs import is_main_process, read_record
    from eit_lab.training.evaluate import evaluate

    folder, part, checkpoint = Path(options["run"]), options["part"], options.get("checkpoint", config.recipe.select)
    weights = folder / "checkpoints" / f"{checkpoint}.ckpt"
    if not weights.is_file():
        from eit_lab.config import ConfigError

        raise ConfigError(f"run: {folder} has no {weights.name} in checkpoints/; has it trained for an epoch?")
    result = evaluate(config, describe(config.data), weights, part=part)
    if not is_main_process():
        return 0
    print("  ".join(f"{name} {value:.6g}" for name, value in result.items()))
    record = read_record(folder)
    known = (record or {}).get("result") if (part, checkpoint) == ("test", config.recipe.select) else None
    if known is None:
        return 0
    same = all(known[name] == value for name, value in result.items())
    if same:
        print("the same as on record, to the last digit")
        return 0
    print("on record: " + "  ".join(f"{name} {value:.6g}" for name, value in known.items()))
    return 0 if known["test/acc1"] == result["test/acc1"] else command.EXIT_FAILED


def _take_options(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    from eit_lab.config import ConfigError
    from eit_lab.loading import nearest

    options = {"part": "test"}
    overrides = []
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"evaluate takes key=value, got {word!r}")
        if key == "run" or key in _CHOICES:
            options[key] = value
        elif key.partition(".")[0] in ("data", "trainer"):
            overrides.append(word)
        else:
            valid = ("run", "checkpoint", "part", "data.root", "trainer.devices")
            raise ConfigError(
                f"{key} must be one of run, checkpoint, part, data.*, trainer.*, got {value!r}{nearest(key, valid)}"
            )
    for key, choices in _CHOICES.items():
        if options.get(key, choices[0]) not in choices:
            raise ConfigError(
                f"{key} must be one of {', '.join(choices)}, got {options[key]!r}{nearest(options[key], choices)}"
            )
    if "run" not in options:
        raise ConfigError("run must be given: evaluate run=FOLDER")
    return options, overrides


def _load_run(folder: Path, overrides: list[str]) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from eit_lab.config import ConfigError
    from eit_lab.loading import load, unknown_key

    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run must be the folder of a run (with config.yaml), got {str(folder)!r}")
    config = OmegaConf.load(folder / "config.yaml")
    OmegaConf.set_struct(config, True)
    for word in overrides:
        key, _, value = word.partition("=")
        try:
            OmegaConf.update(config, key, OmegaConf.from_dotlist([f"x={value}"]).x, merge=True)
        except OmegaConfBaseException:
            parent = OmegaConf.select(config, key.rpartition(".")[0])
            raise ConfigError(unknown_key(key, value, list(parent) if parent else [])) from None
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return load({str(key): value for key, value in plain.items()})


if __name__ == "__main__":
    sys.exit(main())
