"""The verdict: sentences computed from the comparisons, right for every number of seeds, and for none."""

from __future__ import annotations

import math
from collections.abc import Sequence

from eit_lab.report import stats
from eit_lab.report.arms import Ablation
from eit_lab.report.comparison import Comparison, Contrast, Interaction
from eit_lab.report.metric import Metric

_SHOWN = 60  # sentences of a kind; all comparisons are in their table


def verdict(
    ablation: Ablation, comparisons: Sequence[Comparison], interactions: Sequence[Interaction] = ()
) -> list[str]:
    """What the runs say, a sentence for each planned comparison and difference of differences; never nothing."""
    arms = ablation.arms
    if not arms:
        return [f"No finished run has {ablation.metric.key}: there is nothing to compare.", *ablation.unmet]
    if not comparisons and not interactions:
        said = [f"{arm.label}: {_value(arm.estimate(ablation.metric), ablation.metric)}." for arm in arms[:_SHOWN]]
        if len(arms) == 1:
            said.append("One arm only: there is nothing to hold it against.")
        elif not ablation.unmet:
            said.append(
                "No arm is the plain ViT that the others differ from in nothing but their inductive bias, and no baseline was "
                "named: baseline=ARM names one."
            )
        return said + ablation.unmet
    said = [sentence(one) for one in comparisons[:_SHOWN]]
    if len(comparisons) > _SHOWN:
        said.append(f"{len(comparisons) - _SHOWN} more comparisons are in the table of differences.")
    said += [sentence(one) for one in interactions[:_SHOWN]]
    if len(interactions) > _SHOWN:
        said.append(f"{len(interactions) - _SHOWN} more differences of differences are in their table.")
    return said + ablation.unmet


def _value(found: stats.Estimate, metric: Metric) -> str:
    mean = f"{metric.name} {metric.text(found.mean)}{metric.unit}"
    if found.n == 1:
        return f"{mean}, one seed: no interval"
    return f"{mean}, 95% CI [{metric.text(found.low)}, {metric.text(found.high)}], n = {found.n} seeds"


def sentence(one: Contrast) -> str:
    """One comparison, or one difference of differences, in words."""
    return f"{_numbers(one)}{_caveat(one)}"


def _numbers(one: Contrast) -> str:
    found, metric = one.estimate, one.metric
    if found is None:
        return f"{one.name}: no seed in common, so there is no paired difference."
    unit = f" {metric.difference_unit}" if metric.difference_unit else ""
    head = f"{one.name} = {metric.signed(found.mean)}{unit}"
    if found.n == 1:
        return f"{head}, n = 1 seed: no interval and no test; one run an arm says nothing of the noise between seeds."
    if found.is_constant:
        return f"{head} in each of {found.n} seeds, {_p(one)}: {_judgement(one)} The spread is zero, so there is no t test."
    return f"{head}, 95% CI {metric.interval(found.low, found.high)}, n = {found.n} seeds, {_p(one)}: {_judgement(one)}"


def _p(one: Contrast) -> str:
    """The test that counts with its p, corrected where there are several, and the sign-flip p beside the t test's."""
    assert one.p is not None, "two seeds or more"
    assert one.p_holm is not None, "two seeds or more"
    parts = [str(one.test)]
    if one.tests > 1:
        parts.append(f"Holm over {one.corrected_for}: {p_text(one.p_holm)}")
    if one.flip is not None and one.test == "paired t":
        least = f"{one.flip.smallest:.3g}"
        is_least = one.flip.p <= one.flip.smallest
        parts.append(
            f"sign-flip p = {least}, as small as {len(one.seeds)} seeds allow"
            if is_least
            else f"sign-flip {p_text(one.flip.p)}, where {len(one.seeds)} seeds allow {least}"
        )
    return f"{p_text(one.p)} ({'; '.join(parts)})"


def _judgement(one: Contrast) -> str:
    found = one.estimate
    assert found is not None, "two seeds or more"
    if found.is_constant and abs(found.mean) < 1e-9:
        return "no difference."
    if one.is_significant:
        holds_zero = not found.is_constant and found.low <= 0 <= found.high
        although = f" by the {one.test} test, although Student's interval holds zero" if holds_zero else ""
        return f"{_claim(one, found.mean)}, significant at 5%{although}."
    text = "not distinguishable from zero at 5%"
    alone = one.p is not None and one.p < stats.LEVEL
    outside = not found.is_constant and (found.low > 0 or found.high < 0)
    if alone:
        text += f" once corrected for {one.corrected_for}"
        text += ", although its own interval leaves zero out" if outside else ""
    elif outside:  # the interval is Student's, the test that counts is not
        text += f" by the {one.test} test, although Student's interval leaves zero out"
    elif found.is_constant and one.flip is not None:
        text += f": with {found.n} seeds the sign-flip test cannot go below {one.flip.smallest:.3g}"
    return f"{text}."


def _claim(one: Contrast, mean: float) -> str:
    """What a significant mean says of the arms."""
    if isinstance(one, Interaction):
        return _interaction(one, mean)
    assert isinstance(one, Comparison), "there is no third kind"
    better = one.metric.higher_is_better
    if better is None:
        return f"{one.arm.label} is {'above' if mean > 0 else 'below'} {one.against.label}"
    return f"{one.arm.label} is {'better' if (mean > 0) == better else 'worse'} than {one.against.label}"


def _interaction(one: Interaction, mean: float) -> str:
    """A lead is larger than another one only where both are leads."""
    (a, b), (c, d) = ((arm.label, against.label) for arm, against in (one.first, one.second))
    better = one.metric.higher_is_better
    if better is None:
        return f"{a} - {b} is {'above' if mean > 0 else 'below'} {c} - {d}"
    assert one.means is not None, "two seeds or more"
    if all((side > 0) if better else (side < 0) for side in one.means):
        return (
            f"the lead of {a} over {b} is {'larger' if (mean > 0) == better else 'smaller'} than that of {c} over {d}"
        )
    return f"{a} does {'better' if (mean > 0) == better else 'worse'} against {b} than {c} does against {d}"


def _caveat(one: Contrast) -> str:
    said = []
    if one.alone:
        having = "both have" if isinstance(one, Comparison) else "all of these arms have"
        said.append(f"only seeds that {having} are used, not {', '.join(map(str, one.alone))}")
    if one.caveats:
        said.append(f"the arms differ in more than the factor: {'; '.join(one.caveats)}")
    return f" But {'; and '.join(said)}." if said else ""


def p_text(p: float) -> str:
    """``p = 0.058``; very small ones as a bound."""
    if p < 0.001:
        return "p < 0.001"
    digits = 3 if p < 0.1 else 2
    shown = f"{p:.{digits}f}"
    # A p just under 5% must not be shown as 5%.
    if float(shown) == stats.LEVEL and not math.isclose(p, stats.LEVEL):
        shown = f"{p:.5f}"
    return f"p = {shown}"
