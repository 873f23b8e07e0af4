"""Killed and resumed is never killed: signals, damaged files, full disks, losses that are not finite, several processes."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import TINY, TINY_MODEL, Done, only_run, record_of
from eit_lab.selftest import compare

Command = Callable[..., Done]
# Every part of the recipe on: mixing, erasing, RandAugment, repeats, averaged weights; and dropped paths.
DEBUG = (*TINY, "recipe=debug", "data.num_samples=256", "model.drop_path_rate=0.2", "trainer.record_samples=true")


def train(*args: str) -> int:
    from eit_lab.train import main

    return main([*DEBUG, *args])


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as handle:
        return [float(row["train/loss"]) for row in csv.DictReader(handle) if row["train/loss"]]


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have this process send itself a signal while a given step, validation or test runs."""
    from eit_lab.training.module import Classifier

    def arrange(hook: str, *, at_step: int, signum: int = signal.SIGTERM) -> None:
        original = getattr(Classifier, hook)
        sent = []

        def and_then(self: Classifier, *args: object, **kwargs: object) -> object:
            if self.trainer.global_step >= at_step and not sent:
                sent.append(os.kill(os.getpid(), signum))
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Classifier, hook, and_then)

    return arrange


@pytest.mark.parametrize(
    ("hook", "at_step", "signum", "status", "stopped_after"),
    [
        pytest.param("training_step", 4, signal.SIGTERM, 75, 5, marks=pytest.mark.slow),
        # In the last step of the first epoch: its validation is to come.
        ("training_step", 13, signal.SIGUSR2, 75, 14),
        pytest.param("validation_step", 14, signal.SIGTERM, 75, 14, marks=pytest.mark.slow),
        pytest.param("training_step", 17, signal.SIGINT, 130, 18, marks=pytest.mark.slow),
        pytest.param("test_step", 0, signal.SIGTERM, 75, 28, marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_after_the_step_with_the_state_saved_and_the_same_command_goes_on(
    hook: str,
    at_step: int,
    signum: int,
    status: int,
    stopped_after: int,
    here: Path,
    stop_after: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("trainer.keep_epochs=2",)
    assert train(*words, "run.root=alone") == 0
    stop_after(hook, at_step=at_step, signum=signum)
    assert train(*words, "run.root=killed") == status
    killed = only_run(here / "killed")
    assert record_of(killed)["status"] == ("interrupted" if signum == signal.SIGINT else "preempted")
    assert record_of(killed)["error"] == f"stopped by signal {int(signum)} after step {stopped_after}, state saved"
    state = torch.load(killed / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["eit_lab"]["step"] == stopped_after
    said = capsys.readouterr().err
    assert f"eit_lab: stopped by signal {int(signum)} after step {stopped_after}, state saved" in said
    assert "Traceback" not in said
    assert train(*words, "run.root=killed") == 0
    assert list(compare(only_run(here / "alone"), killed)) == []
    first = [
        torch.load(folder / "checkpoints" / "epoch-0000.ckpt", weights_only=True)["eit_lab"]["random"][0]["torch"]
        for folder in (only_run(here / "alone"), killed)
    ]
    assert torch.equal(*first), (
        "a state saved before the next step has the random numbers of the run, not of a new process"
    )


def test_ctrl_c_twice_is_out_at_once(here: Path, stop_after: Callable[..., None]) -> None:
    from eit_lab.training.module import Classifier

    stop_after("training_step", at_step=2, signum=signal.SIGINT)
    original = Classifier.on_before_optimizer_step

    def again(self: Classifier, optimizer: torch.optim.Optimizer) -> None:
        original(self, optimizer)
        if self.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "on_before_optimizer_step", again)
        patch.setattr("eit_lab.signals.SAME_S", 0.0)
        assert train() == 130
    assert not (only_run(here / "runs") / "checkpoints" / "last.ckpt").exists()


def test_ctrl_c_twice_in_the_final_test_is_an_interrupt_too(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.training.module import Classifier

    def test_step(self: Classifier, *_: object) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Classifier, "test_step", test_step)
    monkeypatch.setattr("eit_lab.signals.SAME_S", 0.0)
    assert train("recipe.epochs=1") == 130
    assert record_of(only_run(here / "runs"))["status"] == "interrupted"
    assert "Traceback" not in capsys.readouterr().err


def test_one_interrupt_that_arrives_by_two_ways_is_one(here: Path, stop_after: Callable[..., None]) -> None:
    stop_after("training_step", at_step=4, signum=signal.SIGINT)
    stop_after("training_step", at_step=4, signum=signal.SIGINT)
    assert train() == 130
    assert (only_run(here / "runs") / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
def test_a_state_gets_its_other_names_again_when_a_kill_came_between(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab.command import RunError
    from eit_lab.training import checkpoint

    words = ("trainer.keep_epochs=5", "recipe.epochs=3", "recipe.lr=0.01")
    assert train(*words, "run.root=alone") == 0
    best = record_of(only_run(here / "alone"))["best"]["epoch"]
    link, named = checkpoint._link, []

    def killed(source: Path, target: Path) -> None:
        named.append(target.name)
        if target.name == "best.ckpt" and f"epoch-{best - 1:04d}.ckpt" in [*named, "epoch--001.ckpt"]:
            raise RunError("killed")
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_link", killed)
        assert train(*words, "run.root=killed") == 1
    assert train(*words, "run.root=killed") == 0
    alone, again = only_run(here / "alone"), only_run(here / "killed")
    assert list(compare(alone, again)) == []
    names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (alone, again)]
    assert names[0] == names[1]
    assert "epoch-0002.ckpt" in names[0]


def test_a_run_stopped_before_any_validation_can_be_asked_again(here: Path, stop_after: Callable[..., None]) -> None:
    stop_after("test_step", at_step=5)
    assert train("trainer.max_steps=5") == 75
    assert train("trainer.max_steps=5") == 0
    assert record_of(only_run(here / "runs"))["best"]["step"] == 5


@pytest.mark.slow
def test_a_run_that_overwrites_goes_on_when_its_own_command_is_repeated(
    here: Path, stop_after: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train() == 0
    stop_after("training_step", at_step=4)
    assert train("run.overwrite=true") == 75
    capsys.readouterr()
    assert train("run.overwrite=true") == 0
    assert "(resumed, seed 0)" in capsys.readouterr().out
    assert len(list((here / "runs" / ".replaced").iterdir())) == 1


def test_the_clock_and_the_best_survive_a_restart(here: Path, stop_after: Callable[..., None]) -> None:
    stop_after("training_step", at_step=20)
    assert train() == 75
    folder = only_run(here / "runs")
    first = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert first["callbacks"]["Clock"]["device_hours"] > 0
    assert train() == 0
    record = record_of(folder)
    assert record["restarts"] == 1
    assert record["device_hours"] > first["callbacks"]["Clock"]["device_hours"]
    assert record["best"]["epoch"] in (0, 1)
    assert {"val/acc1", "val/acc1_ema"} <= record["best"].keys()


@pytest.mark.slow
def test_a_damaged_newest_state_falls_back_to_the_one_before(
    here: Path, stop_after: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("run.root=alone") == 0
    stop_after("training_step", at_step=20)
    assert train("run.root=killed", "trainer.checkpoint_every_n_steps=6") == 75
    folder = only_run(here / "killed")
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:5000])
    capsys.readouterr()
    assert train("run.root=killed", "trainer.checkpoint_every_n_steps=6") == 0
    assert f"warning: {last.relative_to(here)} is damaged" in capsys.readouterr().err
    assert (last.parent / "last.ckpt.damaged").stat().st_size == 5000
    torch.load(last.parent / "previous.ckpt", weights_only=True)  # never the damaged one
    assert list(compare(only_run(here / "alone"), folder)) == []


def test_a_flipped_bit_inside_a_state_is_seen_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("recipe.epochs=1") == 0
    folder = only_run(here / "runs")
    record = folder / "record.json"
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    last = folder / "checkpoints" / "last.ckpt"  # the only one after one epoch; best.ckpt is the same file
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(bytes(content))
    capsys.readouterr()
    assert train("recipe.epochs=1") == 2
    assert "is damaged and cannot be resumed from" in capsys.readouterr().err


def test_a_state_of_another_run_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("recipe.epochs=1", "seed=1") == 0
    assert train("recipe.epochs=1", "seed=2") == 0
    one, two = sorted(path.parent for path in (here / "runs").glob("*/record.json"))
    (two / "checkpoints" / "last.ckpt").write_bytes((one / "checkpoints" / "last.ckpt").read_bytes())
    record = two / "record.json"
    record.write_text(record.read_text().replace('"finished"', '"running"'))
    capsys.readouterr()
    assert train("recipe.epochs=1", f"seed={record_of(two)['seed']}") == 2
    assert f"is of the run {record_of(one)['identity']}, not of {record_of(two)['identity']}" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_the_last_good_state_is_intact(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("recipe.epochs=1", "run.root=alone") == 0
    size = (only_run(here / "alone") / "checkpoints" / "last.ckpt").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, before[1]))  # no file may grow to a whole checkpoint
    try:
        assert train("recipe.epochs=1", "run.root=full") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    folder = only_run(here / "full")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eit_lab:")]
    assert said == [
        f"eit_lab: {(folder / 'checkpoints' / 'last.ckpt').relative_to(here)} cannot be written: File too large; "
        "there is no earlier one"
    ]
    assert list((folder / "checkpoints").iterdir()) == []
    assert record_of(folder)["status"] == "failed"
    assert train("recipe.epochs=1", "run.root=full") == 0
    assert list(compare(only_run(here / "alone"), folder)) == []


@pytest.mark.slow
def test_a_vanished_data_root_is_one_line_and_the_run_goes_on_when_it_is_back(
    here: Path, lookalike: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "images").symlink_to(lookalike)
    words = [
        *TINY_MODEL,
        "data=imagenet",
        "data.root=images",
        "data.img_size=32",
        "data.num_workers=1",
        "data.val_size=4",
    ]
    words += ["recipe=debug", "recipe.batch_size=8"]
    from eit_lab.train import main
    from eit_lab.training.module import Classifier

    def vanish(self: Classifier, *_: object) -> None:
        if self.trainer.current_epoch == 1:
            (here / "images").rename(here / "gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "on_train_epoch_start", vanish)
        assert main(words) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eit_lab:")]
    assert len(said) == 1
    assert said[0].startswith("eit_lab: images/train/")
    assert "cannot be read, nor the 8 images after it; the last: " in said[0]
    assert "cannot be read: No such file or directory" in said[0]
    assert said[0].endswith("last.ckpt is intact")
    (here / "gone").rename(here / "images")
    assert main(words) == 0


# ------------------------------------------------------------------------------------------------------- not finite


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the loss of some steps be not a number."""
    from eit_lab.training.module import Classifier

    def poison(*steps: int) -> None:
        original = Classifier.training_step

        def training_step(self: Classifier, *args: object) -> torch.Tensor:
            loss = original(self, *args)
            bad = self.trainer.global_step + 1 in steps
            self._losses[-1] = self._losses[-1] * (torch.nan if bad else 1)
            return loss * (torch.nan if bad else 1)

        monkeypatch.setattr(Classifier, "training_step", training_step)

    return poison


def test_a_loss_that_is_not_finite_stops_the_run_with_step_samples_and_norms_on_record(
    here: Path, poisoned: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(17)
    assert train("trainer.checkpoint_every_n_steps=5", "logger=wandb") == 1
    folder = only_run(here / "runs")
    said = capsys.readouterr().err
    assert "training is not finite any more: loss nan, gradient norm nan at step 17" in said
    assert "last.ckpt is intact" in said
    assert "W&B: not on the server yet; to send it: wandb sync " in said
    facts = json.loads((folder / "nonfinite.json").read_text())
    assert record_of(folder)["nonfinite"]["step"] == facts["step"] == 17
    assert len(facts["sample_ids"]) == 16
    assert len(facts["grad_norms"]) == 10
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["eit_lab"]["step"] == 15
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_steps_that_are_not_finite_are_skipped_up_to_the_configured_number(
    here: Path, poisoned: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned(5, 17)
    assert train("recipe.skip_nonfinite=2") == 0
    assert "skipped (2 of 2)" in capsys.readouterr().out
    state = torch.load(only_run(here / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["skipped"] == 2
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    moments = state["optimizer_states"][0]["state"]
    assert {float(moment["step"]) for moment in moments.values()} == {26.0}  # 28 steps, two of them not taken
    assert train("recipe.skip_nonfinite=1") == 1


# ------------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
def test_two_processes_and_accumulation_give_the_same_run(
    command: Command, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.evaluate import main as evaluate

    same = ("trainer.log_every_n_steps=1", "model.drop_path_rate=0.0")  # dropped paths are drawn by rank
    for name, more in {
        "one": (),
        "accumulated": ("trainer.accumulate_grad_batches=2",),
        "micro": ("trainer.micro_batch_size=5",),  # 16 images in 4 micro-batches
    }.items():
        assert train(*same, f"run.root={name}", *more) == 0
    done = command("train", *DEBUG, *same, "run.root=two", "trainer.devices=2")
    assert done.status == 0, done.err
    one = only_run(here / "one")
    assert len(losses(one)) == 28
    for name in ("accumulated", "micro", "two"):
        folder = only_run(here / name)
        assert folder.name == one.name, "where a run is placed is not what it is"
        assert losses(folder) == pytest.approx(losses(one), rel=2e-5)
    two = only_run(here / "two")
    assert record_of(two)["placement"]["world_size"] == 2
    assert record_of(two)["command"] == [*DEBUG, *same, "run.root=two", "trainer.devices=2"]
    assert record_of(only_run(here / "micro"))["placement"]["accumulate"] == 4
    samples = [(two / "samples" / f"rank{rank}.csv").read_text().splitlines() for rank in (0, 1)]
    joined = [f"{a} {b.partition(',')[2]}" for a, b in zip(*samples, strict=True)]
    assert joined == (one / "samples" / "rank0.csv").read_text().splitlines()
    capsys.readouterr()
    assert evaluate([f"run={two}"]) == 0
    assert "the same as on record, to the last digit" in capsys.readouterr().out  # 1 process, on record by 2
    done = command("evaluate", f"run={one}", "trainer.devices=2")
    assert done.status == 0, done.err
    assert "the same as on record, to the last digit" in done.out


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_run_down_with_one_line(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.train", *DEBUG, "trainer.devices=2", "recipe.epochs=500"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/samples/rank1.csv")) and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[1]), signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "eit_lab: process 1 was killed by SIGKILL; the same command resumes" in said
    assert not any(Path("/proc", child).exists() for child in children)


@pytest.mark.slow
def test_ranks_with_different_configs_stop_with_one_line(tmp_path: Path) -> None:
    """As under a launcher of their own, where each rank composes what it was given."""
    from eit_lab.processes import _free_port

    port = str(_free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "eit_lab.train", *DEBUG, "trainer.devices=2", f"recipe.lr=0.00{rank + 1}"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1]
    for text in said:
        assert "eit_lab: every process must have the same configuration, data and code" in text


@pytest.mark.slow
def test_selftest_proves_it_in_one_process(command: Command) -> None:
    done = command("selftest", "resume", "kills=1", "recipe.epochs=2")
    assert done.status == 0, done.out + done.err
    assert "killed: 1 times" in done.out
    assert "identical to the last bit" in done.out


@pytest.mark.slow
@pytest.mark.parametrize("signals", ["KILL", "KILL,TERM,USR2"])
def test_selftest_proves_it_in_two_processes(signals: str, command: Command) -> None:
    done = command("selftest", "resume", "processes=2", "kills=4", f"signals={signals}", "seed=1")
    assert done.status == 0, done.out + done.err
    assert "identical to the last bit" in done.out


@pytest.mark.slow
def test_selftest_sees_a_difference(here: Path) -> None:
    assert train("run.root=one", "recipe.epochs=1") == 0
    assert train("run.root=two", "recipe.epochs=1") == 0
    one, two = only_run(here / "one"), only_run(here / "two")
    assert list(compare(one, two)) == []
    last = two / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)
    state["ema"]["state_dict"]["norm.bias"][0] += 1e-7
    last.unlink()  # best.ckpt is the same file
    torch.save(state, last)
    (two / "samples" / "rank0.csv").write_text("")
    differences = list(compare(one, two))
    assert differences[0] == "last.ckpt ema state_dict norm.bias: values"
    assert differences[1].startswith("samples/rank0.csv: ")


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_a_signal_to_every_process_of_a_job_stops_it_with_its_state_saved(
    devices: int, tmp_path: Path, lookalike: Path
) -> None:
    """As Slurm sends it: to the loader's workers too, where torch would make an error of it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.train", *TINY_MODEL, "recipe=debug", "data=imagenet", f"data.root={lookalike}",
         "data.img_size=32", "data.val_size=4", "data.num_workers=2", "recipe.batch_size=8", "recipe.epochs=500",
         f"trainer.devices={devices}"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("runs/*/checkpoints/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in descendants(process.pid):
        os.kill(pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert record_of(only_run(tmp_path / "runs"))["status"] == "preempted"


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(grandchild for child in children for grandchild in descendants(int(child)))]


@pytest.mark.slow
def test_an_image_that_one_rank_cannot_read_is_the_line_that_all_end_with(tmp_path: Path, damaged: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(damaged, root)
    for path in list((root / "train" / "n00000000").iterdir())[1:]:
        path.unlink()
    done = subprocess.run(
        [sys.executable, "-m", "eit_lab.train", *TINY_MODEL, "recipe=debug", "data=imagenet", f"data.root={root}",
         "data.img_size=32", "data.val_size=4", "data.num_workers=0", "recipe.batch_size=4", "recipe.epochs=9",
         "trainer.devices=2"],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot be decoded: Premature end of JPEG file" in done.stderr
    assert "cannot be decoded: Premature end of JPEG file" in record_of(only_run(tmp_path / "runs"))["error"]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_ctrl_c_twice_ends_a_run_whose_rank_hangs(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.train", *DEBUG, "trainer.devices=2", "recipe.epochs=500"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("runs/*/samples/rank1.csv")) and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = descendants(process.pid)[1:]
    os.kill(ranks[1], signal.SIGSTOP)
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.7)
    assert process.wait(timeout=20) == 130
    assert not any(Path("/proc", str(rank)).exists() for rank in ranks)


@pytest.mark.slow
def test_selftest_proves_it_on_image_files_with_loader_processes(command: Command, lookalike: Path) -> None:
    """The killed run's loader processes live on for some seconds, and must not hold its folder."""
    done = command(
        "selftest", "resume", "kills=3", "seed=2", "data=imagenet", f"data.root={lookalike}", "data.img_size=32",
        "data.val_size=4", "data.num_workers=2", "recipe=debug", "recipe.batch_size=8", "recipe.epochs=6",
        "trainer.accelerator=cpu", "trainer.checkpoint_every_n_steps=2",
    )  # fmt: skip
    assert done.status == 0, done.out + done.err
    assert "identical to the last bit" in done.out
