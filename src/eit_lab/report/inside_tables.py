"""The tables on the inside of networks, and the same numbers with all their digits for CSV."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eit_lab.report.analyses import QUANTITIES, Analyses, ArmAnalyses, Quantity
from eit_lab.report.content import NO, Row
from eit_lab.report.correlation import Correlation, Rho
from eit_lab.report.interpretation import Interpretation, interval_text, rho_text
from eit_lab.report.metric import Metric
from eit_lab.report.tables import Table
from eit_lab.report.verdict import p_text

_MANY = 30
_SPREAD = "mean ± sample standard deviation over seeds; untrained: the same models with their weights drawn anew"


def means_tables(analyses: Analyses) -> list[Table]:
    """Each arm's figures as means over layers: those of frequency, and those of the heads where there are heads."""
    made = []
    for stem, title, of_heads in (
        ("inside_frequency", "Frequencies, means over the blocks' outputs", False),
        ("inside_heads", "Heads, means over layers", True),
    ):
        chosen = [one for one in QUANTITIES.values() if one.of_heads == of_heads and analyses.has(one.key)]
        if chosen:
            made.append(_means_table(analyses, chosen, stem=stem, title=title, of_heads=of_heads))
    return made


def _means_table(analyses: Analyses, chosen: Sequence[Quantity], *, stem: str, title: str, of_heads: bool) -> Table:
    rows: list[tuple[str, ...]] = []
    for one in analyses.arms:
        found = [one.estimate(quantity.key) for quantity in chosen]
        if not any(found):
            continue
        facts = _head_facts(one) if of_heads else ()
        cells = (
            NO if value is None else quantity.mean_std(value) for quantity, value in zip(chosen, found, strict=True)
        )
        rows.append((one.arm.label, str(len(one.by_seed)), *facts, *cells))
        reference = [one.untrained.get(quantity.key) for quantity in chosen]
        if any(value is not None for value in reference):
            cells = (
                NO if value is None else quantity.text(value) for quantity, value in zip(chosen, reference, strict=True)
            )
            rows.append((f"{one.arm.label}, untrained", "", *("" for _ in facts), *cells))
    columns = ("arm", "runs", *(("heads", "channels of a head", "uniform (px)") if of_heads else ()))
    note = _SPREAD
    if of_heads:
        note += "; Head Diversity: standard deviation over heads of their attention distance, uniform attention's distance being 1"
    else:
        note += "; HFD share: share of the energy above half of the Nyquist frequency, DC counted in the whole"
    return Table(stem, title, (*columns, *(quantity.title for quantity in chosen)), rows, note=note)


def _head_facts(one: ArmAnalyses) -> tuple[str, str, str]:
    widths = [width for width in one.first.head_width or () if width > 0]
    shown = NO if not widths else f"{min(widths)}" if min(widths) == max(widths) else f"{min(widths)} to {max(widths)}"
    heads, uniform = one.first.heads_per_layer, one.first.heads.uniform_distance if one.first.heads else None
    return NO if heads is None else str(heads), shown, NO if uniform is None else f"{uniform:.2f}"


def correlations_table(found: Interpretation, metric: Metric) -> Table | None:
    """Every rank correlation; None where there is none."""
    names = {key: one.name for key, one in QUANTITIES.items()} | {metric.key: metric.name}
    rows = [
        (
            f"{names[one.x]}, {names[one.y]}",
            str(one.runs),
            str(one.arms),
            *_rho(one.pooled),
            *_rho(one.between)[:1],
            *_tested(one, one.between),
            *_rho(one.within),
            *_tested(one, one.within),
        )
        for one in found.correlations
    ]
    if not rows:
        return None
    columns = (
        "quantities", "runs", "arms", "over all runs", "95% interval", "between arms", "p", "p, Holm", "within arms",
        "95% interval", "p", "p, Holm",
    )  # fmt: skip
    tests = next((one.tests for one in found.correlations if one.planned), 0)
    note = (
        "Spearman's ρ. Over all runs: interval by a bootstrap of arms, then of seeds in them. Between arms: of their means, permutation "
        "test. Within arms: ranks inside each arm, permutation test, score interval"
    )
    if tests:
        note += (
            f". Tested are the planned pairs only ({tests} tests); the others were looked at, too, and one of so many may "
            "stand out by chance"
        )
    return Table("correlations", "Rank correlations over runs", columns, rows, note=note)


def _rho(rho: Rho) -> tuple[str, str]:
    return NO if rho.value is None else rho_text(rho.value), interval_text(rho) or NO


def _tested(one: Correlation, rho: Rho) -> tuple[str, str]:
    if not one.planned or rho.p is None or rho.p_holm is None:
        return NO, NO
    p, adjusted = (p_text(value).replace("p = ", "").replace("p ", "") for value in (rho.p, rho.p_holm))
    return f"{p} (≥ {rho.smallest:.2g})", adjusted


def unused_table(analyses: Analyses) -> Table | None:
    """The runs whose inside is not in the figures; None where all are."""
    rows = [(one.arm, str(one.seed), one.why) for one in analyses.unused]
    fold = f"{len(rows)} runs" if len(rows) > _MANY else ""
    title = "Runs that count, without an analysis that can stand beside the others"
    return Table("inside_unused", title, ("arm", "seed", "why"), rows, texts=3, fold=fold) if rows else None


# --------------------------------------------------------------------------------------------------------------------- csv


def inside_rows(analyses: Analyses, metric: Metric) -> Iterator[Row]:
    """A row a run: the metric as recorded, the means over layers, and those of the same model before training."""
    for one in analyses.arms:
        for seed, inside in one.by_seed.items():
            value = metric.of(one.arm.runs[seed].record)
            yield {
                "arm": one.arm.label, "seed": seed, "metric": metric.key, "value": None if value is None else value / metric.scale,
                "analysed": analyses.when, "data": inside.data, "part": inside.part, "images": inside.images,
                "weights": inside.weights, "layers": inside.layers, "heads": inside.heads_per_layer,
                "narrowest_head": min((w for w in inside.head_width or () if w > 0), default=None),
                **{key: inside.means.get(key) for key in QUANTITIES},
                **{f"untrained_{key}": one.untrained.get(key) for key in QUANTITIES},
            }  # fmt: skip
    empty: Row = dict.fromkeys(QUANTITIES)
    for left in analyses.unused:
        yield {"arm": left.arm, "seed": left.seed, "metric": metric.key, "analysed": left.why, **empty}


def correlation_rows(found: Interpretation) -> Iterator[Row]:
    """A row a pair and level."""
    for one in found.correlations:
        for level, rho in (("all runs", one.pooled), ("between arms", one.between), ("within arms", one.within)):
            tested = one.planned and rho.p is not None
            yield {
                "x": one.x, "y": one.y, "level": level, "planned": one.planned, "runs": one.runs, "arms": one.arms, "n": rho.n,
                "rho": rho.value, "low95": rho.low, "high95": rho.high, "p": rho.p if tested else None,
                "p_smallest": rho.smallest if tested else None, "p_exact": rho.exact if tested else None, "tests": one.tests or None,
                "p_holm": rho.p_holm, "why_not": rho.reason or rho.no_interval,
            }  # fmt: skip
