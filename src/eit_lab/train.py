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
    """The command; returns its exit status: 0 done, 1 a run failed, 2 wrong input, 75 asked to stop (state saved), 130 interrupted."""
    return command.run(_main, argv)


def _main(argv: list[str]) -> int:
    if "--help" in argv or "-h" in argv:
        from eit_lab.help import train_help

        print(train_help())
        return 0
    if argv[:1] == ["--frozen"]:
        return _run(_read_frozen(argv), argv, announce=Path(argv[1]).with_suffix(".run.json"))

    from eit_lab.compose import compose_one, hand_over_to_hydra, parse_flags

    flags = parse_flags(argv)
    if flags.wants_hydra:
        return hand_over_to_hydra(argv)
    if not flags.multirun:
        config = compose_one(flags.overrides, config_name=flags.config_name, config_dirs=flags.config_dirs)
        return _run(config, argv)

    from eit_lab.sweep.arms import read_sweep

    sweep = read_sweep(flags)
    from eit_lab.sweep.launch import launch  # after whatever is wrong has been said: it takes a quarter of a second

    return launch(sweep, argv)


def _read_frozen(argv: list[str]) -> Config:
    """The config that a sweep froze for this job: no groups, no YAML of today."""
    from eit_lab.config import ConfigError
    from eit_lab.loading import load

    if len(argv) != 2 or not Path(argv[1]).is_file():
        raise ConfigError(f"--frozen takes the file of one resolved config, got {' '.join(argv[1:]) or 'nothing'}")
    if argv[1].endswith(".json"):
        return load(json.loads(Path(argv[1]).read_text()))
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(OmegaConf.load(argv[1]))
    assert isinstance(plain, dict)
    return load({str(key): value for key, value in plain.items()})


def _run(config: Config, argv: list[str], *, announce: Path | None = None) -> int:
    from eit_lab.processes import count_ranks, die_with_parent, started_by_launcher
    from eit_lab.signals import STOP

    die_with_parent()
    launched = started_by_launcher()
    if not launched and config.run.show is None and (count := count_ranks(config)) > 1:
        return _supervise(config, argv, count, announce)
    STOP.install()
    try:
        return _run_here(config, argv, announce)
    finally:
        STOP.uninstall()


def _supervise(config: Config, argv: list[str], count: int, announce: Path | None) -> int:
    """Start the ranks of this machine, once everything that can be told without them is known to be good."""
    from omegaconf import OmegaConf

    from eit_lab.config import ConfigError, WandbLogger
    from eit_lab.data.prepare import prepare
    from eit_lab.loading import dump
    from eit_lab.plan import plan
    from eit_lab.processes import RankLostError, run_ranks
    from eit_lab.runs import identity, read_record, run_name, write_record

    if config.trainer.num_nodes > 1:
        raise ConfigError(
            f"trainer.num_nodes must be 1 unless torchrun or Slurm starts the processes, got {config.trainer.num_nodes}; "
            "nearest: 1"
        )
    facts = prepare(config)
    plan(config, facts, world_size=count)
    run_id = identity(config, facts)
    if announce is not None:
        _announce(announce, run_id, Path(config.run.root) / run_name(config, run_id))
    folder = Path(config.run.root) / run_name(config, run_id)
    frozen = OmegaConf.to_yaml(OmegaConf.create(dump(config)))
    closing = config.logger.finish_timeout_s if isinstance(config.logger, WandbLogger) else 0.0
    try:
        return run_ranks("eit_lab.train", frozen, count=count, command=argv, patience_s=10.0 + closing)
    except RankLostError as lost:
        record = read_record(folder) or {}
        if lost.main_status > 0 and record.get("error") and record["error"] in lost.said:
            return lost.main_status  # the same error everywhere, and rank 0 has said it
        if record.get("status") in ("running", "failed"):  # what rank 0 saw of it is only that the connection broke
            write_record(folder, {**record, "status": "failed", "error": str(lost)})
        raise


def _announce(path: Path, run_id: str, folder: Path) -> None:
    from eit_lab.runs import write_text

    write_text(path, json.dumps({"identity": run_id, "folder": str(folder)}))


def _run_here(config: Config, argv: list[str], announce: Path | None) -> int:
    from eit_lab.data.prepare import prepare
    from eit_lab.runs import claim, is_main_process

    if config.run.show is not None:
        from eit_lab.data.catalog import published_facts
        from eit_lab.show import show

        known = published_facts(config.data) if config.run.show == "schedule" else None
        return show(config, known or prepare(config))
    facts = prepare(config)
    with claim(config, facts) as run:
        if announce is not None and is_main_process():
            _announce(announce, run.run_id, run.folder)
        return _report_finished(run) if run.state == "finished" else _fit(config, facts, run, argv)


def _report_finished(run: Run) -> int:
    from eit_lab.runs import is_main_process, read_record

    record = read_record(run.folder)
    assert record is not None
    if not is_main_process():
        return 0
    accuracy = 100 * record["result"]["test/acc1"]
    print(f"finished already: test top-1 {accuracy:.2f}%, folder {run.folder}\nrun.overwrite=true starts anew")
    return 0


def _fit(config: Config, facts: DataFacts, run: Run, argv: list[str]) -> int:
    from eit_lab.config import ConfigError
    from eit_lab.processes import typed_command
    from eit_lab.runs import is_main_process, read_record
    from eit_lab.training.fit import fit
    from eit_lab.training.summary import closing_line, stop_line

    command_line = typed_command(argv)
    try:
        record = fit(config, facts, run, command_line)
    except ConfigError:  # the same command would say the same
        raise
    except BaseException:
        if is_main_process():
            print(stop_line(run, command_line), file=sys.stderr, flush=True)
            if sync := (read_record(run.folder) or {}).get("sync"):
                print(sync, file=sys.stderr, flush=True)
        raise
    if is_main_process():
        print(closing_line(record, run), flush=True)
        if record["sync"]:
            print(record["sync"], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
