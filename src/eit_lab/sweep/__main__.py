"""``python -m eit_lab.sweep experiments/NNN-slug``: run a declared ablation; ``status`` and ``cancel`` look after any sweep."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from eit_lab import command

if TYPE_CHECKING:
    from eit_lab.manifest import Manifest

_HELP = """\
Run a declared ablation, or look after a sweep.

  python -m eit_lab.sweep experiments/NNN-slug [key=value ...]    run it; the same command goes on with it
  python -m eit_lab.sweep status FOLDER [once=true]               what its jobs are doing: live on a terminal, else once
  python -m eit_lab.sweep cancel FOLDER                           end its jobs; their states are saved, the same command goes on

FOLDER is a sweep's (runs/sweeps/ID), or a declared ablation's (experiments/NNN-slug), or its name.
`python -m eit_lab.train -m ...` starts sweeps too; `python -m eit_lab.train --help` lists the keys.
"""
_LOOK_S = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status as train's, and of ``status`` 0, or 1 where a job has failed."""
    return command.run(_main, argv, help_text=_HELP)


def _main(argv: list[str]) -> int:
    match argv:
        case ["status", folder, *options]:
            return _status(_sweep_folder(folder), once=_is_once(options))
        case ["cancel", folder]:
            return _cancel(_sweep_folder(folder))
        case ["status" | "cancel" as verb, *_]:
            from eit_lab.config import ConfigError

            raise ConfigError(f"sweep {verb} takes the folder of one sweep, got {' '.join(argv[1:]) or 'nothing'}")
    return _run(argv)


def _run(argv: list[str]) -> int:
    from eit_lab.compose import parse_flags
    from eit_lab.sweep.arms import read_sweep
    from eit_lab.sweep.launch import launch

    name, *overrides = argv
    if any("=" not in word and not word.startswith(("-", "~")) for word in overrides):  # two names: a verb misspelt
        from eit_lab.config import ConfigError
        from eit_lab.loading import nearest

        raise ConfigError(
            "sweep takes an experiment and key=value, or status or cancel and a folder, "
            f"got {' '.join(argv)!r}{nearest(name, ['status', 'cancel'])}"
        )
    return launch(read_sweep(parse_flags(["-m", f"experiment={name.rstrip('/')}", *overrides])), argv)


def _is_once(options: Sequence[str]) -> bool:
    from eit_lab.config import ConfigError

    if not options:
        return False
    if list(options) not in (["once=true"], ["once=false"]):
        raise ConfigError(f"sweep status knows once=true and once=false, got {' '.join(options)!r}")
    return options[0] == "once=true"


def _sweep_folder(text: str) -> Path:
    from eit_lab.config import ConfigError
    from eit_lab.loading import nearest
    from eit_lab.manifest import is_sweep

    sweeps = Path(os.environ.get("EIT_LAB_RUNS", "runs")) / "sweeps"
    given = Path(text)
    for folder in (given, sweeps / given.name):
        if is_sweep(folder):
            return folder
    known = sorted(path.parent.name for path in sweeps.glob("*/sweep.json"))
    there = f"; there are: {', '.join(known[:8])}" if known else ""
    raise ConfigError(f"{text!r} must be the folder of a sweep (with sweep.json){nearest(given.name, known) or there}")


def _status(folder: Path, *, once: bool) -> int:
    from rich.console import Console
    from rich.live import Live

    from eit_lab.manifest import any_alive, read_manifest
    from eit_lab.sweep.status import Watch, lines, render

    watch = Watch(read_manifest(folder))
    console = Console()
    if once or not console.is_terminal:
        for line in lines(watch):
            print(line)
        return command.EXIT_FAILED if watch.failed() else 0
    with Live(render(watch), console=console, auto_refresh=False) as live, suppress(KeyboardInterrupt):  # enough seen
        live.refresh()
        while not (watch.is_over() and not any_alive(folder)):
            time.sleep(_LOOK_S)
            watch.refresh()
            live.update(render(watch), refresh=True)
    return command.EXIT_FAILED if watch.failed() else 0


def _cancel(folder: Path) -> int:
    from eit_lab.manifest import read_manifest

    manifest = read_manifest(folder)
    said = [*_stop_launchers(manifest), *_cancel_slurm(manifest)]
    print("\n".join(said) or f"sweep {folder.name}: no job is running")
    return 0


def _stop_launchers(manifest: Manifest) -> list[str]:
    """Ask the launchers to stop whose jobs end with them; they hand it on, and wait until the states are saved."""
    from eit_lab.manifest import is_alive

    said = []
    jobs = [job for job in manifest.jobs.values() if job.state == "running" and not job.handle.startswith("slurm:")]
    for launcher in sorted({job.by for job in jobs}):
        host, pid, _ = launcher.rsplit("-", 2)
        if not is_alive(manifest.folder, launcher):
            continue
        if host != socket.gethostname():
            said.append(f"its launcher is process {pid} on {host}: give this command there")
            continue
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(int(pid), signal.SIGTERM)
        said.append(f"process {pid}, the launcher, asked to stop: its jobs save their state and end")
    return said


def _cancel_slurm(manifest: Manifest) -> list[str]:
    from eit_lab.manifest import Journal, locked

    jobs = [
        job
        for job in manifest.jobs.values()
        if job.state in ("submitted", "running") and job.handle.startswith("slurm:")
    ]
    if not jobs:
        return []
    ids = [job.handle.removeprefix("slurm:") for job in jobs]
    try:
        done = subprocess.run(["scancel", *ids], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise command.RunError("scancel is not here: give this command on a machine of the cluster") from None
    if done.returncode:
        raise command.RunError(f"scancel: {done.stderr.strip()}")
    journal = Journal(manifest.folder)
    try:
        with locked(manifest.folder):
            journal.write([{"job": job.entry.identity, "state": "interrupted", "said": "cancelled"} for job in jobs])
    finally:
        journal.close()
    return [f"{len(ids)} Slurm jobs cancelled; their runs go on from their last saved state"]


if __name__ == "__main__":
    sys.exit(main())
