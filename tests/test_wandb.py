"""W&B: what arrives at the server, what stays on disk, and how little a bad server costs."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import TINY, Done
from eit_lab.compose import compose_one
from eit_lab.loading import dump
from eit_lab.runs import Run
from eit_lab.training import wandb_log
from eit_lab.training.mistakes import ConfusionCount, Mistake, save_mistakes
from eit_lab.training.wandb_log import WandbLog
from wandb_server import WandbServer, rows_on_disk

ID = "0123abcdef"
SLACK_S = 0.7  # to end a process and its threads, on a machine that does other things too
A_LOG_CALL_S = 0.2

MakeLog = Callable[..., WandbLog]


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


@pytest.fixture
def make_log(server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeLog]:
    """A WandbLog in a folder of its own, told of the stand-in server only."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in wandb_env(server, tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    made: list[WandbLog] = []

    def make(
        *overrides: str, mode: str | None = "online", resumed: bool = False, init: float = 30.0, finish: float = 30.0
    ) -> WandbLog:
        config = compose_one(
            [
                *TINY[:-1],
                "logger=wandb",
                f"logger.mode={mode or 'null'}",
                f"logger.init_timeout_s={init}",
                f"logger.finish_timeout_s={finish}",
                *overrides,
            ]
        )
        folder = Path("runs", f"arm-synthetic-s0-{ID}")
        folder.mkdir(parents=True, exist_ok=True)
        made.append(WandbLog(config, Run(folder, ID, "resume" if resumed else "new"), resumed=resumed))
        return made[-1]

    yield make
    for log in made:
        if log._channel is not None:
            log._channel.end(within=0.0)


def wandb_env(server: WandbServer, folder: Path) -> dict[str, str]:
    return {
        "WANDB_BASE_URL": server.url,
        "WANDB_API_KEY": "0" * 40,
        "WANDB_CONFIG_DIR": str(folder / "config"),
        "WANDB_CACHE_DIR": str(folder / "cache"),
        "HOME": str(folder),  # which may hold keys
        "NETRC": str(folder / "netrc"),
    }


def train_a_little(log: WandbLog, steps: range = range(1, 6)) -> None:
    for step in steps:
        log.log_metrics({"train/loss": 1 / step, "images": 16 * step, "epoch": step // 3}, step=step)
        log.log_metrics({"optim/lr": 1e-3 * step}, step=step)


def steps_on_disk(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows_on_disk(folder, ID) if "train/loss" in row]


def left_of(pid: int) -> list[str]:
    """What is left, a moment later, of a process and of the service that wandb started for it."""
    deadline = time.monotonic() + 5
    while (found := _processes_of(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def _processes_of(pid: int) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if path.parent.name == str(pid) or (b"--pid" in words and str(pid).encode() in words):
                found.append(b" ".join(words).decode())
    return [words for words in found if words]


def sync(line: str | None) -> None:
    """Type what the last line says."""
    assert line is not None
    told = line.partition("to send it: ")[2]
    assert told.startswith("wandb sync ")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", *shlex.split(told)[1:]], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------- a server that answers


def some_mistakes() -> list[Mistake]:
    rng = np.random.default_rng(0)
    return [
        Mistake(index=i, label=1, predicted=2, loss=3.0 - i, image=rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        for i in range(2)
    ]


def test_a_run_arrives_whole_nested_and_under_names_that_read_well(
    server: WandbServer, make_log: MakeLog, capfd: pytest.CaptureFixture[str]
) -> None:
    log = make_log("run.sweep=widths", "logger.tags=[a,b]", "logger.artifacts=best")
    log.start()
    assert (log.mode_now, log.url) == ("online", f"{server.url}/lab/eit_lab/runs/{ID}")
    train_a_little(log)
    log.log_metrics({"val/acc1": 0.5, "images": 80}, step=5)
    log.log_metrics({"test/acc1": 0.25})
    checkpoints = [Path("best.ckpt"), Path("last.ckpt")]
    for path in checkpoints:
        path.write_bytes(path.name.encode())
    mistakes = some_mistakes()
    log.log_confusion([ConfusionCount(1, 2, 3)], class_names=["a", "b", "c"])
    log.log_mistakes(mistakes, figure=save_mistakes(log._run.folder, mistakes))
    log.save_checkpoints(checkpoints)
    log.set_summary({"test/acc1": 0.25, "best": {"epoch": 1}})
    log.finalize("success")
    pid = log._channel._process.pid if log._channel else 0
    assert log.close(0) is None
    assert log.close(0) is None
    assert log.longest_call_s < A_LOG_CALL_S
    assert "eit_lab: W&B" not in capfd.readouterr().err

    assert server.unknown == []
    assert list(server.runs) == [ID]
    run = server.run(ID)
    assert run.config == dump(log._config)
    assert run.config["model"]["size"]["embed_dim"] == 16
    assert run.facts == {
        "displayName": f"arm-synthetic-s0-{ID}",
        "groupName": "widths",
        "jobType": "eit_nano",
        "project": "eit_lab",
        "tags": ["a", "b"],
    }
    assert run.exit_code == 0
    rows = [{name: value for name, value in row.items() if not name.startswith("_")} for row in run.history]
    assert rows[0] == {"step": 1, "images": 16, "epoch": 0, "train/loss": 1, "optim/lr": 0.001}
    assert rows[4] == {
        "step": 5, "images": 80, "epoch": 1, "train/loss": 0.2, "optim/lr": 0.005, "val/acc1": 0.5, "test/acc1": 0.25,
    }  # fmt: skip
    assert [row["images"] for row in rows] == [16, 32, 48, 64, 80, 80, 80, 80]
    assert all("step" in row for row in rows)
    assert run.summary["test/acc1"] == 0.25
    assert run.summary["best"] == {"epoch": 1}
    assert run.summary["test/confusion"]["nrows"] == 1
    assert run.summary["test/mistakes"]["nrows"] == 2
    assert run.summary["test/mistakes_figure"]["_type"] == "image-file"
    assert any(name.startswith("media/images/test/mistakes_figure") for name in run.files)
    assert run.artifacts[f"checkpoint-{ID}-best"] == ["best.ckpt", "wandb_manifest.json"]
    assert f"checkpoint-{ID}-last" not in run.artifacts
    (table,) = (files for name, files in run.artifacts.items() if "mistakes" in name)
    assert sum(file.endswith(".png") for file in table) == 2
    assert left_of(pid) == []


@pytest.mark.slow
def test_a_failed_job_is_failed_on_the_server_and_its_resume_is_the_same_run(
    server: WandbServer, make_log: MakeLog
) -> None:
    log = make_log()
    log.start()
    train_a_little(log, range(1, 4))
    assert log.close(1) is None
    assert server.run(ID).exit_code == 1
    again = make_log(resumed=True)
    again.start()
    train_a_little(again, range(4, 6))
    assert again.close(0) is None
    assert list(server.runs) == [ID]
    run = server.run(ID)
    assert run.exit_code == 0
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 5]
    assert server.requests["RunResumeStatus"] == 1


# -------------------------------------------------------------------------------------------------------- offline and absent


@pytest.mark.slow
def test_offline_asks_no_server_and_the_last_line_sends_every_part_as_one_run(
    server: WandbServer, make_log: MakeLog, capfd: pytest.CaptureFixture[str]
) -> None:
    for resumed, steps in ((False, range(1, 4)), (True, range(4, 6))):
        log = make_log("run.sweep=widths", mode=None, resumed=resumed)
        log.start()
        assert log.start_s < SLACK_S
        assert log.mode_now == "offline"
        train_a_little(log, steps)
        log.log_mistakes(some_mistakes())
        line = log.close(0 if resumed else 1)
    assert server.requests.total() == 0
    assert "eit_lab: W&B" not in capfd.readouterr().err
    assert steps_on_disk(log._run.folder) == [1, 2, 3, 4, 5]
    sync(line)
    run = server.run(ID)
    assert [row["step"] for row in run.history if "train/loss" in row] == [1, 2, 3, 4, 5]
    assert run.facts["groupName"] == "widths"
    assert run.config == dump(log._config)
    assert run.exit_code == 0
    assert log.how_to_sync() is None


@pytest.mark.slow
def test_the_configured_mode_wins_over_an_exported_one_and_disabled_is_absent(
    server: WandbServer, make_log: MakeLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    log = make_log(mode="offline")
    log.start()
    assert log.mode_now == "offline"
    log.close(0)
    assert server.requests.total() == 0
    monkeypatch.setenv("WANDB_MODE", "disabled")
    log = make_log(mode=None)
    log.start()
    assert log.mode_now == "absent"
    train_a_little(log)


def test_without_wandb_one_line_says_so_and_the_training_goes_on(
    make_log: MakeLog, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb_log, "find_spec", lambda name: None)
    log = make_log()
    log.start()
    train_a_little(log)
    log.set_summary({"test/acc1": 0.5})
    assert log.close(0) is None
    assert capsys.readouterr().err == "eit_lab: W&B: wandb is not installed; metrics.csv goes on\n"


@pytest.mark.slow
def test_the_logger_imports_without_wandb(tmp_path: Path) -> None:
    code = "import sys; sys.modules['wandb'] = None; import eit_lab.training.wandb_log"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)


def test_without_a_key_nobody_is_asked_and_the_run_is_offline(
    make_log: MakeLog, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    log = make_log()
    log.start()
    assert log.mode_now == "offline"
    log.close(0)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("eit_lab: W&B: offline from here: ")
    assert "api_key" in line.lower().replace(" ", "_")


# ------------------------------------------------------------------------------------------- a server that fails, hangs, dies


@pytest.mark.parametrize(
    "fault",
    ["refused", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("401", "500", "hang"))],
)
def test_a_bad_start_costs_no_more_than_its_seconds_and_the_run_goes_on_offline(
    fault: Any, server: WandbServer, make_log: MakeLog, capfd: pytest.CaptureFixture[str]
) -> None:
    if fault == "refused":
        server.die()
    else:
        server.mode = fault
    log = make_log(init=2.0)
    log.start()
    assert log.start_s < 2.0 + SLACK_S
    train_a_little(log)
    line = log.close(0)
    assert log.longest_call_s < A_LOG_CALL_S
    assert log.mode_now == "offline"
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("eit_lab: W&B: offline from here: ")
    assert said.endswith(f"; the data stays in {log._run.folder}/wandb")
    assert steps_on_disk(log._run.folder) == [1, 2, 3, 4, 5]
    assert line is not None
    (part,) = log._parts()
    assert line.endswith(f"wandb sync {part}")


@pytest.mark.parametrize(
    "fault", [pytest.param("500", marks=pytest.mark.slow), pytest.param("403", marks=pytest.mark.slow), "hang", "dies"]
)
def test_a_server_that_breaks_in_the_middle_costs_nothing_then_and_only_its_seconds_at_the_end(
    fault: Any, server: WandbServer, make_log: MakeLog
) -> None:
    log = make_log(finish=2.0)
    log.start()
    assert log.mode_now == "online"
    train_a_little(log, range(1, 101))
    if fault == "dies":
        server.die()
    else:
        server.mode = fault
    train_a_little(log, range(101, 201))
    log.log_mistakes(some_mistakes())  # a table asks the server before it is logged
    pid = log._channel._process.pid if log._channel else 0
    line = log.close(0)
    assert log.longest_call_s < A_LOG_CALL_S
    assert log.close_s < 2.0 + SLACK_S
    assert steps_on_disk(log._run.folder) == list(range(1, 201))
    assert line is not None
    assert "wandb sync --include-online " in line
    assert left_of(pid) == []


@pytest.mark.slow
def test_what_a_broken_server_missed_is_sent_by_the_last_line(server: WandbServer, make_log: MakeLog) -> None:
    log = make_log(finish=2.0)
    log.start()
    server.mode = "500"
    train_a_little(log)
    log.set_summary({"test/acc1": 0.5})
    line = log.close(0)
    assert server.run(ID).history == []
    server.mode = "ok"
    sync(line)
    run = server.run(ID)
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 5]
    assert run.summary["test/acc1"] == 0.5
    assert run.exit_code == 0
    assert log.how_to_sync() is None


# ------------------------------------------------------------------------------------------------- its process dies or stops


def test_a_training_that_is_killed_is_failed_on_the_server_with_every_row(
    server: WandbServer, make_log: MakeLog
) -> None:
    log = make_log()
    log.start()
    train_a_little(log)
    assert log._channel is not None
    log.after_save_checkpoint(None)
    log._channel._orders.put(None)  # closes the pipe, as the end of this process would
    assert log._channel._process.wait(20) == 0
    run = server.run(ID)
    assert [row["step"] for row in run.history] == [1, 2, 3, 4, 5]
    assert run.exit_code == 1


def test_when_its_process_dies_one_line_says_so_and_the_training_goes_on(
    make_log: MakeLog, capfd: pytest.CaptureFixture[str]
) -> None:
    log = make_log()
    log.start()
    train_a_little(log)
    assert log._channel is not None
    os.kill(log._channel._process.pid, signal.SIGKILL)
    log._channel._process.wait()
    log._channel._threads[1].join(5)
    train_a_little(log, range(6, 20))
    log.close(0)
    assert log.close_s < SLACK_S
    assert log.mode_now == "absent"
    (said,) = capfd.readouterr().err.splitlines()
    assert said == "eit_lab: W&B: its process has ended; training and metrics.csv go on"


@pytest.mark.slow
def test_when_its_process_stands_still_neither_rows_nor_the_end_wait_for_it(make_log: MakeLog) -> None:
    log = make_log(finish=1.0)
    log.start()
    assert log._channel is not None
    os.kill(log._channel._process.pid, signal.SIGSTOP)
    train_a_little(log, range(1, 5001))  # more than a pipe holds
    assert log.longest_call_s < A_LOG_CALL_S
    log.close(0)
    assert log.close_s < 1.0 + SLACK_S


def test_a_value_that_is_no_number_is_one_line_and_not_the_end(
    make_log: MakeLog, capsys: pytest.CaptureFixture[str]
) -> None:
    log = make_log()
    for _ in range(2):
        log.log_metrics({"train/loss": "none"}, step=1)  # type: ignore[dict-item]
    assert capsys.readouterr().err.splitlines() == [
        "eit_lab: W&B: could not convert string to float: 'none'; metrics.csv goes on"
    ]


# ------------------------------------------------------------------------------------------------------------ the real command


@pytest.mark.slow
def test_the_command_reports_to_w_and_b_under_one_id_with_its_exit_code(
    server: WandbServer, command: Callable[..., Done], tmp_path: Path
) -> None:
    words = [word for word in TINY if word != "logger=none"]
    args = [*words, "logger=wandb", "logger.mode=online", "logger.mistakes=4", "trainer.log_every_n_steps=1"]
    done = command("train", *args, env=wandb_env(server, tmp_path))
    assert done.status == 0, done.err
    (run_id,) = server.runs
    run = server.run(run_id)
    assert run.exit_code == 0
    assert list(Path(tmp_path, "runs").glob(f"*-{run_id}"))
    names = {name for row in run.history for name in row}
    assert {"train/loss", "val/acc1", "perf/img_per_s", "optim/lr", "images", "step", "epoch"} <= names
    assert all("images" in row and "step" in row for row in run.history)
    assert {"test/acc1", "test/confusion", "test/mistakes"} <= run.summary.keys()
    assert server.unknown == []
    assert "wandb sync" not in done.out + done.err


@pytest.mark.slow
def test_a_command_that_is_killed_and_typed_again_is_one_run(
    server: WandbServer, command: Callable[..., Done], tmp_path: Path
) -> None:
    words = [word for word in TINY if word not in ("logger=none", "recipe.epochs=2")]
    args = [*words, "recipe.epochs=60", "logger=wandb", "logger.mode=online", "trainer.log_every_n_steps=1"]
    args += ["trainer.checkpoint_every_n_steps=10"]
    first = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.train", *args],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", **wandb_env(server, tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not any(tmp_path.glob("runs/*/checkpoints/last.ckpt")):
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    first.kill()
    first.wait()
    (run_id,) = server.runs
    while server.run(run_id).exit_code is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.run(run_id).exit_code == 1
    before = [row["step"] for row in server.run(run_id).history if "train/loss" in row]
    assert before == list(range(1, len(before) + 1))
    done = command("train", *args, env=wandb_env(server, tmp_path))
    assert done.status == 0, done.err
    assert list(server.runs) == [run_id]
    run = server.run(run_id)
    assert run.exit_code == 0
    steps = [row["step"] for row in run.history if "train/loss" in row]
    assert steps[: len(before)] == before
    assert set(steps) == set(range(1, max(steps) + 1))
    losses: dict[int, set[float]] = {}
    for row in run.history:
        if "train/loss" in row:
            losses.setdefault(row["step"], set()).add(row["train/loss"])
    assert all(len(values) == 1 for values in losses.values()), "steps that are redone say the same"
