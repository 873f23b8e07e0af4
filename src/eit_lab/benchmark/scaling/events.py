"""The simulated machine once more, one event at a time from a queue: slow, plain, and what ``simulation`` is held against. No torch.

Ranks, their loader workers, their communication streams and the messages on the way are processes that sleep until a time or until
something has happened. Rings only. Nothing is shared with ``simulation`` but what chance draws, so that two programs agree.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator
from itertools import count

from eit_lab.benchmark.scaling.cluster import Cluster, Group
from eit_lab.benchmark.scaling.collectives import ring_hops
from eit_lab.benchmark.scaling.model import passes
from eit_lab.benchmark.scaling.simulation import Draws
from eit_lab.benchmark.scaling.workload import Workload


class Happening:
    """Something that happens once."""

    def __init__(self) -> None:
        self.happened = False
        self.waiting: list[Process] = []


Process = Generator[float | Happening, None, None]
"""Yields the time until which it sleeps, in seconds, or the happening that it waits for."""


class Queue:
    """Wakes processes in the order of their times."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0
        self._due: list[tuple[float, int, Process]] = []
        self._numbers = count()

    def start(self, process: Process, *, at: float = 0.0) -> None:
        """Wake a process at a time; of two at the same time the one that was started first."""
        heapq.heappush(self._due, (at, next(self._numbers), process))

    def tell(self, happening: Happening) -> None:
        """It happens now: all who wait go on."""
        happening.happened = True
        for process in happening.waiting:
            self.start(process, at=self.now)
        happening.waiting.clear()

    def deliver(self, happening: Happening, *, at: float) -> None:
        """It will happen at a time: a message is on its way."""

        def message() -> Process:
            self.tell(happening)
            yield from ()

        self.start(message(), at=at)

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._due:
            self.now, _, process = heapq.heappop(self._due)
            self.events += 1
            for wanted in process:
                if isinstance(wanted, Happening):
                    if wanted.happened:
                        continue
                    wanted.waiting.append(process)
                elif wanted <= self.now:
                    continue
                else:
                    self.start(process, at=wanted)
                break


class _Many:
    """Happenings by name, made when they are first asked for."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Happening] = {}

    def __call__(self, *name: object) -> Happening:
        return self._made.setdefault(name, Happening())


class Machine:
    """Every rank of a training and what belongs to it, for as many steps as were drawn."""

    def __init__(self, workload: Workload, cluster: Cluster, draws: Draws, *, gpus: int, images: int) -> None:
        self.workload, self.cluster, self.draws = workload, cluster, draws
        self.group = Group(gpus, cluster.gpus_per_node)
        self.passes = passes(workload, cluster, images=images)
        self.steps = len(draws.compute)
        self.queue = Queue()
        self.ends = [[0.0] * gpus for _ in range(self.steps)]
        """When each rank has ended each step."""
        self.bytes_sent = [0.0] * gpus
        """By each rank, of gradients."""
        self._what = _Many()

    def run(self) -> list[list[float]]:
        """(steps, ranks) seconds when each rank has ended each step."""
        for rank in range(self.group.gpus):
            self.queue.start(self._train(rank))
            self.queue.start(self._stream(rank))
            for worker in range(self.cluster.workers):
                self.queue.start(self._load(rank, worker))
        self.queue.run()
        return self.ends

    def _load(self, rank: int, worker: int) -> Process:
        """One worker: every so-manieth batch, as soon as it is asked for."""
        workers = self.cluster.workers
        for number in range(worker, self.steps, workers):
            if (asked := number - self.cluster.prefetch * workers) >= 0:
                yield self._what("taken", rank, asked)
            yield self.queue.now + float(self.draws.batch[number, rank])
            self.queue.tell(self._what("made", rank, number))

    def _train(self, rank: int) -> Process:
        """The rank itself."""
        queue, what, alone, buckets = self.queue, self._what, self.passes, self.workload.buckets
        for number in range(self.steps):
            yield what("made", rank, number)
            queue.tell(what("taken", rank, number))
            factor = float(self.draws.compute[number, rank])
            forward = queue.now + factor * alone.forward
            for place, bucket in enumerate(buckets):
                yield forward + bucket.ready_share * factor * alone.backward
                queue.tell(what("ready", rank, number, place))
            yield forward + factor * alone.backward
            if self.group.gpus > 1:
                yield what("summed", rank, number, len(buckets) - 1)
            updated = queue.now + alone.optimizer
            for place in range(self.cluster.agreements):
                yield from self._agree(rank, (number, place))
                if place == 0:
                    updated = queue.now + alone.optimizer
            yield max(updated, queue.now) + self.cluster.host_step_s
            self.ends[number][rank] = queue.now

    def _stream(self, rank: int) -> Process:
        """All-reduces, one after the other."""
        if self.group.gpus == 1:
            return
        for number in range(self.steps):
            for place, bucket in enumerate(self.workload.buckets):
                yield self._what("ready", rank, number, place)
                yield self.queue.now + self.cluster.collective_s
                yield from self._ring(rank, bucket.num_bytes, (number, place))
                self.queue.tell(self._what("summed", rank, number, place))

    def _ring(self, rank: int, num_bytes: float, name: tuple[int, int]) -> Process:
        hops, ranks = ring_hops(num_bytes, self.group, self.cluster), self.group.gpus
        following = (rank + 1) % ranks
        hop = hops.inside if self._same_node(rank, following) else hops.between
        link_free = 0.0
        for message in range(2 * (ranks - 1)):
            link_free = max(self.queue.now, link_free) + hop.hold_s
            self.bytes_sent[rank] += num_bytes / ranks
            self.queue.deliver(self._what("message", following, name, message), at=link_free + hop.latency_s)
            yield self._what("message", rank, name, message)
        yield link_free

    def _agree(self, rank: int, name: tuple[int, int]) -> Process:
        """gloo: values are added up from the last rank down to the first; from there the sum goes around."""
        ranks = self.group.gpus
        if ranks == 1:
            return
        if rank != ranks - 1:
            yield self._what("values", rank, name)
        if rank > 0:
            self._pass_on(rank, rank - 1, "values", name)
            yield self._what("sum", rank, name)
        if rank != 1:
            self._pass_on(rank, (rank - 1) % ranks, "sum", name)

    def _pass_on(self, rank: int, to: int, what: str, name: tuple[int, int]) -> None:
        hop_s = self.cluster.tcp_local_s if self._same_node(rank, to) else self.cluster.tcp_s
        self.queue.deliver(self._what(what, to, name), at=self.queue.now + hop_s)

    def _same_node(self, one: int, other: int) -> bool:
        return one // self.group.local == other // self.group.local
