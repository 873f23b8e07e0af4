"""What a report's tables say, and the same numbers with all their digits for CSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from eit_lab.report import stats
from eit_lab.report.analyses import Analyses
from eit_lab.report.arms import Ablation, Arm
from eit_lab.report.comparison import Comparison, Contrast, Interaction
from eit_lab.report.curves import TRAINING_MACS
from eit_lab.report.made_on import device
from eit_lab.report.metric import Metric, number
from eit_lab.report.pareto import images_per_s
from eit_lab.report.records import RunEntry
from eit_lab.report.stats import McNemar
from eit_lab.report.tables import Table
from eit_lab.report.verdict import p_text
from eit_lab.units import si

Row = dict[str, object]
NO = "-"
_MANY = 30
"""Rows over which a list of runs is folded."""


def arms_table(arms: Sequence[Arm], metric: Metric, analyses: Analyses | None = None) -> Table:
    """Mean, spread and cost of each arm, and beside them what was found inside of it."""
    beside = analyses.beside if analyses else []
    rows: list[tuple[str, ...]] = []
    for arm in arms:
        found = arm.estimate(metric)
        rows.append(
            (
                arm.label,
                str(found.n),
                metric.text(found.mean),
                metric.text(found.std) if found.n > 1 else NO,
                f"[{metric.text(found.low)}, {metric.text(found.high)}]" if found.n > 1 else "one seed",
                *inside_cells(arm, analyses),
                _count(arm.fact("cost", "params")),
                _si(arm.fact("cost", "macs")),
            )
        )
    inside = (one.title for one in beside)
    columns = ("arm", "seeds", metric.title, "std", "95% interval", *inside, "parameters", "MACs")
    note = "mean and sample standard deviation over seeds; interval by Student's t; MACs of a forward pass of one image"
    note += "; HFD share, Head Diversity: means over layers, see Inside the network" if beside else ""
    return Table("arms", f"{metric.name[0].upper()}{metric.name[1:]} by arm", columns, rows, note=note)


def inside_cells(arm: Arm, analyses: Analyses | None) -> list[str]:
    """An arm's figures that stand beside its accuracy, where the report has such figures."""
    own = analyses.of(arm) if analyses else None
    found = [(one, own.estimate(one.key) if own else None) for one in (analyses.beside if analyses else ())]
    return [NO if value is None else one.mean_std(value) for one, value in found]


def arms_rows(arms: Sequence[Arm], metric: Metric, analyses: Analyses | None = None) -> Iterator[Row]:
    """For CSV, values as recorded (accuracies in [0, 1])."""
    beside = [one.key for one in analyses.beside] if analyses else []
    for arm in arms:
        found = stats.estimate([value / metric.scale for value in arm.values(metric)])
        own = analyses.of(arm) if analyses else None
        inside = {key: own.estimate(key) if own else None for key in beside}
        yield {
            "arm": arm.label, "metric": metric.key, "seeds": found.n, "mean": found.mean, "std": _nan(found.std),
            "low95": _nan(found.low), "high95": _nan(found.high), "params": arm.fact("cost", "params"),
            "macs": arm.fact("cost", "macs"), "macs_thop": arm.fact("cost", "macs_thop"), "img_per_s": images_per_s(arm),
            **{key: value.mean if value else None for key, value in inside.items()},
            **{f"{key}_std": _nan(value.std) if value else None for key, value in inside.items()},
            **{key: str(value) for key, value in arm.point.items()},
        }  # fmt: skip


def differences_table(comparisons: Sequence[Comparison], metric: Metric) -> Table:
    """Every planned comparison with its interval and its tests."""
    rows = [(one.name, str(len(one.seeds)), *_tested(one)) for one in comparisons]
    columns = ("comparison", "seeds", f"difference{_unit(metric)}", *_TESTED)
    return Table("differences", "Differences, paired by seed", columns, rows, note=_SMALLEST)


def interactions_table(interactions: Sequence[Interaction], metric: Metric) -> Table:
    """Every planned difference of differences: the two, and the first less the second with its interval and its tests."""
    rows = []
    for one in interactions:
        sides = map(metric.signed, one.means) if one.means else (NO, NO)
        rows.append((one.name, str(len(one.seeds)), *sides, *_tested(one)))
    columns = ("comparison", "seeds", "first", "second", f"first - second{_unit(metric)}", *_TESTED)
    note = f"first, second: the two differences, over the seeds that all of their arms have; {_SMALLEST}"
    return Table("interactions", "Differences of differences, paired by seed", columns, rows, note=note)


_TESTED = ("95% interval", "p, paired t", "p, sign-flip", "test that counts", "p, Holm", "differs at 5%")
_SMALLEST = "in brackets the smallest p that the sign-flip test can give with so many seeds"


def _unit(metric: Metric) -> str:
    return f" ({metric.difference_unit})" if metric.difference_unit else ""


def _tested(one: Contrast) -> tuple[str, ...]:
    """Its mean, and what _TESTED names."""
    found, flip, metric = one.estimate, one.flip, one.metric
    return (
        metric.signed(found.mean) if found else NO,
        metric.interval(found.low, found.high) if found and found.n > 1 else NO,
        _p(one.t),
        f"{flip.p:.3g} ({'≥' if flip.exact else 'sampled, ≥'} {flip.smallest:.3g})" if flip else NO,
        one.test or "none",
        _p(one.p_holm),
        "no test" if one.p is None else "yes" if one.is_significant else "no",
    )


def differences_rows(comparisons: Sequence[Comparison]) -> Iterator[Row]:
    """For CSV, values as recorded."""
    for one in comparisons:
        yield {"arm": one.arm.label, "against": one.against.label, **_tested_row(one)}


def interactions_rows(interactions: Sequence[Interaction]) -> Iterator[Row]:
    """For CSV, values as recorded."""
    for one in interactions:
        labels = [arm.label for arm in (*one.first, *one.second)]
        means = [mean / one.metric.scale for mean in one.means] if one.means else [None, None]
        arms = zip(("first_arm", "first_against", "second_arm", "second_against"), labels, strict=True)
        yield {**dict(arms), "first": means[0], "second": means[1], **_tested_row(one)}


def _tested_row(one: Contrast) -> Row:
    metric = one.metric
    found = stats.estimate([d / metric.scale for d in one.differences]) if one.differences else None
    return {
        "metric": metric.key, "seeds": " ".join(map(str, one.seeds)),
        "n": len(one.seeds), "difference": found.mean if found else None, "std": _nan(found.std) if found else None,
        "low95": _nan(found.low) if found else None, "high95": _nan(found.high) if found else None, "p_t": one.t,
        "p_sign_flip": one.flip.p if one.flip else None, "p_sign_flip_smallest": one.flip.smallest if one.flip else None,
        "test": one.test, "p": one.p, "tests": one.tests, "p_holm": one.p_holm, "caveats": "; ".join(one.caveats),
        "by_seed": " ".join(repr(d / metric.scale) for d in one.differences),
    }  # fmt: skip


def images_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """McNemar's test on the saved predictions, over all seeds and by seed."""
    pooled: list[tuple[str, ...]] = []
    by_seed: list[tuple[str, ...]] = []
    for one in comparisons:
        found = one.images
        by_seed += [(one.name, str(seed), *_mcnemar(test)) for seed, test in found.by_seed.items()]
        if found.pooled is None:
            pooled.append((one.name, *[NO] * 5, found.reason))
        else:
            seeds = f"{len(found.by_seed)}" + (f" ({found.reason})" if found.reason else "")
            pooled.append((one.name, *_mcnemar(found.pooled), _p(found.p_holm), seeds))
    counts = ("images that differ", "only the first right", "only the second right", "p")
    note = (
        "McNemar's test of which arm is right more often on these test images with these weights. It speaks of the test images "
        "that might have been drawn, not of the noise between trainings: another seed can turn it round. An image counts once, "
        "by the seeds in which the first arm alone is right less those in which the second is; the two columns add up the seeds"
    )
    tables = [
        Table(
            "images", "The same images, right or wrong", ("comparison", *counts, "p, Holm", "seeds"), pooled, note=note
        )
    ]
    if by_seed:
        fold = f"{len(by_seed)} tests, one a seed"
        title = "The same images, right or wrong, by seed"
        tables.append(Table("images_by_seed", title, ("comparison", "seed", *counts), by_seed, texts=2, fold=fold))
    return tables


def _mcnemar(test: McNemar) -> tuple[str, ...]:
    how = "exact" if test.exact else "chi-squared"
    return f"{test.images:,} of {test.of:,}", f"{test.better:,}", f"{test.worse:,}", f"{_p(test.p)} ({how})"


def images_rows(comparisons: Sequence[Comparison]) -> Iterator[Row]:
    """For CSV."""
    for one in comparisons:
        tests: list[tuple[str, McNemar]] = [(str(seed), test) for seed, test in one.images.by_seed.items()]
        tests += [("pooled", one.images.pooled)] if one.images.pooled else []
        for seed, test in tests:
            yield {
                "arm": one.arm.label, "against": one.against.label, "seed": seed, "images": test.of, "discordant": test.images,
                "only_arm_right": test.better, "only_against_right": test.worse, "p": test.p, "exact": test.exact,
                "p_holm": one.images.p_holm if seed == "pooled" else None,
            }  # fmt: skip


def cost_table(ablation: Ablation) -> Table:
    """What was spent, by arm and in all; runs that do not count have cost something too."""
    rows = []
    total: list[RunEntry] = []
    for arm in ablation.arms:
        runs = list(arm.runs.values())
        total += runs
        rows.append((arm.label, *_cost(runs), _speed(arm), _si(_training_macs(arm)), _devices(runs)))
    spent = list(
        {id(left.entry): left.entry for left in ablation.left_out if left.entry and left.entry.record}.values()
    )
    if spent:
        rows.append(("runs that do not count", *_cost(spent), NO, NO, _devices(spent)))
    rows.append(("total", *_cost([*total, *spent]), NO, NO, ""))
    columns = ("arm", "runs", "device-hours", "energy (Wh)", "images/s", "training MACs of a run", "devices")
    note = (
        f"training MACs: {TRAINING_MACS} x MACs of a forward pass x images seen, the backward pass counted as two forward ones; "
        "images/s only where all runs of an arm had the same devices"
    )
    return Table(
        "cost", "Time, energy and arithmetic by arm", columns, rows, note=note, strong=frozenset({len(rows) - 1})
    )


def _cost(runs: Sequence[RunEntry]) -> tuple[str, str, str]:
    hours = [found for run in runs if (found := number(run.record.get("device_hours"))) is not None]
    return str(len(runs)), _sum(hours, len(runs), digits=3), _sum(_energies(runs), len(runs), digits=1, none="not read")


def _energies(runs: Sequence[RunEntry]) -> list[float]:
    return [found for run in runs if (found := number(run.record.get("energy_wh"))) is not None]


def _sum(values: Sequence[float], of: int, *, digits: int, none: str = "not known") -> str:
    if not values:
        return none
    return f"{sum(values):,.{digits}f}" + (f" (of {len(values)} runs)" if len(values) < of else "")


def _speed(arm: Arm) -> str:
    speed = images_per_s(arm)
    if speed is None:
        return "different devices" if len({device(run) for run in arm.runs.values()}) > 1 else NO
    return f"{speed:,.0f}"


def _training_macs(arm: Arm) -> float | None:
    """Multiply-accumulates of one run's training; None where it is not known how many images it saw."""
    macs = number(arm.fact("cost", "macs"))
    seen = {images_seen(run) for run in arm.runs.values()}
    images = seen.pop() if len(seen) == 1 else None
    return None if macs is None or images is None else TRAINING_MACS * macs * images


def images_seen(run: RunEntry) -> float | None:
    """Training images until the last validation, each as often as it was seen."""
    progress = number((run.record.get("progress") or {}).get("images"))
    logged = [count for count in run.curve.get("images", []) if count is not None]
    return progress if progress is not None else (logged[-1] if logged else None)


def _devices(runs: Sequence[RunEntry]) -> str:
    return ", ".join(dict.fromkeys(text for run in runs if (text := device(run)))) or NO


def cost_rows(ablation: Ablation) -> Iterator[Row]:
    """For CSV."""
    for arm in ablation.arms:
        runs = list(arm.runs.values())
        hours = [h for run in runs if (h := number(run.record.get("device_hours"))) is not None]
        energies = _energies(runs)
        yield {
            "arm": arm.label, "runs": len(runs), "device_hours": sum(hours) if hours else None,
            "energy_wh": sum(energies) if energies else None, "energy_runs": len(energies), "img_per_s": images_per_s(arm),
            "params": arm.fact("cost", "params"), "macs": arm.fact("cost", "macs"), "training_macs": _training_macs(arm),
            "devices": _devices(runs),
        }  # fmt: skip


def left_out_table(ablation: Ablation) -> Table:
    """Every run that is not averaged over, and why."""
    rows = [(left.arm, _seed(left.seed), left.state, left.why or NO, left.name or NO) for left in ablation.left_out]
    fold = f"{len(rows)} runs" if len(rows) > _MANY else ""
    return Table("left_out", "Runs that do not count", ("arm", "seed", "state", "why", "run"), rows, texts=5, fold=fold)


def runs_table(ablation: Ablation) -> Table:
    """Every run that counts."""
    rows = []
    for arm in ablation.arms:
        for seed in arm.seeds:
            run = arm.runs[seed]
            record, value = run.record, ablation.metric.of(run.record)
            rows.append(
                (
                    arm.label,
                    str(seed),
                    run.name,
                    str((record.get("versions") or {}).get("code", NO)),
                    device(run) or NO,
                    str((record.get("placement") or {}).get("precision", NO)),
                    NO if value is None else ablation.metric.text(value),
                    _number(record.get("device_hours"), digits=3),
                    _number(record.get("img_per_s"), digits=0),
                    str(record.get("restarts", NO)),
                )
            )
    columns = (
        "arm", "seed", "run", "code", "devices", "precision", ablation.metric.title, "device-hours", "images/s", "restarts",
    )  # fmt: skip
    return Table(
        "runs", "Runs that count", columns, rows, texts=6, fold=f"{len(rows)} run{'' if len(rows) == 1 else 's'}"
    )


def runs_rows(ablation: Ablation) -> Iterator[Row]:
    """For CSV: every run, whether it counts or not."""
    counted = [(arm.label, arm.runs[seed], "counts", "") for arm in ablation.arms for seed in arm.seeds]
    left = [(left.arm, left.entry, left.state, left.why) for left in ablation.left_out if left.entry]
    for label, run, state, why in counted + left:
        record = run.record
        result, cost, placement = (record.get(key) or {} for key in ("result", "cost", "placement"))
        yield {
            "arm": label, "seed": run.seed, "state": state, "why": why, "metric": ablation.metric.key,
            "value": number(result.get(ablation.metric.key)), "test_acc1": result.get("test/acc1"),
            "test_acc5": result.get("test/acc5"), "params": cost.get("params"), "macs": cost.get("macs"),
            "macs_thop": cost.get("macs_thop"), "img_per_s": record.get("img_per_s"), "device_hours": record.get("device_hours"),
            "energy_wh": record.get("energy_wh"), "restarts": record.get("restarts"), "device": placement.get("device"),
            "world_size": placement.get("world_size"), "precision": placement.get("precision"),
            "code": (record.get("versions") or {}).get("code"), "data": (record.get("data") or {}).get("fingerprint"),
            "started": record.get("started"), "ended": record.get("ended"), "run": run.name,
        }  # fmt: skip
    for absent in ablation.left_out:
        if absent.entry is None:
            yield {"arm": absent.arm, "seed": absent.seed, "state": absent.state, "why": absent.why}


def _seed(seed: int | None) -> str:
    return "?" if seed is None else str(seed)


def _p(p: float | None) -> str:
    return NO if p is None else p_text(p).replace("p = ", "").replace("p ", "")


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else NO


def _si(value: Any) -> str:
    found = number(value)
    return NO if found is None else si(found).strip()


def _number(value: Any, *, digits: int) -> str:
    found = number(value)
    return NO if found is None else f"{found:,.{digits}f}"


def _nan(value: float) -> float | None:
    return None if value != value else value
