"""The loop waits for nothing it need not know, and its rows say how fast it goes and whether the loader keeps up."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import TINY, only_run, record_of
from eit_lab.command import StoppedError
from eit_lab.training.pace import Feed, starved_line
from eit_lab.training.ranks import Answer, Watch

DEBUG = (*TINY, "recipe=debug", "data.num_samples=256", "trainer.record_samples=true", "trainer.log_every_n_steps=1")


def train(*args: str) -> int:
    from eit_lab.train import main

    return main([*DEBUG, *args])


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as handle:
        return list(csv.DictReader(handle))


# ------------------------------------------------------------------------------------- what processes tell each other


class Board:
    """Questions of several processes, each answered once all have asked it: gloo, without a network."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.asked: list[list[tuple[int, ...]]] = []
        self.changed = threading.Condition()


class Process:
    """What Watch needs of Ranks."""

    def __init__(self, board: Board) -> None:
        self.board, self.world_size, self.asked = board, board.world_size, 0

    def ask_largest(self, *values: int) -> Answer:
        board, number = self.board, self.asked
        self.asked += 1
        with board.changed:
            if number == len(board.asked):
                board.asked.append([])
            board.asked[number].append(values)
            board.changed.notify_all()

        class Coming(Answer):
            def take(self) -> torch.Tensor:
                with board.changed:
                    asked = board.asked[number]
                    assert board.changed.wait_for(lambda: len(asked) == board.world_size, timeout=5), "never answered"
                return torch.tensor([max(column) for column in zip(*asked, strict=True)])

        return Coming(torch.empty(0))


@pytest.mark.parametrize(("pace_s", "span"), [(0.001, 16), (0.02, 5), (0.03, 4), (0.2, 1), (0.7, 0)])
def test_all_processes_hear_of_a_signal_at_the_same_call(pace_s: float, span: int) -> None:
    board, heard, raised_at = Board(3), [[], [], []], 37

    def run(rank: int) -> None:
        now = [0.0]
        watch = Watch(Process(board), clock=lambda: now[0])  # type: ignore[arg-type]
        for call in range(1, 101):
            now[0] += pace_s * (0.8 + 0.1 * rank)  # the slowest process has the say
            said = watch.look(signal.SIGTERM if rank == 1 and call >= raised_at else 0, call)
            if said is not None and said[0]:
                assert said[0] == signal.SIGTERM
                heard[rank].append(call)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    first = {calls[0] for calls in heard}
    assert len(first) == 1, "at the same call everywhere"
    assert heard[0] == heard[1] == heard[2]
    assert raised_at + (span > 0) <= first.pop() <= raised_at + 2 * span
    assert len(board.asked) == pytest.approx(100 / max(span, 1), abs=3), "no oftener than that: it is not free"


def test_whoever_is_alone_is_answered_at_once_and_asks_nobody() -> None:
    board = Board(1)
    assert Watch(Process(board)).look(signal.SIGTERM, 0) == (signal.SIGTERM, 0)  # type: ignore[arg-type]
    assert board.asked == []


def test_the_end_of_an_epoch_hears_what_is_still_on_its_way() -> None:
    board, now = Board(1), [0.0]
    process = Process(board)
    process.world_size = 2  # and the other one always has asked already
    watch = Watch(process, clock=lambda: now[0])  # type: ignore[arg-type]
    assert watch.look(0, 0) == (0, 0)  # the first one is answered at once
    now[0] += 0.01
    assert watch.look(0, 0) == (0, 0)  # and tells the pace
    now[0] += 0.01
    assert watch.look(7, 0) is None
    now[0] += 0.01
    assert watch.look(0, 3, now=True) == (7, 3)
    for _ in range(2):
        now[0] += 1.0
        watch.look(0, 0, now=True)
    now[0] += 1.0
    assert watch.look(5, 0) == (5, 0), "a second apart: at once"


# -------------------------------------------------------------------------------------- a step behind, as on a GPU


@pytest.fixture
def a_step_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read each step when the next one is enqueued, as a GPU's host does."""
    from eit_lab.training.module import Classifier

    monkeypatch.setattr(Classifier, "steps_ahead", 1)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the gradient of some steps be infinite, though the loss is not."""
    from eit_lab.training.module import Classifier

    def poison(*steps: int) -> None:
        original = Classifier.on_before_optimizer_step

        def before(self: Classifier, optimizer: torch.optim.Optimizer) -> None:
            if self.trainer.global_step + 1 in steps:
                next(self.parameters()).grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
            original(self, optimizer)

        monkeypatch.setattr(Classifier, "on_before_optimizer_step", before)

    return poison


@pytest.mark.slow
def test_a_step_that_is_read_late_is_the_same_step(
    here: Path, poisoned: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.selftest import compare
    from eit_lab.training.module import Classifier

    poisoned(1, 6, 14)  # the first of all, one inside, the last of an epoch
    words = ("recipe.skip_nonfinite=3", "trainer.checkpoint_every_n_steps=6")
    said = []
    for root, behind in (("now", 0), ("behind", 1)):
        monkeypatch.setattr(Classifier, "steps_ahead", behind)
        assert train(*words, f"run.root={root}") == 0
        out = capsys.readouterr().out
        said.append([line for line in out.splitlines() if "warning" in line])
    assert said[0] == said[1]
    assert [re.search(r"at step (\d+): skipped \((\d) of 3\)", line).groups() for line in said[0]] == [  # type: ignore[union-attr]
        ("1", "1"), ("6", "2"), ("14", "3"),
    ]  # fmt: skip
    now, behind = only_run(here / "now"), only_run(here / "behind")
    assert list(compare(now, behind)) == []
    assert len([row for row in rows_of(now) if row["train/loss"]]) == 28


def test_a_step_that_ends_the_run_late_has_its_own_facts_and_nothing_after_it_is_kept(
    here: Path, poisoned: Callable[..., None], a_step_behind: None
) -> None:
    poisoned(6, 12)
    assert train("recipe.skip_nonfinite=1", "trainer.checkpoint_every_n_steps=4", "trainer.log_every_n_steps=5") == 1
    folder = only_run(here / "runs")
    facts = json.loads((folder / "nonfinite.json").read_text())
    assert (facts["step"], facts["skipped"], len(facts["grad_norms"])) == (12, 2, 10)
    sampled = (folder / "samples" / "rank0.csv").read_text().splitlines()
    assert f"12,{' '.join(map(str, facts['sample_ids']))}" in sampled
    assert 1 < facts["loss"] < 5, "the loss was finite"
    assert [row["step"] for row in rows_of(folder)] == ["5", "10"]
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert (state["eit_lab"]["step"], state["skipped"]) == (8, 1), "the state of step 12 would have followed a bad step"
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_an_infinite_loss_whose_gradient_is_finite_is_seen_in_the_gradient() -> None:
    from eit_lab.compose import compose_one
    from eit_lab.data.batch import Batch
    from eit_lab.training.module import Classifier

    class Sure(nn.Module):
        """Has no doubt that it is class 0."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1, 2))
            self.infinite = True

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            shift = torch.tensor([0.0, -torch.inf if self.infinite else 0.0])
            return self.weight.expand(len(images), 2) + shift

    recipe = compose_one([*TINY, "recipe.label_smoothing=0.0"]).recipe
    model = Sure()
    module = Classifier(model, recipe, lambda batch: (batch.images, batch.labels))  # type: ignore[arg-type]
    zeros = torch.zeros(4, 3, dtype=torch.int64)
    batch = Batch(torch.zeros(4, 3, 8, 8), torch.ones(4, dtype=torch.int64), torch.arange(4), zeros)
    logits = model(batch.images)
    plain = torch.autograd.grad(nn.functional.cross_entropy(logits, batch.labels), model.weight)[0]
    assert plain.isfinite().all(), "which is why it needs a test"
    assert not torch.autograd.grad(module.training_step(batch, 0), model.weight)[0].isfinite().any()
    model.infinite = False
    plain = torch.autograd.grad(nn.functional.cross_entropy(model(batch.images), batch.labels), model.weight)[0]
    assert torch.equal(torch.autograd.grad(module.training_step(batch, 0), model.weight)[0], plain)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_clipping_is_lightnings_and_the_optimizer_stays_fused(
    precision: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab.training.module import Classifier

    original, ratios = Classifier.configure_gradient_clipping, []

    def clip(self: Classifier, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        expected = [nn.Parameter(p.detach().clone()) for p in parameters]
        for one, other in zip(expected, parameters, strict=True):
            one.grad = other.grad.clone()  # type: ignore[union-attr]
        norm = torch.nn.utils.clip_grad_norm_(expected, 1.4)  # as Lightning does
        original(self, optimizer, *args, **kwargs)
        for one, other in zip(expected, parameters, strict=True):
            torch.testing.assert_close(other.grad, one.grad, rtol=1e-6, atol=0)
        ratios.append(float(norm))
        assert all(group["fused"] for group in optimizer.param_groups)

    monkeypatch.setattr(Classifier, "configure_gradient_clipping", clip)
    assert train("recipe.epochs=1", "trainer.gradient_clip_val=1.4", f"trainer.precision={precision}") == 0
    assert min(ratios) < 1.4 < max(ratios), "both kinds of steps"
    logged = [float(row["optim/grad_norm"]) for row in rows_of(only_run(here / "runs")) if row["optim/grad_norm"]]
    assert logged == pytest.approx(ratios, rel=1e-6), "the norm on record is that before clipping"


# --------------------------------------------------------------------------------------------- waiting for the loader


@pytest.fixture
def slow_loader(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every batch, of training and of evaluation, takes 20 ms; the seconds of those of training."""
    from eit_lab.data.small import InMemoryImages

    original, slept = InMemoryImages.__getitem__, []

    def slowly(self: InMemoryImages, items: Any) -> Any:
        began = time.perf_counter()
        batch = original(self, items)
        time.sleep(0.02)
        if self.augment_seed is not None:
            slept.append(time.perf_counter() - began)
        return batch

    monkeypatch.setattr(InMemoryImages, "__getitem__", slowly)
    return slept


@pytest.mark.slow
def test_the_wait_share_is_the_time_in_the_loader_over_the_time_of_training(
    here: Path, slow_loader: list[float]
) -> None:
    assert train("trainer.checkpoint_every_n_steps=5") == 0
    folder = only_run(here / "runs")
    record = record_of(folder)
    rows = [row for row in rows_of(folder) if row["train/loss"]]
    assert len(rows) == len(slow_loader) == 28
    trained_s = 3600 * float(rows[-1]["perf/hours"])
    assert record["data_wait_share"] * trained_s == pytest.approx(sum(slow_loader), rel=0.1)
    hours = [0.0, *(float(row["perf/hours"]) for row in rows)]
    for row, spent, before, after in list(zip(rows, slow_loader, hours, hours[1:], strict=False))[1:]:
        share = float(row["perf/data_wait_share"])
        assert 0 < share < 1
        assert share * 3600 * (after - before) == pytest.approx(spent, rel=0.3)
    assert record["data_wait_share"] > 0.3


@pytest.mark.slow
def test_every_row_has_its_speed_and_memory_and_says_where_the_peak_comes_from(here: Path) -> None:
    assert train("recipe.epochs=1") == 0
    assert train("recipe.epochs=1", "trainer.peak_tflops=2.0", "run.root=told", "seed=1") == 0
    for root, source in (("runs", "measured"), ("told", "config")):
        folder = only_run(here / root)
        record = record_of(folder)
        rows = [row for row in rows_of(folder) if row["train/loss"]]
        assert all(row["perf/data_wait_share"] and row["perf/memory_gb"] and row["perf/hours"] for row in rows)
        assert all(row["perf/mfu"] and row["perf/img_per_s"] for row in rows[4:])  # three steps are not timed
        assert record["peak"]["source"] == source
        last = rows[-1]
        flops = 6 * record["cost"]["macs"] * float(last["perf/img_per_s"])
        assert float(last["perf/mfu"]) == pytest.approx(flops / (1e12 * record["peak"]["tflops"]))
        assert record["mfu"] == float(last["perf/mfu"])
        status = Path("/proc/self/status").read_text()
        most = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 / 1e9  # type: ignore[index]
        assert record["memory_gb"] == pytest.approx(most, rel=0.1)
    assert record["peak"]["tflops"] == 2.0


def test_a_measured_peak_is_that_of_a_matrix_product_and_draws_nothing() -> None:
    from eit_lab.models.linear import linear
    from eit_lab.training.peak import known_peak, measure_peak

    before = torch.get_rng_state()
    found = measure_peak(torch.device("cpu"), precision="32-true")
    assert torch.equal(torch.get_rng_state(), before)
    left = torch.ones(512, 512)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        linear(left, left, None)
        times.append(time.perf_counter() - began)
    assert found.flops == pytest.approx(2 * 512**3 / min(times), rel=0.8)
    assert (known_peak("NVIDIA H100 80GB HBM3", None).flops, known_peak("cpu, 2 threads", None)) == (989e12, None)  # type: ignore[union-attr]
    assert known_peak("NVIDIA H100 80GB HBM3", 5.0).source == "config"  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ the starvation line


@pytest.fixture
def short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judge after a few steps and a tenth of a second."""
    from eit_lab.training import pace

    for name, value in (("_FIRST_STEPS", 3), ("_LEAST_S", 0.1), ("_LEAST_AT_END_S", 0.05)):
        monkeypatch.setattr(pace, name, value)


@pytest.mark.slow
def test_a_run_whose_loader_is_too_slow_says_so_once_over_a_restart_too(
    here: Path,
    slow_loader: list[float],
    short_windows: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from eit_lab.training.module import Classifier

    original, stopped = Classifier.training_step, []

    def stop(self: Classifier, *args: Any) -> torch.Tensor:
        if self.trainer.global_step == 20 and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGTERM))
        return original(self, *args)

    monkeypatch.setattr(Classifier, "training_step", stop)
    assert train() == 75
    first = [line for line in capsys.readouterr().out.splitlines() if "waits for data" in line]
    assert len(first) == 1
    found = re.fullmatch(
        r"eit_lab: the device waits for data (\d+)% of the time: loading between the steps \(data.num_workers=0\) leaves "
        r"([\d,]+) img/s of ([\d,]+); .*",
        first[0],
    )
    assert found
    share, gives, takes = (float(text.replace(",", "")) for text in found.groups())
    assert 20 < share < 99
    assert takes == pytest.approx(gives / (1 - share / 100), rel=0.03)
    assert gives < 16 / 0.02, "sixteen images every 20 ms and more"
    assert record_of(only_run(here / "runs"))["starved"] == first[0]
    assert train() == 0
    assert "waits for data" not in capsys.readouterr().out
    assert record_of(only_run(here / "runs"))["starved"] == first[0]


@pytest.mark.slow
def test_a_run_whose_loader_keeps_up_or_that_is_short_says_nothing(
    here: Path, slow_loader: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("recipe.epochs=1") == 0
    assert "waits for data" not in capsys.readouterr().out
    assert record_of(only_run(here / "runs"))["starved"] is None


GPU = {"cores": 16, "local": 1, "training_threads": 0}


@pytest.mark.parametrize(
    ("feed", "share", "first_epoch", "rates", "advice"),
    [
        (Feed(**GPU, workers=2, layout="folder", decode="fast"), 0.43, False, "2 workers give 310 img/s, the device takes 544",
         "data.num_workers=4 would feed it (this machine has 16 cores)"),
        (Feed(**GPU, workers=1, layout="shards", decode="fast"), 0.2, False, "1 worker gives 310 img/s, the device takes 388",
         "data.num_workers=2 would feed it (this machine has 16 cores)"),
        (Feed(**GPU, layout=None), 0.5, False, "loading between the steps (data.num_workers=0) leaves 310 img/s of 620",
         "data.num_workers=2 would feed it (this machine has 16 cores)"),
        (Feed(**GPU, workers=16, layout="folder", decode="pil"), 0.5, True, "16 workers give 310 img/s, the device takes 620",
         "data.decode=fast decodes only what a crop needs; shards, in which crops decode alone, are read faster "
         "(python -m eit_lab.shards build, then data.root)"),
        (Feed(cores=16, local=4, training_threads=0, workers=2, layout="folder", decode="fast"), 0.8, False,
         "2 workers of each device give 310 img/s, the devices take 1,550",
         "shards, in which crops decode alone, are read faster (python -m eit_lab.shards build, then data.root); "
         "data.num_workers=4 is what this machine has 16 cores for 4 devices can do"),
        (Feed(**GPU, workers=16, layout="shards", decode="fast"), 0.5, False, "16 workers give 310 img/s, the device takes 620",
         "the loader has all cores already: this machine has 16 cores, and it takes about 2.0 times as many"),
        (Feed(**GPU, workers=2, layout="shards", decode="fast", fetched=True), 0.5, True, "2 workers give 310 img/s, the device takes 620",
         "in this first epoch each file comes from its server once: the next one reads data.cache_dir"),
        (Feed(cores=2, local=1, training_threads=2), 0.5, False, "loading between the steps (data.num_workers=0) leaves 310 img/s of 620",
         "the training has all cores already: this machine has 2 cores, and it takes about 2.0 times as many"),
        (Feed(cores=4, local=1, training_threads=2), 0.6, False, "loading between the steps (data.num_workers=0) leaves 310 img/s of 775",
         "data.num_workers=2 would feed it (this machine has 4 cores)"),
    ],
)  # fmt: skip
def test_the_line_has_the_runs_numbers_and_what_this_machine_can_change(
    feed: Feed, share: float, first_epoch: bool, rates: str, advice: str
) -> None:
    line = starved_line(feed, share=share, img_per_s=310.0, first_epoch=first_epoch)
    assert line == f"eit_lab: the device waits for data {share:.0%} of the time: {rates}; {advice}"


# ----------------------------------------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(stopped: int, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.train", *DEBUG, "trainer.devices=2", "recipe.epochs=500"],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while _sampled(tmp_path, 1) < 10 and time.monotonic() < deadline:
            time.sleep(0.05)
        ranks = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
        assert len(ranks) == 2
        os.kill(ranks[stopped], signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, said
    folder = only_run(tmp_path / "runs")
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["eit_lab"]["step"]
    assert step >= 10
    assert record_of(folder)["error"] == str(StoppedError(int(signal.SIGTERM), step))
    assert [_sampled(tmp_path, rank) for rank in (0, 1)] == [step, step]


def _sampled(here: Path, rank: int) -> int:
    """The last step whose samples a process has written down."""
    lines = [line for path in here.glob(f"runs/*/samples/rank{rank}.csv") for line in path.read_text().splitlines()]
    return int(lines[-1].partition(",")[0]) if lines and "," in lines[-1] else 0


# --------------------------------------------------------------------------------------------------------- on a GPU

CUDA = (*(word for word in DEBUG if not word.startswith(("trainer.accelerator", "trainer.log"))), "trainer.accelerator=cuda",
        "trainer.devices=1", "trainer.log_every_n_steps=100", "recipe.epochs=1")  # fmt: skip


@pytest.mark.gpu
def test_the_host_of_a_gpu_waits_for_nothing_inside_a_step(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eit_lab.train import main
    from eit_lab.training.module import Classifier

    original, modes = Classifier.training_step, []

    def watched(self: Classifier, *args: Any) -> torch.Tensor:
        step = self.trainer.global_step
        if step in (4, 11):  # seven whole steps, in which whatever reads the device raises
            torch.cuda.set_sync_debug_mode("error" if step == 4 else "default")
            modes.append(torch.cuda.get_sync_debug_mode())
        return original(self, *args)

    monkeypatch.setattr(Classifier, "training_step", watched)
    try:
        assert main([*CUDA, "trainer.gradient_clip_val=1.0"]) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert modes == [2, 0]


@pytest.mark.gpu
def test_a_gpus_steps_that_are_not_finite_are_passed_over_on_the_device(
    here: Path, poisoned: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    poisoned(1, 6)
    assert main([*CUDA, "recipe.skip_nonfinite=2"]) == 0
    assert "at step 6: skipped (2 of 2)" in capsys.readouterr().out
    state = torch.load(only_run(here / "runs") / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    steps = {float(moment["step"]) for moment in state["optimizer_states"][0]["state"].values()}
    assert steps == {state["eit_lab"]["step"] - 2.0}


@pytest.mark.gpu
def test_what_a_gpu_computes_while_its_loop_waits_is_not_counted(here: Path, slow_loader: list[float]) -> None:
    """A kernel of 80 million cycles a step, 40 ms at 2 GHz, covers the 20 ms in which the loader makes the next batch."""
    from eit_lab.train import main
    from eit_lab.training.module import Classifier

    assert main([*CUDA, "run.root=idle"]) == 0
    original = Classifier.on_before_optimizer_step

    def busy(self: Classifier, optimizer: torch.optim.Optimizer) -> None:
        torch.cuda._sleep(80_000_000)
        original(self, optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classifier, "on_before_optimizer_step", busy)
        assert main([*CUDA, "run.root=busy"]) == 0
    idle, covered = (record_of(only_run(here / root))["data_wait_share"] for root in ("idle", "busy"))
    assert idle > 0.3
    assert covered < 0.5 * idle
