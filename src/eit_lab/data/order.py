"""The order of samples and the random draws of augmentation, as functions of (seed, epoch, sample index) alone.

Neither depends on the number of workers or ranks, on batch boundaries, or on where a run was stopped and resumed: the
canonical order of an epoch is one permutation, cut by global optimizer step; a draw is a hash, not the state of a generator.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

Item = tuple[int, int]
"""(epoch, sample index): a sample's index travels with its epoch, so that a worker process needs no state of its own."""


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The canonical order of one epoch: a permutation of range(num_samples)."""
    return np.random.Generator(np.random.Philox(key=(seed << 32) + epoch)).permutation(num_samples)


def held_out(num_samples: int, num_val: int, *, split_seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train indices, held-out indices), both sorted: the same slice for every training seed."""
    order = np.random.Generator(np.random.Philox(key=split_seed)).permutation(num_samples)
    return np.sort(order[num_val:]), np.sort(order[:num_val])


def uniform(index: NDArray[np.int64], *, seed: int, epoch: int, stream: int) -> NDArray[np.float64]:
    """One number in [0, 1) per sample index; ``stream`` tells the draws of one sample apart.

    SplitMix64 (Steele, Lea, Flood 2014) over the three counters in turn: a bijective mix each, no state.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(stream))
        state = _mix(state + np.uint64(epoch) * np.uint64(0xD1B54A32D192ED03))
        mixed = _mix(state + index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.uint64 | NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = np.asarray(z, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class TrainBatches(Sampler[list[Item]]):
    """One rank's micro-batches of an epoch. Optimizer step s takes samples [s B, (s + 1) B) of the canonical order.

    B is the GLOBAL batch; micro-batches and ranks cut it in order, so 1 rank with accumulation 2 and 2 ranks see the same
    samples in each step. The tail that does not fill a global batch is dropped (another one in every epoch).
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        repeat_first_epoch: bool = False,
    ) -> None:
        assert batch_size % (accumulate * world_size) == 0, "derive the micro-batch with per_device_batch first"
        self.num_samples, self.batch_size, self.accumulate = num_samples, batch_size, accumulate
        self.rank, self.world_size, self.seed, self.repeat_first_epoch = rank, world_size, seed, repeat_first_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[list[Item]]:
        epoch = 0 if self.repeat_first_epoch else self.epoch
        order = epoch_order(self.num_samples, seed=self.seed, epoch=epoch)
        steps = order[: self.num_samples // self.batch_size * self.batch_size]
        for batch in steps.reshape(-1, self.world_size, self.batch_size // (self.accumulate * self.world_size)):
            yield [(epoch, int(index)) for index in batch[self.rank]]


class EvalBatches(Sampler[list[Item]]):
    """One rank's batches for evaluation: every sample exactly once over all ranks, nothing padded."""

    def __init__(self, num_samples: int, *, batch_size: int, rank: int, world_size: int) -> None:
        self.indices = range(rank, num_samples, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[Item]]:
        for start in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[start : start + self.batch_size]]
