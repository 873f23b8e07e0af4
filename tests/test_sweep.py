"""Multirun: every job its own process with a config frozen at launch; failures reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import TINY, TINY_MODEL, Done
from eit_lab.manifest import read_manifest

Command = Callable[..., Done]


@pytest.mark.slow
def test_a_sweep_runs_every_point_reports_the_failed_one_and_goes_on(
    command: Command, tmp_path: Path, lookalike: Path, damaged: Path
) -> None:
    sweep = (
        "-m", *TINY_MODEL, "data.img_size=32", "data.num_workers=0", f"data.root={damaged},{lookalike}", "recipe.epochs=1",
    )  # fmt: skip
    done = command("train", *sweep)
    assert done.status == 1
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    jobs = list(read_manifest(folder).jobs.values())
    assert [job.state for job in jobs] == ["failed", "finished"]
    assert f"data.root={damaged}: FAILED: {damaged}/train/" in done.err
    assert "cannot be decoded: Premature end of JPEG file" in done.err
    assert f"failed: job 1/2  data.root={damaged}, log " in done.err
    assert "1 finished, 1 failed" in done.out
    assert f"not in the table: data.root={damaged} seed 0 is failed ({damaged}" in done.out
    for name in ("accuracy.png", "accuracy.svg", "summary.csv", "summary.md", "code.diff", "guard.json"):
        assert (folder / name).exists()
    for job in jobs:
        assert (folder / job.entry.frozen).exists()
        ran = json.loads((folder / job.entry.folder / "record.json").read_text())
        assert ran["identity"] == job.entry.identity
        assert ran["config"]["run"]["sweep"] == folder.name
    again = command("train", *sweep)
    assert again.err.count("1 of 2 jobs finished already, skipped") == 1
    assert again.status == 1
    looked = command("report", str(folder))
    assert looked.status == 0
    assert f"data.root={lookalike}" in looked.out
    assert (folder / "report" / "report.html").exists()


@pytest.mark.slow
def test_editing_a_yaml_while_a_sweep_runs_changes_no_job(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "model" / "ib" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("name: mine\nrule: constant\nstrength: 0.5\n")
    args = ["-m", *TINY, "recipe.epochs=1", "--config-dir", "mine", "model/ib=mine", "seed=0,1"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.train", *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not list(tmp_path.glob("runs/sweeps/*/jobs/*.log")):
        assert sweep.poll() is None
        time.sleep(0.01)
    mine.write_text("name: mine\nrule: nonsense\n")
    assert sweep.wait(timeout=120) == 0, sweep.stdout.read()
    sweep.stdout.close()
    records = [json.loads(p.read_text()) for p in tmp_path.glob("runs/*/record.json")]
    assert [r["config"]["model"]["ib"]["strength"] for r in records] == [0.5, 0.5]


@pytest.mark.slow
def test_two_processes_inside_a_multirun_train_one_model_each_job_whatever_launcher_is_around(
    command: Command, tmp_path: Path
) -> None:
    leaked = {
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "PL_GLOBAL_SEED": "99",
    }
    done = command("train", "-m", *TINY, "recipe.epochs=1", "seed=0,1", "trainer.devices=2", env=leaked)
    assert done.status == 0, done.err
    records = [json.loads(p.read_text()) for p in sorted(tmp_path.glob("runs/*/record.json"))]
    assert [(r["seed"], r["placement"]["world_size"], r["placement"]["per_device_batch"]) for r in records] == [
        (0, 2, 8),
        (1, 2, 8),
    ]


@pytest.mark.slow
def test_ctrl_c_stops_a_sweep_and_the_same_command_goes_on(tmp_path: Path) -> None:
    import signal

    args = [sys.executable, "-m", "eit_lab.train", "-m", *TINY, "recipe.epochs=30", "seed=0,1"]
    sweep = subprocess.Popen(
        args, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")):
        assert sweep.poll() is None
        time.sleep(0.02)
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does: to the launcher and to its job
    out, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 130, out
    assert "the same command goes on" in out
    assert "seed 1 is waiting" in out
    again = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(list(tmp_path.glob("runs/*/record.json"))) == 2
