"""What a bad W&B server costs a training, in seconds: ``python benchmarks/wandb_faults.py``.

A stand-in server on loopback answers, refuses, fails, hangs or dies, at the start, in the middle or at the end. First
the logger alone is driven, with short limits (``--configured`` adds the defaults of the configuration, which takes some
minutes); then, with ``--train``, the real command. The tables go to benchmarks/records/wandb-faults.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eit_lab.compose import compose_one
from eit_lab.config import WandbLogger
from eit_lab.runs import Run
from eit_lab.training.mistakes import ConfusionCount, Mistake
from eit_lab.training.wandb_log import WandbLog

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from wandb_server import WandbServer, rows_on_disk  # noqa: E402 - the line above finds it

RUN_ID = "0123abcdef"
STEPS = 200
SECONDS_A_STEP = 0.01
TINY = (
    "model=eit_nano", "model.size.embed_dim=16", "model.size.depth=2", "model.size.num_heads=4", "data=synthetic",
    "data.img_size=8", "data.num_samples=64", "recipe=small", "recipe.batch_size=16", "recipe.epochs=2",
    "recipe.warmup_epochs=0.0", "trainer.accelerator=cpu", "trainer.log_every_n_steps=1",
)  # fmt: skip


class Fault(NamedTuple):
    """What the server does, and from when on."""

    name: str
    mode: Any
    """A mode of the stand-in server, or ``gone``: its port is closed."""
    when: str
    """start, middle or end."""


FAULTS = (
    Fault("none", "ok", "start"),
    Fault("refuses (closed port)", "gone", "start"),
    Fault("401 (wrong key)", "401", "start"),
    Fault("500 at the start", "500", "start"),
    Fault("hangs at the start", "hang", "start"),
    Fault("403 in the middle", "403", "middle"),
    Fault("500 in the middle", "500", "middle"),
    Fault("hangs in the middle", "hang", "middle"),
    Fault("dies in the middle", "gone", "middle"),
    Fault("hangs at the end", "hang", "end"),
)


@contextmanager
def served(folder: Path) -> Iterator[WandbServer]:
    """A server, and an environment that knows of no other."""
    before = dict(os.environ)
    with WandbServer() as server:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        os.environ |= {
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_CONFIG_DIR": str(folder / "config"),
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "HOME": str(folder),
            "NETRC": str(folder / "netrc"),
        }
        yield server
    os.environ.clear()
    os.environ |= before


def strike(server: WandbServer, fault: Fault) -> None:
    """Let the fault begin."""
    if fault.mode == "gone":
        server.die()
    else:
        server.mode = fault.mode


def drive(fault: Fault, *, init_timeout_s: float, finish_timeout_s: float) -> list[str]:
    """One run of the logger alone: 200 rows, two tables, a checkpoint, a summary; a row of the table."""
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as server:
        limits = (f"logger.init_timeout_s={init_timeout_s}", f"logger.finish_timeout_s={finish_timeout_s}")
        config = compose_one([*TINY, "logger=wandb", "logger.mode=online", "logger.artifacts=best", *limits])
        run = Run(Path(name, "run"), RUN_ID, "new")
        run.folder.mkdir()
        if fault.when == "start":
            strike(server, fault)
        log = WandbLog(config, run, resumed=False)
        log.start()
        for step in range(1, STEPS + 1):
            if fault.when == "middle" and step == STEPS // 2:
                strike(server, fault)
            log.log_metrics({"train/loss": 1 / step, "images": 16 * step, "epoch": 0}, step=step)
            time.sleep(SECONDS_A_STEP)
        checkpoint = Path(name, "best.ckpt")
        checkpoint.write_bytes(bytes(1_000_000))
        image = np.zeros((8, 8), dtype=np.uint8)
        log.log_confusion([ConfusionCount(0, 1, 2)])
        log.log_mistakes([Mistake(index=0, label=0, predicted=1, loss=1.0, image=image)])
        log.save_checkpoints([checkpoint])
        log.set_summary({"test/acc1": 0.5})
        if fault.when == "end":
            strike(server, fault)
        mode = log.mode_now
        line = log.close(0)
        on_disk = sum("train/loss" in row for row in rows_on_disk(run.folder, RUN_ID))
        at_server = sum("train/loss" in row for run in server.runs.values() for row in run.history)
        told = "nothing to do" if line is None else "`" + line.partition("to send it: ")[2].split(" /")[0] + " FOLDER`"
        return [
            fault.name,
            mode,
            f"{log.start_s:.2f}",
            f"{1000 * log.longest_call_s:.1f}",
            f"{log.close_s:.2f}",
            f"{on_disk} / {at_server}",
            told,
        ]


def train(fault: Fault | None, *, init_timeout_s: float, finish_timeout_s: float) -> list[str]:
    """One real command on tiny synthetic images; None: with metrics.csv alone."""
    with tempfile.TemporaryDirectory() as name, served(Path(name)) as server:
        limits = (f"logger.init_timeout_s={init_timeout_s}", f"logger.finish_timeout_s={finish_timeout_s}")
        words = ("logger=none",) if fault is None else ("logger=wandb", "logger.mode=online", *limits)
        if fault is not None and fault.when == "start":
            strike(server, fault)
        elif fault is not None:
            threading.Thread(target=_strike_later, args=(server, fault, Path(name)), daemon=True).start()
        began = time.perf_counter()
        command = [sys.executable, "-m", "eit_lab.train", *TINY, *words]
        done = subprocess.run(command, cwd=name, capture_output=True, text=True, timeout=600, check=False)
        seconds = time.perf_counter() - began
        (path,) = Path(name).glob("runs/*/record.json")
        result = json.loads(path.read_text())["result"] or {}
        at_server = [str(run.exit_code) for run in server.runs.values() if run.exit_code is not None]
        return [
            "metrics.csv alone" if fault is None else fault.name,
            str(done.returncode),
            f"{seconds:.1f}",
            f"{result.get('test/loss', float('nan')):.6f}",
            ", ".join(at_server) or "-",
            "says how" if "wandb sync" in done.stdout + done.stderr else "nothing to do",
        ]


def _strike_later(server: WandbServer, fault: Fault, folder: Path) -> None:
    """Middle: once the run is known to the server. End: once the test is done, which is when confusion.csv is there."""
    while not (any(folder.glob("runs/*/confusion.csv")) if fault.when == "end" else server.runs):
        time.sleep(0.005)
    time.sleep(0.0 if fault.when == "end" else 0.3)  # wandb's start is then over
    strike(server, fault)


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of Markdown."""
    lines = [head, ["---", *["---:"] * (len(head) - 2), "---"], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init-timeout-s", type=float, default=5.0, help="logger.init_timeout_s")
    parser.add_argument("--finish-timeout-s", type=float, default=5.0, help="logger.finish_timeout_s")
    parser.add_argument("--configured", action="store_true", help="also with the limits that the configuration has")
    parser.add_argument("--train", action="store_true", help="also through the real command")
    args = parser.parse_args()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("wandb", "lightning", "torch"))
    lines = [
        "# W&B: a server that refuses, fails, hangs or dies",
        "",
        f"- {time.strftime('%Y-%m-%d')}, {versions}, Python {platform.python_version()}, {platform.machine()}, "
        f"{os.cpu_count()} cores",
        f"- command: `{shlex.join(['python', 'benchmarks/wandb_faults.py', *sys.argv[1:]])}`",
    ]
    both = [(args.init_timeout_s, args.finish_timeout_s)]
    if args.configured:
        both.append((WandbLogger(kind="wandb").init_timeout_s, WandbLogger(kind="wandb").finish_timeout_s))
    for init_timeout_s, finish_timeout_s in both:
        limits = {"init_timeout_s": init_timeout_s, "finish_timeout_s": finish_timeout_s}
        rows = [drive(fault, **limits) for fault in FAULTS]
        faults = rows[1:]
        lines += [
            "",
            f"## The logger, {STEPS} rows of {1000 * SECONDS_A_STEP:g} ms; limits: {init_timeout_s:g} s at the start, "
            f"{finish_timeout_s:g} s at the end",
            "",
            f"{sum(row[5].startswith(f'{STEPS} /') for row in faults)} of {len(faults)} faults survived with every row on "
            f"disk. Longest delay: start {max(float(row[2]) for row in faults):.2f} s, a log call "
            f"{max(float(row[3]) for row in faults):.1f} ms, close {max(float(row[4]) for row in faults):.2f} s.",
            "",
            *table(
                ["server", "the run went on", "start (s)", "longest log call (ms)", "close (s)", "rows on disk / at server",
                 "the last line"],
                rows,
            ),
        ]  # fmt: skip
    if args.train:
        limits = {"init_timeout_s": args.init_timeout_s, "finish_timeout_s": args.finish_timeout_s}
        rows = [train(fault, **limits) for fault in (None, *FAULTS)]
        lines += [
            "",
            f"## `python -m eit_lab.train`, tiny, same limits: {args.init_timeout_s:g} s and {args.finish_timeout_s:g} s",
            "",
            f"{sum(row[1] == '0' and row[3] == rows[0][3] for row in rows[2:])} of {len(rows) - 2} faults: exit status 0 and "
            f"the test loss of the run without W&B, to the last digit shown.",
            "",
            *table(
                ["server", "exit status", "whole command (s)", "test loss", "exit code at server", "the last line"],
                rows,
            ),
        ]
    text = "\n".join(lines) + "\n"
    print(text)
    (ROOT / "benchmarks" / "records" / "wandb-faults.md").write_text(text)


if __name__ == "__main__":
    main()
