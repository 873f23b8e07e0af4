"""The order of samples and the random draws of augmentation, as functions of (seed, epoch, sample index, copy) alone.

Neither depends on the number of workers or ranks, on batch boundaries, or on where a run was stopped and resumed: the
canonical order of an epoch is one permutation, cut by global optimizer step; a draw is a hash, not the state of a generator.

Repeated augmentation (arXiv:1901.09335) as DeiT runs it (arXiv:2012.12877): each chosen sample comes several times in a
row, an epoch has as many steps as without. Where we differ: here it is the same in a single process, whose sampler in the
published code is a plain one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from eit_lab.data.batch import FILLER

Item = tuple[int, int, int, int]
"""(epoch, sample index, copy, place in the epoch's order): all of it travels, so a worker process needs no state."""

_COPY_STREAMS = 1000  # streams of one copy of a sample; those of copy 0 are the streams themselves


def epoch_order(num_samples: int, *, seed: int, epoch: int) -> NDArray[np.int64]:
    """The canonical order of one epoch: a permutation of range(num_samples)."""
    return np.random.Generator(np.random.Philox(key=(seed << 32) + epoch)).permutation(num_samples)


def held_out(num_samples: int, num_val: int, *, split_seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train indices, held-out indices), both sorted: the same slice for every training seed."""
    order = np.random.Generator(np.random.Philox(key=split_seed)).permutation(num_samples)
    return np.sort(order[num_val:]), np.sort(order[:num_val])


def hashed(
    index: NDArray[np.int64],
    *,
    seed: int,
    epoch: int | NDArray[np.int64],
    stream: int,
    copy: int | NDArray[np.int64] = 0,
) -> NDArray[np.uint64]:
    """64 random bits per sample index (and epoch and copy, which broadcast); ``stream`` tells the draws of one sample apart.

    SplitMix64 (Steele, Lea, Flood 2014) over the three counters in turn: a bijective mix each, no state.
    """
    assert stream < _COPY_STREAMS, "streams from there on belong to the next copy"
    streams = np.asarray(stream + _COPY_STREAMS * np.asarray(copy)).astype(np.uint64)
    with np.errstate(over="ignore"):
        state = _mix(np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + streams)
        state = _mix(state + np.asarray(epoch).astype(np.uint64) * np.uint64(0xD1B54A32D192ED03))
        return _mix(state + index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def uniform(
    index: NDArray[np.int64],
    *,
    seed: int,
    epoch: int | NDArray[np.int64],
    stream: int,
    copy: int | NDArray[np.int64] = 0,
) -> NDArray[np.float64]:
    """One number in [0, 1) per sample index: the leading 53 of its ``hashed`` bits."""
    bits = hashed(index, seed=seed, epoch=epoch, stream=stream, copy=copy)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(z: np.uint64 | NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = np.asarray(z, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class TrainBatches(Sampler[list[Item]]):
    """One rank's micro-batches of an epoch. Optimizer step s takes entries [s B, (s + 1) B) of the epoch's stream.

    The stream is the canonical order with each sample ``repeat`` times in a row. B is the GLOBAL batch; micro-batches and
    ranks cut it in order, so 1 rank with accumulation 2 and 2 ranks see the same samples in each step. The tail that does
    not fill a global batch is dropped (another one in every epoch), and with ``repeat`` what does not fit in N // B steps.

    Inside a global batch the first copies come first, then the second ones: images are mixed with their neighbours, and
    those are different samples wherever B is at least twice ``repeat``.

    ``start`` is (epoch, micro-batches of that epoch that were taken already), for a run that is resumed inside an epoch.
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
        repeat: int = 1,
        start: tuple[int, int] = (0, 0),
        repeat_first_epoch: bool = False,
    ) -> None:
        assert batch_size % (accumulate * world_size) == 0, "derive the micro-batch with micro_batches first"
        self.num_samples, self.batch_size, self.accumulate = num_samples, batch_size, accumulate
        self.rank, self.world_size, self.seed, self.repeat = rank, world_size, seed, repeat
        self.start, self.repeat_first_epoch = start, repeat_first_epoch
        # NOTE: worker processes are fed before the training loop calls set_epoch, so the first epoch must be right already.
        self.epoch = start[0]

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        # NOTE: of the full epoch, also where ``start`` skips some: the training loop counts from what it took before.
        return self.num_samples // self.batch_size * self.accumulate

    def __iter__(self) -> Iterator[list[Item]]:
        taken = self.start[1] if self.epoch == self.start[0] else 0
        epoch = 0 if self.repeat_first_epoch else self.epoch
        order = epoch_order(self.num_samples, seed=self.seed, epoch=epoch)
        stream = np.arange(self.num_samples // self.batch_size * self.batch_size).reshape(-1, self.batch_size)
        by_copy = np.argsort(stream % self.repeat, axis=1, kind="stable")  # without repeats: as they are
        entries = np.take_along_axis(stream, by_copy, axis=1)
        cut = (-1, self.world_size, self.batch_size // (self.accumulate * self.world_size))
        indices, copies, places = (
            values.reshape(cut)[taken:, self.rank]
            for values in (order[entries // self.repeat], entries % self.repeat, stream)
        )
        for index, copy, place in zip(indices, copies, places, strict=True):
            yield [(epoch, *item) for item in zip(index.tolist(), copy.tolist(), place.tolist(), strict=True)]


class EvalBatches(Sampler[list[Item]]):
    """One rank's batches for evaluation: every sample exactly once over all ranks.

    The batches are the same on any number of ranks, and so is what each of them gives, to the last bit: batch b is samples
    [b E, (b + 1) E), the last one may be short, and rank r takes those with b % world_size == r. A rank that has one fewer
    gets a blank image (FILLER), so that all of them take part in each collective.
    """

    def __init__(self, num_samples: int, *, batch_size: int, rank: int, world_size: int) -> None:
        self.num_samples, self.batch_size, self.rank, self.world_size = num_samples, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Item]]:
        for turn in range(len(self)):
            first = (turn * self.world_size + self.rank) * self.batch_size
            indices = range(first, min(first + self.batch_size, self.num_samples)) or (FILLER,)
            yield [(0, index, 0, 0) for index in indices]
