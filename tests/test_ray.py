"""Sweeps on Ray: a private cluster on the loopback, jobs in processes of their own, failures, Ctrl-C."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import TINY, record_of

_LIMIT_S = 240.0
_LISTENS = "0A"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hydra.launcher.cpus_per_job=100000"], "hydra.launcher.cpus_per_job must be at most"),
        (["hydra.launcher.address=ray://somewhere"], "hydra.launcher.address must be auto, HOST:PORT or null, got 'ray://somewhere'; nearest: auto"),
        (["hydra.launcher.address=127.0.0.1:1"], "hydra.launcher.address: nobody answers at 127.0.0.1:1: "),
        (["hydra.launcher.cpus=1"], "hydra.launcher.cpus"),
    ],
)  # fmt: skip
def test_a_ray_that_cannot_be_is_refused_in_one_line(
    words: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    if importlib.util.find_spec("ray") is None:
        message = "hydra/launcher=ray needs Ray, which is not installed; pip install 'eit_lab[ray]'"
    assert main(["-m", *TINY, "seed=0,1", "hydra/launcher=ray", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (here / "runs").exists()


def children(pid: int) -> set[int]:
    """All processes below one."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parents.setdefault(int(after_name[1]), set()).add(int(path.parent.name))
    found, new = set(), {pid}
    while new:
        new = set().union(*(parents.get(one, set()) for one in new)) - found
        found |= new
    return found


def listening(pids: set[int]) -> set[str]:
    """Addresses, as the kernel writes them, at which any of these processes takes connections."""
    sockets = set()
    for pid in pids:
        try:
            links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        sockets |= {match[1] for link in links if (match := re.fullmatch(r"socket:\[(\d+)\]", link))}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENS and fields[9] in sockets:
                found.add(fields[1].partition(":")[0])
    return found


class Sweep:
    def __init__(self, folder: Path, *words: str) -> None:
        self.folder = folder
        self.out = folder / f"launcher{len(list(folder.glob('launcher*')))}.out"
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eit_lab.train", "-m", "hydra/launcher=ray", *TINY, *words],
                cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "tmp")},
                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def wait_for(self, ready: Callable[[], object], what: str) -> None:
        until = time.monotonic() + _LIMIT_S
        while not ready():
            assert self.process.poll() is None, f"{what}: {self.out.read_text()}"
            assert time.monotonic() < until, f"{what}: {self.out.read_text()}"
            time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra eit_lab[ray])")
def test_a_sweep_on_a_private_ray_is_tried_again_stopped_and_continued(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    words = (
        "recipe.epochs=200", "seed=0,1", "hydra.launcher.retries=1", "trainer.checkpoint_every_n_steps=5",
    )  # fmt: skip
    sweep = Sweep(tmp_path, *words)
    sweep.wait_for(lambda: list(tmp_path.glob("runs/*-s0-*/checkpoints/last.ckpt")), "training")
    below = children(sweep.process.pid)
    found = listening(below | {sweep.process.pid})
    assert found  # there is a cluster
    assert found <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}  # loopback
    (job,) = tmp_path.glob("runs/*-s0-*/lock")
    os.kill(int(job.read_text().split()[1]), signal.SIGKILL)
    sweep.wait_for(lambda: "FAILED: killed by SIGKILL; tried again" in sweep.out.read_text(), "reported")
    (events,) = tmp_path.glob("runs/sweeps/*/events.jsonl")
    sweep.wait_for(lambda: events.read_text().count('"attempt": true') == 3, "started again")
    below |= children(sweep.process.pid)
    sweep.process.send_signal(signal.SIGINT)
    assert sweep.process.wait(_LIMIT_S) == 130, sweep.out.read_text()
    until = time.monotonic() + 20
    while (left := [pid for pid in below if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left
    assert not list((tmp_path / "tmp").glob("eit-ray-*"))

    again = Sweep(tmp_path, *words[:-1], "trainer.checkpoint_every_n_steps=null")
    assert again.process.wait(_LIMIT_S) == 0, again.out.read_text()
    records = [record_of(path.parent) for path in tmp_path.glob("runs/*/record.json")]
    assert [(record["status"], record["steps"]) for record in records] == [("finished", 600)] * 2
    states = [json.loads(line)["state"] for line in events.read_text().splitlines()]
    assert states.count("failed") == 1
    assert states.count("finished") == 2
