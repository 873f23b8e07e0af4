"""The sweep engine: a manifest that survives, launchers that share, slots without oversubscription, forked jobs that are fresh."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conftest import TINY, Done
from eit_lab.benchmark import nothing
from eit_lab.compose import compose_one, parse_flags
from eit_lab.config import ConfigError
from eit_lab.launchers import LocalLauncher
from eit_lab.manifest import Entry, Journal, Manifest, add_jobs, is_alive, locked, read_manifest
from eit_lab.report.summary import write_summary
from eit_lab.sweep.arms import read_sweep
from eit_lab.sweep.engine import Ended, Job
from eit_lab.sweep.launch import launch
from eit_lab.sweep.local import build_slots
from eit_lab.sweep.status import Watch

Command = Callable[..., Done]

# A job of this file: a record after a moment, or whatever its seed asks for. It stands in for training where the engine
# is what is tested; the same door (--frozen FILE) as eit_lab.train.
_JOB = """
import json, os, pathlib, signal, sys, time
from eit_lab.benchmark import nothing
from eit_lab.processes import die_with_parent
die_with_parent()
frozen = pathlib.Path(sys.argv[2])
seed = json.loads(frozen.read_text())["seed"]
marks = pathlib.Path("marks"); marks.mkdir(exist_ok=True)
first = not (marks / f"{seed}").exists()
with (marks / f"{seed}").open("a") as handle:
    handle.write(f"{os.getpid()} {sorted(os.sched_getaffinity(0))} {os.environ.get('OMP_NUM_THREADS')}\\n")
if seed == 666 or (seed == 77 and first):
    sys.exit("eit_lab: no luck today")
if seed == 9:
    os.kill(os.getpid(), signal.SIGKILL)
if seed in (500, 501):  # hears nothing but the default signals; 501 not even Ctrl-C
    signal.signal(signal.SIGINT, signal.SIG_IGN if seed == 501 else signal.default_int_handler)
    time.sleep(60)
if seed >= 1000:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    time.sleep(60)
time.sleep(0.05)
if __name__ == "__main__":
    nothing.main(sys.argv[1:])
"""
_QUIET = ("hydra.launcher.template=false", "guard.speed_s=0")


@pytest.fixture
def small(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module ``small_job`` that jobs can run."""
    (here / "small_job.py").write_text(_JOB)
    monkeypatch.setenv("PYTHONPATH", str(here), prepend=os.pathsep)
    return here


def run(*overrides: str) -> int:
    """A sweep of small jobs, as ``train -m`` starts it."""
    return launch(read_sweep(parse_flags(["-m", *TINY, *_QUIET, *overrides])), ["-m"], module="small_job")


def sweep_of(folder: Path) -> Path:
    (found,) = (folder / "runs" / "sweeps").iterdir()
    return found


def states(folder: Path) -> dict[int, str]:
    return {job.entry.seed: job.state for job in read_manifest(sweep_of(folder)).jobs.values()}


def times_run(folder: Path, seed: int) -> int:
    path = folder / "marks" / str(seed)
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_the_same_command_skips_what_is_finished_and_new_seeds_are_added(small: Path) -> None:
    assert run("seed=0,1") == 0
    assert run("seed=0,1,2") == 0
    assert states(small) == {0: "finished", 1: "finished", 2: "finished"}
    assert [times_run(small, seed) for seed in range(3)] == [1, 1, 1]
    manifest = read_manifest(sweep_of(small))
    assert len(manifest.launches) == 2
    for job in manifest.jobs.values():
        frozen = json.loads((manifest.folder / job.entry.frozen).read_text())
        assert frozen["seed"] == job.entry.seed
        assert job.entry.identity in job.entry.frozen
        assert (manifest.folder / job.entry.folder / "record.json").exists()


@pytest.mark.slow
def test_a_failed_job_is_said_with_its_reason_and_retried_as_told(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("seed=666,9,1") == 1
    said = capsys.readouterr().err
    assert "seed=666: FAILED: no luck today" in said
    assert "seed=9: FAILED: killed by SIGKILL" in said
    assert states(small) == {666: "failed", 9: "failed", 1: "finished"}
    assert run("seed=666,9,1", "hydra.launcher.retry_failed=false") == 1
    assert times_run(small, 666) == 1
    assert run("seed=666,9,1", "hydra.launcher.retries=2") == 1
    assert times_run(small, 666) == 4  # one before, and three times now
    assert run("seed=77", "hydra.launcher.retries=1") == 0
    assert times_run(small, 77) == 2
    assert states(small)[77] == "finished"


def test_fail_fast_starts_no_further_job(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("seed=666,1,2", "hydra.launcher.keep_going=false") == 1
    assert states(small) == {666: "failed", 1: "waiting", 2: "waiting"}
    assert "1 failed, the rest not ended: the same command goes on" in capsys.readouterr().out


def test_fail_fast_does_not_call_those_failed_that_it_stopped(small: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core only")
    two = ("hydra/launcher=local", "hydra.launcher.jobs_at_once=2")
    assert run("seed=500,666,1", *two, "hydra.launcher.keep_going=false") == 1
    assert states(small) == {500: "preempted", 666: "failed", 1: "waiting"}


@pytest.mark.slow
def test_a_job_that_does_not_hear_ctrl_c_is_killed_after_the_second(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eit_lab.sweep.stopping._LAST_S", 0.2)

    def press_twice() -> None:
        _until(lambda: times_run(small, 501) == 1)
        for _ in range(2):
            time.sleep(0.6)  # two within half a second are one
            os.kill(os.getpid(), signal.SIGINT)

    keyboard = threading.Thread(target=press_twice)
    keyboard.start()
    assert run("seed=501,1") == 130
    keyboard.join()
    assert states(small) == {501: "preempted", 1: "waiting"}


class _Cluster:
    """An engine whose jobs outlive their launcher; ``meanwhile`` happens while this launcher starts its first one."""

    survives = True

    def __init__(self, meanwhile: Callable[[Sequence[Job]], None], *, room: int) -> None:
        self.meanwhile, self.room = meanwhile, room
        self.started: list[int] = []
        self.adopted: list[str] = []
        self.jobs: list[Job] = []

    def threads(self, config: object) -> None:
        return None

    def capacity(self) -> int:
        return self.room - len(self.jobs)

    def start(self, jobs: Sequence[Job]) -> list[str]:
        if not self.started:
            self.meanwhile(jobs)
        self.jobs += jobs
        self.started += [job.config.seed for job in jobs]
        for job in jobs:
            assert nothing.main(["--frozen", str(job.frozen)]) == 0
        return [f"slurm:{job.config.seed}" for job in jobs]

    def adopt(self, job: Job, handle: str) -> bool:
        self.adopted.append(handle)
        assert nothing.main(["--frozen", str(job.frozen)]) == 0
        self.jobs.append(job)
        return True

    def poll(self) -> list[tuple[Job, Ended]]:
        ended, self.jobs = self.jobs, []
        return [(job, Ended(0, "")) for job in ended]

    def wait(self, seconds: float) -> None: ...

    def is_running(self, job: Job) -> bool:
        return True

    def stop(self, job: Job, signum: int) -> None: ...

    def close(self) -> None: ...


def test_what_another_launcher_does_meanwhile_is_not_done_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with ``run.overwrite``, and where the other one has submitted a job and is gone (``wait=false``)."""

    def another(_: Sequence[Job]) -> None:
        journal = Journal(small / "runs" / "sweeps" / "mine")
        mine = {job.entry.seed: identity for identity, job in read_manifest(journal.folder).jobs.items()}
        journal.write(
            [
                {"job": mine[1], "state": "finished"},
                {"job": mine[2], "state": "failed", "said": "no luck"},
                {"job": mine[3], "state": "submitted", "handle": "slurm:17_3"},
            ]
        )
        journal.close()

    engine = _Cluster(another, room=1)
    monkeypatch.setattr("eit_lab.sweep.launch.build_engine", lambda *_, **__: engine)
    assert run("seed=0,1,2,3,4", "run.sweep=mine", "run.overwrite=true") == 1
    assert engine.started == [0, 4]
    assert engine.adopted == ["slurm:17_3"]
    manifest = read_manifest(small / "runs" / "sweeps" / "mine")
    found = {job.entry.seed: job.state for job in manifest.jobs.values()}
    assert found == {0: "finished", 1: "finished", 2: "failed", 3: "finished", 4: "finished"}


def test_a_full_disk_is_one_line(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from eit_lab.train import main

    sweep = small / "runs" / "sweeps" / "mine"
    sweep.mkdir(parents=True)
    (sweep / "events.jsonl").symlink_to("/dev/full")
    assert main(["-m", *TINY, *_QUIET, "seed=0", "run.sweep=mine"]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eit_lab: ")]
    assert said == (
        "eit_lab: sweep mine stopped: No space left on device (runs/sweeps/mine/events.jsonl); the same command goes on"
    )


def test_the_script_for_wandb_keeps_the_runs_of_earlier_launches(small: Path) -> None:
    assert run("seed=0") == 0
    (record,) = (small / "runs").glob("*-s0-*/record.json")
    said = json.loads(record.read_text())
    record.write_text(json.dumps({**said, "sync": "W&B: not on the server yet; to send it: wandb sync zero"}))
    assert run("seed=1") == 0
    assert (sweep_of(small) / "sync.sh").read_text() == "wandb sync zero\n"


def test_a_changed_point_supersedes_its_earlier_version_and_never_stands_beside_it(small: Path) -> None:
    assert run("seed=0,1", "run.sweep=mine", "data.num_samples=64") == 0
    sweep = small / "runs" / "sweeps" / "mine"
    before = list(read_manifest(sweep).jobs)
    changed = [dict(json.loads((sweep / "sweep.json").read_text())["jobs"][0], identity="0123456789")]
    with locked(sweep):
        add_jobs(sweep, [Entry(**{**changed[0], "point": tuple(changed[0]["point"])})], declaration=None, launch={})
    after = read_manifest(sweep)
    assert list(after.jobs) == [before[1], "0123456789"]
    assert [entry.identity for entry in after.superseded] == [before[0]]


def test_a_declaration_that_was_edited_supersedes_the_runs_it_had(tmp_path: Path) -> None:
    def add(*entries: tuple[str, int, str], lr: str) -> Manifest:
        listed = [
            Entry(
                label=f"arms={arm} seed={seed}", point=(f"recipe.lr={lr}", f"arms={arm}", f"seed={seed}"), arm=arm, seed=seed,
                identity=identity, name=identity, folder=f"../{identity}", frozen="f", log="l",
            )
            for arm, seed, identity in entries
        ]  # fmt: skip
        with locked(tmp_path):
            return add_jobs(tmp_path, listed, declaration={"arms": {"vit": [], "eit": []}}, launch={})

    add(("vit", 0, "a"), ("eit", 0, "b"), lr="1e-3")
    after = add(("vit", 0, "c"), ("vit", 1, "d"), ("eit", 0, "e"), lr="2e-3")
    assert list(after.jobs) == ["c", "d", "e"]
    assert [entry.identity for entry in after.superseded] == ["a", "b"]


def test_time_left_is_of_the_moment_of_the_last_step_and_falls_until_the_next(tmp_path: Path) -> None:
    (tmp_path / "sweep").mkdir()
    watch = Watch(_one_job(tmp_path / "sweep"))
    journal = Journal(tmp_path / "sweep")
    journal.write([{"job": "1", "state": "running", "handle": "slurm:1", "attempt": True}])
    journal.close()
    watch.refresh()
    started, now = watch.manifest.jobs["1"].started, time.time()
    (tmp_path / "a-1").mkdir()
    record = tmp_path / "a-1" / "record.json"
    for step, after, left in [(10, 100.0, 400.0), (20, 300.0, 600.0)]:  # 10 s a step, then 20 s a step: of 50 steps
        record.write_text(json.dumps({"progress": {"step": step, "steps": 50}}))
        os.utime(record, (started + after,) * 2)
        (progress,) = watch.running()
        assert progress.seconds_left == pytest.approx(left + started + after - now, abs=2.0)


def _start(small: Path, *overrides: str) -> subprocess.Popen[str]:
    code = (
        "import sys; from eit_lab.compose import parse_flags; from eit_lab.sweep.arms import read_sweep; "
        "from eit_lab.sweep.launch import launch; "
        "sys.exit(launch(read_sweep(parse_flags(sys.argv[1:])), sys.argv[1:], module='small_job'))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, "-m", *TINY, *_QUIET, *overrides],
        cwd=small, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def _until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to be in time"
        time.sleep(0.02)


@pytest.mark.slow
def test_two_launchers_share_the_jobs_and_run_none_twice(small: Path) -> None:
    seeds = f"seed={','.join(map(str, range(12)))}".replace("9,", "")
    both = [_start(small, seeds), _start(small, seeds)]
    outputs = [launcher.communicate(timeout=120)[0] for launcher in both]
    assert [launcher.returncode for launcher in both] == [0, 0], outputs
    assert set(states(small).values()) == {"finished"}
    assert [times_run(small, seed) for seed in range(12) if seed != 9] == [1] * 11
    takers = {
        json.loads(line)["by"]
        for line in (sweep_of(small) / "events.jsonl").read_text().splitlines()
        if "attempt" in line
    }
    assert len(takers) == 2, outputs


@pytest.mark.slow
def test_a_run_that_another_sweep_is_busy_with_is_waited_for(small: Path) -> None:
    assert run("seed=0") == 0
    (folder,) = (path.parent for path in (small / "runs").glob("*-s0-*/record.json"))
    (folder / "record.json").rename(small / "record.json")
    held = (folder / "lock").open("w")
    fcntl.flock(held, fcntl.LOCK_EX)
    held.write("process 1 on elsewhere")
    held.flush()
    sweep = _start(small, "seed=0,1")
    _until(lambda: times_run(small, 1) == 1)
    time.sleep(0.5)
    assert sweep.poll() is None
    (small / "record.json").rename(folder / "record.json")
    held.close()
    out, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 0, out
    assert "seed=0: is being run by process 1 on elsewhere" in out
    assert "seed=0: finished by another command" in out
    assert times_run(small, 0) == 1


@pytest.mark.slow
def test_a_killed_launcher_takes_its_jobs_along_and_another_takes_over(small: Path) -> None:
    first = _start(small, "seed=1000,1")
    _until(lambda: times_run(small, 1000) == 1)
    pid = int((small / "marks" / "1000").read_text().split()[0])
    second = _start(small, "seed=1")  # the same sweep: it takes what is free
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0, out
    first.kill()
    first.communicate()
    _until(lambda: not Path(f"/proc/{pid}").exists())
    shown = subprocess.run(
        [sys.executable, "-m", "eit_lab.sweep", "status", str(sweep_of(small))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 1
    assert "1 finished, 1 lost of 2" in shown.stdout
    assert "not in the table: eit_nano seed 1000 is lost" in write_summary(sweep_of(small))
    third = _start(small, "seed=1000,1")
    _until(lambda: times_run(small, 1000) == 2)
    third.send_signal(signal.SIGTERM)
    out, _ = third.communicate(timeout=60)
    assert third.returncode == 75, out
    assert states(small) == {1000: "preempted", 1: "finished"}


def test_cancel_stops_the_launcher_and_states_are_kept(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from eit_lab.sweep.__main__ import main

    launcher = _start(small, "seed=1000,1001")
    _until(lambda: times_run(small, 1000) == 1)
    assert main(["cancel", str(sweep_of(small))]) == 0
    assert f"process {launcher.pid}, the launcher, asked to stop" in capsys.readouterr().out
    launcher.communicate(timeout=60)
    assert launcher.returncode == 75
    assert states(small) == {1000: "preempted", 1001: "waiting"}
    assert main(["cancel", str(sweep_of(small))]) == 0
    assert "no job is running" in capsys.readouterr().out


def test_jobs_side_by_side_have_cores_of_their_own(small: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core only")
    assert run("seed=0,1,2,3", "hydra/launcher=local", "hydra.launcher.jobs_at_once=2") == 0
    used = {(small / "marks" / str(seed)).read_text().partition(" ")[2].strip() for seed in range(4)}
    threads = os.environ.get("OMP_NUM_THREADS", str(len(cores) // 2))
    half = len(cores) // 2
    assert used == {f"{cores[:half]} {threads}", f"{cores[half : 2 * half]} {threads}"}


def _slots(monkeypatch: pytest.MonkeyPatch, *, cores: int, gpus: str | None, jobs: int = 9, **options: object) -> list:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus or "")
    accelerator = "gpu" if gpus else "cpu"
    configs = [compose_one([*TINY, f"trainer.accelerator={accelerator}"])] * jobs
    return build_slots(LocalLauncher(kind="local", **options), configs)


def test_slots_share_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [len(slot.cores) for slot in _slots(monkeypatch, cores=8, gpus=None)] == [1] * 8
    assert [len(slot.cores) for slot in _slots(monkeypatch, cores=8, gpus=None, jobs=3)] == [2, 2, 2]
    assert [slot.cores for slot in _slots(monkeypatch, cores=4, gpus=None, cores_per_job=2)] == [(0, 1), (2, 3)]
    four = _slots(monkeypatch, cores=8, gpus="4,5,6,7")
    assert [(slot.devices, slot.cores) for slot in four[:2]] == [(("4",), (0, 1)), (("5",), (2, 3))]
    assert len(four) == 4
    pairs = _slots(monkeypatch, cores=8, gpus="0,1,2,3", devices_per_job=2)
    assert [slot.devices for slot in pairs] == [("0", "1"), ("2", "3")]
    in_order = _slots(monkeypatch, cores=8, gpus="0,1", jobs_at_once=1)
    assert [(slot.devices, slot.cores) for slot in in_order] == [((), ())]  # everything


@pytest.mark.parametrize(
    ("gpus", "options", "message"),
    [
        (
            None,
            {"jobs_at_once": 5},
            "hydra.launcher.jobs_at_once must be at most 4 (jobs on 4 cores), got 5; nearest: 4",
        ),
        (None, {"jobs_at_once": 2, "cores_per_job": 3}, "hydra.launcher.cores_per_job must be at most 2"),
        (None, {"devices_per_job": 1}, "hydra.launcher.devices_per_job needs GPUs, and there is none"),
        ("0,1", {"devices_per_job": 3}, "hydra.launcher.devices_per_job must be at most 2 (GPUs), got 3; nearest: 2"),
        ("0,1", {"jobs_at_once": 3}, "hydra.launcher.jobs_at_once must be at most 2"),
    ],
)
def test_more_than_the_machine_has_is_refused_in_one_line(
    gpus: str | None, options: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError) as refused:
        _slots(monkeypatch, cores=4, gpus=gpus, **options)
    assert message in str(refused.value)


def test_the_journal_knows_who_is_alive_and_reads_only_what_is_new(tmp_path: Path) -> None:
    entry = Entry(
        label="a", point=("a",), arm="a", seed=0, identity="1", name="a-1", folder="../a-1", frozen="f", log="l"
    )
    with locked(tmp_path):
        manifest = add_jobs(tmp_path, [entry], declaration=None, launch={})
    journal = Journal(tmp_path)
    assert is_alive(tmp_path, journal.name)
    journal.write([{"job": "1", "state": "running", "handle": "local:1", "attempt": True}])
    with (tmp_path / "events.jsonl").open("a") as handle:
        handle.write('{"time": 1, "job": "1", "sta')  # another launcher is in the middle of a line
    manifest.refresh()
    assert (manifest.jobs["1"].state, manifest.jobs["1"].attempts, manifest.jobs["1"].by) == (
        "running",
        1,
        journal.name,
    )
    with (tmp_path / "events.jsonl").open("a") as handle:
        handle.write('te": "failed", "said": "why", "by": "x"}\n')
    manifest.refresh()
    assert (manifest.jobs["1"].state, manifest.jobs["1"].said) == ("failed", "why")
    journal.close()
    assert not is_alive(tmp_path, journal.name)
    other = tmp_path / "launchers" / "elsewhere-1-1"  # on another machine, whose locks are not seen here
    other.touch()
    assert is_alive(tmp_path, "elsewhere-1-1")
    os.utime(other, (time.time() - 1000,) * 2)
    assert not is_alive(tmp_path, "elsewhere-1-1")


def _one_job(folder: Path) -> Manifest:
    entry = Entry(
        label="a", point=("a",), arm="a", seed=0, identity="1", name="a-1", folder="../a-1", frozen="f", log="l"
    )
    with locked(folder):
        return add_jobs(folder, [entry], declaration=None, launch={})


@pytest.mark.parametrize("torn", [b'{"time": 1, "job": "1", "sta', b"\0\0\0\0\n", b"\xff\xfe\n", b"17\n", b'{"time": 1}\n', b"[]\n"])  # fmt: skip
def test_a_line_that_a_full_disk_cut_short_takes_no_other_along(torn: bytes, tmp_path: Path) -> None:
    _one_job(tmp_path)
    journal = Journal(tmp_path)
    journal.write([{"job": "1", "state": "running", "attempt": True}])
    with (tmp_path / "events.jsonl").open("ab") as handle:
        handle.write(torn)
    journal.write([{"job": "1", "state": "finished"}])
    journal.close()
    job = read_manifest(tmp_path).jobs["1"]
    assert (job.state, job.attempts) == ("finished", 1)


def test_who_asks_is_not_taken_for_the_launcher(tmp_path: Path) -> None:
    (tmp_path / "launchers").mkdir()
    gone = tmp_path / "launchers" / f"{socket.gethostname()}-1-1"
    gone.touch()
    with gone.open() as another:
        fcntl.flock(another, fcntl.LOCK_SH)
        assert not is_alive(tmp_path, gone.name)


@pytest.mark.parametrize("handle", ["local:1", "ray:ab"])
def test_jobs_that_end_with_their_launcher_are_lost_with_it(handle: str, tmp_path: Path) -> None:
    _one_job(tmp_path)
    journal = Journal(tmp_path)
    journal.write([{"job": "1", "state": "running", "handle": handle}])
    assert Watch(read_manifest(tmp_path)).counts() == {"running": 1}
    journal.close()
    assert Watch(read_manifest(tmp_path)).counts() == {"lost": 1}


def test_who_watches_a_sweep_sees_the_jobs_that_are_added(tmp_path: Path) -> None:
    manifest = _one_job(tmp_path)
    watch = Watch(manifest)
    two = dataclasses.replace(manifest.jobs["1"].entry, identity="2", point=("b",))
    with locked(tmp_path):
        add_jobs(tmp_path, [two], declaration=None, launch={})
    journal = Journal(tmp_path)
    journal.write([{"job": "2", "state": "finished"}])
    journal.close()
    watch.refresh()
    assert watch.counts() == {"waiting": 1, "finished": 1}


@pytest.mark.parametrize("told", ["", "4,2", "many"])
def test_threads_are_told_by_the_first_number(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", told)
    (slot,) = _slots(monkeypatch, cores=8, gpus=None, jobs=1)
    assert slot.threads(compose_one([*TINY])) == (4 if told == "4,2" else 8)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["status", "nothing"], "'nothing' must be the folder of a sweep (with sweep.json)"),
        (["status"], "sweep status takes the folder of one sweep, got nothing"),
        (["cancel", "a", "b"], "sweep cancel takes the folder of one sweep, got a b"),
        (["status", ".", "onse=true"], "must be the folder of a sweep"),
        (["statu", "runs/sweeps/a"], "or status or cancel and a folder, got 'statu runs/sweeps/a'; nearest: status"),
    ],
)
def test_a_mistake_in_a_sweep_command_is_one_line(
    args: Sequence[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.sweep.__main__ import main

    assert main(list(args)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_manifest_of_another_version_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"schema": 1, "jobs": []}')
    with pytest.raises(ConfigError, match="must have schema 2, got 1"):
        read_manifest(tmp_path)
    for damaged in (b"[]", b"\xff\xfe\xfd", b'{"schema"'):
        (tmp_path / "sweep.json").write_bytes(damaged)
        with pytest.raises(ConfigError, match="is damaged"):
            read_manifest(tmp_path)


@pytest.mark.slow
def test_a_killed_template_takes_its_job_along_and_the_sweep_goes_on(tmp_path: Path) -> None:
    sweep = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.train", "-m", *TINY, "guard.speed_s=0", "recipe.epochs=20", "seed=0,1"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    _until(lambda: bool(list(tmp_path.glob("runs/*-s0-*/checkpoints/last.ckpt"))), 120)
    (template,) = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()
    os.kill(int(template), signal.SIGKILL)
    out, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 1, out
    assert "seed=0: FAILED: the process that jobs are forked from has ended" in out
    assert states(tmp_path) == {0: "failed", 1: "finished"}


@pytest.mark.slow
def test_a_forked_job_is_the_run_that_a_fresh_process_makes(command: Command, tmp_path: Path) -> None:
    common = (*TINY, "seed=0,1", "guard.speed_s=0", "trainer.log_every_n_steps=1")
    forked = command("train", "-m", *common, "run.root=forked")
    fresh = command("train", "-m", *common, "run.root=fresh", "hydra.launcher.template=false")
    alone = command("train", *TINY, "seed=1", "run.root=alone", "trainer.log_every_n_steps=1")
    assert (forked.status, fresh.status, alone.status) == (0, 0, 0), forked.err + fresh.err + alone.err

    def losses(root: str, seed: int) -> list[str]:
        (path,) = (tmp_path / root).glob(f"*-s{seed}-*/metrics.csv")
        header, *rows = path.read_text().splitlines()
        place = header.split(",").index("train/loss")
        return [row.split(",")[place] for row in rows]

    assert len(losses("forked", 1)) == 6  # two epochs of 56 images, 16 a step
    assert losses("forked", 0) == losses("fresh", 0)
    assert losses("forked", 1) == losses("fresh", 1) == losses("alone", 1)
    assert losses("forked", 0) != losses("forked", 1)
