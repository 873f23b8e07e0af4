"""What the sweep engine itself costs: ten thousand jobs that do nothing, and what a small job pays before it trains.

The sweep goes through the real commands. Its jobs leave a record and end (benchmark/nothing.py), forked from the same template
as real ones. The second half takes a real run of one step, in turn forked from the template and as a Python process of its own,
beside a process that only imports torch, Lightning and torchvision: what a script of one's own would pay.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from rich.console import Console

from eit_lab.benchmark.words import read_words
from eit_lab.compose import parse_flags
from eit_lab.config import ConfigError
from eit_lab.manifest import read_manifest
from eit_lab.processor import machine
from eit_lab.runs import code_state, versions, write_text
from eit_lab.sweep.arms import read_sweep
from eit_lab.sweep.launch import launch

HELP = """\
Measure what the sweep engine costs: jobs that do nothing, and the way of a small job to its first step.

  python -m eit_lab.bench sweep [jobs=N] [rounds=N] [out=FOLDER]

  jobs      jobs that do nothing                                              [10000]
  rounds    runs of one step, each forked, on its own, and imports alone      [5]
  out       folder of the record: sweep.md, sweep.json                        [bench-sweep]

Takes about ten minutes; let the machine do nothing else.
"""
_DEFAULTS = {"jobs": "10000", "rounds": "5", "out": "bench-sweep"}
_ARMS = 100
_T = TypeVar("_T")
# The smallest run there is: what it takes is the way there, not the step.
_ONE_STEP = (
    "data=synthetic", "data.img_size=8", "data.num_samples=64", "model=eit_nano", "model.size.embed_dim=16", "model.size.depth=2",
    "model.size.num_heads=4", "recipe=small", "recipe.batch_size=16", "recipe.warmup_epochs=0.0", "logger=none",
    "trainer.accelerator=cpu", "trainer.max_steps=1", "guard.speed_s=0",
)  # fmt: skip
_PEER = "import torch, lightning, torchvision"


def run(argv: Sequence[str]) -> int:
    """``bench sweep``: measure, print and write the record. Returns 0; raises ConfigError for wrong words."""
    told = read_words(argv, _DEFAULTS, verb="sweep")
    for key in ("jobs", "rounds"):
        if not told[key].isdigit() or int(told[key]) == 0:
            raise ConfigError(f"{key} must be a whole number of 1 or more, got {told[key]!r}")
    results = measure(jobs=int(told["jobs"]), rounds=int(told["rounds"]))
    results["command"] = " ".join(["python -m eit_lab.bench sweep", *argv])
    text = as_markdown(results)
    print(text)
    out = Path(told["out"])
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "sweep.json", json.dumps(results, indent=2) + "\n")
    write_text(out / "sweep.md", text)
    print(f"{out / 'sweep.md'}\n{out / 'sweep.json'}")
    return 0


def measure(*, jobs: int, rounds: int) -> dict[str, Any]:
    """Seconds of every part, and what they were measured on."""
    with tempfile.TemporaryDirectory(prefix="eit_lab-bench-") as scratch, _inside(Path(scratch)):
        return {
            "jobs": jobs,
            "rounds": rounds,
            "seconds": _many(jobs),
            "one_step": _one_step(rounds),
            "cores": len(os.sched_getaffinity(0)),
            "machine": machine(),
            "load": os.getloadavg()[0],
            "commit": code_state()[0],
            "date": time.strftime("%Y-%m-%d"),
            **{key: value for key, value in versions().items() if key in ("python", "packages", "eit_lab")},
        }


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _step(text: str) -> None:
    Console(stderr=True).print(f"{time.strftime('%H:%M:%S')}  {text}", highlight=False)


def _timed(body: Callable[[], _T]) -> tuple[float, _T]:
    began = time.perf_counter()
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        value = body()
    return time.perf_counter() - began, value


def _many(jobs: int) -> dict[str, float]:
    """A sweep of arms and seeds whose jobs do nothing, through every part of the engine."""
    seeds = max(1, jobs // _ARMS)
    arms = -(-jobs // seeds)
    axes = [f"recipe.weight_decay={','.join(f'{0.001 * (n + 1):g}' for n in range(arms))}", f"seed=range({seeds})"]
    flags = parse_flags(["-m", "data=digits", "logger=none", "guard.speed_s=0", "hydra/launcher=local", *axes])
    seconds: dict[str, float] = {}
    _step(f"{arms} arms of {seeds} seeds: the command line")
    seconds["compose"], sweep = _timed(lambda: read_sweep(flags))
    _step("launch: freeze, manifest, run every job")
    seconds["launch"], status = _timed(lambda: launch(sweep, ["bench"], module="eit_lab.benchmark.nothing"))
    if status:
        raise RuntimeError("a job that does nothing failed")
    folder = Path("runs", "sweeps", sweep.id)
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    begun = min(event["time"] for event in events)
    seconds["jobs"] = max(event["time"] for event in events) - begun
    _step("the same command again")
    seconds["again"], _ = _timed(lambda: launch(sweep, ["bench"], module="eit_lab.benchmark.nothing"))
    _step("manifest, status, report")
    seconds["manifest"], manifest = _timed(lambda: read_manifest(folder))
    if sum(job.state == "finished" for job in manifest.jobs.values()) != len(sweep.points):
        raise RuntimeError("not every job finished")
    seconds["status"], _ = _timed(lambda: _command("eit_lab.sweep", "status", str(folder), "once=true"))
    seconds["report"], _ = _timed(lambda: _command("eit_lab.report", str(folder)))
    return {name: round(value, 3) for name, value in seconds.items()}


def _command(module: str, *argv: str) -> None:
    subprocess.run([sys.executable, "-m", module, *argv], check=True, capture_output=True)


def _one_step(rounds: int) -> dict[str, list[float]]:
    """Seconds from the order to the end: of forked runs of one step, of fresh ones, and of imports alone, in turn."""
    took: dict[str, list[float]] = {"forked": [], "fresh": [], "imports": []}
    _step(f"runs of one step: {2 * rounds} forked, {2 * rounds} fresh")
    for number in range(rounds):
        for kind in ("forked", "fresh"):
            seeds = f"seed={10 * number},{10 * number + 1},{10 * number + 2}"
            more = [] if kind == "forked" else ["hydra.launcher.template=false"]
            flags = parse_flags(["-m", *_ONE_STEP, seeds, f"run.root=one-{kind}", *more])
            sweep = read_sweep(flags)
            _, status = _timed(lambda sweep=sweep: launch(sweep, ["bench"]))  # type: ignore[misc]
            if status:
                raise RuntimeError(f"a {kind} run of one step failed")
            took[kind] += _durations(Path(f"one-{kind}", "sweeps", sweep.id), number)
        seconds, _ = _timed(lambda: subprocess.run([sys.executable, "-c", _PEER], check=True))
        took["imports"].append(round(seconds, 3))
    return took


def _durations(folder: Path, number: int) -> list[float]:
    """Of the second and the third job: the first one waits for the template."""
    jobs = [job for job in read_manifest(folder).jobs.values() if job.entry.seed in (10 * number + 1, 10 * number + 2)]
    return [round(job.since - job.started, 3) for job in jobs]


def as_markdown(results: dict[str, Any]) -> str:
    """The record as a page."""
    s, n = results["seconds"], results["jobs"]
    rows = [
        ("read the command line, check every point", s["compose"]),
        ("launch: freeze every config, write the manifest, run every job, summary", s["launch"]),
        ("of it, from the first job's start to the last one's end", s["jobs"]),
        ("the same command again: find every job finished", s["again"]),
        ("read the manifest", s["manifest"]),
        ("`sweep status`, from the shell", s["status"]),
        ("`report`, from the shell", s["report"]),
    ]
    lines = [
        f"# The sweep engine: {n:,} jobs that do nothing",
        "",
        f"`{results['command']}`, {results['date']}, {results['cores']} cores ({results['machine']}), Python {results['python']}, "
        f"torch {results['packages']['torch']}, commit {results['commit']}.",
        "",
        "| part | seconds | ms a job |",
        "|---|---:|---:|",
        *(f"| {name} | {value:.1f} | {1000 * value / n:.2f} |" for name, value in rows),
        "",
        f"## A run of one step, start to end (medians of {2 * results['rounds']})",
        "",
        "| how | seconds | range |",
        "|---|---:|---|",
    ]
    names = {
        "forked": "forked from the template",
        "fresh": "a Python process of its own (`hydra.launcher.template=false`)",
        "imports": f'`python -c "{_PEER}"`, which trains nothing',
    }
    for key, name in names.items():
        took = results["one_step"][key]
        lines.append(f"| {name} | {median(took):.2f} | {min(took):.2f} to {max(took):.2f} |")
    return "\n".join(lines) + "\n"
