"""Sweeps on a real Slurm: arrays, several tasks, preemption, time limits, kills, launchers that come and go. And what needs none."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import TINY, Done, only_run, record_of
from eit_lab.compose import compose_one
from eit_lab.config import ConfigError
from eit_lab.launchers import SlurmLauncher
from eit_lab.processes import started_by_launcher
from eit_lab.selftest import compare
from eit_lab.sweep.slurm_job import stays_out
from eit_lab.sweep.slurm_queue import Seen, read_queue
from eit_lab.sweep.slurm_submit import place_slurm
from slurm_cluster import SlurmCluster, why_not

Command = Callable[..., Done]
_NO_SLURM = why_not()
slurm = pytest.mark.skipif(_NO_SLURM is not None, reason=_NO_SLURM or "")
_LONG_S = 240.0
# 60 steps, every part of the recipe on, a state every second step: there is always something to go on from.
RUN = (
    *TINY, "recipe=debug", "recipe.epochs=10", "data.num_samples=112", "model.drop_path_rate=0.2",
    "trainer.record_samples=true", "trainer.checkpoint_every_n_steps=2",
)  # fmt: skip
SLURM = (
    "hydra/launcher=slurm", "hydra.launcher.partition=main", "hydra.launcher.poll_s=1", "hydra.launcher.timeout_min=20",
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------- without a Slurm


@pytest.fixture(scope="module")
def config():
    return compose_one(TINY)


def launcher(**options: object) -> SlurmLauncher:
    return SlurmLauncher(kind="slurm", **options)


@pytest.mark.parametrize(
    ("trainer", "options", "placed"),
    [
        ({}, {}, (1, 1)),
        ({"devices": 4}, {}, (4, 1)),
        ({"devices": "auto"}, {"tasks_per_node": 2, "nodes": 4}, (2, 4)),
        ({"devices": -1, "num_nodes": 2}, {}, (1, 2)),
        ({"devices": "2", "num_nodes": 2}, {"tasks_per_node": 2, "nodes": 2}, (2, 2)),
    ],
)
def test_the_devices_of_a_job_are_its_tasks(config, trainer: dict, options: dict, placed: tuple[int, int]) -> None:
    given = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **trainer))
    done = place_slurm(given, launcher(**options)).trainer
    assert (done.devices, done.num_nodes) == placed


@pytest.mark.parametrize(
    ("trainer", "options", "message"),
    [
        ({"devices": 4}, {"tasks_per_node": 2}, "hydra.launcher.tasks_per_node must be trainer.devices, one process for each device, got 2 and 4; nearest: 4"),
        ({}, {"nodes": 3}, "trainer.devices times trainer.num_nodes must divide the global recipe.batch_size (16), got 3; nearest: 2 and 4"),
        ({"num_nodes": 2}, {"nodes": 3}, "hydra.launcher.nodes must be trainer.num_nodes, got 3 and 2; nearest: 2"),
        ({"devices": (0, 1)}, {}, "trainer.devices must be a number or auto with hydra/launcher=slurm, which chooses the devices, got (0, 1)"),
        ({"devices": 2, "accelerator": "gpu"}, {"gpus_per_node": 1}, "hydra.launcher.gpus_per_node must be 2 or more, one for each of a node's processes, got 1; nearest: 2"),
    ],
)  # fmt: skip
def test_a_placement_that_contradicts_itself_is_refused(config, trainer: dict, options: dict, message: str) -> None:
    given = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, **trainer))
    with pytest.raises(ConfigError) as refused:
        place_slurm(given, launcher(**options))
    assert str(refused.value) == message


def test_without_slurm_the_launcher_is_refused_in_one_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    monkeypatch.setenv("PATH", str(here))
    assert main(["-m", *TINY, "hydra/launcher=slurm", "seed=0,1"]) == 2
    err = capsys.readouterr().err
    assert err == "eit_lab: hydra/launcher=slurm needs Slurm's sbatch, which is not on PATH; nearest: local\n"
    assert not (here / "runs").exists()


def seen(**facts: object) -> Seen:
    blank = Seen(
        id="17", state="RUNNING", exit_code="0", reason="None", restarts=0, started=None, nodes="n1", comment=""
    )
    return dataclasses.replace(blank, **facts)


@pytest.mark.parametrize(
    ("code", "status"),
    [("0", 0), ("768", 3), ("35072", -9), ("15", -15), ("33280", 130), ("137:0", -9), ("0:15", -15), ("75:0", 75), ("", None)],
)  # fmt: skip
def test_exit_codes_are_read_as_old_and_new_versions_write_them(code: str, status: int | None) -> None:
    assert seen(exit_code=code).status == status


def test_the_queue_is_read_task_by_task() -> None:
    def line(*values: str) -> str:
        return "".join(f"{value:<30}|" for value in values)

    text = "\n".join(
        [
            line("17_0", "RUNNING", "0", "None", "2", "2026-01-02T03:04:05", "n[1-2]", "eit_lab:ab12"),
            line("17_1", "PENDING", "0", "Nodes required for job are DOWN", "0", "N/A", "", "(null)"),
            "slurm_load_jobs: something else",
        ]
    )
    found = read_queue(text)
    assert list(found) == ["17_0", "17_1"]
    first = found["17_0"]
    assert (first.state, first.restarts, first.nodes, first.comment) == ("RUNNING", 2, "n[1-2]", "eit_lab:ab12")
    assert first.started == time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))
    assert (found["17_1"].started, found["17_1"].reason) == (None, "Nodes required for job are DOWN")


@pytest.mark.parametrize(
    ("facts", "comes_back_by_itself"),
    [
        ({}, True),  # asked before the time limit, or in the time of grace before a preemption
        ({"restarts": 1}, False),  # requeued by somebody else: never twice
        ({"state": "COMPLETING", "reason": "TimeLimit"}, True),
        ({"state": "COMPLETING"}, False),  # cancelled
        ({"state": "CANCELLED"}, False),
        ({"state": "PENDING", "restarts": 1}, False),
    ],
)
def test_a_job_requeues_itself_once_and_never_against_somebodys_wish(facts: dict, comes_back_by_itself: bool) -> None:
    assert (stays_out(seen(**facts), restarts=0) is None) == comes_back_by_itself


@pytest.mark.parametrize(
    ("environment", "is_rank"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, False),  # the shell of salloc
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"}, False),  # sbatch's script
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NAME": "interactive"}, False),
    ],
)
def test_only_a_process_that_srun_started_beside_others_is_a_rank(
    environment: dict[str, str], is_rank: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert started_by_launcher() == is_rank


def test_signals_that_were_blocked_are_heard_and_handlers_that_were_there_come_back() -> None:
    from eit_lab.signals import StopRequest

    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda signum, _: heard.append(signum))
    stop = StopRequest()
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        signal.raise_signal(signal.SIGUSR2)  # to this thread: another one has not blocked it
        assert not heard
        stop.install()
        assert (stop.signum, heard) == (signal.SIGUSR2, [])
        stop.uninstall()
        signal.raise_signal(signal.SIGUSR2)
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


# -------------------------------------------------------------------------------------------------------- on a real one


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    folder = Path(tempfile.mkdtemp(prefix="eit-slurm-", dir="/tmp"))  # a short path: munge's socket lies in it
    try:
        with SlurmCluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder)


class Sweep:
    """A launcher in a folder of its own, and what it leaves."""

    def __init__(self, cluster: SlurmCluster, folder: Path, *words: str) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.words = folder, words
        self.environment = {**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1"}
        self.out = folder / f"launcher{len(list(folder.glob('launcher*')))}.out"
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "eit_lab.train", "-m", *SLURM, *words],
                cwd=folder, env=self.environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.out.read_text()

    def end(self) -> int:
        try:
            return self.process.wait(_LONG_S)
        finally:
            self.process.kill()

    def wait_for(self, ready: Callable[[], object], what: str) -> None:
        until = time.monotonic() + _LONG_S
        while not ready():
            assert self.process.poll() is None, f"{what}: the launcher ended; {self.said}{self.logs()}"
            assert time.monotonic() < until, f"{what}: not in time; {self.said}{self.logs()}"
            time.sleep(0.02)

    def logs(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("runs/sweeps/*/jobs/*.log"))

    def log(self, seed: int = 0) -> str:
        (path,) = (p for p in self.folder.glob(f"runs/sweeps/*/jobs/*-s{seed}-*.log") if ".rank" not in p.name)
        return path.read_text()

    def run(self, seed: int = 0) -> Path:
        (folder,) = self.folder.glob(f"runs/*-s{seed}-*")
        return folder

    def events(self) -> list[dict]:
        (path,) = self.folder.glob("runs/sweeps/*/events.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def trains(self, seed: int = 0) -> Callable[[], object]:
        return lambda: list(self.folder.glob(f"runs/*-s{seed}-*/checkpoints/last.ckpt"))

    def process_of(self, seed: int = 0) -> int:
        """Number of the process that trains, rank 0 of several."""
        return int((self.run(seed) / "lock").read_text().split()[1])

    def pause(self, seed: int = 0) -> None:
        """Stop the clock of a run in the middle of it. Whatever Slurm sends it next wakes it up: SIGCONT comes along."""
        self.wait_for(self.trains(seed), f"seed {seed} trains")
        os.kill(self.process_of(seed), signal.SIGSTOP)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed, without Slurm."""
    return _alone(tmp_path_factory.mktemp("alone"))


def _alone(folder: Path, *words: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "eit_lab.train", *RUN, *words], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=_LONG_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return only_run(folder / "runs")


@pytest.fixture(scope="module")
def at_the_limit(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    """Two runs, paused until their minute is over: Slurm's shortest. Seed 1 hears no signal, so that Slurm kills it.

    It begins with the first test and is looked at in the last but one: the minute need not be waited for.
    """
    sweep = Sweep(
        cluster, tmp_path_factory.mktemp("limit"), *RUN, "seed=0,1", "hydra.launcher.timeout_min=1",
        "hydra.launcher.signal_delay_s=25",
    )  # fmt: skip
    for seed in (0, 1):
        sweep.pause(seed)
    deaf, over = sweep.process_of(1), threading.Event()

    def keep_deaf() -> None:
        while not over.wait(0.001) and Path(f"/proc/{deaf}").exists():
            os.kill(deaf, signal.SIGSTOP)

    thread = threading.Thread(target=keep_deaf, daemon=True)
    thread.start()
    yield sweep
    over.set()
    thread.join()
    sweep.process.kill()
    sweep.process.wait()


@slurm
@pytest.mark.slow
def test_a_sweep_is_one_array_and_an_early_signal_loses_no_job(
    cluster: SlurmCluster, at_the_limit: Sweep, tmp_path: Path
) -> None:
    gpus = int(cluster.has_gpus)  # pretended ones, which some containers do not let us make
    sweep = Sweep(cluster, tmp_path, *TINY, "model/ib=none,eit", "seed=0,1", f"hydra.launcher.gpus_per_node={gpus}")
    sweep.wait_for(lambda: list(tmp_path.glob("runs/sweeps/*/events.jsonl")), "submitted")
    handles = [event["handle"] for event in sweep.events() if event["state"] == "submitted"]
    array = handles[0].removeprefix("slurm:").partition("_")[0]
    assert handles == [f"slurm:{array}_{number}" for number in range(4)]
    task = f"{array}_0"
    sweep.wait_for(lambda: f"{task}.0" in cluster.run("squeue", "-h", "-s", "-j", task, "-o", "%i"), "started")
    while not list(tmp_path.glob("runs/sweeps/*/jobs/vit_nano-*-s0-*.log")):  # till it says its first word
        cluster.run("scancel", "--signal=USR2", task)
    assert ("gres:gpu:1" in cluster.run("scontrol", "show", "job", task)) == cluster.has_gpus
    assert sweep.end() == 0, sweep.said + sweep.logs()
    records = [record_of(path.parent) for path in tmp_path.glob("runs/*/record.json")]
    assert [record["status"] for record in records] == ["finished"] * 4
    parts = sorted(path.read_text().count("Slurm job ") for path in tmp_path.glob("runs/sweeps/*/jobs/*.log"))
    first = json.loads(next(tmp_path.glob("runs/sweeps/*/sweep.json")).read_text())["jobs"][0]
    log = next(tmp_path.glob("runs/sweeps/*")) / first["log"]
    assert f"Slurm job {task}, part 2, on n" in log.read_text()
    assert log.read_text().count("requeued, its state is saved; part 2 goes on") == 1
    assert parts == [1, 1, 1, 3]
    assert "4 jobs in" in sweep.said
    assert "4 finished, 0 failed" in sweep.said


@slurm
@pytest.mark.slow
def test_two_tasks_are_one_run_that_stops_at_the_same_step_on_both_and_goes_on(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    words = (*RUN, "trainer.devices=2")
    # The nodes of this cluster have names that nothing resolves.
    sweep = Sweep(cluster, tmp_path / "slurm", *words, "hydra.launcher.setup=['export MASTER_ADDR=127.0.0.1']")
    sweep.wait_for(sweep.trains(), "training")
    job = sweep.events()[0]["handle"].removeprefix("slurm:")
    cluster.run("scancel", "--signal=USR2", job)
    (tmp_path / "alone").mkdir()
    undisturbed = _alone(tmp_path / "alone", *words[len(RUN) :])
    assert sweep.end() == 0, sweep.said + sweep.logs()
    assert "part 2 goes on" in sweep.log()
    assert record_of(sweep.run())["placement"]["world_size"] == 2
    assert list(compare(undisturbed, sweep.run())) == []
    (other,) = sweep.folder.glob("runs/sweeps/*/jobs/*.rank1.log")
    assert other.read_text().count(f"Slurm job {job}, part ") == 2


@slurm
@pytest.mark.slow
def test_a_killed_job_is_reported_with_the_cause_and_tried_again(
    cluster: SlurmCluster, alone: Path, tmp_path: Path
) -> None:
    sweep = Sweep(cluster, tmp_path, *RUN, "hydra.launcher.retries=1")
    sweep.pause()
    job = sweep.events()[0]["handle"].removeprefix("slurm:")
    os.kill(sweep.process_of(), signal.SIGKILL)
    assert sweep.end() == 0, sweep.said + sweep.logs()
    events = sweep.events()
    (failed,) = (event for event in events if event["state"] == "failed")
    assert failed["status"] == -9
    assert failed["said"].startswith(f"killed by SIGKILL: Slurm job {job} on n")
    assert "FAILED: killed by SIGKILL" in sweep.said
    assert "srun: error: n" in sweep.log()  # Slurm's own word for it
    assert [event["state"] for event in events if event["state"] in ("submitted", "finished")] == [
        "submitted", "submitted", "finished",
    ]  # fmt: skip
    assert list(compare(alone, sweep.run())) == []


@slurm
@pytest.mark.slow
def test_jobs_outlive_their_launcher_and_the_same_command_takes_them_over(
    cluster: SlurmCluster, alone: Path, tmp_path: Path
) -> None:
    words = (*RUN, "seed=0,1", "hydra.launcher.array_parallelism=1")
    first = Sweep(cluster, tmp_path, *words)
    first.pause()  # the other job waits in the queue
    handles = [event["handle"] for event in first.events() if event["state"] == "submitted"]
    os.kill(first.process.pid, signal.SIGKILL)
    first.process.wait()

    second = Sweep(cluster, tmp_path, *words)
    second.wait_for(lambda: second.said.count("found slurm:") == 2, "taken over")
    assert all(f"found {handle}, which an earlier command started" in second.said for handle in handles)
    cluster.stop_controller()
    second.wait_for(lambda: "Slurm does not answer" in second.said, "heard that Slurm is away")
    cluster.start_controller()
    second.wait_for(lambda: "Slurm answers again" in second.said, "heard that Slurm is back")
    os.kill(second.process.pid, signal.SIGKILL)
    second.process.wait()
    # As if it had been killed after sbatch, before it could write down which jobs these are.
    next(tmp_path.glob("runs/sweeps/*/events.jsonl")).write_text("")

    third = Sweep(cluster, tmp_path, *words)
    third.wait_for(lambda: third.events(), "looked")
    os.kill(third.process_of(), signal.SIGCONT)
    assert third.end() == 0, third.said + third.logs()
    assert "2 finished, 0 failed" in third.said
    assert [third.log(seed).count("Slurm job ") for seed in (0, 1)] == [1, 1]
    (token,) = (path.name for path in tmp_path.glob("runs/sweeps/*/jobs/submitit/*"))  # one call of sbatch in all
    every = dict(line.split() for line in cluster.run("squeue", "-h", "-r", "-t", "all", "-o", "%i %k").splitlines())
    assert sorted(f"slurm:{job}" for job, comment in every.items() if comment == f"eit_lab:{token}") == sorted(handles)
    assert list(compare(alone, third.run())) == []


@slurm
@pytest.mark.slow
def test_after_a_failure_the_rest_is_stopped_for_good_where_that_is_wanted(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    sweep = Sweep(
        cluster, tmp_path, *RUN, "seed=0,1,2", "hydra.launcher.array_parallelism=2", "hydra.launcher.keep_going=false"
    )
    for seed in (0, 1):
        sweep.pause(seed)
    os.kill(sweep.process_of(), signal.SIGKILL)
    sweep.wait_for(lambda: "keep_going=false" in sweep.said, "failed")
    os.kill(sweep.process_of(1), signal.SIGCONT)
    assert sweep.end() == 1, sweep.said
    states = {seed: [e["state"] for e in sweep.events() if f"-s{seed}-" in _name(sweep, e["job"])][-1] for seed in range(3)}  # fmt: skip
    assert states == {0: "failed", 1: "interrupted", 2: "interrupted"}
    assert record_of(sweep.run(1))["status"] == "interrupted"
    # Slurm may have started it before anybody knew: then it stops at its first step.
    assert [record_of(path)["status"] for path in tmp_path.glob("runs/*-s2-*")] in ([], ["interrupted"])


def _name(sweep: Sweep, identity: str) -> str:
    plain = json.loads(next(sweep.folder.glob("runs/sweeps/*/sweep.json")).read_text())
    return next(job["name"] for job in plain["jobs"] if job["identity"] == identity)


@slurm
@pytest.mark.slow
def test_a_time_limit_costs_no_step_whether_its_warning_is_heard_or_not(at_the_limit: Sweep, alone: Path) -> None:
    sweep = at_the_limit
    assert sweep.end() == 0, sweep.said + sweep.logs()
    assert "part 2 goes on" in sweep.log(0)
    assert "stopped by signal 12 after step" in sweep.log(0)
    assert "TIMEOUT after 1 min: Slurm job" in sweep.said  # seed 1, which the launcher brought back
    assert "requeued, part 2" in sweep.said
    assert "part 2, on n" in sweep.log(1)
    assert list(compare(alone, sweep.run(0))) == []
    (parts,) = {e["attempt"] for e in sweep.events() if e["state"] == "submitted"}
    assert parts is True
    assert record_of(sweep.run(1))["status"] == "finished"


@slurm
@pytest.mark.slow
def test_a_preempted_job_comes_back_once_and_goes_on_at_the_same_step(
    cluster: SlurmCluster, alone: Path, tmp_path: Path
) -> None:
    sweep = Sweep(cluster, tmp_path, *RUN)
    sweep.pause()
    job = sweep.events()[0]["handle"].removeprefix("slurm:")
    cluster.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    assert sweep.end() == 0, sweep.said + sweep.logs()
    log = sweep.log()
    assert "stopped by signal 15 after step" in log
    assert f"Slurm job {job}: Slurm has requeued it already" in log
    assert f"Slurm job {job}, part 2, on n" in log
    assert "part 3" not in log
    assert "Restarts=1 " in cluster.run("scontrol", "-o", "show", "job", job)
    assert list(compare(alone, sweep.run())) == []
