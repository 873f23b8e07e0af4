"""What the figures of the inside of networks say beside their accuracy, in sentences that are computed, and what else could make them so.

The planned questions are the paper's argument (arXiv:2203.07116): inductive bias raises the share of high frequencies, heads then see
more diverse things, accuracy rises. So HFD share against the metric, Head Diversity against the metric, and HFD share against Head
Diversity are tested, and corrected for; the other quantities are shown beside them without a test. No sentence says that one causes the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from eit_lab.report.analyses import ARGUED, QUANTITIES, Analyses, ArmAnalyses
from eit_lab.report.correlation import Correlation, Rho, correct, correlate
from eit_lab.report.digest import TRAINING
from eit_lab.report.keys import varying
from eit_lab.report.metric import Metric, number
from eit_lab.report.records import plain_text
from eit_lab.report.stats import LEVEL
from eit_lab.report.verdict import p_text

_NORMALISED = ("lightweight", "dynamic")
_NARROW = 8  # channels
_UNKNOWN = "not known"
_NAMED = 6  # arms of a sentence


@dataclass(frozen=True)
class Interpretation:
    """All that is computed from the figures of several arms."""

    correlations: list[Correlation] = field(default_factory=list)
    """The planned ones first."""
    sentences: list[str] = field(default_factory=list)
    headline: str = ""
    """One sentence for the verdict; empty where there is no correlation to tell of."""
    confounds: list[str] = field(default_factory=list)

    def of(self, x: str, y: str) -> Correlation | None:
        """The correlation of two quantities, by their keys."""
        return next((one for one in self.correlations if (one.x, one.y) == (x, y)), None)


def interpret(analyses: Analyses, metric: Metric) -> Interpretation:
    """Correlations over the runs of all arms with their sentences; ``metric`` is what accuracy is here."""
    if not analyses.arms:
        return Interpretation()
    found = correct([*_planned(analyses, metric), *_others(analyses, metric)])
    names = {key: one.name for key, one in QUANTITIES.items()} | {metric.key: metric.name}
    planned = [one for one in found if one.planned]
    sentences = [sentence(one, names) for one in planned]
    absent = [QUANTITIES[key].name for key in ARGUED if not analyses.has(key)]
    sentences += [f"No run has {name}." for name in absent]
    if any(one.pooled.value is not None for one in planned):
        sentences.append(
            "A correlation over arms is not a cause: whatever the arms differ in can move both. Runs of one arm share its model "
            "and are not independent, so what is seen over all runs is held apart from what is seen between and within arms."
        )
    return Interpretation(found, sentences, _headline(planned, metric, names), confounds(analyses, metric))


# ---------------------------------------------------------------------------------------------------------- correlations


def _planned(analyses: Analyses, metric: Metric) -> list[Correlation]:
    pairs = [(key, metric.key) for key in ARGUED] + [ARGUED]
    keys = [(x, y) for x, y in pairs if analyses.has(x) and (y == metric.key or analyses.has(y))]
    return [replace(_correlation(analyses, metric, x, y), planned=True) for x, y in keys]


def _others(analyses: Analyses, metric: Metric) -> list[Correlation]:
    everywhere = [
        key for key in QUANTITIES
        if key not in ARGUED and all(len(one.values(key)) == len(one.by_seed) for one in analyses.arms)
    ]  # fmt: skip
    return [_correlation(analyses, metric, key, metric.key) for key in everywhere]


def _correlation(analyses: Analyses, metric: Metric, x: str, y: str) -> Correlation:
    rows = []
    for one in analyses.arms:
        first = one.values(x)
        second = values_of(one, metric) if y == metric.key else one.values(y)
        rows += [(first[seed], second[seed], one.place) for seed in first if seed in second]
    found = (
        correlate(*map(list, zip(*rows, strict=True)), names=(x, y)) if rows else correlate([], [], [], names=(x, y))
    )
    heads = _heads(analyses)
    if "head_diversity" in (x, y) and len(heads) > 1:
        why = f"arms have {_listed(map(str, sorted(heads)))} heads a layer, and a spread over heads compares with equal numbers only"
        found = replace(
            found, pooled=Rho(n=found.pooled.n, reason=why), between=Rho(n=found.between.n, reason=why)
        )  # fmt: skip
    return found


def values_of(one: ArmAnalyses, metric: Metric) -> dict[int, float]:
    """Seed -> metric as it is shown, of the analysed seeds."""
    found = {seed: metric.of(one.arm.runs[seed].record) for seed in one.by_seed}
    return {seed: value for seed, value in found.items() if value is not None}


def _heads(analyses: Analyses) -> dict[int, list[str]]:
    """Heads a layer -> the arms that have so many; an arm without attention has no say."""
    found: dict[int, list[str]] = {}
    for one in analyses.arms:
        if one.first.heads_per_layer and one.values("head_diversity"):
            found.setdefault(one.first.heads_per_layer, []).append(one.arm.label)
    return found


# -------------------------------------------------------------------------------------------------------------- sentences


def rho_text(value: float) -> str:
    """With its sign and two digits; +0.00, never -0.00."""
    text = f"{value:+.2f}"
    return "+0.00" if text == "-0.00" else text


def interval_text(rho: Rho) -> str:
    """``[-0.10, +0.90]``; empty where there is none."""
    return "" if rho.low is None or rho.high is None else f"[{rho_text(rho.low)}, {rho_text(rho.high)}]"


def sentence(one: Correlation, names: dict[str, str]) -> str:
    """One planned correlation in words: over all runs, between arms, within arms, and what these three are together."""
    head = f"{names[one.x]} and {names[one.y]}"
    if {one.pooled.reason} == {one.between.reason} == {one.within.reason} != {""}:
        return f"{head}: no rank correlation ({one.pooled.reason})."
    parts = [
        _value(one.pooled) + (f" over {_many(one)}" if one.pooled.value is not None else ""),
        f"between the arms' means {_value(one.between)}{_p(one.between, one, 'arms')}",
        f"within arms {_value(one.within)}{_p(one.within, one, 'runs')}",
    ]
    return f"{head}: {'; '.join(parts)}.{_judgement(one)}{_together(one)}"


def _many(one: Correlation) -> str:
    runs, arms = (f"{n:,} {what}{'' if n == 1 else 's'}" for n, what in ((one.runs, "run"), (one.arms, "arm")))
    return f"{runs} of {arms}"


def _value(rho: Rho) -> str:
    if rho.value is None:
        return f"no rank correlation ({rho.reason})"
    spread = f", 95% CI {interval_text(rho)}" if interval_text(rho) else ""
    spread = f" (no interval: {rho.no_interval})" if rho.no_interval else spread
    return f"ρ = {rho_text(rho.value)}{spread}"


def _p(rho: Rho, one: Correlation, points: str) -> str:
    if rho.p is None or rho.smallest is None:
        return ""
    cannot = rho.smallest * one.tests >= LEVEL
    return f", {p_text(rho.p)}" + (f" ({rho.n} {points} cannot give less than {rho.smallest:.2g})" if cannot else "")


def _judgement(one: Correlation) -> str:
    """Which of its two tests are significant once corrected."""
    tested = [
        (where, rho)
        for where, rho in (("between arms", one.between), ("within arms", one.within))
        if rho.p_holm is not None
    ]
    if not tested:
        return ""
    how = f" Corrected for {one.tests} tests (Holm)" if one.tests > 1 else " At 5%"
    found = [
        f"{where} ({p_text(rho.p_holm)})" for where, rho in tested if rho.p_holm is not None and rho.p_holm < LEVEL
    ]
    if not found:
        return f"{how}, not distinguishable from zero{', neither between arms nor within' if len(tested) > 1 else ''}."
    rest = [where for where, rho in tested if rho.p_holm is not None and rho.p_holm >= LEVEL]
    return f"{how}, significant {' and '.join(found)}" + (f", not {rest[0]}" if rest else "") + "."


def _together(one: Correlation) -> str:
    pooled, between, within = one.pooled, one.between, one.within
    said = ""
    outer = between if between.value is not None else pooled
    if outer.value is not None and within.value is not None:
        if within.excludes_zero and outer.value * within.value < 0:
            said = (
                " The signs between and within arms are opposite (Simpson's paradox): what sets arms apart is not what sets seeds "
                "apart, and the number over all runs mixes the two."
            )
        elif pooled.excludes_zero and not within.excludes_zero:
            said = (
                " It is carried by differences between arms; seeds of one arm do not show it, so any other thing that the arms "
                "differ in explains it as well."
            )
    return said


def _headline(planned: Sequence[Correlation], metric: Metric, names: dict[str, str]) -> str:
    parts = []
    for one in planned:
        if one.y != metric.key or one.pooled.value is None:
            continue
        spread = interval_text(one.pooled)
        text = f"ρ = {rho_text(one.pooled.value)}" + (f", 95% CI {spread}" if spread else ", no interval")
        holds = "" if not spread else ", zero left out" if one.pooled.excludes_zero else ", zero not left out"
        parts.append(f"{names[one.x]} and {names[one.y]}: {text}{holds} ({_many(one)})")
    return f"Inside the network, rank correlations, which are no causes: {'; '.join(parts)}." if parts else ""


# -------------------------------------------------------------------------------------------------------------- confounds


def confounds(analyses: Analyses, metric: Metric) -> list[str]:
    """What besides the inductive bias can move these figures, checked against the arms that are here; a sentence each."""
    arms = analyses.arms
    if not arms:
        return []
    made = [_recipe(arms), _low_pass(arms), _mlp(arms), _number_of_heads(arms, _heads(analyses)), _head_width(arms)]
    made += [_grids(arms), _depths(arms), _factors(arms), _time(analyses, metric)]
    return [text for text in made if text]


def _recipe(arms: Sequence[ArmAnalyses]) -> str:
    configs = [one.arm.config for one in arms]
    keys = [key for key in varying(configs) if key.startswith("recipe.")]
    alone = "CutMix alone changes how local the attention of early layers is"
    if keys:
        shown = "; ".join(f"{key}: {_by_value(arms, key)}" for key in keys[:3])
        more = f" and {len(keys) - 3} more keys" if len(keys) > 3 else ""
        if keys == ["recipe.lr"]:
            return f"The learning rate is not the same in all arms ({shown}): a difference here may come from it, too."
        return f"The recipe is not the same in all arms ({shown}{more}). {alone}: a difference here cannot be laid to the inductive bias."
    alphas = {number(config.get("recipe.cutmix_alpha")) for config in configs}
    alpha = alphas.pop() if len(alphas) == 1 else None
    cutmix = "" if alpha is None else ", without CutMix" if alpha == 0 else f", CutMix with alpha {alpha:g}"
    same = "The recipe is the same in all arms" if len(arms) > 1 else "There is one recipe"
    return f"{same}{cutmix}. It has to be: {alone}."


def _low_pass(arms: Sequence[ArmAnalyses]) -> str:
    """Convolutions whose kernels are shares: docs/models.md."""
    having = [one.arm.label for one in arms if one.arm.config.get("model.ib.conv") in _NORMALISED and not one.arm.plain]
    what = "A softmax-normalised convolution is a low-pass filter, since its kernels are non-negative and sum to 1"
    if not having:
        return f"{what}: none of these arms has one."
    has = "has one" if len(having) == 1 else "have one"
    return f"{what}: {_listed(having)} {has}, and a low HFD share there may come from the kernels rather than from the split."


def _mlp(arms: Sequence[ArmAnalyses]) -> str:
    of: dict[str, list[str]] = {}
    for one in arms:
        width, ratio = (number(one.arm.config.get(f"model.size.{key}")) for key in ("embed_dim", "mlp_ratio"))
        hidden = _UNKNOWN if width is None or ratio is None else f"{int(width * ratio)} ({ratio:g} x {width:g})"
        of.setdefault(hidden, []).append(one.arm.label)
    if len(of) == 1:
        (hidden,) = of
        if hidden == _UNKNOWN:
            return "The hidden width of the MLP (FFN), a factor of its own, is not in the records."
        where = "in all arms" if len(arms) > 1 else "here"
        return f"The hidden width of the MLP (FFN) is {hidden} {where}; it is a factor of its own."
    shown = "; ".join(f"{hidden} in {_listed(labels)}" for hidden, labels in of.items())
    return f"The hidden width of the MLP (FFN) is not the same in all arms ({shown}): it is a factor of its own, and mixed in here."


def _number_of_heads(arms: Sequence[ArmAnalyses], heads: dict[int, list[str]]) -> str:
    if not heads:
        return ""
    if len(heads) == 1:
        (count,) = heads
        said = "All arms have" if len(arms) > 1 else "It has"
        return f"{said} {count} heads a layer, so that Head Diversity, a spread over heads, can be compared."
    shown = "; ".join(f"{count} in {_listed(labels)}" for count, labels in sorted(heads.items()))
    return f"Arms have different numbers of heads a layer ({shown}): Head Diversity, a spread over heads, is not correlated across them."


def _head_width(arms: Sequence[ArmAnalyses]) -> str:
    shown: dict[str, list[str]] = {}
    narrowest = None
    for one in arms:
        widths = [width for width in one.first.head_width or () if width > 0]
        if not widths:
            continue
        low, high = min(widths), max(widths)
        narrowest = low if narrowest is None else min(narrowest, low)
        text = (
            f"{low}"
            if low == high
            else f"{low} to {high}, {'first' if widths[0] < widths[-1] else 'last'} layers narrowest"
        )
        shown.setdefault(text, []).append(one.arm.label)
    if narrowest is None:
        return ""
    listed = "; ".join(f"{_listed(labels)}: {text}" for text, labels in shown.items())
    if len(shown) == 1 and narrowest >= _NARROW:
        return f"Channels of a head: {next(iter(shown))} in all arms."
    narrow = f"A head of {narrowest} channels scores tokens" if narrowest < _NARROW else "A narrower head scores tokens"
    return f"Channels of a head ({listed}). {narrow} in few directions: how far it looks may say that rather than what it looks for."


def _grids(arms: Sequence[ArmAnalyses]) -> str:
    of: dict[str, list[str]] = {}
    for one in arms:
        if one.first.grid is not None:
            of.setdefault("x".join(map(str, one.first.grid)), []).append(one.arm.label)
    if len(of) < 2:
        return ""
    shown = "; ".join(f"{grid} in {_listed(labels)}" for grid, labels in of.items())
    return f"Arms have different grids of tokens ({shown}): the Nyquist frequency, and with it HFD share, is another in each."


def _depths(arms: Sequence[ArmAnalyses]) -> str:
    layers = sorted({one.first.layers for one in arms})
    return (
        "" if len(layers) == 1 else f"Arms have {_listed(map(str, layers))} layers: each figure is a mean over as many."
    )


def _factors(arms: Sequence[ArmAnalyses]) -> str:
    keys = [key for key in varying([one.arm.config for one in arms]) if not key.startswith(("recipe.", "model.ib."))]
    named = dict.fromkeys(".".join(key.split(".")[:3]) for key in keys if key not in ("model.kind", "model.timm_name"))
    if any("model.timm_name" in one.arm.config for one in arms) and len(arms) > 1:
        return "Some arms are other architectures (timm's): a correlation across them is about whole architectures."
    if not named:
        return ""
    more = f" and {len(named) - 4} more" if len(named) > 4 else ""
    return f"Arms differ in more than their inductive bias ({', '.join(list(named)[:4])}{more}): a correlation across them mixes these."


def _time(analyses: Analyses, metric: Metric) -> str:
    weights = {one.first.weights for one in analyses.arms}
    averaged = metric.key.endswith("_ema")
    said = []
    if analyses.when == TRAINING:
        said.append(
            "These figures were taken at the end of training on images held out of the training set; the metric is of the checkpoint "
            "that was chosen, on the test images."
        )
    if ("ema" in weights) != averaged and weights - {""}:
        kinds = ("averaged (EMA)", "raw")
        said.append(
            "These figures are of the {} weights, {} is of the {} ones.".format(
                *((kinds[0], metric.name, kinds[1]) if "ema" in weights else (kinds[1], metric.name, kinds[0]))
            )
        )
    return " ".join(said)


def _by_value(arms: Sequence[ArmAnalyses], key: str) -> str:
    of: dict[str, list[str]] = {}
    for one in arms:
        of.setdefault(plain_text(one.arm.config.get(key, "none")), []).append(one.arm.label)
    return ", ".join(f"{value} in {_listed(labels)}" for value, labels in of.items())


def _listed(names: Iterable[str]) -> str:
    """``a, b and c``; of very many the first ones."""
    known = list(names)
    if len(known) > _NAMED:
        return f"{', '.join(known[:_NAMED])} and {len(known) - _NAMED} more"
    return known[0] if len(known) == 1 else f"{', '.join(known[:-1])} and {known[-1]}"
