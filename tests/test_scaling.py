"""The model of training on many GPUs: known answers, two simulations that agree, and a record that is what the code says."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from conftest import TINY
from eit_lab.bench import main
from eit_lab.benchmark.scaling import simulation
from eit_lab.benchmark.scaling.cluster import Cluster, Group, measured_cluster
from eit_lab.benchmark.scaling.collectives import (
    Algorithm,
    agreement,
    agreement_behind,
    all_reduce,
    bytes_sent,
    fastest,
)
from eit_lab.benchmark.scaling.events import Machine
from eit_lab.benchmark.scaling.model import (
    Step,
    between_epochs_s,
    efficiency,
    epoch_s,
    feeding,
    loader_rate,
    passes,
    question,
    slowest,
    step,
    stop,
    strong_step,
    sweep,
    weak_step,
)
from eit_lab.benchmark.scaling.results import Results, compute, counted_gpus
from eit_lab.benchmark.scaling.tables import Summary, efficiencies
from eit_lab.benchmark.scaling.workload import Bucket, Workload, count_workload, fill_buckets

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "scaling.json"
AGAIN = "python -m eit_lab.bench scaling out=benchmarks/records"
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "tree", "hierarchical")
CLUSTER = Cluster(core_images_per_s=1000.0, image_bytes=1e5, first_batch_s=0.2, cores_per_node=24)
AGREEING = dataclasses.replace(CLUSTER, agreements=2)
STEADY = dataclasses.replace(CLUSTER, jitter=0.0, image_spread=0.0)
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def a_workload(**changes: object) -> Workload:
    buckets = (Bucket(1_000_000, 0.1), Bucket(26_000_000, 0.6), Bucket(9_000_000, 1.0))
    return Workload(
        **{
            "model": "eit_base", "params": 9_000_000, "macs": 7_000_000_000, "forward_ops": 200, "backward_ops": 300,
            "backward_ratio": 1.8, "buckets": buckets, "batch_size": 512, "steps_per_epoch": 100, "epochs": 300,
            "num_val": 1000, "eval_batch_size": 250, "images_per_gpu": {num: 512 // num for num in GPUS}, **changes,
        }
    )  # type: ignore[arg-type]  # fmt: skip


def simulated_s(workload: Workload, cluster: Cluster, gpus: int, images: int, **options: object) -> float:
    return simulation.simulate(workload, cluster, gpus=gpus, images=images, steps=20, **options).step_s  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------- all-reduces


def test_a_ring_of_two_is_one_exchange() -> None:
    seconds = all_reduce(1e6, Group(2, 8), CLUSTER, algorithm="ring")
    payload_bps = CLUSTER.nvlink_bps * CLUSTER.protocol_share
    assert seconds == pytest.approx(CLUSTER.collective_s + 2 * CLUSTER.nvlink_ring_s + 1e6 / payload_bps, rel=1e-12)
    assert bytes_sent(1e6, 2) == 1e6
    assert bytes_sent(1e6, 1) == 0
    assert all(all_reduce(1e6, Group(1, 8), CLUSTER, algorithm=one) == 0 for one in ALGORITHMS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("num_bytes", [1e4, 1e6, 26e6])
def test_every_message_in_turn_takes_as_long_as_the_formula_says(algorithm: Algorithm, num_bytes: float) -> None:
    for gpus in (2, 4, 8, 16, 24, 64, 256):
        group = Group(gpus, 8)
        ends = simulation.ALGORITHMS[algorithm](np.full(gpus, CLUSTER.collective_s), num_bytes, group, CLUSTER)
        formula = all_reduce(num_bytes, group, CLUSTER, algorithm=algorithm)
        # A ring whose links differ is paced by the slowest one in the formula.
        mixed = algorithm == "ring" and group.nodes > 1
        assert ends.max() == pytest.approx(formula, rel=5e-3 if mixed else 1e-12)
        assert ends.max() <= formula * (1 + 1e-12)


def test_nobody_has_the_sum_before_the_last_rank_has_its_gradients() -> None:
    late = np.zeros(64)
    late[37] = 1.0
    for algorithm in ALGORITHMS:
        ends = simulation.ALGORITHMS[algorithm](late, 1e6, Group(64, 8), CLUSTER)
        assert ends.min() > 1.0


def test_a_few_machines_are_a_ring_and_many_are_a_tree_as_nccl_chooses() -> None:
    assert fastest(26e6, Group(8, 8), CLUSTER) == "ring"
    assert fastest(26e6, Group(1024, 8), CLUSTER) == "tree"


def test_an_agreement_goes_twice_around_and_the_next_one_half_hides_behind_it() -> None:
    group = Group(4, 8)
    assert agreement(group, CLUSTER) == pytest.approx(6 * CLUSTER.tcp_local_s)
    assert agreement_behind(group, CLUSTER) == pytest.approx(4 * CLUSTER.tcp_local_s)
    assert agreement(Group(2, 1), CLUSTER) == pytest.approx(2 * CLUSTER.tcp_s)
    for gpus in (2, 8, 16, 256):
        group = Group(gpus, 8)
        once = simulation.agree(np.zeros(gpus), group, CLUSTER)
        assert once.max() == pytest.approx(agreement(group, CLUSTER))
        twice = simulation.agree(once, group, CLUSTER).max()
        assert twice == pytest.approx(agreement(group, CLUSTER) + agreement_behind(group, CLUSTER))


# ------------------------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
def test_without_chance_the_simulation_is_the_closed_form_on_one_machine(gpus: int) -> None:
    workload = a_workload()
    for cluster in (STEADY, dataclasses.replace(STEADY, agreements=1), dataclasses.replace(STEADY, agreements=2)):
        one = strong_step(workload, cluster, gpus)
        assert one is not None
        assert simulated_s(workload, cluster, gpus, one.images) == pytest.approx(one.seconds, rel=1e-9)


def test_with_chance_and_many_machines_they_differ_by_percents() -> None:
    workload = a_workload()
    for gpus in (16, 64, 256):
        for cluster in (CLUSTER, AGREEING):
            one = strong_step(workload, cluster, gpus)
            assert one is not None
            assert simulated_s(workload, cluster, gpus, one.images) == pytest.approx(one.seconds, rel=0.04)


@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("cluster", [CLUSTER, AGREEING], ids=["alone", "agreeing"])
def test_events_one_at_a_time_give_the_same_times(gpus: int, cluster: Cluster) -> None:
    workload, images = a_workload(), 4
    total = simulation.warm_up(cluster) + 6
    draws = simulation.draw(cluster, gpus=gpus, images=images, steps=total, seed=3)
    machine = Machine(workload, cluster, draws, gpus=gpus, images=images)
    ends = np.array(machine.run())
    arrays = simulation.simulate(workload, cluster, gpus=gpus, images=images, steps=6, seed=3, algorithm="ring").ends
    assert np.allclose(ends, arrays, rtol=1e-12, atol=0)
    assert (np.diff(ends, axis=0) > 0).all()
    # Every byte that the formula says was sent, by every rank.
    sent = total * sum(bytes_sent(bucket.num_bytes, gpus) for bucket in workload.buckets)
    assert machine.bytes_sent == pytest.approx([sent] * gpus)


def test_a_loader_that_is_too_slow_gives_the_step_its_pace_in_all_three() -> None:
    workload = a_workload()
    slow = dataclasses.replace(STEADY, core_images_per_s=100.0)
    one = step(workload, slow, gpus=8, images=64)
    assert one.seconds == pytest.approx(64 / loader_rate(slow))
    assert one.loader_wait > 0
    assert simulated_s(workload, slow, 8, 64) == pytest.approx(one.seconds)
    draws = simulation.draw(slow, gpus=2, images=64, steps=24, seed=0)
    ends = Machine(workload, slow, draws, gpus=2, images=64).run()
    assert (max(ends[-1]) - max(ends[3])) / 20 == pytest.approx(64 / loader_rate(slow))


def test_a_network_without_bounds_leaves_the_compute_and_no_compute_leaves_the_network() -> None:
    workload, inf = a_workload(), float("inf")
    free = dataclasses.replace(
        STEADY, nvlink_bps=inf, nic_bps=inf, collective_s=0.0, nvlink_ring_s=0.0, nic_ring_s=0.0, nvlink_tree_s=0.0,
        nic_tree_s=0.0, tcp_s=0.0, tcp_local_s=0.0, core_images_per_s=1e9,
    )  # fmt: skip
    alone = passes(workload, free, images=8)
    one = step(workload, free, gpus=64, images=8)
    assert one.exposed == one.agreements == one.stragglers == 0
    assert one.seconds == pytest.approx(alone.compute + alone.optimizer + free.host_step_s)
    assert simulated_s(workload, free, 64, 8) == pytest.approx(one.seconds)
    idle = dataclasses.replace(STEADY, mfu=1e9, op_s=0.0, core_images_per_s=1e12)
    one = step(workload, idle, gpus=8, images=8)
    assert one.exposed == pytest.approx(one.reduce, rel=1e-6)
    assert one.seconds == pytest.approx(one.reduce + one.update, rel=1e-6)
    assert simulated_s(workload, idle, 8, 8) == pytest.approx(one.seconds)


def test_a_bucket_that_is_ready_early_hides_and_the_last_one_does_not() -> None:
    cluster = STEADY
    late = a_workload(buckets=(Bucket(36_000_000, 1.0),))
    early = a_workload(buckets=(Bucket(36_000_000, 0.0),))
    one, other = (step(workload, cluster, gpus=8, images=64) for workload in (late, early))
    assert one.exposed == pytest.approx(one.reduce)
    assert one.reduce > 0
    assert other.exposed == 0
    assert one.reduce == other.reduce


def test_worse_machines_are_slower_and_better_ones_faster() -> None:
    workload = a_workload()

    def seconds(**changes: float) -> float:
        return step(workload, dataclasses.replace(AGREEING, **changes), gpus=64, images=8).seconds  # type: ignore[arg-type]

    now = seconds()
    for worse in ({"jitter": 0.1}, {"nic_bps": 1e9}, {"tcp_s": 1e-4}, {"op_s": 1e-5}, {"host_step_s": 2e-3}):
        assert seconds(**worse) > now
    assert seconds(agreements=0) < seconds(agreements=1) < seconds(agreements=2) == now
    steps = [weak_step(workload, AGREEING, num) for num in GPUS]
    for part in ("stragglers", "agreements", "reduce"):
        values = [getattr(one, part) for one in steps]
        assert values == sorted(values)


def test_the_slowest_of_many_is_the_mean_of_their_largest() -> None:
    assert slowest(1, 0.3) == slowest(100, 0.0) == 1.0
    assert slowest(2, 1e-3) - 1 == pytest.approx(
        1e-3 / np.sqrt(np.pi), rel=1e-2
    )  # two normal variables: std / sqrt(pi)
    generator = np.random.Generator(np.random.Philox(0))
    sigma = np.sqrt(np.log1p(0.3**2))
    largest = np.exp(sigma * generator.standard_normal((20_000, 64)) - sigma**2 / 2).max(axis=1)
    assert slowest(64, 0.3) == pytest.approx(largest.mean(), rel=5e-3)


def test_the_same_seed_gives_the_same_times_and_another_one_others() -> None:
    one, again, other = (
        simulation.simulate(a_workload(), CLUSTER, gpus=16, images=4, steps=10, seed=seed).ends for seed in (1, 1, 2)
    )
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


# --------------------------------------------------------------------------------------------------- epochs, runs, sweeps


def test_efficiency_is_one_on_a_machine_and_the_gpu_hours_of_a_machine_over_those_of_more() -> None:
    workload = a_workload()
    on = {num: strong_step(workload, CLUSTER, num) for num in (8, 64)}
    eight, many = on[8], on[64]
    assert isinstance(eight, Step)
    assert isinstance(many, Step)
    assert efficiency(workload, CLUSTER, eight) == 1
    ratio = 8 * epoch_s(workload, CLUSTER, eight) / (64 * epoch_s(workload, CLUSTER, many))
    assert efficiency(workload, CLUSTER, many) == pytest.approx(ratio)
    here = stop(workload, CLUSTER)
    steps = {num: strong_step(workload, CLUSTER, num) for num in GPUS if num >= 8}
    pays = {num for num, one in steps.items() if one and efficiency(workload, CLUSTER, one) >= 0.5}
    assert here.pays_to == max(pays)
    assert epoch_s(workload, CLUSTER, steps[here.fastest]) == min(
        epoch_s(workload, CLUSTER, one) for one in steps.values()
    )  # type: ignore[arg-type]


def test_weak_scaling_has_fewer_steps_and_as_many_images() -> None:
    workload = a_workload()
    one = weak_step(workload, CLUSTER, 32)
    assert one.images == 64
    between = between_epochs_s(workload, CLUSTER, gpus=32)
    assert epoch_s(workload, CLUSTER, one, scaling="weak") == pytest.approx(25 * one.seconds + between)
    # Four batches of 250 images for evaluation, one of 32 GPUs each: one worker's work, and two forward passes.
    evaluation = 250 / CLUSTER.core_images_per_s + 2 * passes(workload, CLUSTER, images=250).forward
    assert between == pytest.approx(evaluation + 16 * 9_000_000 / CLUSTER.disk_bps + CLUSTER.first_batch_s)


def test_runs_of_a_sweep_go_in_rounds() -> None:
    widths = {width.gpus: width for width in sweep(a_workload(), CLUSTER, runs=8, total_gpus=64)}
    assert set(widths) == {1, 2, 4, 8, 16, 32, 64}
    assert widths[8].all_hours == widths[8].run_hours
    assert widths[4].all_hours == widths[4].run_hours
    assert widths[16].all_hours == 2 * widths[16].run_hours
    assert widths[64].all_hours == 8 * widths[64].run_hours


def test_what_a_step_needs_of_loader_and_storage() -> None:
    workload = a_workload()
    one = step(workload, dataclasses.replace(CLUSTER, core_images_per_s=1.0), gpus=16, images=32)
    need = feeding(workload, CLUSTER, one)
    busy = one.seconds - one.loader_wait
    assert need.images_per_s == pytest.approx(512 / busy)
    assert need.cores_per_gpu == pytest.approx(512 / busy / 16 / 1000)
    assert need.in_place_bps == pytest.approx(1e5 * 512 / busy)
    assert need.first_epoch_s == pytest.approx(2 * 1_281_167 * 1e5 / CLUSTER.storage_bps)
    assert need.nic_bps == pytest.approx(bytes_sent(36e6, 16) / busy)


# ------------------------------------------------------------------------------------------------------------ what is counted


def test_a_model_is_counted_with_its_buckets_and_its_recipes_batch() -> None:
    one = count_workload("mini", (8, 24, 512, 1024))
    assert (one.params, one.gradient_bytes, one.checkpoint_bytes) == (3_512_750, 14_051_000, 56_204_000)
    assert sum(bucket.num_bytes for bucket in one.buckets) == one.gradient_bytes
    shares = [bucket.ready_share for bucket in one.buckets]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] == 1
    assert 1.5 < one.backward_ratio < 2  # the stem has no gradient of its images to compute
    assert one.images_per_gpu == {8: 128, 24: None, 512: 2, 1024: None}
    assert (one.batch_size, one.steps_per_epoch, one.epochs, one.num_val) == (1024, 1238, 300, 12_812)


def test_buckets_are_filled_as_torch_fills_them() -> None:
    import torch
    from torch.distributed import _compute_bucket_assignment_by_size as assign

    generator = np.random.Generator(np.random.Philox(0))
    sizes = [int(4 * size) for size in generator.integers(1, 3_000_000, 200)]
    tensors = [torch.empty(size // 4, device="meta") for size in sizes]
    theirs, _ = assign(tensors, [1 << 20, 25 << 20], [], list(range(len(tensors))))
    assert fill_buckets(sizes) == theirs
    assert fill_buckets([]) == []


# ------------------------------------------------------------------------------------------------------- record and command


@pytest.fixture(scope="module")
def results() -> Results:
    gpus = (8, 64, 1024)
    shares = {num: 512 // num if num < 512 else None for num in counted_gpus(gpus)}
    return compute(CLUSTER, [a_workload(images_per_gpu=shares)], gpus=gpus, steps=10, seed=0, reality={})


def test_the_record_has_every_row_and_the_tables_say_it(results: Results, tmp_path: Path) -> None:
    summary = Summary(results, "x")
    paths = list(summary.save(tmp_path / "out"))
    assert [path.name for path in paths] == ["scaling.json", "scaling.md", "scaling.png", "scaling.svg"]
    record = json.loads(paths[0].read_text())
    rows = [(row["model"], row["scaling"], row["step"]["gpus"]) for row in record["rows"]]
    assert len(rows) == len(set(rows)) == 2 + 3  # the recipe refuses 1024
    for row in record["rows"]:
        parts = ("compute", "stragglers", "exposed", "agreements", "update", "loader_wait")
        assert row["step"]["seconds"] == pytest.approx(sum(row["step"][part] for part in parts))
        assert row["error"] == pytest.approx(row["step"]["seconds"] / row["simulated_s"] - 1)
    assert {fact["kind"] for fact in record["numbers"]} == {"published", "measured", "counted", "assumed"}
    assert all(one["largest_difference"] < 1e-9 for one in record["two_simulations"])
    text = paths[1].read_text()
    assert "eit_base: more GPUs pay to" in text
    assert efficiencies(results)[1][0][-1] == "refused"
    assert sum("eit_base" in line for line in summary.lines) >= 3
    assert paths[2].stat().st_size > 20_000


def test_the_records_rows_are_what_the_code_says() -> None:
    record = json.loads(RECORD.read_text())
    cluster = Cluster(**{fact["name"]: fact["value"] for fact in record["numbers"]})
    assert cluster == measured_cluster(RECORD.with_name("data.json")), f"measured anew: {AGAIN}"
    workloads = {}
    for found in record["workloads"]:
        told = {field.name: found[field.name] for field in dataclasses.fields(Workload)}
        told["buckets"] = tuple(Bucket(**bucket) for bucket in told["buckets"])
        told["images_per_gpu"] = {int(num): images for num, images in told["images_per_gpu"].items()}
        workloads[told["model"]] = Workload(**told)
    assert list(workloads) == ["eit_mini", "eit_tiny", "eit_base", "eit_large"]
    for row in record["rows"]:
        workload, gpus = workloads[row["model"]], row["step"]["gpus"]
        one = (weak_step if row["scaling"] == "weak" else strong_step)(workload, cluster, gpus)
        assert one is not None
        assert row["step"]["seconds"] == pytest.approx(one.seconds), AGAIN
        assert row["efficiency"] == pytest.approx(efficiency(workload, cluster, one, scaling=row["scaling"])), AGAIN
        assert abs(row["error"]) < 0.05
        if row["model"] == "eit_mini" and gpus <= 16:
            again = simulation.simulate(
                workload, cluster, gpus=gpus, images=one.images, steps=record["steps"], seed=record["seed"]
            )
            assert again.step_s == pytest.approx(row["simulated_s"], rel=1e-12), AGAIN
    buckets = {model.removeprefix("eit_"): [b.num_bytes for b in one.buckets] for model, one in workloads.items()}
    assert all(rank["buckets"] == buckets for rank in record["reality"]["2"])


def test_every_table_of_the_docs_is_in_the_record() -> None:
    record = RECORD.with_suffix(".md").read_text().splitlines()
    docs = [line for line in (ROOT / "docs" / "scaling.md").read_text().splitlines() if line.startswith("| ")]
    assert len(docs) > 20
    assert [line for line in docs if line not in record] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gpu=8"], "bench scaling takes gpus, steps, seed, data, check, out as key=value, got 'gpu=8'; nearest: gpus"),
        (["gpus=8,12"], "gpus must be whole machines of 8, at most 4096, got '12'; nearest: 16"),
        (["gpus=many"], "gpus must be whole machines of 8, at most 4096, got 'many'; nearest: 8"),
        (["gpus=8192"], "gpus must be whole machines of 8, at most 4096, got '8192'; nearest: 4096"),
        (["steps=2"], "steps must be a whole number of 10 or more, got '2'"),
        (["seed=x"], "seed must be a whole number of 0 or more, got 'x'"),
        (["check=no"], "check must be true or false, got 'no'"),
        (["data=nowhere.json"], "data must be a record of `bench data` (data.json), got 'nowhere.json': No such file or directory"),
        (["data=other.json"], "data must be a record of `bench data` (data.json), got 'other.json', which is another file"),
    ],
)  # fmt: skip
def test_a_wrong_word_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.json").write_text('{"rates": []}')
    assert main(["scaling", *words]) == 2
    assert capsys.readouterr().err.splitlines() == [f"eit_lab: {said}"]


@pytest.mark.slow
def test_real_processes_have_the_counted_buckets_and_send_the_bytes_of_a_ring() -> None:
    from eit_lab.benchmark.scaling.reality import check
    from eit_lab.benchmark.scaling.workload import SIZES

    counted = {size: [bucket.num_bytes for bucket in count_workload(size, (8,)).buckets] for size in SIZES}
    for rank in check(SIZES, processes=2):
        assert rank["buckets"] == counted
        for size, came in rank["ddp_bytes"].items():
            assert came == pytest.approx(bytes_sent(sum(counted[size]), 2), rel=1e-2)
    for processes in (3, 4):
        ranks = check((), processes=processes)
        for rank in ranks:
            assert rank["raw"] == pytest.approx(bytes_sent(rank["raw_bytes"], processes), rel=1e-2)
        # Two pieces of 8 bytes go twice around, three TCP segments for each hop: nobody takes a short cut.
        messages = sum(rank["agreement_messages"] for rank in ranks)
        assert messages == pytest.approx(3 * 2 * 2 * (processes - 1), abs=2)
        assert sum(rank["question_messages"] for rank in ranks) == pytest.approx(3 * 3 * 2 * (processes - 1), abs=2)
        assert all(rank["asked_without_waiting"] for rank in ranks)


def test_a_question_is_back_before_anybody_looks_and_the_loop_asks_as_the_model_says() -> None:
    from eit_lab.training.ranks import Watch

    assert (CLUSTER.question_s, CLUSTER.question_steps) == (Watch.SPAN_S, Watch.MOST_CALLS)
    workload = a_workload()
    one = step(workload, CLUSTER, gpus=64, images=8)
    steps = min(16, -(-0.1 // one.seconds))
    assert question(workload, CLUSTER, one) == pytest.approx(agreement(Group(64, 8), CLUSTER) / (steps * one.seconds))
    record = json.loads(RECORD.read_text())
    assert max(row["question"] for row in record["rows"]) < 1


@pytest.mark.slow
def test_no_step_of_training_waits_for_another_host(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eit_lab.train import main as train
    from eit_lab.training.ranks import Ranks

    asked = dict.fromkeys(
        ("largest", "from_main", "gather", "must_agree", "copy_from_main", "ask_largest", "ask_all"), 0
    )

    def counted(name: str) -> None:
        original = getattr(Ranks, name)

        def ask(self: Ranks, *args: object) -> object:
            asked[name] += 1
            return original(self, *args)

        monkeypatch.setattr(Ranks, name, ask)

    for name in asked:
        counted(name)
    found = []
    for steps in (4, 9):  # of one epoch both; the last one is logged
        assert train([*TINY, "data.num_samples=256", f"trainer.max_steps={steps}"]) == 0
        found.append(dict(asked))
        asked.update(dict.fromkeys(asked, 0))
    assert found[0] == found[1], "what is asked at the start, of the logged step, in the validation and at the end"
    assert sum(found[0].values()) > 5
    assert found[0]["ask_all"] == 1
    assert CLUSTER.agreements == 0


@pytest.mark.slow
def test_the_command_models_simulates_and_checks(command, tmp_path: Path) -> None:
    data = RECORD.with_name("data.json")
    done = command("bench", "scaling", "gpus=8,64", "steps=10", f"data={data}", "out=out")
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "out" / "scaling.json").read_text())
    assert {row["step"]["gpus"] for row in record["rows"]} == {8, 64}
    assert set(record["reality"]) == {"2", "3", "4"}
    assert "DDP's buckets on 2 processes" in done.out
    assert "NOT AS COUNTED" not in done.out
