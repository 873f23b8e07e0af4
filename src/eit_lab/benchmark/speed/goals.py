"""The goals of the model and its training step as data, judged from a record, each beside what the hardware allows. No torch.

A ratio is taken within a round, then its median. Beside it stands the roof: the ratio at which our step would take no longer than
its matrix products alone do, at the rate that a large product reached in the same run. Where a goal lies above the roof, no code
can meet it on that machine.

The mark for eit_large: a ViT of 22 M parameters at 224 px, batch 256, bfloat16, on one H100, compiled with max-autotune, runs at
8,003 images/s, 22.9% of the dense peak, and at 1,608 eagerly (nvSubquadratic's benchmark page).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from eit_lab.benchmark.speed.peers import COMPILED_VIT, LITERAL, OURS

PASSES = {"step": 3, "model": 1}
"""Forward passes that the verb's work equals: a backward pass costs two."""
Record = Mapping[str, Any]
Spread = tuple[float, float, float]
"""Median, least, most."""
_MODELS = {"cpu": ("eit_base",), "cuda": ("eit_mini", "eit_tiny", "eit_base", "eit_large")}
_IMG_SIZE = 224
_BATCH = {"cpu": 8, "cuda": 256}


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What was set: a figure of ours in one precision, against a peer's in one."""

    verb: str
    device: str
    kind: str
    """One of time: a peer's seconds over ours; rate: our MACs per second over a peer's; peak: our share of the device's peak; memory:
    our bytes over a peer's."""
    target: float
    precision: str
    against: str | None = None
    """The peer."""
    against_precision: str | None = None
    models: tuple[str, ...]
    batch: int

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.kind == "memory"

    @property
    def what(self) -> str:
        """In words."""
        theirs = "" if self.against_precision in (None, self.precision) else f" in {self.against_precision}"
        against = "timm's compiled ViT" if self.against == COMPILED_VIT else f"{self.against}{theirs}"
        match self.kind:
            case "time":
                return f"{self.precision}: times as fast as {against}"
            case "rate":
                return f"{self.precision}: MACs per second over those of {against}"
            case "memory":
                return f"{self.precision}: peak memory over that of {against}"
        return f"{self.precision}: share of the device's dense peak"


def _goals() -> Iterator[Goal]:
    def against(
        peer: str, *, verb: str, device: str, kind: str, target: float, precision: str, theirs: str | None = None
    ) -> Goal:
        return Goal(
            verb=verb, device=device, kind=kind, target=target, precision=precision, against=peer,
            against_precision=theirs or precision, models=_MODELS[device], batch=_BATCH[device],
        )  # fmt: skip

    yield against(LITERAL, verb="step", device="cpu", kind="time", target=2.0, precision="float32")
    yield against(LITERAL, verb="step", device="cpu", kind="time", target=1.7, precision="bfloat16")
    yield against(LITERAL, verb="step", device="cpu", kind="time", target=4.0, precision="bfloat16", theirs="float32")
    yield against(LITERAL, verb="step", device="cuda", kind="time", target=3.0, precision="bfloat16")
    yield against(COMPILED_VIT, verb="step", device="cuda", kind="rate", target=0.9, precision="bfloat16")
    yield Goal(
        verb="step", device="cuda", kind="peak", target=0.25, precision="bfloat16", models=("eit_large",), batch=_BATCH["cuda"]
    )  # fmt: skip
    for device, precision in (("cpu", "float32"), ("cpu", "bfloat16"), ("cuda", "bfloat16")):
        yield against(LITERAL, verb="step", device=device, kind="memory", target=0.6, precision=precision)
        passes = {"cpu": 2.0, "cuda": 3.0}[device]
        yield against(LITERAL, verb="model", device=device, kind="time", target=passes, precision=precision)


GOALS = tuple(_goals())


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A goal for one size: what was measured of it."""

    goal: Goal
    model: str
    measured: Spread | None
    """None: it could not be measured, and ``why`` says so."""
    roof: float | None = None
    """What the hardware allows; None of memory."""
    why: str = ""

    @property
    def met(self) -> bool | None:
        """By the median; None where there is none."""
        if self.measured is None:
            return None
        return self.measured[0] <= self.goal.target if self.goal.at_most else self.measured[0] >= self.goal.target

    @property
    def beyond(self) -> bool:
        """Whether the goal lies above the roof."""
        return self.roof is not None and self.roof < self.goal.target


def judge(record: Record) -> list[Verdict]:
    """Every goal of the record's verb and device, for each size that was measured, at the batch that it is set for."""
    models = list(dict.fromkeys(row["model"] for row in record["rows"]))
    return [
        _judge(record, goal, model)
        for goal in GOALS
        if (goal.verb, goal.device) == (record["kind"], record["device_kind"])
        and (goal.batch, _IMG_SIZE) == (record["batch"], record["img_size"])
        for model in models
        if model in goal.models and goal.precision in record["precision"]
    ]


def _judge(record: Record, goal: Goal, model: str) -> Verdict:
    ours = row_of(record, model, OURS, goal.precision)
    theirs = None if goal.against is None else row_of(record, model, goal.against, str(goal.against_precision))
    for name, row in ((OURS, ours), (goal.against, theirs)):
        if name is not None and (row is None or not row["seconds"]):
            reason = "was not measured" if row is None else str(row["lost"])
            return Verdict(goal=goal, model=model, measured=None, why=f"{name}: {reason}")
    assert ours is not None
    measured: Spread | None
    match goal.kind:
        case "time":
            assert theirs is not None
            measured = times_as_fast(ours, theirs)
            roof = median(theirs["seconds"]) / least_seconds(record, ours)
        case "rate":
            assert theirs is not None
            measured = scaled(times_as_fast(ours, theirs), ours["macs"] / theirs["macs"])
            roof = product_rate(record, model, goal.precision) * median(theirs["seconds"]) / flops(record, theirs)
        case "peak":
            peak = record["peak_flops"].get(goal.precision)
            if peak is None:
                return Verdict(goal=goal, model=model, measured=None, why="the peak of this device is not known")
            measured = scaled(_rates(record, ours), 1 / peak)
            roof = product_rate(record, model, goal.precision) / peak
        case _:
            assert theirs is not None
            if not ours["memory_bytes"] or not theirs["memory_bytes"]:
                return Verdict(goal=goal, model=model, measured=None, why="the system does not tell")
            share = ours["memory_bytes"] / theirs["memory_bytes"]
            return Verdict(goal=goal, model=model, measured=(share, share, share))
    return Verdict(goal=goal, model=model, measured=measured, roof=roof)


# --------------------------------------------------------------------------------------------------- figures of a record


def row_of(record: Record, model: str, peer: str, precision: str) -> Mapping[str, Any] | None:
    """The row of a peer beside a size; None where it did not take part."""
    named = (row for row in record["rows"] if (row["model"], row["peer"], row["precision"]) == (model, peer, precision))
    return next(named, None)


def spread(values: Sequence[float]) -> Spread:
    """Of one number a round."""
    return median(values), min(values), max(values)


def scaled(values: Spread, factor: float) -> Spread:
    """Each times a factor."""
    return values[0] * factor, values[1] * factor, values[2] * factor


def times_as_fast(row: Mapping[str, Any], other: Mapping[str, Any]) -> Spread:
    """The other's seconds over the row's, round by round."""
    return spread([theirs / mine for mine, theirs in zip(row["seconds"], other["seconds"], strict=True)])


def flops(record: Record, row: Mapping[str, Any]) -> float:
    """Operations of a row's step or pass by its MACs: two a MAC, a backward pass as two forward passes."""
    return 2.0 * PASSES[record["kind"]] * float(row["macs"]) * float(record["batch"])


def _rates(record: Record, row: Mapping[str, Any]) -> Spread:
    return spread([flops(record, row) / seconds for seconds in row["seconds"]])


def product_rate(record: Record, model: str, precision: str) -> float:
    """Operations per second of a large matrix product, the median over the rounds beside a size."""
    for row in record["products"]:
        if (row["model"], row["precision"]) == (model, precision) and row["seconds"]:
            return 2.0 * float(row["macs"]) / median(row["seconds"])
    return float("nan")


def least_seconds(record: Record, row: Mapping[str, Any]) -> float:
    """What the row's matrix products alone take at that rate: attention's softmax, norms and all else cost nothing here."""
    return flops(record, row) / product_rate(record, row["model"], row["precision"])
