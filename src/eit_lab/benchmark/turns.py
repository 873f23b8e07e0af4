"""Rates that can be compared: everything is warmed up, then measured in turns, round after round, on cores of its own.

A number of a round is compared with the other numbers of the same round: what else the machine does meanwhile falls on all of
them. Workers are started once and stay; a turn is an epoch of so many batches that nothing is left over for the next turn.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from eit_lab.data.order import epoch_order

Rates = Mapping[str, Sequence[float]]
"""Images per second of each round."""


@dataclass(frozen=True)
class Spread:
    """Median and range over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one number a round."""
        return cls(median(values), min(values), max(values))


def ratio(rates: Rates, above: str, below: str) -> Spread:
    """One rate over another, round by round."""
    return Spread.of([a / b for a, b in zip(rates[above], rates[below], strict=True)])


def cores() -> list[int]:
    """Cores this process may use, those first that share no physical core with one before."""
    allowed = sorted(os.sched_getaffinity(0))
    first, rest = list[int](), list[int]()
    for core in allowed:
        path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        siblings = path.read_text().replace("-", ",").split(",") if path.exists() else [str(core)]
        (rest if any(int(other) in first for other in siblings) else first).append(core)
    return first + rest


@contextmanager
def on_cores(chosen: Sequence[int]) -> Iterator[None]:
    """This thread, and what it starts, on these cores only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, chosen)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class TurnBatches(Sampler[list[Any]]):
    """``num`` batches of a turn, out of one epoch in random order after the other; all of them full."""

    def __init__(self, num_samples: int, *, batch_size: int, as_items: bool) -> None:
        """``as_items``: what eit_lab's data sets take (order.Item); else sample indices."""
        self.num, self._as_items = 0, as_items
        self._stream = self._endless(num_samples, batch_size)

    def __iter__(self) -> Iterator[list[Any]]:
        for _ in range(self.num):
            epoch, indices = next(self._stream)
            yield [(epoch, index, 0, place) for place, index in enumerate(indices)] if self._as_items else indices

    @staticmethod
    def _endless(num_samples: int, batch_size: int) -> Iterator[tuple[int, list[int]]]:
        epoch = 0
        while True:
            order = epoch_order(num_samples, seed=0, epoch=epoch)
            for first in range(0, num_samples - batch_size + 1, batch_size):
                yield epoch, order[first : first + batch_size].tolist()
            epoch += 1


class LoaderTurn:
    """Turns of a DataLoader whose workers stay, each on a core of its own. The main process does nothing but take batches."""

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        workers: int,
        seconds: float,
        as_items: bool,
        available: Sequence[int],
    ) -> None:
        """``as_items``: a data set of ours, which gives a batch at a time; else one that gives a sample."""
        self.batch_size, self.workers, self.seconds = batch_size, workers, seconds
        self._batches = TurnBatches(len(dataset), batch_size=batch_size, as_items=as_items)  # type: ignore[arg-type]
        mine = [available[place % len(available)] for place in range(workers)]
        self._main = sorted(set(available) - set(mine)) or list(available)
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            sampler=self._batches if as_items else None,
            batch_sampler=None if as_items else self._batches,
            batch_size=None if as_items else 1,
            num_workers=workers,
            worker_init_fn=_Settle(mine),
            persistent_workers=True,
            generator=torch.Generator().manual_seed(0),
        )

    def warm_up(self) -> None:
        """Start the workers, and find out how many batches a turn takes."""
        self._batches.num = 3 * self.workers
        rate = self._run()
        per_worker = self.seconds * rate / self.batch_size / self.workers
        self._batches.num = self.workers * (1 + max(2, round(per_worker)))

    def __call__(self) -> float:
        """One turn; images per second."""
        return self._run()

    def _run(self) -> float:
        with on_cores(self._main):
            batches = iter(self._loader)
            for _ in range(self.workers):  # each worker's first, made while the others start
                next(batches)
            began, count = time.perf_counter(), 0
            for _ in batches:
                count += 1
            return count * self.batch_size / (time.perf_counter() - began)


class _Settle:
    """worker_init_fn: each worker to its core."""

    def __init__(self, cores: Sequence[int]) -> None:
        self.cores = cores

    def __call__(self, worker: int) -> None:
        os.sched_setaffinity(0, [self.cores[worker]])


def interleave(
    turns: Mapping[str, Callable[[], float]], *, rounds: int, on_turn: Callable[[], None]
) -> dict[str, list[float]]:
    """Each once a round, in an order that is turned around every other round."""
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds):
        for name in list(turns) if number % 2 == 0 else list(turns)[::-1]:
            rates[name].append(turns[name]())
            on_turn()
    return rates
