"""The same machine, step by step: when each rank sends and receives each message, with ranks that differ. No torch.

Nothing of the closed form is used but the latency and the bytes of a single hop. Every rank has a loader whose workers make a batch
each and stay ``prefetch`` batches ahead, a compute time of its own in each step, buckets that become ready on the way, a stream
that all-reduces them in order, and the hosts' agreements; a message leaves when its data is there and its link is free.

Times are arrays over ranks, one operation for a message of all ranks: 1024 ranks take seconds. ``events`` handles one message
at a time from a queue and gives the same times; it is what this module is held against.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eit_lab.benchmark.scaling.cluster import Cluster, Group
from eit_lab.benchmark.scaling.collectives import (
    Algorithm,
    Hop,
    fastest,
    hierarchical_hops,
    ring_hops,
    tree_depth,
    tree_hops,
)
from eit_lab.benchmark.scaling.model import passes
from eit_lab.benchmark.scaling.workload import Workload

Times = NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """What chance decides: the same for whoever simulates."""

    compute: Times
    """(steps, ranks) factor of a rank's compute time."""
    batch: Times
    """(steps, ranks) seconds in which a worker makes the rank's batch of a step."""


@dataclass(frozen=True)
class Simulated:
    """Of the steps after those in which the loader's first batches are used up."""

    step_s: float
    """Mean over the steps counted."""
    steps: int
    """Counted."""
    ends: Times
    """(steps, ranks) when each rank has ended each step, from the first one."""


def draw(cluster: Cluster, *, gpus: int, images: int, steps: int, seed: int) -> Draws:
    """Factors and seconds of every step and rank: lognormal, of the means and spreads that the cluster says."""
    generator = np.random.Generator(np.random.Philox(seed))

    def lognormal(spread: float) -> Times:
        sigma = np.sqrt(np.log1p(spread**2))
        drawn: Times = np.exp(sigma * generator.standard_normal((steps, gpus)) - sigma**2 / 2)
        return drawn

    compute = lognormal(cluster.jitter)
    batch = images / cluster.core_images_per_s * lognormal(cluster.image_spread / np.sqrt(images))
    return Draws(compute, batch)


def warm_up(cluster: Cluster) -> int:
    """Steps until the batches made before the first step are used up, and as many again."""
    return 2 * cluster.prefetch * cluster.workers


def simulate(
    workload: Workload,
    cluster: Cluster,
    *,
    gpus: int,
    images: int,
    steps: int,
    seed: int = 0,
    algorithm: Algorithm | None = None,
) -> Simulated:
    """``steps`` steps after the warm-up, of ``gpus`` ranks with ``images`` each; ``algorithm`` instead of NCCL's choice."""
    before = warm_up(cluster)
    draws = draw(cluster, gpus=gpus, images=images, steps=before + steps, seed=seed)
    group, alone = Group(gpus, cluster.gpus_per_node), passes(workload, cluster, images=images)
    free = np.zeros(gpus)
    taken: list[Times] = []
    made: list[Times] = []
    ends = np.empty((before + steps, gpus))
    reduces = [all_reduces(bucket.num_bytes, group, cluster, algorithm=algorithm) for bucket in workload.buckets]
    for number in range(before + steps):
        # The worker was asked for this batch when an earlier one was taken, and has made those before it.
        asked = number - cluster.prefetch * cluster.workers
        begun = taken[asked] if asked >= 0 else np.zeros(gpus)
        if number >= cluster.workers:
            begun = np.maximum(begun, made[number - cluster.workers])
        made.append(begun + draws.batch[number])
        taken.append(np.maximum(free, made[-1]))
        forward, backward = alone.forward * draws.compute[number], alone.backward * draws.compute[number]
        end = taken[-1] + forward + backward
        if gpus > 1:
            done = np.zeros(gpus)
            for bucket, reduce in zip(workload.buckets, reduces, strict=True):
                ready = taken[-1] + forward + bucket.ready_share * backward
                done = reduce(np.maximum(done, ready))
            end = np.maximum(end, done)
        if cluster.agreements:
            end = agree(end, group, cluster)
        updated = end + alone.optimizer
        for _ in range(cluster.agreements - 1):
            end = agree(end, group, cluster)
        free = np.maximum(updated, end) + cluster.host_step_s
        ends[number] = free
    last = ends.max(axis=1)
    return Simulated(float(last[-1] - last[before - 1]) / steps, steps, ends)


# --------------------------------------------------------------------------------------------------------- all-reduces


def all_reduces(
    num_bytes: float, group: Group, cluster: Cluster, *, algorithm: Algorithm | None = None
) -> Callable[[Times], Times]:
    """(ranks,) when each has its gradients ready -> (ranks,) when each has the sum, as NCCL would choose or as told."""
    chosen = ALGORITHMS[algorithm or fastest(num_bytes, group, cluster)]
    return lambda ready: chosen(ready + cluster.collective_s, num_bytes, group, cluster)


def ring(ready: Times, num_bytes: float, group: Group, cluster: Cluster) -> Times:
    """All ranks in one ring, machine after machine: 2 (n - 1) messages of each."""
    hops = ring_hops(num_bytes, group, cluster)
    to_next = np.arange(group.gpus) % group.local == group.local - 1 if group.nodes > 1 else np.zeros(group.gpus, bool)
    hold = np.where(to_next, hops.between.hold_s, hops.inside.hold_s)
    latency = np.where(to_next, hops.between.latency_s, hops.inside.latency_s)
    return _around(ready, hold, latency, messages=2 * (group.gpus - 1))


def hierarchical(ready: Times, num_bytes: float, group: Group, cluster: Cluster) -> Times:
    """Reduce-scatter in each machine, a ring across machines for each of its GPUs, all-gather in each machine."""
    hops = hierarchical_hops(num_bytes, group, cluster)

    def within(times: Times) -> Times:
        return _around(times, hops.inside.hold_s, hops.inside.latency_s, messages=group.local - 1)

    times = within(ready.reshape(group.nodes, group.local))
    across = _around(times.T, hops.between.hold_s, hops.between.latency_s, messages=2 * (group.nodes - 1))
    return within(across.T).ravel()


def _around(ready: Times, hold: Times | float, latency: Times | float, *, messages: int) -> Times:
    """Rings along the last axis: each rank sends to the next one what it has, then what it got, ``messages`` in all.

    A rank has done when the last message is there and its own last one is sent.
    """
    has, link_free = ready, np.zeros_like(ready)
    for _ in range(messages):
        link_free = np.maximum(has, link_free) + hold
        has = np.maximum(np.roll(link_free + latency, 1, axis=-1), ready)
    return np.maximum(has, link_free)


def tree(ready: Times, num_bytes: float, group: Group, cluster: Cluster) -> Times:
    """Two binary trees over the machines, half of the data each, in pieces; in a machine the GPUs hand on in a row."""
    times = ready.reshape(group.nodes, group.local)
    hops = tree_hops(num_bytes, group, cluster)
    one = _tree(times, hops.inside, hops.between, hops.chunks)
    other = _tree(times[::-1], hops.inside, hops.between, hops.chunks)[::-1]
    return np.maximum(one, other).ravel()


def _tree(ready: Times, inside: Hop, between: Hop, chunks: int) -> Times:
    """(machines, GPUs) ready -> when each has the last piece; machine i's parent is (i - 1) // 2, GPU 0 is its machine's head."""
    nodes, local = ready.shape
    has = np.repeat(ready[:, -1:], chunks, axis=1)  # (machines, pieces) at the end of the row
    for place in range(local - 2, -1, -1):
        has = np.maximum(_sent(has, inside), ready[:, place, None])
    levels = [np.arange(2**depth - 1, min(2 ** (depth + 1) - 1, nodes)) for depth in range(tree_depth(nodes) + 1)]
    for level in levels[:0:-1]:
        arrived = _sent(has[level], between)
        np.maximum.at(has, (level - 1) // 2, arrived)
    for level in levels[1:]:
        has[level] = _sent(has[(level - 1) // 2], between)
    ends = np.empty((nodes, local))
    for place in range(local):
        ends[:, place] = has[:, -1]
        has = _sent(has, inside)
    return ends


def _sent(ready: Times, hop: Hop) -> Times:
    """(..., pieces) when each piece can be sent -> when it has arrived: pieces leave in order, one at a time."""
    before = np.arange(ready.shape[-1]) * hop.hold_s
    left: Times = np.maximum.accumulate(ready - before, axis=-1) + before + hop.hold_s
    return left + hop.latency_s


ALGORITHMS: dict[Algorithm, Callable[[Times, float, Group, Cluster], Times]] = {
    "ring": ring,
    "tree": tree,
    "hierarchical": hierarchical,
}


# --------------------------------------------------------------------------------------------------------------- hosts


def agree(ready: Times, group: Group, cluster: Cluster) -> Times:
    """What gloo does with a few bytes: from the last rank down to the first, each adding its own; then the sum down once more."""
    if group.gpus == 1:
        return ready
    node = np.arange(group.gpus) // group.local
    down = np.where(node[1:] == node[:-1], cluster.tcp_local_s, cluster.tcp_s)[::-1]  # rank n - 1 to n - 2, ..., 1 to 0
    back = cluster.tcp_local_s if group.nodes == 1 else cluster.tcp_s  # rank 0 to n - 1
    travelled = np.concatenate([[0.0], np.cumsum(down)])
    summed = np.max(ready[::-1] - travelled) + travelled[-1]  # at rank 0
    ends = np.empty(group.gpus)
    ends[0] = summed
    ends[:0:-1] = summed + back + travelled[:-1]
    return ends
