"""Multirun: every job its own process with a config frozen at launch; failures reported; a summary from records alone."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import TINY, TINY_MODEL, Done
from eit_lab.report.arms import estimate, group_arms, paired_difference
from eit_lab.report.summary import write_summary

Command = Callable[..., Done]


def record(
    arm: str, seed: int, accuracy: float, *, status: str = "finished", strength: float = 1.0, **more: object
) -> dict:
    rule = "none" if arm.startswith("vit") else "decreasing"
    config = {
        "seed": seed,
        "model": {"name": arm, "ib": {"name": arm, "rule": rule, "strength": strength}},
        "data": {"name": "d"},
    }
    return {
        "schema": 1, "identity": f"{arm}{strength}{seed}", "name": arm, "seed": seed, "status": status, "config": config,
        "cost": {"params": 1_234_567, "macs": 2_500_000, "macs_thop": 2_400_000}, "img_per_s": 100.0 + seed,
        "result": {"test/acc1": accuracy, "test/acc5": 1.0} if status == "finished" else None,
        "versions": {"code": "abc"}, **more,
    }  # fmt: skip


def write_records(folder: Path, records: list[dict]) -> None:
    for number, content in enumerate(records):
        run = folder / f"run{number}"
        run.mkdir(parents=True)
        (run / "record.json").write_text(json.dumps(content))
        (run / "metrics.csv").write_text("step,epoch,val/acc1\n9,0,0.5\n19,1,0.9\n")


def test_a_sweep_runs_every_point_reports_the_failed_one_and_goes_on(
    command: Command, tmp_path: Path, lookalike: Path, damaged: Path
) -> None:
    sweep = (
        "-m", *TINY_MODEL, "data.img_size=32", "data.num_workers=0", f"data.root={damaged},{lookalike}", "recipe.epochs=1",
    )  # fmt: skip
    done = command("train", *sweep)
    assert done.status == 1
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    manifest = json.loads((folder / "sweep.json").read_text())
    assert [job["status"] for job in manifest["jobs"]] == ["failed", "finished"]
    assert f"eit_lab: {damaged}/train/" in done.err
    assert "cannot be decoded: Premature end of JPEG file" in done.err
    assert f"failed: job 1 (data.root={damaged})" in done.err
    assert "1 finished, 1 failed" in done.out
    assert f"not in the table: eit_nano seed 0 is failed ({damaged}" in done.out
    for name in ("accuracy.png", "accuracy.svg", "summary.csv", "summary.md", "code.diff"):
        assert (folder / name).exists()
    for job in manifest["jobs"]:
        assert (folder / job["frozen"]).exists()
        ran = json.loads((folder / job["folder"] / "record.json").read_text())
        assert ran["identity"] == job["identity"]
        assert ran["config"]["run"]["sweep"] == folder.name
    again = command("train", *sweep)
    assert again.err.count("finished already, skipped") == 1
    assert again.status == 1
    looked = command("report", str(folder))
    assert looked.status == 0
    assert "eit_nano" in looked.out


@pytest.mark.slow
def test_editing_a_yaml_while_a_sweep_runs_changes_no_job(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "model" / "ib" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("name: mine\nrule: constant\nstrength: 0.5\n")
    args = ["-m", *TINY, "recipe.epochs=1", "--config-dir", "mine", "model/ib=mine", "seed=0,1"]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.train", *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    while not list(tmp_path.glob("runs/sweeps/*/jobs/000.log")):
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


def test_the_summary_needs_no_torch(tmp_path: Path) -> None:
    write_records(tmp_path, [record("vit_x", s, 0.9 + s / 100) for s in range(3)])
    probe = "import sys; from eit_lab.report.__main__ import main; main([sys.argv[1]]); sys.exit(3 if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", probe, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vit_x" in done.stdout


def test_the_table_has_known_statistics(tmp_path: Path) -> None:
    vit = [record("vit_x", seed, accuracy) for seed, accuracy in enumerate((0.90, 0.92, 0.94))]
    eit = [record("eit_x", seed, accuracy) for seed, accuracy in enumerate((0.93, 0.94, 0.98))]
    write_records(tmp_path, [*eit, *vit, record("eit_x", 3, 0, status="failed", error="OSError: disk full")])
    text = write_summary(tmp_path)
    assert "92.00 ± 2.00" in text
    assert "95.00 ± 2.65" in text
    # differences 3, 2, 4: mean 3, sd 1, t(2) = 4.303: half width 4.303 / sqrt 3 = 2.484
    assert "+3.00 [+0.52, +5.48]" in text
    assert "1,234,567" in text
    assert "2.50 M" in text
    assert "not in the table: eit_x seed 3 is failed (OSError: disk full)" in text
    assert text.index("vit_x") < text.index("eit_x")  # the plain ViT is what the others are held against
    with (tmp_path / "summary.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(r["arm"], r["seed"], r["test_acc1"]) for r in rows[:2]] == [("vit_x", "0", "0.9"), ("vit_x", "1", "0.92")]


def test_estimates_are_students() -> None:
    spread = estimate([1.0, 2.0, 3.0, 4.0])
    assert (spread.mean, spread.n) == (2.5, 4)
    assert spread.std == pytest.approx(1.2909944)
    assert spread.half_width == pytest.approx(3.1824463 * 1.2909944 / 2)
    assert estimate([5.0]).half_width != estimate([5.0]).half_width  # NaN: one seed has no interval


def test_arms_are_told_apart_by_what_differs_when_their_name_does_not() -> None:
    arms = group_arms([record("eit_x", s, 0.9, strength=k) for k in (0.0, 1.0) for s in (0, 1)])
    assert [arm.label for arm in arms] == ["eit_x model.ib.strength=0.0", "eit_x model.ib.strength=1.0"]
    assert [sorted(arm.runs) for arm in arms] == [[0, 1], [0, 1]]


def test_differences_are_paired_by_seed_and_unequal_seeds_are_said(tmp_path: Path) -> None:
    records = [record("vit_x", 0, 0.9), record("vit_x", 1, 0.5), record("eit_x", 1, 0.6), record("eit_x", 2, 0.1)]
    arms = group_arms(records)
    difference = paired_difference(arms[1], arms[0])
    assert difference is not None
    assert (difference.n, round(difference.mean, 6)) == (1, 10)
    write_records(tmp_path, records)
    text = write_summary(tmp_path)
    assert "arms have different seeds (vit_x: 0, 1; eit_x: 1, 2)" in text
    assert "(one seed: no interval)" in text


def test_runs_in_other_places_are_one_arm_and_the_later_of_two_runs_counts(tmp_path: Path) -> None:
    records = [record("vit_x", seed, 0.9, ended=f"2026-01-0{seed + 1}") for seed in range(2)]
    records[0]["config"]["trainer"] = {"devices": 8, "progress_bar": False}
    records.append(record("vit_x", 0, 0.5, ended="2026-01-09"))
    write_records(tmp_path, records)
    text = write_summary(tmp_path)
    assert "70.00" in text  # 50 and 90: the later run of seed 0
    assert "run0, which has a later run of the same arm and seed" in text


def test_a_difference_never_mixes_two_factors(tmp_path: Path) -> None:
    records = []
    for size, width in (("s", 10), ("l", 20)):
        for arm, accuracy in (("vit", 0.80), ("eit", 0.80 + width / 1000)):
            made = record(f"{arm}_{size}", 0, accuracy)
            made["config"]["model"]["size"] = {"name": size, "embed_dim": width}
            records.append(made)
    write_records(tmp_path, records)
    text = write_summary(tmp_path)
    assert "minus its plain ViT" in text
    assert "+1.00 (one seed" in text
    assert "+2.00 (one seed" in text
    for place in range(4):  # two sizes of EIT and no ViT: nothing to hold them against
        if "vit" in records[place]["name"]:
            (tmp_path / f"run{place}" / "record.json").unlink()
    assert "(one seed" in write_summary(tmp_path)  # they differ in one key only: the width


def test_a_damaged_record_is_said_and_hides_no_other(tmp_path: Path) -> None:
    write_records(tmp_path, [record("vit_x", 0, 0.9), record("vit_x", 1, 0.9)])
    (tmp_path / "run1" / "record.json").write_text('{"schema": 1, "iden')
    text = write_summary(tmp_path)
    assert "90.00" in text
    assert "not in the table: run1 seed ? is damaged" in text


def test_mixed_versions_of_the_code_are_said(tmp_path: Path) -> None:
    write_records(tmp_path, [record("vit_x", 0, 0.9), record("eit_x", 0, 0.9, versions={"code": "def"})])
    assert "runs were made with 2 versions of the code (abc, def)" in write_summary(tmp_path)


def test_the_figure_is_drawn_and_not_blank(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    write_records(tmp_path, [record(arm, s, 0.9 + s / 100) for arm in ("vit_x", "eit_x") for s in range(3)])
    write_summary(tmp_path)
    image = np.asarray(Image.open(tmp_path / "accuracy.png").convert("RGB"))
    assert image.shape[0] > 400
    colours = {tuple(pixel) for pixel in image.reshape(-1, 3)[::7]}
    assert (0, 114, 178) in colours  # the first arm's
    assert (230, 159, 0) in colours  # the second's
    svg = (tmp_path / "accuracy.svg").read_text()
    assert "<svg" in svg


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "report takes one folder"),
        (["nothing"], "report: no folder 'nothing'"),
        (["."], "no record.json of a run in '.'"),
    ],
)
def test_report_answers_a_mistake_in_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab.report.__main__ import main

    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


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
