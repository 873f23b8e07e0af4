"""A training step, an epoch and a run on any number of GPUs, in closed form. No torch.

A step: the batch is there; forward and backward, at the pace of the slowest rank; buckets of gradients all-reduced one after the
other behind the backward pass; optimizer and average; some Python. Images come at the rate of the loader's cores, where that is slower.
Where hosts agree in a step (``Cluster.agreements``: as the loop once did), it waits for them before the optimizer, and once more
behind it. What the loop asks all hosts now comes back while it goes on.

The GLOBAL batch is the recipe's, so a GPU's share shrinks as GPUs are added (*strong* scaling: the same experiment, sooner). With
a fixed share the global batch grows (*weak* scaling): another experiment, which needs its own learning rate.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from math import ceil, log, sqrt
from typing import Any, Literal

import numpy as np

from eit_lab.benchmark.scaling.cluster import Cluster, Group
from eit_lab.benchmark.scaling.collectives import (
    Algorithm,
    agreement,
    agreement_behind,
    all_reduce,
    bytes_sent,
    fastest,
)
from eit_lab.benchmark.scaling.workload import OPTIMIZER_BYTES, Workload

Scaling = Literal["strong", "weak"]
BASE_GPUS = 8
"""One machine: what more GPUs are compared with."""
PAYS = 0.5
"""Efficiency from which on more GPUs pay: an epoch costs at most twice the GPU-hours that it costs on one machine."""
_OPERATIONS = 2  # of a multiply-accumulate


@dataclass(frozen=True)
class Passes:
    """Seconds of a rank alone, by the mean."""

    forward: float
    backward: float
    optimizer: float

    @property
    def compute(self) -> float:
        """What jitters from rank to rank."""
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of one optimizer step, by part; the parts add up to the step."""

    gpus: int
    images: int
    """Of one GPU."""
    compute: float
    """Forward and backward of an average rank."""
    stragglers: float
    """What the slowest rank takes longer."""
    exposed: float
    """All-reduce that goes on after the slowest rank's backward pass."""
    agreements: float
    """Hosts that wait for each other, the GPU idle."""
    update: float
    """Optimizer, averaged weights, Python between two steps."""
    loader_wait: float
    """Waiting for images, where the loader is slower than all the rest."""
    reduce: float
    """All of the all-reduce, hidden or not: no part of the sum."""
    algorithms: tuple[Algorithm, ...]
    """Of each bucket."""

    @property
    def parts(self) -> dict[str, float]:
        """What adds up to the step."""
        names = ("compute", "stragglers", "exposed", "agreements", "update", "loader_wait")
        return {name: getattr(self, name) for name in names}

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.parts.values())

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {**asdict(self), "seconds": self.seconds}


def passes(workload: Workload, cluster: Cluster, *, images: int) -> Passes:
    """Of one rank and its share of the batch: as long as its products take, or its operations, whichever is longer."""
    product_s = _OPERATIONS * workload.macs * images / (cluster.mfu * cluster.peak_flops)
    return Passes(
        forward=max(product_s, workload.forward_ops * cluster.op_s),
        backward=max(product_s * workload.backward_ratio, workload.backward_ops * cluster.op_s),
        optimizer=OPTIMIZER_BYTES * workload.params / cluster.memory_bps,
    )


@cache
def slowest(num: int, spread: float) -> float:
    """Expected largest of ``num`` independent lognormal times of mean 1 and standard deviation ``spread``."""
    if spread == 0 or num == 1:
        return 1.0
    from scipy.special import log_ndtr

    sigma = sqrt(log(1 + spread**2))
    # The integral of 1 - F(x)^n, in the logarithm of x: x = exp(sigma z - sigma^2 / 2), F = ndtr(z).
    z = np.linspace(-12, 12, 48_001)
    x = np.exp(sigma * z - sigma**2 / 2)
    above = -np.expm1(num * log_ndtr(z))
    return float(x[0] + np.trapezoid(above * x * sigma, z))


def strong_step(workload: Workload, cluster: Cluster, gpus: int) -> Step | None:
    """The recipe's own batch; None where it refuses so many GPUs."""
    images = workload.images_per_gpu[gpus]
    return None if images is None else step(workload, cluster, gpus=gpus, images=images)


def weak_step(workload: Workload, cluster: Cluster, gpus: int) -> Step:
    """Each GPU's share as on one machine: the global batch grows with the GPUs."""
    return step(workload, cluster, gpus=gpus, images=workload.batch_size // BASE_GPUS)


def step(workload: Workload, cluster: Cluster, *, gpus: int, images: int) -> Step:
    """One step of ``gpus`` ranks with ``images`` each."""
    group, alone = Group(gpus, cluster.gpus_per_node), passes(workload, cluster, images=images)
    factor = slowest(gpus, cluster.jitter)
    algorithms = tuple(fastest(bucket.num_bytes, group, cluster) for bucket in workload.buckets)
    reduces = [
        all_reduce(bucket.num_bytes, group, cluster, algorithm=algorithm)
        for bucket, algorithm in zip(workload.buckets, algorithms, strict=True)
    ]
    end = done = factor * alone.compute
    if gpus > 1:
        done = 0.0
        for bucket, seconds in zip(workload.buckets, reduces, strict=True):
            ready = factor * (alone.forward + bucket.ready_share * alone.backward)
            done = max(done, ready) + seconds
    exposed = max(0.0, done - end)
    waits = _agreements(group, cluster, optimizer=alone.optimizer)
    update = alone.optimizer + cluster.host_step_s
    busy = end + exposed + waits + update
    return Step(
        gpus=gpus,
        images=images,
        compute=alone.compute,
        stragglers=end - alone.compute,
        exposed=exposed,
        agreements=waits,
        update=update,
        loader_wait=max(0.0, images / loader_rate(cluster) - busy),
        reduce=sum(reduces),
        algorithms=algorithms,
    )


def question(workload: Workload, cluster: Cluster, one: Step) -> float:
    """What a question of all hosts takes on its way, over the time that it has until somebody looks: above 1, steps would wait."""
    steps = min(cluster.question_steps, max(1, ceil(cluster.question_s / one.seconds)))
    return agreement(Group(one.gpus, cluster.gpus_per_node), cluster) / (steps * one.seconds)


def _agreements(group: Group, cluster: Cluster, *, optimizer: float) -> float:
    """Seconds that agreements add to a step: the first before the optimizer, all others while it runs."""
    if cluster.agreements == 0:
        return 0.0
    behind = (cluster.agreements - 1) * agreement_behind(group, cluster)
    return agreement(group, cluster) + max(0.0, behind - optimizer)


# ----------------------------------------------------------------------------------------------------------- epochs, runs


def epoch_s(workload: Workload, cluster: Cluster, one: Step, *, scaling: Scaling = "strong") -> float:
    """Seconds of an epoch: steps, evaluation on the held-out slice, checkpoint, and the loader starting over."""
    steps = workload.steps_per_epoch
    if scaling == "weak":
        steps = steps * workload.batch_size // (one.gpus * one.images)
    return steps * one.seconds + between_epochs_s(workload, cluster, gpus=one.gpus)


def between_epochs_s(workload: Workload, cluster: Cluster, *, gpus: int) -> float:
    """Evaluation with the weights and with their average, a state written by one rank, the first batch of the next epoch."""
    batch = workload.eval_batch_size
    batches = ceil(ceil(workload.num_val / batch) / gpus)  # of the rank that has most
    forward = passes(workload, cluster, images=batch).forward
    loading = ceil(batches / cluster.workers) * batch / cluster.core_images_per_s  # a batch is one worker's work
    evaluation = max(loading + 2 * forward, 2 * batches * forward)
    return evaluation + workload.checkpoint_bytes / cluster.disk_bps + cluster.first_batch_s


def run_hours(workload: Workload, cluster: Cluster, one: Step) -> float:
    """Hours of a run of the recipe's epochs, its start included."""
    start = cluster.startup_s + one.gpus * cluster.startup_rank_s
    return (start + workload.epochs * epoch_s(workload, cluster, one)) / 3600


def efficiency(workload: Workload, cluster: Cluster, one: Step, *, scaling: Scaling = "strong") -> float:
    """GPU-seconds of an epoch on one machine over those on ``one.gpus`` GPUs."""
    step_of = strong_step(workload, cluster, BASE_GPUS)
    assert step_of is not None, "every recipe runs on one machine"
    base = BASE_GPUS * epoch_s(workload, cluster, step_of)
    return base / (one.gpus * epoch_s(workload, cluster, one, scaling=scaling))


@dataclass(frozen=True)
class Stop:
    """Where more GPUs stop paying, among those asked for."""

    pays_to: int
    """The most GPUs that keep an efficiency of PAYS."""
    fastest: int
    """The number of GPUs with the shortest epoch."""


def stop(workload: Workload, cluster: Cluster) -> Stop:
    """Of strong scaling."""
    steps = [
        found for num in workload.images_per_gpu if num >= BASE_GPUS and (found := strong_step(workload, cluster, num))
    ]
    pays = [one.gpus for one in steps if efficiency(workload, cluster, one) >= PAYS]
    return Stop(max(pays), min(steps, key=lambda one: epoch_s(workload, cluster, one)).gpus)


# ------------------------------------------------------------------------------------------------------- loader, network


def loader_rate(cluster: Cluster) -> float:
    """Images a second that the cores of one GPU give."""
    return cluster.workers * cluster.core_images_per_s


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """What a step's images need."""

    images_per_s: float
    """Taken by all GPUs, with cores enough."""
    cores_per_gpu: float
    """That give them."""
    in_place_bps: float
    """Read from shared storage where it is not cached: whole records; only decoding stops at the crop."""
    first_epoch_s: float
    """Until every machine has fetched its copy of the data set from a server, at the storage's bandwidth."""
    nic_bps: float
    """That each GPU sends for gradients, by its ring."""


def feeding(workload: Workload, cluster: Cluster, one: Step) -> Feeding:
    """Of one step, the loader not in its way; and of the first epoch from a server, into the caches of all machines."""
    from eit_lab.benchmark.scaling.workload import IMAGENET_TRAIN

    seconds = one.seconds - one.loader_wait
    rate = one.gpus * one.images / seconds
    nodes = Group(one.gpus, cluster.gpus_per_node).nodes
    return Feeding(
        images_per_s=rate,
        cores_per_gpu=rate / one.gpus / cluster.core_images_per_s,
        in_place_bps=rate * cluster.image_bytes,
        first_epoch_s=nodes * IMAGENET_TRAIN * cluster.image_bytes / cluster.storage_bps,
        nic_bps=bytes_sent(workload.gradient_bytes, one.gpus) / seconds,
    )


# ---------------------------------------------------------------------------------------------------------------- sweeps


@dataclass(frozen=True, kw_only=True)
class Width:
    """Several runs on a fixed number of GPUs, ``gpus`` each."""

    gpus: int
    run_hours: float
    """Of one run: when the first answers come."""
    all_hours: float
    """Until the last run has ended, as many at once as there is room for."""


def sweep(workload: Workload, cluster: Cluster, *, runs: int, total_gpus: int) -> list[Width]:
    """Every width that the workload was counted for, from one run a GPU to one run on all of them."""
    widths = []
    for gpus in sorted(workload.images_per_gpu):
        if total_gpus % gpus == 0 and (one := strong_step(workload, cluster, gpus)):
            hours = run_hours(workload, cluster, one)
            widths.append(Width(gpus=gpus, run_hours=hours, all_hours=ceil(runs * gpus / total_gpus) * hours))
    return widths
