"""Runs: identity, folder, record; the same command finds its run again; the same seed gives the same digits."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from conftest import TINY, TINY_MODEL, Done, only_run, record_of
from eit_lab.compose import compose_one
from eit_lab.data.catalog import describe
from eit_lab.runs import identity

Command = Callable[..., Done]


def train(*args: str) -> int:
    from eit_lab.train import main

    return main([*TINY, *args])


def metrics_of(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what they took."""
    with (folder / "metrics.csv").open(newline="") as handle:
        return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in csv.DictReader(handle)]


def test_a_run_leaves_everything_that_later_tools_read(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    folder = only_run(here / "runs")
    out = capsys.readouterr().out
    for words in (
        "cost  ",
        "parameters;",
        "MACs an image",
        "data  synthetic: 56 train, 8 held out",
        "test top-1",
        f"run={folder.relative_to(here)}",
    ):
        assert words in out
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    record = record_of(folder)
    assert folder.name == f"{record['name']}-synthetic-s0-{record['identity']}"
    assert record["status"] == "finished"
    assert record["config"] == yaml.safe_load((folder / "config.yaml").read_text())
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["packages"]["torch"]
    assert versions["command"] == list(TINY)
    assert (folder / "code.diff").exists()
    rows = (folder / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,epoch,")
    assert "val/acc1" in rows[0]
    predictions = np.load(folder / "predictions.npz")
    assert predictions["index"].tolist() == list(range(16))
    accuracy = (predictions["label"] == predictions["predicted"]).mean()
    assert record["result"]["test/acc1"] == pytest.approx(accuracy, abs=1e-7)


def test_the_same_command_finds_its_finished_run_and_overwrite_moves_it_aside(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    folder = only_run(here / "runs")
    first = (folder / "record.json").read_bytes()
    capsys.readouterr()
    assert train("trainer.log_every_n_steps=7", "data.num_workers=0") == 0  # how it is watched is not what it is
    assert "finished already" in capsys.readouterr().out
    assert (folder / "record.json").read_bytes() == first
    assert train("run.overwrite=true") == 0
    (aside,) = (here / "runs" / ".replaced").iterdir()
    assert (aside / "record.json").read_bytes() == first
    assert only_run(here / "runs") == folder
    assert record_of(folder)["result"] == json.loads(first)["result"]


def test_evaluate_gives_the_same_number_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from eit_lab.evaluate import main

    assert train() == 0
    folder = only_run(here / "runs")
    capsys.readouterr()
    assert main([f"run={folder}"]) == 0
    assert "the same as on record, to the last digit" in capsys.readouterr().out
    assert main([f"run={folder}", "part=val", "checkpoint=last"]) == 0
    assert "val/acc1" in capsys.readouterr().out


@pytest.mark.parametrize("select", ["best", "last"])
@pytest.mark.parametrize("stop", ["recipe.epochs=3", "trainer.max_steps=4"])
def test_evaluate_agrees_wherever_training_stopped(select: str, stop: str, here: Path) -> None:
    from eit_lab.evaluate import main

    assert train(f"recipe.select={select}", stop, "trainer.check_val_every_n_epoch=2", "recipe.lr=0.01") == 0
    assert main([f"run={only_run(here / 'runs')}"]) == 0


def test_damaged_files_are_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("recipe.epochs=1") == 0
    folder = only_run(here / "runs")
    record = folder / "record.json"
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    assert train("recipe.epochs=1") == 2
    assert (
        f"{last.relative_to(here)} is damaged and cannot be resumed from, nor is there a good one before it; "
        "move the run's folder away to start anew" in capsys.readouterr().err
    )
    record.write_text("{")
    assert train("recipe.epochs=1") == 2
    assert "record.json is damaged" in capsys.readouterr().err
    (here / "a_file").write_text("")
    assert train("run.root=a_file") == 2
    assert "run.root must be a folder that can be written, got 'a_file'" in capsys.readouterr().err


def test_the_summary_counts_the_steps_that_will_run() -> None:
    from eit_lab.plan import plan

    for args, steps in (
        ((), 6),
        (("trainer.max_steps=4",), 4),
        (("trainer.max_steps=500",), 500),
        (("trainer.max_steps=500", "trainer.max_epochs=1"), 3),
        (("trainer.limit_train_batches=1",), 2),
        (("trainer.limit_train_batches=0.7",), 4),
        (("trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=0.7"), 4),
        (("trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=1"), 2),
        (("debug=one_batch",), 1),
    ):
        config = compose_one([*TINY, *args])
        assert plan(config, describe(config.data)).total_steps == steps, args


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["part=val"], "run must be given"),
        (["run=nothing"], "run must be the folder of a run (with config.yaml), got 'nothing'"),
        (["run=x", "part=tset"], "part must be one of test, val, got 'tset'; nearest: test"),
        (["run=x", "chekpoint=best"], "nearest: checkpoint"),
        (["x"], "evaluate takes key=value, got 'x'"),
    ],
)
def test_evaluate_answers_a_mistake_in_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.evaluate import main

    assert main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_same_seed_gives_the_same_loss_to_the_last_digit_and_seed_0_is_a_seed(here: Path) -> None:
    for root, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert train(f"run.root={root}", f"seed={seed}", "trainer.log_every_n_steps=1", "data.crop_padding=1") == 0
    a, b, c = (metrics_of(only_run(here / root)) for root in "abc")
    assert "train/loss" in a[0]
    assert a == b
    assert a != c
    assert record_of(only_run(here / "a"))["identity"] == record_of(only_run(here / "b"))["identity"]


def test_epochs_differ_in_order_and_augmentation_as_training_really_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab.data.small import InMemoryImages

    seen: list[list[tuple[int, int, int, int]]] = []
    read = InMemoryImages.__getitem__

    def watch(self: InMemoryImages, items: list[tuple[int, int, int, int]]) -> object:
        if self.augment_seed is not None:
            seen.append(list(items))
        return read(self, items)

    monkeypatch.setattr(InMemoryImages, "__getitem__", watch)
    assert train("recipe.epochs=3") == 0
    assert [{epoch for epoch, *_ in batch} for batch in seen] == [{0}] * 3 + [{1}] * 3 + [{2}] * 3
    orders = [[index for batch in seen[3 * e : 3 * e + 3] for _, index, *_ in batch] for e in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_identity_is_the_config_the_data_and_the_code_but_not_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from eit_lab import runs

    config = compose_one(list(TINY))
    facts = describe(config.data)
    first = identity(config, facts)
    assert identity(compose_one([*TINY, "trainer.devices=2", "run.root=elsewhere", "logger=wandb"]), facts) == first
    for change in (
        "seed=1",
        "recipe.lr=0.002",
        "model.ib.strength=0.5",
        "trainer.precision=bf16-mixed",
        "data.split_seed=1",
    ):
        assert identity(compose_one([*TINY, change]), facts) != first
    assert identity(config, dataclasses.replace(facts, fingerprint="other files")) != first
    monkeypatch.setattr(runs, "code_hash", lambda: "other code")
    assert identity(config, facts) != first


def test_the_code_hash_sees_code_and_not_comments(tmp_path: Path) -> None:
    from eit_lab import runs

    package = tmp_path / "src" / "eit_lab"
    source = Path(runs.__file__).parent
    subprocess.run(["cp", "-r", str(source), str(package.parent.mkdir(parents=True) or package)], check=True)

    def code_hash() -> str:
        probe = "from eit_lab.runs import code_hash; print(code_hash())"
        environment = {**os.environ, "PYTHONPATH": str(package.parent)}
        return subprocess.run(
            [sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=True
        ).stdout

    first = code_hash()

    def change(name: str, old: str, new: str) -> None:
        text = (package / name).read_text()
        assert old in text
        (package / name).write_text(text.replace(old, new))

    change("models/mixers.py", "Mix tokens on their grid", "Blend tokens")
    assert code_hash() == first
    change("models/attention.py", "** -0.5", "** -0.25")
    second = code_hash()
    change("models/native/attention.c", "1.442695", "1.442696")
    assert len({first, second, code_hash()}) == 3


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(here: Path) -> None:
    args = [sys.executable, "-m", "eit_lab.train", *TINY, "recipe.epochs=12", "data.num_samples=640"]
    killed = subprocess.Popen(args, cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while not list(here.glob("runs/*/checkpoints/last.ckpt")):
        assert killed.poll() is None
        assert time.monotonic() - began < 60
        time.sleep(0.05)
    busy = subprocess.run(args, cwd=here, capture_output=True, text=True, check=False)
    assert busy.returncode == 2
    assert f"is being run by process {killed.pid}" in busy.stderr
    assert busy.stderr.count("\n") == 1
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert record_of(only_run(here / "runs"))["status"] == "running"
    again = subprocess.run(args, cwd=here, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "(resumed, seed 0)" in again.stdout
    assert record_of(only_run(here / "runs"))["status"] == "finished"
    rows = (only_run(here / "runs") / "metrics.csv").read_text().splitlines()
    epochs = [int(row.split(",")[1]) for row in rows[1:] if row.split(",")[rows[0].split(",").index("val/acc1")]]
    assert epochs == list(range(12))


@pytest.mark.slow
def test_ctrl_c_says_how_to_resume(here: Path) -> None:
    args = [sys.executable, "-m", "eit_lab.train", *TINY, "recipe.epochs=500", "data.num_samples=640"]
    run = subprocess.Popen(args, cwd=here, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(here.glob("runs/*/checkpoints/last.ckpt")):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "resume: " in err
    assert "Traceback" not in err
    assert record_of(only_run(here / "runs"))["status"] == "interrupted"


@pytest.mark.slow
def test_a_failure_is_on_record_with_its_last_lines(command: Command, damaged: Path, tmp_path: Path) -> None:
    done = command("train", *TINY_MODEL, f"data.root={damaged}", "data.img_size=32", "data.num_workers=0")
    assert done.status == 1
    record = record_of(only_run(tmp_path / "runs"))
    assert record["status"] == "failed"
    assert record["error"].startswith(f"{damaged}/train/n00000000/cut_")
    assert "cannot be decoded: Premature end of JPEG file" in record["error"]
    assert any("max_unread" in line for line in record["error_lines"])
    assert "resume: " in done.err


def test_what_only_the_machine_can_refuse_is_one_line_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from eit_lab.train import main

    assert main([*TINY, "trainer.accelerator=tpu"]) == 2
    assert "eit_lab: trainer: Lightning refuses accelerator=tpu" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_other_precisions_train_clip_and_average(precision: str, here: Path) -> None:
    words = (f"trainer.precision={precision}", "trainer.gradient_clip_val=0.5", "recipe=debug", "recipe.epochs=1")
    assert train(*words) == 0
    assert record_of(only_run(here / "runs"))["placement"]["precision"] == precision


@pytest.mark.slow
def test_wandb_is_offline_unless_asked_and_carries_the_identity(command: Command, tmp_path: Path) -> None:
    done = command("train", *TINY, "logger=wandb")
    assert done.status == 0, done.err
    folder = only_run(tmp_path / "runs")
    (offline,) = folder.glob("wandb/offline-run-*")
    assert offline.name.endswith(record_of(folder)["identity"])
    assert (folder / "metrics.csv").exists()


@pytest.mark.parametrize("debug", ["one_batch", "overfit", "profile"])
@pytest.mark.slow
def test_debug_presets_run(debug: str, here: Path) -> None:
    assert train(f"debug={debug}", *(["recipe.epochs=60", "recipe.lr=0.01"] if debug == "overfit" else [])) == 0
    record = record_of(only_run(here / "runs"))
    assert record["status"] == "finished"
    assert (debug == "profile") == bool(list(only_run(here / "runs").glob("*profile*.txt")))
    if debug == "overfit":
        rows = (only_run(here / "runs") / "metrics.csv").read_text().splitlines()
        column = rows[0].split(",").index("train/loss")
        losses = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
        assert losses[-1] < 0.1 * losses[0]


@pytest.mark.slow
def test_the_very_command_trains_on_imagenets_layout_with_two_processes(
    command: Command, lookalike: Path, tmp_path: Path
) -> None:
    done = command(
        "train", "model=eit_base", "trainer.devices=2", "trainer.accelerator=cpu", f"data.root={lookalike}", "data.val_size=4",
        "recipe.batch_size=4", "trainer.max_steps=2", "logger=none",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert f"{15_972_280 - 996 * 401:,} parameters" in done.out  # four classes, not a thousand
    assert "2 x cpu" in done.out
    record = record_of(only_run(tmp_path / "runs"))
    assert record["placement"]["per_device_batch"] == 2
    assert record["data"]["num_test"] == 12
    assert np.load(only_run(tmp_path / "runs") / "predictions.npz")["index"].tolist() == list(range(12))
