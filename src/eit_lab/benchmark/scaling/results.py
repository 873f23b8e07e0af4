"""The model's numbers, the simulation beside them, and what this machine confirmed: as data for the record and its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from eit_lab.benchmark.scaling import simulation
from eit_lab.benchmark.scaling.cluster import Cluster, Group
from eit_lab.benchmark.scaling.collectives import Algorithm, agreement, all_reduce, bytes_sent
from eit_lab.benchmark.scaling.events import Machine
from eit_lab.benchmark.scaling.model import (
    BASE_GPUS,
    Feeding,
    Scaling,
    Step,
    Stop,
    Width,
    efficiency,
    epoch_s,
    feeding,
    question,
    run_hours,
    step,
    stop,
    strong_step,
    sweep,
    weak_step,
)
from eit_lab.benchmark.scaling.workload import BUCKET_BYTES, Workload

Advance = Callable[[str, int, int], None]

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
"""GPUs of one run, for sweeps on SWEEP_GPUS."""
SWEEP_GPUS, SWEEP_RUNS = 64, (8, 15)
ALGORITHMS: tuple[Algorithm, ...] = ("ring", "tree", "hierarchical")
_ETHERNET = {"nic_bps": 1.4e9, "nic_ring_s": 20e-6, "nic_tree_s": 40e-6}
AGREEING: Mapping[str, float] = {"agreements": 2}
"""Loss and norm before the optimizer, whether to stop after it: what the loop waited for in each step before it asked ahead."""
SCENARIOS: Mapping[str, Mapping[str, float]] = {
    "as above": {},
    "two agreements of the hosts in each step": AGREEING,
    "one agreement": {"agreements": 1},
    "two agreements, hosts' network twice as fast": {**AGREEING, "tcp_s": 25e-6, "tcp_local_s": 12.5e-6},
    "not compiled: 4.6% of the peak, 20 us an operation": {"mfu": 0.046, "op_s": 20e-6},
    "45% of the peak": {"mfu": 0.45},
    "45% of the peak, two agreements": {"mfu": 0.45, **AGREEING},
    "1 us an operation (CUDA graphs)": {"op_s": 1e-6},
    "Ethernet, 100 Gb/s a machine": _ETHERNET,
    "Ethernet, 100 Gb/s a machine, two agreements": {**_ETHERNET, **AGREEING},
    "spread of compute time 10%": {"jitter": 0.1},
}
"""Other values for what is assumed. 4.6%: the same source as for 22.9%, 1,608 images/s without torch.compile."""
STRESS_GPUS = (8, 64, 256)
_STRESS: Mapping[str, Mapping[str, float]] = {
    "nothing varies": {"jitter": 0.0, "image_spread": 0.0},
    "spread of compute time 3%": {},
    "10%": {"jitter": 0.1},
    "30%": {"jitter": 0.3},
    "30%, two agreements": {"jitter": 0.3, **AGREEING},
    "Ethernet, 100 Gb/s a machine": _ETHERNET,
}
_LOADERS: Mapping[str, float] = {
    "loader exactly as fast as the rest": 1.0,
    "loader 1.5 times as fast": 1.5,
    "loader 2 times as fast": 2.0,
}
"""The loader's rate over what the rest of a step takes."""
EVENT_STEPS, EVENT_GPUS = 4, (8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model on a number of GPUs."""

    model: str
    scaling: Scaling
    step: Step
    simulated_s: float
    """Of a step."""
    epoch_s: float
    efficiency: float
    efficiency_agreeing: float
    """If the hosts waited for each other twice in each step."""
    question: float
    """What a question of all hosts takes over the time it has."""
    run_hours: float | None
    """Of the recipe's epochs; None where the global batch is another one."""
    feeding: Feeding

    @property
    def error(self) -> float:
        """Of the closed form against the simulation, relative."""
        return self.step.seconds / self.simulated_s - 1

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {**asdict(self), "step": self.step.as_dict(), "error": self.error}


@dataclass(frozen=True)
class Stress:
    """The closed form against the simulation where it is hard."""

    what: str
    gpus: int
    closed_s: float
    simulated_s: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.closed_s / self.simulated_s - 1


@dataclass(frozen=True)
class Twice:
    """The two simulations of the same draws."""

    gpus: int
    events: int
    largest_difference: float
    """Of any rank's end of any step, relative to the end of all."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of it."""

    cluster: Cluster
    workloads: Sequence[Workload]
    gpus: Sequence[int]
    steps: int
    """Simulated of each row, after the warm-up."""
    seed: int
    rows: Sequence[Row]
    scenarios: Mapping[str, Mapping[str, Stop]]
    """By scenario, then model."""
    stress: Sequence[Stress]
    twice: Sequence[Twice]
    sweeps: Mapping[str, Mapping[int, Sequence[Width]]]
    """By model, then number of runs."""
    reality: Mapping[int, Sequence[Mapping[str, Any]]]
    """By number of processes, each rank's findings; empty where nothing was checked."""

    def of(self, model: str, scaling: Scaling) -> list[Row]:
        """Rows by number of GPUs."""
        return [row for row in self.rows if row.model == model and row.scaling == scaling]

    def reduces(self) -> list[dict[str, Any]]:
        """A full bucket on each number of GPUs: bytes that a rank sends, seconds of each algorithm; and of an agreement."""
        found = []
        for num in self.gpus:
            group = Group(num, self.cluster.gpus_per_node)
            seconds = {one: all_reduce(BUCKET_BYTES, group, self.cluster, algorithm=one) for one in ALGORITHMS}
            found.append(
                {
                    "gpus": num,
                    "bytes_sent": bytes_sent(BUCKET_BYTES, num),
                    "seconds": seconds,
                    "agreement_s": agreement(group, self.cluster),
                }
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {
            "numbers": self.cluster.facts(),
            "workloads": [one.as_dict() for one in self.workloads],
            "steps": self.steps,
            "seed": self.seed,
            "rows": [row.as_dict() for row in self.rows],
            "reduces": self.reduces(),
            "scenarios": {
                name: {"changes": dict(SCENARIOS[name]), **{model: asdict(one) for model, one in stops.items()}}
                for name, stops in self.scenarios.items()
            },
            "stress": [{**asdict(one), "error": one.error} for one in self.stress],
            "two_simulations": [asdict(one) for one in self.twice],
            "sweeps": {
                model: {runs: [asdict(width) for width in widths] for runs, widths in by_runs.items()}
                for model, by_runs in self.sweeps.items()
            },
            "reality": {processes: list(ranks) for processes, ranks in self.reality.items()},
        }


def compute(
    cluster: Cluster,
    workloads: Sequence[Workload],
    *,
    gpus: Sequence[int],
    steps: int,
    seed: int,
    reality: Mapping[int, Sequence[Mapping[str, Any]]],
    advance: Advance = lambda step, done, total: None,
) -> Results:
    """Model and simulate every row; the same arguments give the same numbers to the last digit."""
    rows = []
    total = len(workloads) * len(gpus)
    for place, (workload, num) in enumerate((workload, num) for workload in workloads for num in gpus):
        advance("simulating", place, total)
        strong = strong_step(workload, cluster, num)
        if strong is not None:
            rows.append(_row(workload, cluster, strong, "strong", steps=steps, seed=seed))
        rows.append(_row(workload, cluster, weak_step(workload, cluster, num), "weak", steps=steps, seed=seed))
    advance("simulating", total, total)
    hard = workloads[min(2, len(workloads) - 1)]
    return Results(
        cluster=cluster,
        workloads=workloads,
        gpus=gpus,
        steps=steps,
        seed=seed,
        rows=rows,
        scenarios={
            name: {one.model: stop(one, dataclasses.replace(cluster, **changes)) for one in workloads}  # type: ignore[arg-type]
            for name, changes in SCENARIOS.items()
        },
        stress=_stress(hard, cluster, steps=steps, seed=seed, advance=advance),
        twice=_twice(hard, cluster, seed=seed, advance=advance),
        sweeps={
            one.model: {runs: sweep(one, cluster, runs=runs, total_gpus=SWEEP_GPUS) for runs in SWEEP_RUNS}
            for one in workloads
        },
        reality=reality,
    )


def _row(workload: Workload, cluster: Cluster, one: Step, scaling: Scaling, *, steps: int, seed: int) -> Row:
    simulated = simulation.simulate(workload, cluster, gpus=one.gpus, images=one.images, steps=steps, seed=seed)
    agreeing = dataclasses.replace(cluster, **AGREEING)  # type: ignore[arg-type]
    waiting = step(workload, agreeing, gpus=one.gpus, images=one.images)
    return Row(
        model=workload.model,
        scaling=scaling,
        step=one,
        simulated_s=simulated.step_s,
        epoch_s=epoch_s(workload, cluster, one, scaling=scaling),
        efficiency=efficiency(workload, cluster, one, scaling=scaling),
        efficiency_agreeing=efficiency(workload, agreeing, waiting, scaling=scaling),
        question=question(workload, cluster, one),
        run_hours=run_hours(workload, cluster, one) if scaling == "strong" else None,
        feeding=feeding(workload, cluster, one),
    )


def _stress(workload: Workload, cluster: Cluster, *, steps: int, seed: int, advance: Advance) -> list[Stress]:
    cases: list[tuple[str, int, Cluster]] = []
    for what, changes in _STRESS.items():
        changed = dataclasses.replace(cluster, **changes)  # type: ignore[arg-type]
        cases += [(what, num, changed) for num in STRESS_GPUS]
    for what, times in _LOADERS.items():
        cases += [(what, num, _with_loader(workload, cluster, gpus=num, times=times)) for num in STRESS_GPUS]
    found = []
    for place, (what, num, changed) in enumerate(cases):
        advance("where the closed form errs", place, len(cases))
        images = _images(workload, num)
        closed = step(workload, changed, gpus=num, images=images).seconds
        simulated = simulation.simulate(workload, changed, gpus=num, images=images, steps=steps, seed=seed)
        found.append(Stress(what, num, closed, simulated.step_s))
    return found


def _with_loader(workload: Workload, cluster: Cluster, *, gpus: int, times: float) -> Cluster:
    """The cluster with a loader so many times as fast as the rest of the step."""
    images = _images(workload, gpus)
    one = step(workload, cluster, gpus=gpus, images=images)
    wanted = times * images / (one.seconds - one.loader_wait)
    return dataclasses.replace(cluster, core_images_per_s=wanted / cluster.workers)


def _images(workload: Workload, gpus: int) -> int:
    images = workload.images_per_gpu[gpus]
    assert images is not None, "no recipe refuses these numbers"
    return images


def _twice(workload: Workload, cluster: Cluster, *, seed: int, advance: Advance) -> list[Twice]:
    """Both simulations, with rings, of a few steps of some numbers of GPUs."""
    found: list[Twice] = []
    for num in EVENT_GPUS:
        advance("event by event", len(found), len(EVENT_GPUS))
        images = _images(workload, num)
        total = simulation.warm_up(cluster) + EVENT_STEPS
        draws = simulation.draw(cluster, gpus=num, images=images, steps=total, seed=seed)
        machine = Machine(workload, cluster, draws, gpus=num, images=images)
        one = np.array(machine.run())
        other = simulation.simulate(
            workload, cluster, gpus=num, images=images, steps=EVENT_STEPS, seed=seed, algorithm="ring"
        ).ends
        found.append(Twice(num, machine.queue.events, float(np.abs(one - other).max() / one.max())))
    return found


def counted_gpus(gpus: Sequence[int]) -> list[int]:
    """What workloads are counted for: those asked for, of sweeps, and where the closed form is put to the test."""
    return sorted({*gpus, *WIDTHS, *STRESS_GPUS, BASE_GPUS})
