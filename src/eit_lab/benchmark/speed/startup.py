"""``bench startup``: from the command to the end of the first training step, beside the least that a script of one's own needs.

Three things start in turn, each a process of its own, round after round: ``eit_lab.train`` on synthetic data; a script that imports
torch, lightning and torchvision and builds the same model with torch.nn (the goal's measure, which takes no step); the same script
with a step. Ours has come to the end of its first step when the step's row, with its loss, stands in metrics.csv, which is looked
at every two milliseconds; the process is then ended. CPU seconds, which a busy machine disturbs less, are noted too.

The batch is small, so that what is timed is the start and not the step. No torch here.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eit_lab.benchmark.speed.options import StartupOptions
from eit_lab.command import RunError
from eit_lab.compose import compose_one
from eit_lab.config import Config, EITStem, ModelConfig

OURS, BY_HAND, WITH_STEP = "eit_lab", "by_hand", "by_hand_with_step"
_BATCH = 8
_LIMIT_S = 300.0
_LOOK_S = 0.002
_IMPORT = re.compile(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$")
_SHOWN = 14  # packages
_Advance = Callable[[str, int, int], None]


def measure(options: StartupOptions, advance: _Advance) -> dict[str, Any]:
    """{"starts": name -> {"seconds", "cpu_seconds"}, "imports": name -> package -> seconds, "model", "params", "load"}.

    Raises RunError in one line where one of the three cannot run.
    """
    before = os.getloadavg()[0]
    words = _words(options.model)
    shape = _shape(compose_one(words))
    step = [str(_BATCH), str(compose_one(words).data.img_size)]
    starts: dict[str, Callable[[], tuple[float, float]]] = {
        OURS: lambda: _first_step(words),
        BY_HAND: lambda: _whole(_script(shape)),
        WITH_STEP: lambda: _whole(_script([*shape, *step])),
    }
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "cpu_seconds": []} for name in starts}
    for place, start in enumerate(starts.values()):
        advance("warming up", place, len(starts))
        start()  # files into the page cache, bytecode
    advance("warming up", len(starts), len(starts))
    for number in range(options.rounds):
        names = list(starts) if number % 2 == 0 else list(starts)[::-1]
        for place, name in enumerate(names):
            advance("in turn", number * len(names) + place, options.rounds * len(names))
            seconds, cpu = starts[name]()
            found[name]["seconds"].append(seconds)
            found[name]["cpu_seconds"].append(cpu)
    advance("in turn", options.rounds * len(starts), options.rounds * len(starts))
    advance("imports", 0, 2)
    imports = {OURS: _imports_of_ours(words)}
    advance("imports", 1, 2)
    imports[BY_HAND] = _imports(_run_out(_script(shape), profile_imports=True)[1])
    advance("imports", 2, 2)
    return {
        "model": options.model,
        "batch": _BATCH,
        "params": int(_run_out(_script(shape))[0]),
        "starts": found,
        "imports": imports,
        "train": ["python", "-m", "eit_lab.train", *words],
        "load": [before, os.getloadavg()[0]],
    }


def _words(model: str) -> list[str]:
    return [
        f"model={model}",
        "data=synthetic",
        f"recipe.batch_size={_BATCH}",
        "trainer.max_steps=1",
        "trainer.accelerator=cpu",
        "logger=none",
    ]


def _shape(config: Config) -> list[str]:
    """The arguments of by_hand.py that make the same model."""
    assert isinstance(config.model, ModelConfig)
    size, stem = config.model.size, config.model.for_images(config.data.img_size).stem
    assert isinstance(stem, EITStem)
    classes = config.data.num_classes
    return [
        str(one)
        for one in (size.embed_dim, size.depth, size.num_heads, classes, stem.kernel_size, stem.stride, stem.pool)
    ]


def _script(arguments: Sequence[str]) -> list[str]:
    # -P: the folder of the script, which is one of ours, is nowhere to look for modules
    return [sys.executable, "-P", str(Path(__file__).with_name("by_hand.py")), *arguments]


def _whole(command: Sequence[str]) -> tuple[float, float]:
    """(seconds, CPU seconds) of a process."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    _check(process.returncode, command, said.decode(errors="replace"))
    return seconds, used.ru_utime + used.ru_stime


def _first_step(words: Sequence[str]) -> tuple[float, float]:
    """(seconds, CPU seconds) until the first step's row is in metrics.csv; the run is ended then, its folder removed."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            _train(words, folder), stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
        )
        try:
            while not _has_step(Path(folder)):
                if process.poll() is not None or time.perf_counter() - began > _LIMIT_S:
                    errors.seek(0)
                    _check(process.poll() or 1, _train(words, "FOLDER"), errors.read())
                time.sleep(_LOOK_S)
            return time.perf_counter() - began, _cpu_seconds(process.pid)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # and its loader's workers
            process.wait()


def _train(words: Sequence[str], folder: str) -> list[str]:
    return [sys.executable, "-m", "eit_lab.train", *words, f"run.root={folder}"]


def _has_step(root: Path) -> bool:
    """Whether a run below ``root`` has a row with a training loss."""
    for path in root.glob("*/metrics.csv"):
        with path.open(newline="") as handle:
            return any(row.get("train/loss") for row in csv.DictReader(handle))
    return False


def _cpu_seconds(pid: int) -> float:
    """User and system time so far of a process and of its children that have ended; proc(5)."""
    path = Path(f"/proc/{pid}/stat")
    if not path.exists():
        return float("nan")
    fields = path.read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


# -------------------------------------------------------------------------------------------------------------- imports


def _imports_of_ours(words: Sequence[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return _imports(_run_out(_train(words, folder), profile_imports=True)[1])


def _run_out(command: Sequence[str], *, profile_imports: bool = False) -> tuple[str, str]:
    """(stdout, stderr) of a process, with Python's report of its imports in the second."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"} if profile_imports else None
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    _check(done.returncode, command, done.stderr)
    return done.stdout, done.stderr


def _imports(report: str) -> dict[str, float]:
    """Seconds by top-level package, each module's own time, most first; "all" is their sum, "others" what is not shown."""
    spent = Counter[str]()
    for line in report.splitlines():
        if found := _IMPORT.match(line):
            spent[found[2].partition(".")[0]] += int(found[1])
    shown = spent.most_common(_SHOWN)
    total = sum(spent.values())
    rest = total - sum(one for _, one in shown)
    return {**{name: one / 1e6 for name, one in shown}, "others": rest / 1e6, "all": total / 1e6}


def _check(status: int, command: Sequence[str], said: str) -> None:
    if status:
        lines = said.strip().splitlines() or ["nothing was said"]
        raise RunError(f"{' '.join(Path(word).name for word in command)} ended with status {status}: {lines[-1]}")
