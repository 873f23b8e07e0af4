"""Train one run, or with -m every point of a sweep: ``python -m eit_lab.train model=eit_base trainer.devices=8``.

Configuration is checked, all of it, before torch is imported. One mistake is one line on stderr and exit status 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eit_lab import command

if TYPE_CHECKING:
    from eit_lab.config import Config
    from eit_lab.runs import DataFacts, Run


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 1 a run failed, 2 wrong input, 130 interrupted."""
    return command.run(_main, argv)


def _main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        from eit_lab.help import train_help

        print(train_help())
        return 0
    if argv[:1] == ["--frozen"]:
        return _run(_read_frozen(argv), argv, announce=Path(argv[1]).with_suffix(".json"))

    from eit_lab.compose import compose_one, compose_points, hand_over_to_hydra, parse_flags

    flags = parse_flags(argv)
    if flags.wants_hydra:
        return hand_over_to_hydra(argv)
    if not flags.multirun:
        config = compose_one(flags.overrides, config_name=flags.config_name, config_dirs=flags.config_dirs)
        return _run(config, argv)

    from eit_lab.sweep.launch import launch

    points, launcher = compose_points(flags.overrides, config_name=flags.config_name, config_dirs=flags.config_dirs)
    return launch(points, launcher, argv)


def _read_frozen(argv: list[str]) -> Config:
    """The config that a sweep froze for this job: no groups, no YAML of today."""
    from omegaconf import OmegaConf

    from eit_lab.config import ConfigError
    from eit_lab.loading import load

    if len(argv) != 2 or not Path(argv[1]).is_file():
        raise ConfigError(f"--frozen takes the file of one resolved config, got {' '.join(argv[1:]) or 'nothing'}")
    plain = OmegaConf.to_container(OmegaConf.load(argv[1]))
    assert isinstance(plain, dict)
    return load({str(key): value for key, value in plain.items()})


def _run(config: Config, argv: list[str], *, announce: Path | None = None) -> int:
    from eit_lab.data.prepare import prepare
    from eit_lab.runs import claim, is_main_process, write_text

    facts = prepare(config)
    with claim(config, facts) as run:
        if announce is not None and is_main_process():
            write_text(announce, json.dumps({"identity": run.run_id, "folder": str(run.folder)}))
        return _report_finished(run) if run.state == "finished" else _fit(config, facts, run, argv)


def _report_finished(run: Run) -> int:
    from eit_lab.runs import read_record

    record = read_record(run.folder)
    assert record is not None
    accuracy = 100 * record["result"]["test/acc1"]
    print(f"finished already: test top-1 {accuracy:.2f}%, folder {run.folder}\nrun.overwrite=true starts anew")
    return 0


def _fit(config: Config, facts: DataFacts, run: Run, argv: list[str]) -> int:
    from eit_lab.runs import is_main_process
    from eit_lab.training.fit import closing_line, fit, stop_line

    try:
        record = fit(config, facts, run, argv)
    except BaseException:
        if is_main_process():
            print(stop_line(run, argv), file=sys.stderr, flush=True)
        raise
    if is_main_process():
        print(closing_line(record, run), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
