"""Counting: every sample once an epoch, whatever the number of ranks and workers, over stops and another number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest

from eit_lab.command import RunError
from eit_lab.data.batch import FILLER
from eit_lab.data.order import EvalBatches, Item, TrainBatches, Windows, epoch_order, held_out


def ranks(num_samples: int, world_size: int, **more: object) -> list[TrainBatches]:
    fixed = {"batch_size": 512, "accumulate": 1, "seed": 3, **more}
    return [TrainBatches(num_samples, rank=rank, world_size=world_size, **fixed) for rank in range(world_size)]  # type: ignore[arg-type]


def deal(batches: list[list[Item]], num_workers: int) -> Iterator[list[list[Item]]]:
    """What each worker of a DataLoader gets: batches in turn."""
    for worker in range(num_workers):
        yield batches[worker::num_workers]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("keep_tail", [False, True])
def test_64_ranks_of_8_workers_share_an_epoch_each_sample_once(world_size: int, keep_tail: bool) -> None:
    num_samples, batch_size = 12_811, 768
    samplers = ranks(num_samples, world_size, batch_size=batch_size, keep_tail=keep_tail)
    dealt = [list(deal(list(sampler), 8)) for sampler in samplers]
    lengths = {sum(map(len, workers)) for workers in dealt}
    assert lengths == {len(samplers[0])}
    assert all(any(worker) for workers in dealt for worker in workers)  # every worker has something to do
    seen = Counter(
        index
        for workers in dealt
        for worker in workers
        for batch in worker
        for _, index, _, place in batch
        if place != FILLER
    )
    assert set(seen.values()) == {1}
    assert len(seen) == (num_samples if keep_tail else num_samples // batch_size * batch_size)
    fillers = sum(item[3] == FILLER for workers in dealt for worker in workers for batch in worker for item in batch)
    assert fillers <= (world_size - 1 if keep_tail else 0)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("keep_tail", [False, True])
def test_a_stop_anywhere_and_another_number_of_ranks_lose_nothing(windowed: bool, keep_tail: bool) -> None:
    num_samples, batch_size = 1000, 96
    windows = Windows(np.arange(num_samples) * 7 % 13, 300) if windowed else None
    more = {"batch_size": batch_size, "keep_tail": keep_tail, "windows": windows}
    whole = [item for batch in ranks(num_samples, 1, **more)[0] for item in batch]
    for before, after, steps in product((2, 3), (1, 2, 3, 4), (0, 1, 5, 10)):
        first = [list(sampler)[: steps * sampler.accumulate] for sampler in ranks(num_samples, before, **more)]
        then = [list(s) for s in ranks(num_samples, after, start=(0, steps), **more)]
        assert len({len(batches) for batches in then}) == 1
        seen = [item for batches in (*first, *then) for batch in batches for item in batch if item[3] != FILLER]
        assert sorted(seen) == sorted(whole), (before, after, steps)


@pytest.mark.parametrize(("repeat", "pair"), [(1, True), (3, False), (3, True)])
def test_the_shorter_last_step_counts_copies_and_pairs_once(repeat: int, pair: bool) -> None:
    for world_size, accumulate in ((1, 1), (2, 2), (4, 1), (4, 3)):
        samplers = ranks(
            997, world_size, batch_size=96, accumulate=accumulate, repeat=repeat, pair=pair, keep_tail=True
        )
        batches = [list(sampler) for sampler in samplers]
        assert {len(b) for b in batches} == {len(samplers[0])}
        assert max(len(batch) for b in batches for batch in b) <= samplers[0].micro_batch
        items = [(i, copy) for b in batches for batch in b for _, i, copy, place in batch if place != FILLER]
        assert len(items) == len(set(items)) == 997
        tail = [batch for b in batches for batch in b if batch[0][3] >= 997 // 96 * 96]
        if pair:  # neighbours are mixed, so they lie in one micro-batch
            assert all(len(batch) % 2 == 0 for batch in tail[:-1])


def test_ranks_agree_that_they_share_an_epoch_and_notice_when_they_do_not() -> None:
    for keep_tail, repeat in product((False, True), (1, 3)):
        samplers = ranks(1000, 4, batch_size=96, keep_tail=keep_tail, repeat=repeat)
        shares = [sampler.share(2) for sampler in samplers]
        assert len({share[0] for share in shares}) == 1
        assert (sum(s[1] for s in shares), sum(s[2] for s in shares) % 2**64) == samplers[0].whole(2)
        samplers[1].seed = 4  # a rank of another order
        shares = [sampler.share(2) for sampler in samplers]
        assert sum(s[2] for s in shares) % 2**64 != samplers[0].whole(2)[1]


def test_a_run_whose_ranks_do_not_share_an_epoch_ends_before_it_starts() -> None:
    from types import SimpleNamespace

    from eit_lab.training.fit import check_shares

    def start(*gathered: tuple[int, int, int]) -> None:
        data = SimpleNamespace(train_batches=lambda: ranks(1000, 2, batch_size=96)[0])
        check_shares(data, SimpleNamespace(gather=lambda _: list(gathered), world_size=2))  # type: ignore[arg-type]

    one, two = (sampler.share(0) for sampler in ranks(1000, 2, batch_size=96))
    start(one, two)
    with pytest.raises(
        RunError, match=r"the 2 processes must share an epoch's 960 samples, each once; they have 960 others"
    ):
        start(one, one)
    with pytest.raises(RunError, match=r"every process must get as many batches of an epoch, got \[10, 9\]"):
        start(one, (9, *two[1:]))


def test_windows_go_through_files_in_turn_and_shuffle_inside() -> None:
    file = np.repeat(np.arange(40), 25)
    windows = Windows(file, 100)
    orders = [epoch_order(1000, seed=1, epoch=epoch, windows=windows) for epoch in (0, 1)]
    for epoch, order in enumerate(orders):
        assert sorted(order.tolist()) == list(range(1000))
        files, window = windows.files_in_turn(seed=1, epoch=epoch)
        assert sorted(files.tolist()) == list(range(40))
        assert window.tolist() == [place // 4 for place in range(40)]
        for number in range(10):
            part = order[100 * number : 100 * (number + 1)]
            assert set(file[part]) == set(files[window == number])
            assert (np.diff(file[part]) != 0).sum() > 50  # not file after file
    assert file[orders[0][:100]].tolist() != file[orders[1][:100]].tolist()
    assert np.array_equal(orders[0], epoch_order(1000, seed=1, epoch=0, windows=windows))


@pytest.mark.parametrize(("per_file", "size"), [(100, 150), (100, 40), (25, 100), (30, 100)])
def test_windows_are_numbered_without_gaps_and_hold_at_least_their_size(per_file: int, size: int) -> None:
    windows = Windows(np.repeat(np.arange(21), per_file), size)
    files, window = windows.files_in_turn(seed=0, epoch=0)
    assert len(files) == 21
    assert np.unique(window).tolist() == list(range(window.max() + 1))
    held = np.bincount(window) * per_file
    assert (held[:-1] >= size).all()
    assert (held[:-1] < size + per_file).all()


def test_the_next_window_is_announced_before_its_samples_are_read() -> None:
    heard: list[tuple[int, int]] = []
    windows = Windows(np.repeat(np.arange(10), 100), 200)
    sampler = TrainBatches(
        1000, batch_size=50, accumulate=1, rank=0, world_size=2, seed=0, windows=windows,
        on_window=lambda epoch, window: heard.append((epoch, window)),
    )  # fmt: skip
    for number, _ in enumerate(sampler):
        assert heard[-1] == (0, number * 50 // 200)
    assert len(heard) == 20


def test_whole_files_are_held_out_where_they_are_fetched_whole() -> None:
    file = np.random.default_rng(0).permutation(np.repeat(np.arange(50), 20))
    train, val = held_out(1000, 110, split_seed=0, file=file)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(1000))
    assert len(val) == 110
    assert len(set(file[val])) == 6
    assert len(set(file[train])) == 45  # one file is in both
    assert not np.array_equal(val, held_out(1000, 110, split_seed=1, file=file)[1])


def test_evaluation_in_the_order_of_files_takes_each_sample_once() -> None:
    order = np.random.default_rng(0).permutation(103)
    for world_size in (1, 2, 3, 64):
        samplers = [
            EvalBatches(103, batch_size=10, rank=r, world_size=world_size, order=order) for r in range(world_size)
        ]
        batches = [list(sampler) for sampler in samplers]
        assert {len(b) for b in batches} == {len(samplers[0])}
        seen = [item[1] for b in batches for batch in b for item in batch if item[1] != FILLER]
        assert sorted(seen) == list(range(103))
        assert [item[1] for item in batches[0][0]] == order[:10].tolist()
