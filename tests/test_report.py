"""``python -m eit_lab.report``: sentences that are right in every case, files in every form, and the same from records.jsonl."""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as reference

from eit_lab import published
from eit_lab.report.__main__ import main
from eit_lab.report.arms import Ablation, collect
from eit_lab.report.build import Report, build, csv_files
from eit_lab.report.comparison import compare, compare_all
from eit_lab.report.content import cost_table, images_tables
from eit_lab.report.curves import arm_curve
from eit_lab.report.figures import factor_figure, numeric_factor
from eit_lab.report.metric import metric_of
from eit_lab.report.page import inline_svg, to_latex
from eit_lab.report.pareto import costs, front
from eit_lab.report.records import Source, plain_text, read_sources, write_records
from eit_lab.report.tables import latex, markdown
from eit_lab.report.verdict import p_text, verdict
from made_runs import declared, made_record, write_run, write_runs, write_sweep
from test_report_summary import ACC1, CROSSED, LARGER_LEAD, ablation, arm_record, crossed_plan, crossed_record, entries

HOSTILE = (
    "vit<script>alert(1)</script>",
    r"a|b\c%d_e&f$g$#h{i}~j^k",
    "<img src=x onerror=alert(1)> \"q\" 'q' `t` *s* [link](http://x.example) [ {{ 7*7 }} {% x %}",
    "long" * 40,
    "名前 é\x07\nnew line",
)


def said(records: Sequence[dict[str, Any]], *, metric: str = "test/acc1", **how: Any) -> list[str]:
    """The verdict on some records."""
    found = collect(
        [Source("s", how.get("declaration") or {}, entries(records))], metric_of(metric), baseline=how.get("baseline")
    )
    return verdict(found, *compare_all(found))


def two_arms(vit: Sequence[float], eit: Sequence[float]) -> list[dict[str, Any]]:
    return [made_record("ViT", s, a, rule="none") for s, a in enumerate(vit)] + [
        made_record("EIT", s, a) for s, a in enumerate(eit)
    ]


# ----------------------------------------------------------------------------------------------------------------- verdict


def test_the_verdict_of_three_seeds_whose_interval_holds_zero() -> None:
    # differences 2, 0.5, 3.5: mean 2, sd 1.5, half width 4.303 x 1.5 / sqrt 3 = 3.726
    assert said(two_arms((0.9, 0.92, 0.94), (0.92, 0.925, 0.975))) == [
        "EIT - ViT = +2.00 points, 95% CI [-1.73, +5.73], n = 3 seeds, p = 0.15 (paired t; sign-flip p = 0.25, as small as 3 "
        "seeds allow): not distinguishable from zero at 5%."
    ]


def test_the_verdict_of_a_difference_and_of_the_same_one_turned_round() -> None:
    # differences 3, 3, 2.5, 3.2: mean 2.925, sd 0.2986, half width 3.182 x 0.2986 / 2 = 0.475
    vit, eit = (0.90, 0.91, 0.92, 0.90), (0.93, 0.94, 0.945, 0.932)
    (better,), (worse,) = said(two_arms(vit, eit)), said(two_arms(eit, vit))
    assert better.startswith("EIT - ViT = +2.93 points, 95% CI [+2.45, +3.40], n = 4 seeds, p < 0.001 (paired t; ")
    assert better.endswith(": EIT is better than ViT, significant at 5%.")
    assert worse.startswith("EIT - ViT = -2.93 points, 95% CI [-3.40, -2.45], n = 4 seeds, p < 0.001 (paired t; ")
    assert worse.endswith(": EIT is worse than ViT, significant at 5%.")


def test_the_sign_flip_test_counts_where_seeds_are_enough() -> None:
    vit = [0.90 + 0.001 * n for n in range(6)]
    assert said(two_arms(vit, [v + 0.01 + 0.002 * (n % 2) for n, v in enumerate(vit)])) == [
        "EIT - ViT = +1.10 points, 95% CI [+0.99, +1.21], n = 6 seeds, p = 0.031 (sign-flip): EIT is better than ViT, "
        "significant at 5%."
    ]
    # Two comparisons: 2/2^6 can no longer pass half of 5%, so the t test counts again.
    three = [*two_arms(vit, [v + 0.01 + 0.002 * (n % 2) for n, v in enumerate(vit)])]
    three += [made_record("LSRA", n, v + 0.001 * (-1) ** n, rule="constant") for n, v in enumerate(vit)]
    assert [line.partition("(")[2].partition(";")[0] for line in said(three)] == ["paired t", "paired t"]


def test_the_two_tests_may_disagree_and_the_sentence_says_so() -> None:
    # Six seeds, one on the other side: sign-flip p = 4/64 > 5%, and yet Student's interval leaves zero out.
    differences = (0.030, 0.031, 0.029, 0.032, 0.028, -0.001)
    (line,) = said(two_arms([0.9] * 6, [0.9 + d for d in differences]))
    assert "p = 0.062 (sign-flip)" in line
    assert line.endswith(
        "not distinguishable from zero at 5% by the sign-flip test, although Student's interval leaves zero out."
    )
    # All on one side, one of them far off: sign-flip p = 2/64, and Student's interval holds zero.
    (line,) = said(two_arms([0.5] * 6, [0.5 + d for d in (0.001, 0.001, 0.001, 0.001, 0.001, 0.2)]))
    assert line.endswith(
        "EIT is better than ViT, significant at 5% by the sign-flip test, although Student's interval holds zero."
    )


def test_one_seed_has_no_interval_and_no_test() -> None:
    assert said(two_arms([0.9], [0.92])) == [
        "EIT - ViT = +2.00 points, n = 1 seed: no interval and no test; one run an arm says nothing of the noise between seeds."
    ]


def test_no_seed_in_common_is_no_paired_difference() -> None:
    records = [made_record("ViT", 0, 0.9, rule="none"), made_record("EIT", 1, 0.9)]
    assert said(records) == [
        "EIT - ViT: no seed in common, so there is no paired difference. But only seeds that both have are used, not 0, 1."
    ]


def test_differences_without_a_spread() -> None:
    assert said(two_arms([0.9, 0.8, 0.7], [0.91, 0.81, 0.71])) == [
        "EIT - ViT = +1.00 points in each of 3 seeds, p = 0.25 (sign-flip): not distinguishable from zero at 5%: with 3 seeds the "
        "sign-flip test cannot go below 0.25. The spread is zero, so there is no t test."
    ]
    assert said(two_arms([0.9, 0.8], [0.9, 0.8])) == [
        "EIT - ViT = +0.00 points in each of 2 seeds, p = 1.00 (sign-flip): no difference. The spread is zero, so there is no t test."
    ]


def test_a_mean_of_zero_with_a_spread_is_not_called_no_difference() -> None:
    (line,) = said(two_arms([0.5, 0.5], [0.75, 0.25]))
    assert line.startswith("EIT - ViT = +0.00 points, 95% CI [-")
    assert line.endswith(": not distinguishable from zero at 5%.")


def test_what_is_significant_alone_may_not_be_among_many() -> None:
    vit = [0.90, 0.91, 0.92, 0.90]
    records = two_arms(vit, [v + d for v, d in zip(vit, (0.010, 0.022, 0.012, 0.026), strict=True)])
    for n in range(4):
        records += [made_record(f"E{n}", s, v + 0.003 * (-1) ** s, strength=0.1 * (n + 1)) for s, v in enumerate(vit)]
    line = said(records)[0]
    assert "(paired t; Holm over 5 comparisons: p = " in line
    assert (
        line.endswith(
            "not distinguishable from zero at 5% once corrected for 5 comparisons, although its own interval leaves zero out."
        )
        or "E0" in line
    )
    (own,) = [line for line in said(records) if line.startswith("EIT")]
    assert own.endswith(
        "not distinguishable from zero at 5% once corrected for 5 comparisons, although its own interval leaves zero out."
    )


def test_one_arm_alone_no_arm_and_a_baseline_without_runs() -> None:
    assert said([made_record("ViT", s, 0.9 + s / 100, rule="none") for s in range(2)]) == [
        "ViT: test top-1 90.50%, 95% CI [84.15, 96.85], n = 2 seeds.",
        "One arm only: there is nothing to hold it against.",
    ]
    assert said([made_record("ViT", 0, 0.9, rule="none")])[0] == "ViT: test top-1 90.00%, one seed: no interval."
    assert said([made_record("ViT", 0, 0, status="failed")]) == [
        "No finished run has test/acc1: there is nothing to compare."
    ]
    records = [
        made_record("ViT", 0, 0, status="failed"),
        made_record("EIT", 0, 0.9),
        made_record("LSRA", 0, 0.9, rule="constant"),
    ]
    assert said(records, baseline="ViT")[-1] == "The baseline ViT has no run that counts: nothing is held against it."
    plan = declared("a", ["vit", "eit"], factor=["model.ib"], seeds=[0])
    assert (
        said([arm_record("eit", 0, 0.9)], declaration=plan)[-1]
        == "eit - vit: not compared, vit has no run that counts."
    )
    records[1]["config"]["recipe"]["lr"] = 0.1
    assert "baseline=ARM names one" in said(records)[-1]  # two arms, two factors, and none of them the plain ViT


def test_a_loss_is_better_where_it_is_lower_and_an_unknown_metric_takes_no_side() -> None:
    vit, eit = (0.90, 0.91, 0.92, 0.90), (0.93, 0.94, 0.945, 0.932)
    (line,) = said(two_arms(vit, eit), metric="test/loss")  # 1 - accuracy
    assert line.startswith("EIT - ViT = -0.0292, 95% CI [-0.0340, -0.0245], n = 4 seeds")
    assert line.endswith("EIT is better than ViT, significant at 5%.")
    records = two_arms(vit, eit)
    for record in records:
        record["result"]["test/entropy"] = record["result"]["test/acc1"]
    assert said(records, metric="test/entropy")[0].endswith("EIT is above ViT, significant at 5%.")


def test_sets_that_differ_in_more_than_the_factor_are_said_with_the_difference() -> None:
    records = [arm_record("vit", 0, 0.9), arm_record("eit", 0, 0.9, versions={"code": "def"})]
    plan = declared("a", ["vit", "eit"], factor=["model.ib"], seeds=[0])
    assert said(records, declaration=plan)[0].endswith(" But the arms differ in more than the factor: code (def; abc).")


# ---------------------------------------------------------------------------------------------- differences of differences


VIT_10, EIT_10 = (0.70, 0.71, 0.72), (0.75, 0.765, 0.78)  # 5, 5.5, 6 points
VIT_100, EIT_100 = (0.90, 0.91, 0.92), (0.905, 0.916, 0.927)  # 0.5, 0.6, 0.7


def crossed(*values: Sequence[float]) -> list[dict[str, Any]]:
    """Runs of CROSSED, the values of each by seed."""
    return [crossed_record(arm, s, v) for arm, of in zip(CROSSED, values, strict=True) for s, v in enumerate(of)]


def test_the_verdict_of_a_difference_of_differences_in_one_family_with_the_comparisons() -> None:
    records, plan = crossed(VIT_10, EIT_10, VIT_100, EIT_100), crossed_plan(LARGER_LEAD)
    # 4.5, 4.9, 5.3: mean 4.9, sd 0.4, half width 4.303 x 0.4 / sqrt 3 = 0.994; p 0.0022, the smallest of three: x 3
    assert said(records, declaration=plan)[2:] == [
        "(eit_10 - vit_10) - (eit_100 - vit_100) = +4.90 points, 95% CI [+3.91, +5.89], n = 3 seeds, p = 0.002 (paired t; "
        "Holm over 3 tests: p = 0.007; sign-flip p = 0.25, as small as 3 seeds allow): the lead of eit_10 over vit_10 is larger "
        "than that of eit_100 over vit_100, significant at 5%."
    ]
    turned = crossed_plan(LARGER_LEAD[::-1])
    line = said(records, declaration=turned)[2]
    assert line.startswith("(eit_100 - vit_100) - (eit_10 - vit_10) = -4.90 points, 95% CI [-5.89, -3.91]")
    assert line.endswith(
        "the lead of eit_100 over vit_100 is smaller than that of eit_10 over vit_10, significant at 5%."
    )
    comparisons, (interaction,) = compare_all(ablation(records, declaration=plan))
    of = [(5, 5.5, 6), (0.5, 0.6, 0.7), (4.5, 4.9, 5.3)]
    ps = [reference.ttest_1samp(differences, 0).pvalue for differences in of]
    family = [*comparisons, interaction]
    assert [one.differences for one in family] == [pytest.approx(differences) for differences in of]
    assert [one.p for one in family] == pytest.approx(ps)
    assert ps[2] < ps[0] < ps[1]
    assert [one.p_holm for one in family] == pytest.approx(
        [max(3 * ps[2], 2 * ps[0]), max(3 * ps[2], ps[1]), 3 * ps[2]]
    )
    assert {one.tests for one in family} == {3}
    assert interaction.means == pytest.approx((5.5, 0.6))


def test_an_interaction_counts_in_the_correction_and_in_the_choice_of_the_test() -> None:
    # 1, 1.1, 0.9, 1.2, 0.8, 1.0 points at a tenth of the images; -0.1, 0.1, ... at all of them: sign-flip alone has p = 2/64.
    vit = [0.7] * 6
    values = [vit, [0.7 + d for d in (0.01, 0.011, 0.009, 0.012, 0.008, 0.01)]]
    values += [vit, [0.7 + 0.001 * (-1) ** n for n in range(6)]]
    alone = crossed_plan(compare=LARGER_LEAD[:1])
    (line,) = said(crossed(*values), declaration=alone)
    assert "p = 0.031 (sign-flip): " in line
    lines = said(crossed(*values), declaration={**alone, "interactions": [LARGER_LEAD]})
    assert [line.partition("(paired t; Holm over 2 tests: p")[1] != "" for line in lines] == [True, True]
    # 1, 2.2, 1.2, 2.6 points: p 0.021 alone (paired t), and twice that is under 5%; beside two more it is not.
    values = [[0.7] * 4, [0.7 + d for d in (0.010, 0.022, 0.012, 0.026)], [0.7] * 4, [0.7, 0.701, 0.702, 0.697]]
    lines = said(crossed(*values), declaration=crossed_plan(LARGER_LEAD))
    assert lines[0].endswith(
        "not distinguishable from zero at 5% once corrected for 3 tests, although its own interval leaves zero out."
    )
    assert lines[2].endswith("not distinguishable from zero at 5%" + lines[0].rpartition("at 5%")[2])


def test_an_interaction_uses_the_seeds_that_all_its_arms_have_and_names_the_others() -> None:
    records = [
        r for r in crossed(VIT_10, EIT_10, VIT_100, EIT_100) if (r["seed"], r["config"]["run"]["arm"]) != (0, "eit_100")
    ]
    plan = crossed_plan(LARGER_LEAD)
    found = said(records, declaration=plan)
    assert found[0].startswith("eit_10 - vit_10 = +5.50 points, 95% CI [+4.26, +6.74], n = 3 seeds")
    assert found[2].startswith("(eit_10 - vit_10) - (eit_100 - vit_100) = +5.10 points, 95% CI [")  # 4.9, 5.3
    assert "n = 2 seeds" in found[2]
    assert found[2].endswith(" But only seeds that all of these arms have are used, not 0.")
    first = [r for r in records if r["seed"] == 1]
    assert said(first, declaration=plan)[2] == (
        "(eit_10 - vit_10) - (eit_100 - vit_100) = +4.90 points, n = 1 seed: no interval and no test; one run an arm says nothing "
        "of the noise between seeds."
    )
    apart = [*first, *(r for r in records if r["seed"] == 2)]
    apart = [r for r in apart if (r["seed"] == 1) == (r["config"]["run"]["arm"] == "eit_10")]
    assert said(apart, declaration=plan)[2].startswith(
        "(eit_10 - vit_10) - (eit_100 - vit_100): no seed in common, so there is no paired difference. But only seeds"
    )
    assert said(records[:6], declaration=plan)[-1] == (
        "(eit_10 - vit_10) - (eit_100 - vit_100): not compared, eit_100 and vit_100 have no run that counts."
    )


def test_a_lead_is_called_so_only_where_there_is_one() -> None:
    plan = crossed_plan(LARGER_LEAD)

    def last(*values: Sequence[float], metric: str = "test/acc1") -> str:
        records = crossed(*values)
        for record in records:
            record["result"]["test/entropy"] = record["result"]["test/acc1"]
        return said(records, declaration=plan, metric=metric)[2].partition("): ")[2]

    of = (VIT_10, EIT_10, VIT_100, EIT_100)
    lead = "the lead of eit_10 over vit_10 is larger than that of eit_100 over vit_100, significant at 5%."
    assert last(*of).endswith(lead)
    assert last(*of, metric="test/loss").endswith(lead)  # 1 - accuracy: lower is better
    behind = (EIT_10, VIT_10, EIT_100, VIT_100)
    worse = "eit_10 does worse against vit_10 than eit_100 does against vit_100, significant at 5%."
    assert last(*behind).endswith(worse)
    assert last(*behind, metric="test/loss").endswith(worse)
    better = "eit_10 does better against vit_10 than eit_100 does against vit_100, significant at 5%."
    assert last(VIT_10, EIT_10, EIT_100, VIT_100).endswith(better)  # ahead, and behind
    assert last(*of, metric="test/entropy").endswith("eit_10 - vit_10 is above eit_100 - vit_100, significant at 5%.")
    assert (
        last([0.5, 0.6], [0.6, 0.7], [0.7, 0.8], [0.8, 0.9])
        == "no difference. The spread is zero, so there is no t test."
    )


def test_an_interaction_across_unlike_runs_says_what_differs() -> None:
    records = crossed(VIT_10, EIT_10, VIT_100, EIT_100)
    for record in records[6:]:
        record["versions"] = {"code": "def"}  # each pair is alike, the two are not
    lines = said(records, declaration=crossed_plan(LARGER_LEAD))
    assert [line.partition(" But ")[2] for line in lines] == [
        "", "", "the arms differ in more than the factor: code (abc; def).",
    ]  # fmt: skip


def test_interactions_are_in_every_form_of_a_report_and_in_its_records(tmp_path: Path) -> None:
    records, plan = crossed(VIT_10, EIT_10, VIT_100, EIT_100), crossed_plan(LARGER_LEAD)
    folder = write_sweep(tmp_path / "runs", "a", records, declaration=plan)
    out, again = tmp_path / "out", tmp_path / "again"
    assert main([str(folder), f"out={out}", f"records={tmp_path / 'r.jsonl'}"]) == 0
    assert main([str(tmp_path / "r.jsonl"), f"out={again}"]) == 0
    for name in ("report.html", "report.md", "report.tex", "interactions.csv", "figures/differences.svg"):
        assert (out / name).read_bytes() == (again / name).read_bytes(), name
    with (out / "interactions.csv").open() as handle:
        (row,) = csv.DictReader(handle)
    assert [row[key] for key in ("first_arm", "first_against", "second_arm", "second_against")] == [
        "eit_10", "vit_10", "eit_100", "vit_100",
    ]  # fmt: skip
    shown = {key: float(row[key]) for key in ("first", "second", "difference", "std", "low95", "high95")}
    half = reference.t.ppf(0.975, 2) * 0.004 / 3**0.5
    assert shown == pytest.approx(
        {
            "first": 0.055,
            "second": 0.006,
            "difference": 0.049,
            "std": 0.004,
            "low95": 0.049 - half,
            "high95": 0.049 + half,
        }
    )
    assert (row["seeds"], row["n"], row["test"], row["tests"]) == ("0 1 2", "3", "paired t", "3")
    name = "(eit_10 - vit_10) - (eit_100 - vit_100)"
    text = (out / "report.md").read_text()
    assert f"| {name} | 3 | +5.50 | +0.60 | +4.90 | \\[+3.91, +5.89\\] | 0.002 |" in text
    assert "Corrected by Holm's method for 3 tests." in text
    assert "Differences of differences, paired by seed" in (out / "report.html").read_text()
    assert r"\label{tab:interactions}" in (out / "report.tex").read_text()
    assert name in (out / "figures" / "differences.svg").read_text()


def test_interactions_alone_are_a_report_too() -> None:
    plan = crossed_plan(LARGER_LEAD, compare=[["eit_10", "lsra_10"]])
    found = build([Source("a", plan, entries(crossed(VIT_10, EIT_10, VIT_100, EIT_100)))])
    (section,) = (section for section in found.sections if section.anchor == "differences")
    assert [table.stem for table in section.tables] == ["interactions"]
    assert section.text[-1] == "Corrected by Holm's method for 1 test."
    assert found.sentences[0].startswith("(eit_10 - vit_10) - (eit_100 - vit_100) = +4.90 points")
    assert found.sentences[1:] == ["eit_10 - lsra_10: not compared, lsra_10 has no run that counts."]
    assert csv_files(found)["differences.csv"] == ""


@pytest.mark.parametrize(("p", "text"), [(0.0004, "p < 0.001"), (0.0496, "p = 0.04960"), (0.0504, "p = 0.05040"), (0.05, "p = 0.050"), (0.25, "p = 0.25"), (1.0, "p = 1.00")])  # fmt: skip
def test_a_p_is_never_rounded_to_the_other_side_of_five_percent(p: float, text: str) -> None:
    assert p_text(p) == text


# -------------------------------------------------------------------------------------------------------------- per image


def test_mcnemar_compares_only_runs_of_the_same_test_images(tmp_path: Path) -> None:
    records = two_arms([0.8, 0.8, 0.8], [0.9, 0.9, 0.9])
    write_runs(tmp_path, records, images=100)
    other = {"index": np.arange(100), "label": np.arange(100) % 7, "predicted": np.zeros(100, dtype=int)}
    np.savez(tmp_path / "run4" / "predictions.npz", **other)  # other labels: another test set
    (tmp_path / "run5" / "predictions.npz").write_bytes(b"PK cut short")
    (one,) = compare(collect(read_sources([tmp_path]), ACC1))
    assert list(one.images.by_seed) == [0]
    assert one.images.reason == "no predictions were kept: seed 2; other test images: seed 1"
    pooled = one.images.pooled
    assert pooled is not None
    assert pooled.better - pooled.worse == 10  # of 100 images
    with (
        np.load(tmp_path / "run0" / "predictions.npz") as first,
        np.load(tmp_path / "run3" / "predictions.npz") as second,
    ):
        vit, eit = (file["predicted"] == file["label"] for file in (first, second))
    assert (pooled.better, pooled.worse) == (np.sum(eit & ~vit), np.sum(vit & ~eit))
    (table, by_seed) = images_tables([one])
    assert "not of the noise between trainings" in table.note
    assert len(by_seed.rows) == 1


def test_rows_of_predictions_may_lie_in_any_order(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", made_record("vit_x", 0, 0.8), images=50)
    second = shutil.copytree(first, tmp_path / "b")
    with np.load(first / "predictions.npz") as file:
        order = np.random.default_rng(0).permutation(50)
        np.savez(second / "predictions.npz", **{name: file[name][order] for name in file})
    a, b = (read_sources([folder])[0].entries[0].predictions for folder in (first, second))
    assert a is not None
    assert b is not None
    assert a.of == b.of
    assert (a.correct == b.correct).all()


# ------------------------------------------------------------------------------------------------ curves, fronts, factors, cost


def test_a_curve_is_mean_and_range_and_its_axes_are_epochs_macs_and_hours(tmp_path: Path) -> None:
    for seed, accuracies in enumerate(((0.1, 0.5), (0.3, 0.6))):
        run = write_run(tmp_path / f"r{seed}", made_record("vit_x", seed, 0.9, macs=10**9), curve=False)
        rows = [f"5,{e},500,,0.5," for e in range(2)] if seed else []
        rows += [f"10,{e},{1000 * (e + 1)},{0.1 * (e + 1) * (seed + 1)},,{a}" for e, a in enumerate(accuracies)]
        (run / "metrics.csv").write_text("\n".join(["step,epoch,images,perf/hours,train/loss,val/acc1", *rows]))
    (arm,) = collect(read_sources([tmp_path]), ACC1).arms
    curve = arm_curve(arm, metric_of("val/acc1"))
    assert curve is not None
    assert curve.x["epochs"] == [1, 2]
    assert curve.x["macs"] == [3e12, 6e12]  # 3 x 1e9 x 1000 images
    assert curve.x["hours"] == pytest.approx([0.15, 0.3])
    assert (curve.mean, curve.low, curve.high) == (pytest.approx([20, 55]), [10, 50], [30, 60])
    (tmp_path / "r0" / "metrics.csv").write_text("step,epoch,images,val/acc1\n10,0,1000,0.4\n")
    (arm,) = collect(read_sources([tmp_path]), ACC1).arms
    curve = arm_curve(arm, metric_of("val/acc1"))
    assert curve is not None
    assert curve.x == {"epochs": [1], "macs": [3e12]}  # hours were not recorded in every run, the second epoch neither


def test_the_front_is_what_no_other_point_beats() -> None:
    points = [(1, 70), (2, 75), (3, 74), (4, 80), (4, 79), (2, 75)]
    assert front(points, less_is_better=True, higher_is_better=True) == [0, 1, 5, 3]
    assert front(points, less_is_better=False, higher_is_better=True) == [3]
    assert front([(1, 0.5), (2, 0.4), (3, 0.6)], less_is_better=True, higher_is_better=False) == [0, 1]


def test_speeds_of_different_devices_are_neither_averaged_nor_drawn_beside_each_other() -> None:
    records = [made_record(arm, s, 0.9) for arm in ("vit_x", "eit_x") for s in range(2)]
    assert costs(ablation(records).arms)["speed"] == {"vit_x": 100.5, "eit_x": 100.5}
    records[3]["placement"] = {**records[3]["placement"], "device": "NVIDIA H100"}
    found = ablation(records)
    assert "speed" not in costs(found.arms)
    assert [row[4] for row in cost_table(found).rows] == ["100", "different devices", "-"]


def test_the_published_models_are_those_of_the_papers_figure() -> None:
    models = published.models()
    assert len(models) == 31
    assert {model.name: (model.params_m, model.top1) for model in models}["EIT-Base"] == (16.0, 80.6)
    assert {model.family for model in models if model.name.startswith(("EIT", "ResNet", "Next"))} == {
        "EIT",
        "ResNet",
        "Next-ViT",
    }


def test_a_factor_is_drawn_where_the_arms_differ_in_one_number() -> None:
    by_strength = [made_record("eit_x", 0, 0.9, strength=k) for k in (0.0, 0.5, 1.0)]
    assert numeric_factor(ablation(by_strength).arms) == "model.ib.strength"
    both = [made_record("eit_x", 0, 0.9, strength=k, epochs=e) for k in (0.0, 0.5, 1.0) for e in (5, 10, 20)]
    assert numeric_factor(ablation(both).arms) is None
    assert numeric_factor(ablation(two_arms([0.9], [0.9])).arms) is None
    stems = [made_record(f"conv{depth}", 0, 0.9) for depth in (1, 2, 3)] + [made_record("patchify", 0, 0.8)]
    for depth, record in enumerate(stems[:3], start=1):
        record["config"]["model"]["stem"] = {"kind": "conv", "depth": depth}
    arms = ablation(stems).arms
    assert numeric_factor(arms) == "model.stem.depth"
    (axes,) = factor_figure(arms, ACC1, "model.stem.depth").axes
    assert [list(line.get_xdata()) for line in axes.lines if line.get_label() == "mean"] == [[1, 2, 3]]
    assert [list(line.get_ydata()) for line in axes.lines if line.get_label() == "patchify"] == [[80, 80]]


def test_cost_is_of_all_runs_and_of_those_that_do_not_count_too() -> None:
    records = [made_record("vit_x", s, 0.9, energy_wh=100.0 if s else None) for s in range(2)]
    records += [made_record("vit_x", 2, 0, status="failed"), made_record("eit_x", 0, 0.9)]
    rows = {row[0]: row for row in cost_table(ablation(records)).rows}
    assert rows["vit_x"][1:4] == ("2", "1.000", "100.0 (of 1 runs)")
    assert rows["eit_x"][3] == "not read"
    assert rows["runs that do not count"][1:3] == ("1", "0.100")
    assert rows["total"][1:3] == ("4", "1.600")
    assert rows["vit_x"][5] == "75.00 G"  # 3 x 2.5e6 MACs x 10,000 images


# ------------------------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A declared sweep with gaps of every kind."""
    rng = np.random.default_rng(1)
    records = []
    for arm, mean in (("vit", 0.90), ("lsra", 0.915), ("eit", 0.93)):
        records += [arm_record(arm, seed, mean + 0.004 * rng.standard_normal()) for seed in range(4)]
    records[1] = {**records[1], "status": "failed", "error": "OSError: disk full\nmore", "result": None}
    records[6]["versions"] = {"code": "def"}
    plan = declared("010-ib", ["vit", "lsra", "eit"], factor=["model.ib"], seeds=range(5))
    states = {11: ("waiting", "")}
    return write_sweep(tmp_path_factory.mktemp("runs"), "010-ib", records, declaration=plan, states=states)


@pytest.fixture(scope="module")
def written(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report, and its records.jsonl."""
    out = tmp_path_factory.mktemp("report")
    assert main([str(sweep), f"out={out}", f"records={out / 'r.jsonl'}"]) == 0
    return out


def test_a_report_is_there_in_every_form(written: Path) -> None:
    figures = {"accuracy", "differences", "curves_epochs", "curves_macs", "curves_hours", "pareto_speed"}
    assert {path.name for path in written.iterdir()} == {
        "report.html", "report.md", "report.tex", "arms.csv", "differences.csv", "images.csv", "cost.csv", "runs.csv",
        "figures", "r.jsonl",
    }  # fmt: skip
    assert {path.name for path in (written / "figures").iterdir()} == {
        f"{f}.{end}" for f in figures for end in ("svg", "png")
    }
    page = (written / "report.html").read_text()
    assert "Does it help?" in page
    assert page.count("<svg") == len(figures)
    assert "lsra \N{MINUS SIGN} vit =\N{NO-BREAK SPACE}+" in page
    text = (written / "report.md").read_text()
    for state in ("failed | OSError: disk full", "unequal | code def, where the others have abc", "waiting", "missing"):
        assert state in text
    assert re.search(r"!\[.*\]\(figures/accuracy.svg\)", text)
    with (written / "arms.csv").open() as handle:
        arms = {row["arm"]: row for row in csv.DictReader(handle)}
    assert [(label, row["seeds"]) for label, row in arms.items()] == [("vit", "3"), ("lsra", "3"), ("eit", "3")]
    with (written / "runs.csv").open() as handle:
        runs = list(csv.DictReader(handle))
    states = [row["state"] for row in runs]
    assert {state: states.count(state) for state in states} == {
        "counts": 9,
        "failed": 1,
        "waiting": 1,
        "unequal": 1,
        "missing": 3,
    }
    values = [float(row["value"]) for row in runs if row["arm"] == "vit" and row["value"]]
    assert float(arms["vit"]["mean"]) == pytest.approx(np.mean(values))


def test_the_page_asks_nothing_of_the_network(written: Path) -> None:
    page = (written / "report.html").read_text()
    found = re.findall(r"""(?:\bsrc=|\bhref=|\baction=|@import|url\()\s*["']?([^"')\s>]+)""", page)
    assert len(found) > 20
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"|http-equiv', "", page)
    assert {address for address in found if not address.startswith("#")} == {"data:,"}  # no icon is asked for either
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert len(set(re.findall(r'\bid="([^"]+)"', page))) == len(re.findall(r'\bid="([^"]+)"', page))
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', page):
        assert f'id="{target}"' in page


def test_records_jsonl_draws_the_same_report_elsewhere(written: Path, tmp_path: Path) -> None:
    records = tmp_path / "elsewhere" / "records.jsonl"
    records.parent.mkdir()
    shutil.copy(written / "r.jsonl", records)
    again = tmp_path / "again"
    assert main([str(records), f"out={again}", f"records={tmp_path / 'twice.jsonl'}"]) == 0
    assert (tmp_path / "twice.jsonl").read_bytes() == records.read_bytes()
    for path in written.rglob("*"):
        if path.is_file() and path.name != "r.jsonl":
            assert (again / path.relative_to(written)).read_bytes() == path.read_bytes(), path.name


def test_records_hold_no_places_and_a_bit_an_image(written: Path) -> None:
    text = (written / "r.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 12
    for word in ("/somewhere/else", "a-host", str(Path.home())):
        assert word not in text
    (first, *_) = lines
    assert first["predictions"]["images"] == 200
    assert len(first["predictions"]["correct"]) == 36  # 25 bytes in base64
    assert list(first["curve"]) == ["step", "epoch", "images", "perf/hours", "val/acc1", "val/loss"]
    assert len(first["curve"]["epoch"]) == 10


def test_an_experiments_folder_is_its_records_or_else_the_sweep_of_its_name(
    sweep: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = tmp_path / "experiments" / "010-ib"
    experiment.mkdir(parents=True)
    (experiment / "experiment.yaml").write_text(
        "question: Of this file?\nfactor: model.ib\nseeds: [0, 1, 2, 3]\nbaseline: eit\n"
        "arms:\n  vit: model=vit_nano\n  lsra: model=lsra_nano\n  eit: model=eit_nano\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EIT_LAB_RUNS", raising=False)
    assert main(["experiments/010-ib"]) == 2
    assert "has no records.jsonl, and there is no sweep 'runs/sweeps/010-ib' of it yet\n" in capsys.readouterr().err
    trial = tmp_path / "runs" / "sweeps" / "010-ib-0a1b2c"
    trial.mkdir(parents=True)
    (trial / "sweep.json").touch()
    assert main(["experiments/010-ib"]) == 2
    assert "yet; of it with another configuration: runs/sweeps/010-ib-0a1b2c\n" in capsys.readouterr().err
    assert main(["runs/sweeps"]) == 2
    assert "nor one folder below; name a sweep in it: 010-ib-0a1b2c\n" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").symlink_to(sweep.parent.parent)
    assert [len(source.entries) for source in read_sources([experiment])] == [12]
    (tmp_path / "runs").unlink()
    shutil.copy(written / "r.jsonl", experiment / "records.jsonl")
    (source,) = read_sources([experiment])
    assert len(source.entries) == 12
    assert source.declaration["question"] == "Of this file?"  # what is declared now, not when they were written
    assert [one.name for one in compare(collect([source], ACC1))] == ["vit - eit", "lsra - eit"]


@pytest.fixture(scope="module")
def hostile() -> Report:
    records = [
        made_record(name, s, 0.9 + 0.01 * s, epochs=n + 3, rule="none")
        for n, name in enumerate(HOSTILE)
        for s in range(2)
    ]
    records.append(made_record(HOSTILE[0], 7, 0, status="failed", error=f"OSError: {HOSTILE[1]}{HOSTILE[2]}"))
    for number, record in enumerate(records):
        record["placement"]["device"] = HOSTILE[number % 3]
    runs = entries(records)
    for run in runs:
        run.arm, run.said = plain_text(run.arm), plain_text(run.record.get("error", ""))
    return build([Source(HOSTILE[0], {"question": HOSTILE[2]}, runs)], baseline=HOSTILE[0])


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_names_and_texts_of_runs_are_text_in_the_page(hostile: Report, tmp_path: Path) -> None:
    from eit_lab.report.page import write_report

    write_report(hostile, tmp_path)
    page = Tags()
    page.feed((tmp_path / "report.html").read_text())
    assert not {"script", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not [key for _, attributes in page.tags for key in attributes if key.startswith("on")]
    text = "".join(page.text)
    for name in (*HOSTILE[:2], plain_text(HOSTILE[2])[:40], "{{ 7*7 }} {% x %}"):
        assert name in text
    assert "49" not in "".join(part for part in page.text if "q" in part and "link" in part)
    drawn = (tmp_path / "figures" / "accuracy.svg").read_text()
    assert "&lt;script&gt;" in drawn
    assert "<script" not in drawn


def test_names_and_texts_of_runs_are_text_in_markdown_and_latex(hostile: Report, tmp_path: Path) -> None:
    assert markdown(r"a|b\c<i>*_x_ `y` [z](u) eit_nano") == r"a\|b\\c\<i\>\*\_x\_ \`y\` \[z\](u) eit_nano"
    assert latex("0.5 (≥ 0.25)") == r"0.5 ($\geq$ 0.25)"  # what pdflatex has no letter for
    assert latex(r"a_b & 5% \x {y} #1 $z$ ~^ <|> -0.18 eit-base") == (
        r"a\_b \& 5\% \textbackslash{}x \{y\} \#1 \$z\$ \textasciitilde{}\textasciicircum{} $<$\textbar{}$>$ $-$0.18 eit-base"
    )
    text = to_latex(hostile)
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) > 20
    for row in rows:
        assert not row.lstrip().startswith("[")  # an argument of the \\ before it
    bare = re.sub(r"\\[&%$#_{}\\]|\\[a-z]+|\$[<>]\$|\$-\$|\$\\pm\$|\$\\geq\$", "", text.replace(r"\\", ""))
    bare = "\n".join(line for line in bare.splitlines() if not line.startswith("%"))
    assert not re.search(r"[%$#_~^\\]", bare)
    assert bare.count("{") == bare.count("}")
    widths = {len(re.findall(r"(?<!\\)&", row)) for row in rows[:1]}
    assert len(widths) == 1
    table = text[text.index(r"\label{tab:arms}") :]
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", table)
    assert columns is not None
    of_arms = [row for row in table[: table.index(r"\end{tabular}")].splitlines() if row.endswith(r"\\")]
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in of_arms} == {len(columns.group(1))}
    lines = tmp_path / "x.md"
    from eit_lab.report.page import to_markdown

    lines.write_text(to_markdown(hostile))
    arms = next(t for t in hostile.tables if t.stem == "arms")
    for line in lines.read_text().splitlines():
        if line.startswith("| vit"):
            assert len(re.findall(r"(?<!\\)\|", line)) in {len(t.columns) + 1 for t in hostile.tables}
    assert len(arms.rows) == len(HOSTILE)


def test_the_colours_of_a_figure_become_the_pages_and_those_in_names_stay() -> None:
    svg = '<?xml?>\n<svg viewBox="0 0 1 1" width="9pt"><metadata>http://x</metadata><g id="a"><path style="fill: #0072B2"/>'
    svg += (
        '<text style="font: 9px \'DejaVu Sans\'">#0072b2 #a</text><use xlink:href="#a" clip-path="url(#a)"/></g></svg>'
    )
    assert inline_svg(svg, stem="f", label='a "b"') == (
        '<svg viewBox="0 0 1 1" role="img" aria-label="a &#34;b&#34;"><g id="f-a"><path style="fill: var(--c0)"/>'
        '<text style="font: 9px var(--font)">#0072b2 #a</text><use xlink:href="#f-a" clip-path="url(#f-a)"/></g></svg>'
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["out=x"], "report takes a folder at least"),
        (["nothing"], "report: no folder 'nothing'"),
        (["."], "no record.json of a run in '.'"),
        (["runs", "basline=vit"], "report: basline is not a key, got 'basline=vit'; nearest: baseline"),
        (["runs", "out="], "report: out must have a value"),
        (["runs", "baseline=vitx"], "baseline must be one of the arms vit_x, got 'vitx'; nearest: vit_x"),
        (
            ["runs", "metric=test/acc"],
            "metric must be one of test/acc1, test/acc5, test/loss, got 'test/acc'; nearest: test/acc",
        ),
        (["runs", "out=file/x"], "out must name a folder that can be written, got 'file/x'"),
        (["runs", "records=no/r.jsonl"], "records must name a file that can be written, got 'no/r.jsonl'"),
        (["file"], "must have one run a line as schema 1 of records.jsonl has it; line 1 has not"),
    ],
)
def test_a_mistake_is_answered_in_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    write_run(here / "runs" / "a", made_record("vit_x", 0, 0.9), images=0, curve=False)
    (here / "file").write_text('{"schema": 9}\n')
    assert main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_the_command_needs_no_torch_and_says_what_it_found(tmp_path: Path) -> None:
    write_runs(tmp_path, [made_record("vit_x", s, 0.9 + s / 100) for s in range(3)], images=0)
    probe = (
        "import sys; from eit_lab.report.__main__ import main; status = main([sys.argv[1]]); "
        "sys.exit(status or 3 * any(name in sys.modules for name in ('torch', 'wandb', 'scipy.stats', 'hydra')))"
    )
    done = subprocess.run([sys.executable, "-c", probe, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "vit_x: test top-1 91.00%, 95% CI [88.52, 93.48], n = 3 seeds." in done.stdout
    assert f"report {tmp_path / 'report' / 'report.html'}" in done.stdout
    assert (tmp_path / "report" / "report.html").is_file()


def test_help_names_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(key in said for key in ("FOLDER", "out=DIR", "baseline=ARM", "metric=KEY", "records=FILE"))


@pytest.mark.slow
def test_a_thousand_runs_take_seconds(tmp_path: Path) -> None:
    records = [
        made_record(f"eit_{n}" if n else "vit", seed, 0.8 + 0.0005 * n, strength=n / 200, epochs=50)
        for n in range(200)
        for seed in range(5)
    ]
    folder = write_runs(tmp_path / "runs", records, images=10_000)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "eit_lab.report", str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "200 arms; 1,000 runs that count" in done.stdout
    # Of one core, start and all; several times what it takes on ours, so that a slower one passes too.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30


def test_records_of_two_sources_stay_two(tmp_path: Path) -> None:
    plan = declared("b", ["vit", "eit"], factor=["model.ib"], seeds=[0])
    sources = [
        Source("a", {}, entries([made_record("vit_x", 0, 0.9)])),
        Source("b", plan, entries([arm_record("vit", 0, 0.9), arm_record("eit", 0, 0.95)])),
    ]
    assert write_records(tmp_path / "r.jsonl", sources) == 3
    found = read_sources([tmp_path / "r.jsonl"])
    assert [(source.name, len(source.entries)) for source in found] == [("a", 1), ("b", 2)]
    first, again = (csv_files(build(of)) for of in (sources, found))
    assert first == again


def test_the_ablation_of_nothing_is_empty() -> None:
    found: Ablation = collect([Source("s", {}, [])], ACC1)
    assert (found.arms, found.pairs, found.left_out) == ([], [], [])
