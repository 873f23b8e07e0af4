"""How long an all-reduce takes, in closed form: a latency for each hop in turn, and bytes over bandwidth. No torch.

Sources: the ring of Patarasuk and Yuan (2009) sends 2 (n - 1) / n of the data from each rank; how NCCL adds up latencies and picks
the fastest is its own tuning model (src/graph/tuning.cc); gloo's ring for a few bytes is read from its source
(gloo/allreduce.cc). NCCL's ring goes through the GPUs of a machine and on to the next one, on as many channels as there are
network cards, so what leaves a machine leaves through all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2
from typing import Literal

from eit_lab.benchmark.scaling.cluster import Cluster, Group

Algorithm = Literal["ring", "tree", "hierarchical"]
OFFERED: tuple[Algorithm, ...] = ("ring", "tree")
"""What NCCL has on such machines, and chooses from; switches that add up by themselves (NVLS, SHARP) are left out."""


@dataclass(frozen=True)
class Hop:
    """One message from a rank to the next: ``latency_s`` until it is there, ``hold_s`` in which its link sends nothing else."""

    latency_s: float
    hold_s: float

    @property
    def seconds(self) -> float:
        """From the first byte sent to the last one received."""
        return self.latency_s + self.hold_s


@dataclass(frozen=True)
class Hops:
    """The hops of one algorithm at one size: inside a machine, and between two."""

    inside: Hop
    between: Hop
    chunks: int = 1
    """Pieces that follow each other over a hop."""


def bytes_sent(num_bytes: float, num: int) -> float:
    """By each rank of a ring all-reduce of ``num_bytes`` over ``num`` ranks."""
    return 2 * (num - 1) / num * num_bytes


def ring_hops(num_bytes: float, group: Group, cluster: Cluster) -> Hops:
    """Each message is a share of 1 / ranks; between machines it leaves through all network cards."""
    share = num_bytes / group.gpus / cluster.protocol_share
    return Hops(
        Hop(cluster.nvlink_ring_s, share / cluster.nvlink_bps),
        Hop(cluster.nic_ring_s, share / (cluster.nic_bps * group.local)),
    )


def ring(num_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds of NCCL's ring: 2 (n - 1) messages one after the other, at the pace of the slowest link."""
    if group.gpus == 1:
        return 0.0
    hops = ring_hops(num_bytes, group, cluster)
    between = _crossings(group)
    inside = 2 * (group.gpus - 1) - between
    pace = max(hop.hold_s for hop, count in ((hops.inside, inside), (hops.between, between)) if count)
    latency = inside * hops.inside.latency_s + between * hops.between.latency_s
    return cluster.collective_s + latency + 2 * (group.gpus - 1) * pace


def _crossings(group: Group) -> int:
    """Of 2 (n - 1) hops of a ring in a row, the most that lead to another machine: all of two laps but for two hops in a row."""
    if group.nodes == 1:
        return 0
    return 2 * group.nodes - max(0, 3 - group.local)


def tree_depth(nodes: int) -> int:
    """Hops from the farthest machine to the root of a binary tree."""
    return int(log2(nodes))


def tree_hops(num_bytes: float, group: Group, cluster: Cluster) -> Hops:
    """Two trees with half of the data each, in which a machine that is inside one is a leaf of the other.

    What leaves a machine is then four streams at most (of both trees up and down), each with a quarter of the bandwidth, and so is
    what leaves a GPU inside it, where GPUs are in a row.
    """
    chunks = max(1, ceil(num_bytes / 2 / cluster.tree_chunk_bytes))
    chunk = num_bytes / 2 / chunks / cluster.protocol_share
    return Hops(
        Hop(cluster.nvlink_tree_s, chunk / (cluster.nvlink_bps / 4)),
        Hop(cluster.nic_tree_s, chunk / (cluster.nic_bps * group.local / 4)),
        chunks,
    )


def tree(num_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds of NCCL's double binary tree: up along the longest path and down again, the pieces behind each other."""
    if group.gpus == 1:
        return 0.0
    hops, depth = tree_hops(num_bytes, group, cluster), tree_depth(group.nodes)
    inside = group.local - 1
    pace = max(hop.hold_s for hop, count in ((hops.inside, inside), (hops.between, depth)) if count)
    path = 2 * (inside * hops.inside.seconds + depth * hops.between.seconds)
    return cluster.collective_s + path + (hops.chunks - 1) * pace


def hierarchical_hops(num_bytes: float, group: Group, cluster: Cluster) -> Hops:
    """Inside a machine a share of 1 / GPUs of the machine a message; between machines 1 / ranks, through one's own card."""
    return Hops(
        Hop(cluster.nvlink_ring_s, num_bytes / group.local / cluster.protocol_share / cluster.nvlink_bps),
        Hop(cluster.nic_ring_s, num_bytes / group.gpus / cluster.protocol_share / cluster.nic_bps),
    )


def hierarchical(num_bytes: float, group: Group, cluster: Cluster) -> float:
    """Seconds of reduce-scatter inside the machines, a ring across them for each GPU's share, and all-gather inside."""
    if group.gpus == 1:
        return 0.0
    hops = hierarchical_hops(num_bytes, group, cluster)
    inside, between = 2 * (group.local - 1), 2 * (group.nodes - 1)
    return cluster.collective_s + inside * hops.inside.seconds + between * hops.between.seconds


_SECONDS = {"ring": ring, "tree": tree, "hierarchical": hierarchical}


def all_reduce(num_bytes: float, group: Group, cluster: Cluster, *, algorithm: Algorithm) -> float:
    """Seconds of one algorithm; 0 on a single GPU."""
    return _SECONDS[algorithm](num_bytes, group, cluster)


def fastest(num_bytes: float, group: Group, cluster: Cluster) -> Algorithm:
    """As NCCL chooses: by its model, not by trying."""
    return min(OFFERED, key=lambda one: all_reduce(num_bytes, group, cluster, algorithm=one))


def agreement(group: Group, cluster: Cluster) -> float:
    """Seconds of gloo's all-reduce of a few bytes: its ring passes them through all ranks, twice, one hop after the other."""
    return _hosts_hops(2 * (group.gpus - 1), 2 * group.nodes - 1, group, cluster)


def agreement_behind(group: Group, cluster: Cluster) -> float:
    """Seconds of one more right behind another: the sum of the first goes around as the ranks' values of the second do."""
    return _hosts_hops(group.gpus, group.nodes, group, cluster)


def _hosts_hops(hops: int, between: int, group: Group, cluster: Cluster) -> float:
    if group.gpus == 1:
        return 0.0
    between = min(between, hops) if group.nodes > 1 else 0
    return between * cluster.tcp_s + (hops - between) * cluster.tcp_local_s
