"""Prove on this machine that a run which is killed and comes back is the run that was never killed:
``python -m eit_lab.selftest resume``. Weights, averaged weights, optimizer, random states, metrics, results and the order of
samples are compared bit by bit.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from eit_lab import command
from eit_lab.processes import LAUNCH_VARIABLES

_HELP = """\
Kill a run again and again, let the same command bring it back, and compare it with a run that was left alone.

  python -m eit_lab.selftest resume [processes=N] [kills=N] [signals=KILL,TERM,USR2] [seed=N] [keep=FOLDER] [KEY=VALUE ...]

  processes   ranks of the run                                            [1]
  kills       how often it is ended, at random steps                      [4]
  signals     how, drawn at random: KILL tells nobody; TERM and USR2 ask  [KILL]
  seed        of the random steps                                         [0]
  keep        where the two runs are left to look at                      [a folder that is deleted]
  KEY=VALUE   any override of train, for your model on your cluster       [a small run with every part of the recipe on]

Exit status 0 when not a bit differs, 1 when something does, 2 for wrong input.
"""
_SMALL = (
    "model=eit_nano", "model.size.embed_dim=24", "model.drop_path_rate=0.2", "data=synthetic", "data.img_size=16",
    "data.num_samples=256", "recipe=debug", "recipe.epochs=3", "trainer.accelerator=cpu",
    "trainer.checkpoint_every_n_steps=3",
)  # fmt: skip
_OPTIONS = {"processes": "1", "kills": "4", "signals": "KILL", "seed": "0", "keep": ""}
_SIGNALS = ("KILL", "TERM", "USR2")
_POLL_S = 0.002
_STARTS_PER_KILL = 4  # a run may be killed before its first checkpoint, so that it starts over


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, 1 when the two runs differ, 2 for wrong input."""
    return command.run(_main, argv, help_text=_HELP)


def _main(argv: list[str]) -> int:
    from eit_lab.config import ConfigError
    from eit_lab.loading import nearest

    if argv[0] != "resume":
        raise ConfigError(f"selftest must be one of resume, got {argv[0]!r}{nearest(argv[0], ['resume'])}")
    options, overrides = _take_options(argv[1:])
    if options["keep"]:
        folder = Path(options["keep"])
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"keep must be a new or empty folder, got {str(folder)!r}")
        folder.mkdir(parents=True, exist_ok=True)
        return _resume(options, overrides, folder)
    with tempfile.TemporaryDirectory(prefix="eit_lab-selftest-") as scratch:
        return _resume(options, overrides, Path(scratch))


def _take_options(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    from eit_lab.config import ConfigError
    from eit_lab.loading import nearest

    options, overrides = dict(_OPTIONS), []
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"selftest takes key=value, got {word!r}")
        if key in options:
            options[key] = value
        else:
            overrides.append(word)
    for key in ("processes", "kills", "seed"):
        if not options[key].isdigit() or (key == "processes" and options[key] == "0"):
            raise ConfigError(
                f"{key} must be a whole number{' of 1 or more' * (key == 'processes')}, got {options[key]!r}"
            )
    for name in options["signals"].split(","):
        if name not in _SIGNALS:
            raise ConfigError(f"signals must be of {', '.join(_SIGNALS)}, got {name!r}{nearest(name, _SIGNALS)}")
    return options, overrides


@dataclass
class Kills:
    """What was done to the run."""

    at_steps: list[str] = field(default_factory=list)
    starts: int = 0
    seconds: float = 0.0


def _resume(options: Mapping[str, str], overrides: Sequence[str], folder: Path) -> int:
    from eit_lab.compose import compose_one
    from eit_lab.data.prepare import prepare
    from eit_lab.plan import plan

    # Where the user chose a group, our choice and what we set in it go.
    chosen = {word.partition("=")[0] for word in overrides}
    small = [word for word in _SMALL if word.partition("=")[0].partition(".")[0] not in chosen]
    words = [*small, "logger=none", *overrides, f"trainer.devices={options['processes']}", "trainer.record_samples=true",
             "trainer.progress_bar=false"]  # fmt: skip
    config = compose_one(words)
    total = plan(config, prepare(config), world_size=int(options["processes"])).total_steps
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps, left"), TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"), console=console, transient=True,
    ) as progress:  # fmt: skip
        alone = progress.add_task("left alone", total=total, note="")
        began = time.monotonic()
        _run_to_end(words, folder / "alone", progress, alone)
        seconds_alone = time.monotonic() - began
        task = progress.add_task("killed", total=total, note="")
        kills = _kill_and_resume(words, folder / "killed", options, total, progress, task)
    differences = list(compare(_only_run(folder / "alone"), _only_run(folder / "killed")))
    print(f"left alone: {total} steps in {seconds_alone:.1f} s, {options['processes']} process(es)")
    print(
        f"killed: {len(kills.at_steps)} times, {kills.starts} starts, {kills.seconds:.1f} s: {', '.join(kills.at_steps)}"
    )
    for line in differences:
        print(f"differs: {line}")
    if differences:
        print(f"FAILED: {len(differences)} differences")
        return command.EXIT_FAILED
    print(
        "identical to the last bit: weights, averaged weights, optimizer, random states, metrics, results, order of samples"
    )
    return 0


def _start(words: Sequence[str], root: Path) -> subprocess.Popen[bytes]:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "eit_lab.train", *words, f"run.root={root}"],
            env={key: value for key, value in os.environ.items() if key not in LAUNCH_VARIABLES},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _run_to_end(words: Sequence[str], root: Path, progress: Progress, task: TaskID) -> None:
    process = _start(words, root)
    try:
        while process.poll() is None:
            progress.update(task, completed=_step(root))
            time.sleep(0.2)
    finally:
        process.kill()
    progress.update(task, completed=_step(root))
    if process.returncode:
        raise command.RunError(f"the run itself ended with status {process.returncode}: {_last_lines(root)}")


def _kill_and_resume(
    words: Sequence[str], root: Path, options: Mapping[str, str], total: int, progress: Progress, task: TaskID
) -> Kills:
    """Start the run, end it at a random later step, and so on; then let it end."""
    draw, planned, kills = random.Random(int(options["seed"])), int(options["kills"]), Kills()
    began, reached = time.monotonic(), 0
    while True:
        left = planned - len(kills.at_steps)
        target = reached + draw.randint(1, max(1, 2 * (total - reached) // (left + 1))) if left else total + 1
        signame = draw.choice(options["signals"].split(","))
        kills.starts += 1
        process = _start(words, root)
        try:
            while process.poll() is None and _step(root) < target:
                progress.update(task, completed=_step(root), note=f"{len(kills.at_steps)} kills")
                time.sleep(_POLL_S if left else 0.2)
            if process.poll() is None:
                time.sleep(draw.random() * 0.02)
                process.send_signal(getattr(signal, f"SIG{signame}"))
                process.wait()
                _wait_until_free(root)
                reached = _step(root)
                kills.at_steps.append(f"{signame} at step {reached}")
        finally:
            process.kill()
            process.wait()
        asked = signame != "KILL" and process.returncode == command.EXIT_PREEMPTED
        if process.returncode == 0:
            kills.seconds = time.monotonic() - began
            return kills
        if not (process.returncode == -signal.SIGKILL or asked):
            raise command.RunError(
                f"the run ended with status {process.returncode} instead of resuming: {_last_lines(root)}"
            )
        if kills.starts > _STARTS_PER_KILL * (planned + 1):
            raise command.RunError(f"the run makes no progress: {kills.starts} starts; {_last_lines(root)}")


def _wait_until_free(root: Path) -> None:
    """Until the last of the killed processes is gone: the ranks end by themselves when their supervisor is killed."""
    for lock in root.glob("*/lock"):
        words = lock.read_text().split()
        while len(words) > 1 and Path("/proc", words[1]).exists() and not _is_zombie(words[1]):
            time.sleep(_POLL_S)


def _is_zombie(pid: str) -> bool:
    try:
        return Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:  # gone meanwhile
        return True


def _step(root: Path) -> int:
    """The last optimizer step that rank 0 has written down."""
    for path in root.glob("*/samples/rank0.csv"):
        lines = path.read_bytes()[-4096:].splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole and (number := whole[-1].partition(b",")[0]).isdigit():
            return int(number)
    return 0


def _only_run(root: Path) -> Path:
    (record,) = root.glob("*/record.json")
    return record.parent


def _last_lines(root: Path) -> str:
    lines = (root / "log.txt").read_text(errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-3:])


# ------------------------------------------------------------------------------------------------------------ comparing


def compare(alone: Path, killed: Path) -> Iterator[str]:
    """What differs between the results of two run folders, one line each; times and places do not count."""
    from eit_lab.training.checkpoint import read

    for name in ("last", "best"):
        states = [read(folder / "checkpoints" / f"{name}.ckpt") for folder in (alone, killed)]
        parts = [
            {key: s.get(key) for key in ("state_dict", "ema", "optimizer_states", "lr_schedulers")} for s in states
        ]
        yield from _differences(parts[0], parts[1], f"{name}.ckpt")
        places = [{key: s["eit_lab"][key] for key in ("step", "epoch", "random")} for s in states]
        yield from _differences(places[0], places[1], f"{name}.ckpt eit_lab")
    rows = [_metrics(folder / "metrics.csv") for folder in (alone, killed)]
    yield from _differences(rows[0], rows[1], "metrics.csv")
    records = [json.loads((folder / "record.json").read_text()) for folder in (alone, killed)]
    for key in ("status", "identity", "best", "result", "steps"):
        yield from _differences(records[0][key], records[1][key], f"record.json {key}")
    looks = [_history(folder / "analysis" / "history.jsonl") for folder in (alone, killed)]
    yield from _differences(looks[0], looks[1], "analysis/history.jsonl")
    last = [_untimed(record["analysis"] or {}) for record in records]
    yield from _differences(last[0], last[1], "record.json analysis")
    files = sorted(path.name for path in (alone / "samples").iterdir())
    for name in files:
        first, second = ((folder / "samples" / name).read_text().splitlines() for folder in (alone, killed))
        yield from _differences(first, second, f"samples/{name}")


def _metrics(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return [
            {key: value for key, value in row.items() if not key.startswith("perf/") and value}
            for row in csv.DictReader(handle)
        ]


def _history(path: Path) -> list[dict[str, Any]]:
    return [_untimed(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _untimed(look: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in look.items() if key not in ("seconds", "share_of_training")}


def _differences(a: Any, b: Any, where: str) -> Iterator[str]:
    import torch

    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        if not same:
            yield f"{where}: {tuple(a.shape)} and {tuple(b.shape)}" if a.shape != b.shape else f"{where}: values"
    elif isinstance(a, Mapping) and isinstance(b, Mapping) and a.keys() == b.keys():
        for key in a:
            yield from _differences(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for place, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _differences(left, right, f"{where} [{place}]")
    elif a != b:
        yield f"{where}: {str(a)[:80]} and {str(b)[:80]}"


if __name__ == "__main__":
    sys.exit(main())
