"""The order of samples and the random draws of augmentation, as functions of (seed, epoch, sample index, copy) alone.

Neither depends on the number of workers or ranks, on batch boundaries, or on where a run was stopped and resumed: the
canonical order of an epoch is one permutation, cut by global optimizer step; a draw is a hash, not the state of a generator.

Repeated augmentation (arXiv:1901.09335) as DeiT runs it (arXiv:2012.12877): each chosen sample comes several times in a
row, an epoch has as many steps as without. Where we differ: here it is the same in a single process, whose sampler in the
published code is a plain one.

Where files have to be fetched whole (shards on a server), the order is a shuffle within windows of files: the files in random
order, some tens of thousands of samples of them at a time shuffled together. It is one permutation all the same, so
everything else holds for it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from eit_lab.data.batch import FILLER
from eit_lab.plan import count_tail_batches

Item = tuple[int, int, int, int]
"""(epoch, sample index, copy, place in the epoch's order): all of it travels, so a worker process needs no state."""

_COPY_STREAMS = 1000  # streams of one copy of a sample; those of copy 0 are the streams themselves


@dataclass(frozen=True)
class Windows:
    """A shuffle that goes through its files window by window."""

    file: NDArray[np.int64]
    """(num_samples,) number of the file that each sample lies in."""
    size: int
    """Samples, at least, that are shuffled together; a window ends where a file does, the last one may be smaller."""

    def files_in_turn(self, *, seed: int, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(files in the order of an epoch, the window of each), the same files whichever rank asks."""
        counts = np.bincount(self.file)
        files = np.flatnonzero(counts)
        turn = files[_generator(seed, epoch, stream=1).permutation(len(files))]
        window, held, windows = 0, 0, []
        for count in counts[turn].tolist():
            if held >= self.size:
                window, held = window + 1, 0
            windows.append(window)
            held += count
        return turn, np.array(windows)

    def of_files(self, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """(files,) the window of each file, by its number."""
        files, window = self.files_in_turn(seed=seed, epoch=epoch)
        windows = np.zeros(int(self.file.max()) + 1, dtype=np.int64)
        windows[files] = window
        return windows


def epoch_order(num_samples: int, *, seed: int, epoch: int, windows: Windows | None = None) -> NDArray[np.int64]:
    """The canonical order of one epoch: a permutation of range(num_samples)."""
    order = _generator(seed, epoch).permutation(num_samples)
    if windows is None:
        return order
    window = windows.of_files(seed=seed, epoch=epoch)[windows.file[order]]
    return order[np.argsort(window, kind="stable")]


def _generator(seed: int, epoch: int, *, stream: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=(stream << 64) + (seed << 32) + epoch))


def held_out(
    num_samples: int,
    num_val: int,
    *,
    split_seed: int,
    num_train: int | None = None,
    file: NDArray[np.int64] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(train indices, held-out indices), both sorted: the same slice for every training seed.

    With ``file``, the file of each sample, whole files are held out, and one in part: so that an evaluation between two
    epochs need not fetch all of them. ``num_train`` (all, where it is None) of the others are trained on, drawn image by image
    whatever their files are, since a file can hold one class only; fewer are a part of more.
    """
    shuffled = np.random.Generator(np.random.Philox(key=split_seed)).permutation(num_samples)
    order = shuffled
    if file is not None:
        files = np.random.Generator(np.random.Philox(key=(1 << 64) + split_seed)).permutation(int(file.max()) + 1)
        order = order[np.argsort(np.argsort(files)[file[order]], kind="stable")]
    is_val = np.zeros(num_samples, dtype=bool)
    is_val[order[:num_val]] = True
    return np.sort(shuffled[~is_val[shuffled]][:num_train]), np.flatnonzero(is_val)


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

    With ``keep_tail`` the tail is one more, shorter step. Every rank gets as many micro-batches of it; where there are not
    enough samples, a rank gets the epoch's first one (``pair``: two) again, its place FILLER, which the loss leaves out.

    Inside a global batch the first copies come first, then the second ones: images are mixed with their neighbours, and
    those are different samples wherever B is at least twice ``repeat``. With ``pair`` neighbours stay on one rank.

    ``on_window`` hears (epoch, window) of what is handed out, ahead of its being read.

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
        keep_tail: bool = False,
        pair: bool = False,
        windows: Windows | None = None,
        on_window: Callable[[int, int], None] | None = None,
        start: tuple[int, int] = (0, 0),
        repeat_first_epoch: bool = False,
    ) -> None:
        assert batch_size % (accumulate * world_size) == 0, "derive the micro-batch with micro_batches first"
        self.num_samples, self.batch_size, self.accumulate = num_samples, batch_size, accumulate
        self.rank, self.world_size, self.seed, self.repeat = rank, world_size, seed, repeat
        self.group, self.windows, self.on_window = 2 if pair else 1, windows, on_window
        self.tail = num_samples % batch_size if keep_tail else 0
        self.start, self.repeat_first_epoch = start, repeat_first_epoch
        # NOTE: worker processes are fed before the training loop calls set_epoch, so the first epoch must be right already.
        self.epoch = start[0]

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        # NOTE: of the full epoch, also where ``start`` skips some: the training loop counts from what it took before.
        return self.num_samples // self.batch_size * self.accumulate + self.tail_batches

    @property
    def micro_batch(self) -> int:
        """Images of one rank at once."""
        return self.batch_size // (self.accumulate * self.world_size)

    @property
    def tail_batches(self) -> int:
        """Micro-batches of the last, shorter step of one rank; 0 where there is none."""
        return count_tail_batches(self.tail, micro_batch=self.micro_batch, world_size=self.world_size, group=self.group)

    def __iter__(self) -> Iterator[list[Item]]:
        taken = self.start[1] if self.epoch == self.start[0] else 0
        epoch = 0 if self.repeat_first_epoch else self.epoch
        windows = None if self.windows is None else self.windows.of_files(seed=self.seed, epoch=epoch)
        for index, copy, place in self.batches(epoch, taken=taken):
            if self.windows is not None and windows is not None and self.on_window is not None:
                self.on_window(epoch, int(windows[self.windows.file[index]].max()))
            yield [(epoch, *item) for item in zip(index.tolist(), copy.tolist(), place.tolist(), strict=True)]

    def batches(self, epoch: int, *, taken: int = 0) -> Iterator[tuple[NDArray[np.int64], ...]]:
        """(sample index, copy, place), each of (micro_batch,), of this rank's micro-batches from number ``taken`` on."""
        order = epoch_order(self.num_samples, seed=self.seed, epoch=epoch, windows=self.windows)
        whole = self.num_samples // self.batch_size * self.batch_size
        stream = np.arange(whole).reshape(-1, self.batch_size)
        by_copy = np.argsort(stream % self.repeat, axis=1, kind="stable")  # without repeats: as they are
        entries = np.take_along_axis(stream, by_copy, axis=1)
        cut = (-1, self.world_size, self.micro_batch)
        rows = [
            values.reshape(cut)[taken:, self.rank]
            for values in (order[entries // self.repeat], entries % self.repeat, stream)
        ]
        yield from zip(*rows, strict=True)
        if self.tail:
            places = np.arange(whole, self.num_samples)
            entries = places[np.argsort(places % self.repeat, kind="stable")]
            for where in self._tail_cut()[max(0, taken - whole // self.batch_size * self.accumulate) :]:
                filler = where < 0
                entry = np.where(filler, np.arange(len(where)), entries[where])
                yield order[entry // self.repeat], entry % self.repeat, np.where(filler, FILLER, places[where])

    def share(self, epoch: int) -> tuple[int, int, int]:
        """(micro-batches, samples, sum of their hashes) of this rank: what ``whole`` says of all ranks together."""
        batches, samples, total = 0, 0, 0
        for index, copy, place in self.batches(epoch):
            real = place != FILLER
            batches, samples = batches + 1, samples + int(real.sum())
            total += _sum_of_hashes(index[real], copy[real])
        return batches, samples, total % 2**64

    def whole(self, epoch: int) -> tuple[int, int]:
        """(samples, sum of their hashes) that an epoch must have over all ranks, each once."""
        count = self.num_samples - (0 if self.tail else self.num_samples % self.batch_size)
        entries = np.arange(count)
        order = epoch_order(self.num_samples, seed=self.seed, epoch=epoch, windows=self.windows)
        return count, _sum_of_hashes(order[entries // self.repeat], entries % self.repeat) % 2**64

    def _tail_cut(self) -> list[NDArray[np.int64]]:
        """Places in the tail of each of this rank's micro-batches of it; FILLER where there is nothing left."""
        first = np.arange(0, self.tail, self.group)
        mine = np.array_split(first, self.world_size)[self.rank]
        parts = [np.add.outer(part, np.arange(self.group)).ravel() for part in np.array_split(mine, self.tail_batches)]
        return [part[part < self.tail] if len(part) else np.full(self.group, FILLER) for part in parts]


def _sum_of_hashes(index: NDArray[np.int64], copy: NDArray[np.int64]) -> int:
    return int(hashed(index, seed=0, epoch=0, copy=copy, stream=0).sum(dtype=np.uint64))


class EvalBatches(Sampler[list[Item]]):
    """One rank's batches for evaluation: every sample exactly once over all ranks.

    The batches are the same on any number of ranks, and so is what each of them gives, to the last bit: batch b is samples
    [b E, (b + 1) E), the last one may be short, and rank r takes those with b % world_size == r. A rank that has one fewer
    gets a blank image (FILLER), so that all of them take part in each collective.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        order: NDArray[np.int64] | None = None,
    ) -> None:
        """``order`` (num_samples or more,): the samples' indices, where they are not taken as they are numbered."""
        self.num_samples, self.batch_size, self.rank, self.world_size = num_samples, batch_size, rank, world_size
        self.order = order

    def __len__(self) -> int:
        return -(-self.num_samples // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Item]]:
        for turn in range(len(self)):
            first = (turn * self.world_size + self.rank) * self.batch_size
            end = min(first + self.batch_size, self.num_samples)
            places: Sequence[int] = range(first, end) if self.order is None else self.order[first:end].tolist()
            yield [(0, index, 0, 0) for index in places or (FILLER,)]


def fixed_order(num_samples: int, *, seed: int) -> NDArray[np.int64]:
    """A permutation of a part's samples that only its size and ``seed`` decide: the order of every analysis.

    Neighbours are of any class then, and the first n are a fair subset, the same for all arms and training seeds.
    """
    return np.random.default_rng(seed).permutation(num_samples)
