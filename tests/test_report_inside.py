"""The inside of networks in a report: which analyses are read and stand together, sentences, confounds, and every form of it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest

from eit_lab.report.__main__ import main
from eit_lab.report.analyses import QUANTITIES, Analyses, choose, untrained_means
from eit_lab.report.build import Report, build
from eit_lab.report.digest import digest
from eit_lab.report.inside.numbers import read_inside
from eit_lab.report.interpretation import confounds, interpret
from eit_lab.report.page import to_latex, to_markdown
from eit_lab.report.records import Source, read_sources, write_records
from eit_lab.report.summary import write_summary
from made_inside import made_inside
from made_runs import declared, made_record, write_run, write_sweep
from test_report_summary import ACC1, ablation, arm_record, entries

ARMS = ("vit", "lsra", "lsra_lite", "eit")
RULES = {"vit": "none", "lsra": "constant", "lsra_lite": "constant", "eit": "decreasing"}


def analysis(arm: str = "eit", seed: int = 0, *, when: str = "afterwards", means: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:  # fmt: skip
    """A small analysis whose means are those of its parts, but for the ones that are given."""
    without = more.pop("without", ("filters", "similarity", "rollout", "receptive_field"))
    found = made_inside(arm, seed, layers=3, heads=4, grid=(4, 4), without=without, **more)
    places = range(2, 7, 2)
    frequency, heads = found["frequency"], found["heads"]
    found["means"] = {
        "hfd_share": fmean(frequency["hfd_share"][2][n] for n in places),
        "log_amplitude": fmean(frequency["log_amplitude"][n][-1] for n in places),
        **{key: fmean(frequency[key][n] for n in places) for key in ("hf_dc_ratio", "feature_variance")},
    }
    if heads:
        keys = ("attention_distance", "attention_entropy", "attention_nmi", "cls_mass")
        found["means"] |= {key: fmean(fmean(layer) for layer in heads[key]) for key in keys}
        found["means"]["head_diversity"] = fmean(heads["head_diversity"])
    return {**found, "means": found["means"] | (means or {}), "when": when}


def records(arms: Sequence[str] = ARMS, seeds: int = 3, *, change: Callable[[str, int, dict[str, Any]], None] | None = None, **more: Any) -> list[dict[str, Any]]:  # fmt: skip
    """Runs of some arms with an analysis each; their accuracy rises with the arm's place and falls with the seed."""
    made = []
    for place, arm in enumerate(arms):
        for seed in range(seeds):
            found = analysis(arm, seed, weights="raw", means={"hfd_share": 0.2 + 0.1 * place + 0.01 * seed, "head_diversity": 0.1 + 0.01 * place + 0.001 * seed})  # fmt: skip
            record = arm_record(arm, seed, 0.8 + 0.03 * place - 0.001 * seed, rule=RULES[arm], analysis=found)
            record["config"]["model"]["size"] |= {"mlp_ratio": 4.0, "num_heads": 4}
            record["config"]["model"]["ib"]["conv"] = "lightweight" if arm == "lsra_lite" else "depthwise"
            record["config"]["recipe"]["cutmix_alpha"] = 1.0
            found["identity"] = record["identity"] = f"{arm}{seed}"
            if change:
                change(arm, seed, record)
            made.append({**record, **more})
    return made


def chosen(made: Sequence[dict[str, Any]]) -> Analyses:
    found = choose(ablation(made).arms)
    assert found is not None
    return found


def section(made: Sequence[dict[str, Any]], **declaration: Any) -> Report:
    return build([Source("s", declaration, entries(made))])


# ----------------------------------------------------------------------------------------------------------- what is read


def put(folder: Path, record: dict[str, Any], found: object) -> Path:
    """A run on disk with an analysis beside it."""
    write_run(folder, record, images=0, curve=False)
    (folder / "analysis").mkdir()
    (folder / "analysis" / "analysis.json").write_text(found if isinstance(found, str) else json.dumps(found))
    return folder


def test_an_analysis_made_afterwards_goes_before_the_runs_own(tmp_path: Path) -> None:
    own, later = analysis(images=64), analysis(seconds=99.0)
    own.pop("when"), later.pop("when")
    record = made_record("eit_x", 0, 0.9, identity="abc", analysis={**own, "identity": "abc"})
    put(tmp_path / "both", record, {**later, "identity": "abc"})
    write_run(tmp_path / "one", record, images=0, curve=False)
    both, one = (read_sources([tmp_path / name])[0].entries[0] for name in ("both", "one"))
    assert (both.record["analysis"]["when"], both.record["analysis"]["seconds"]) == ("afterwards", 99.0)
    assert both.record["analysis_in_training"]["when"] == "while training"
    assert one.record["analysis"] == both.record["analysis_in_training"]
    assert "analysis_in_training" not in one.record
    assert (both.unread, one.unread) == ("", "")


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({**analysis(), "identity": "other"}, "analysis.json is of another run (other)"),
        ({**analysis(), "identity": None}, "analysis.json is of another run (without an identity)"),
        ("{cut short", "analysis.json cannot be read (JSONDecodeError)"),
        ([1], "analysis.json is no analysis"),
    ],
)
def test_an_analysis_of_another_run_or_a_damaged_one_is_not_taken_and_said(
    tmp_path: Path, found: object, why: str
) -> None:
    put(tmp_path / "run", made_record("eit_x", 0, 0.9, identity="abc"), found)
    (source,) = read_sources([tmp_path / "run"])
    assert "analysis" not in source.entries[0].record
    assert source.entries[0].unread == why
    write_records(tmp_path / "r.jsonl", [source])
    (again,) = read_sources([tmp_path / "r.jsonl"])
    for one in (source, again):
        report = build([one])
        assert report.analyses is not None
        assert [(left.arm, left.why) for left in report.analyses.unused] == [("eit_x", why)]
        assert "No run has an analysis that can be read." in to_markdown(report)


def test_records_keep_few_kilobytes_of_an_analysis_and_no_places(tmp_path: Path) -> None:
    large = made_inside("eit", 0, layers=12, heads=16, grid=(19, 19), pitch=12.0)
    large |= {
        "checkpoint": "/srv/someone/runs/best.ckpt", "host": "node7", "folder": "/data/x", "command": ["a"],
        "settings": {"files": [["best.ckpt", 1, 2]], "overrides": ["data.root=/data/y", "data.eval_resize_share=0.9"], "out": "elsewhere/z"},
        "data": {**large["data"], "root": "/data/q"},
    }  # fmt: skip
    own = made_inside("eit", 0, layers=12, heads=16, grid=(19, 19), without=("filters", "similarity", "rollout", "receptive_field", "untrained"))  # fmt: skip
    record = made_record("eit_x", 0, 0.9, identity=large["identity"], analysis=own)
    put(tmp_path / "run", record, large)
    (source,) = read_sources([tmp_path / "run"])
    write_records(tmp_path / "r.jsonl", [source])
    text = (tmp_path / "r.jsonl").read_text()
    assert len(json.dumps(json.loads(text)["record"]["analysis"], separators=(",", ":"))) < 33_000
    assert len(text) < 48_000
    assert len(json.dumps(large)) > 100_000
    for word in ("/home", "node7", "/data", "/tmp"):
        assert word not in text
    kept = json.loads(text)["record"]["analysis"]
    assert kept["settings"] == {"overrides": ["data.eval_resize_share=0.9"]}
    assert kept["checkpoint"] == "best.ckpt"
    assert kept["heads"]["attention_distance"][3][5] == float(f"{large['heads']['attention_distance'][3][5]:.6g}")
    assert kept["similarity"]["cka"][0][4] == float(f"{large['similarity']['cka'][0][4]:.3g}")
    assert "map" not in kept["receptive_field"]
    assert kept["means"] == {key: float(f"{value:.6g}") for key, value in large["means"].items()}
    assert digest(kept) == kept
    assert read_inside(kept, source="x").layers == 12


# ------------------------------------------------------------------------------------------------------ what stands together


def test_the_ones_made_afterwards_are_taken_where_every_arm_has_them() -> None:
    def change(arm: str, seed: int, record: dict[str, Any]) -> None:
        record["analysis_in_training"] = analysis(arm, seed, when="while training", weights="raw")
        if arm == "eit" and seed > 0:
            del record["analysis"]

    found = chosen(records(change=change))
    assert found.when == "afterwards"
    assert {one.arm.label: list(one.by_seed) for one in found.arms}["eit"] == [0]
    why = "analysed while training, where the others have afterwards"
    assert [(one.arm, one.seed, one.why) for one in found.unused] == [("eit", 1, why), ("eit", 2, why)]


def test_else_the_runs_own_are_taken_and_kinds_are_never_mixed() -> None:
    def change(arm: str, seed: int, record: dict[str, Any]) -> None:
        own = analysis(arm, seed, when="while training", weights="raw")
        record["analysis_in_training"] = own
        if arm == "eit":
            record["analysis"] = record.pop("analysis_in_training")
        if arm == "vit" and seed == 1:
            own["data"]["images"] = 64
        if arm == "lsra" and seed == 2:
            record.pop("analysis"), record.pop("analysis_in_training")

    found = chosen(records(change=change))
    assert found.when == "while training"
    assert {one.arm.label: list(one.by_seed) for one in found.arms} == {
        "vit": [0, 2], "lsra": [0, 1], "lsra_lite": [0, 1, 2], "eit": [0, 1, 2],
    }  # fmt: skip
    whys = {(one.arm, one.seed): one.why for one in found.unused}
    assert whys.keys() == {("vit", 1), ("lsra", 2)}
    assert "afterwards" in whys["vit", 1]
    assert whys["lsra", 2] == "it was not analysed"
    assert (found.used, found.runs) == (10, 12)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda a: a["data"].update(part="val"), "part val, where the others have test"),
        (lambda a: a["data"].update(images=500), "images 500, where the others have 10000"),
        (lambda a: a["data"].update(img_size=[8, 8]), "image size 8x8, where the others have 16x16"),
        (lambda a: a.update(weights="ema"), "weights ema, where the others have raw"),
        (lambda a: a.update(settings={"overrides": ["data.hflip=1.0"]}), "settings data.hflip=1.0, where the others have none"),
        (lambda a: a.update(points=["stem"]), "frequency.frequencies must have 1 entries, got 7"),
        (lambda a: a.update(schema=9), "schema must be 1, got 9"),
        (lambda a: a.update(heads_per_layer=8), "its analysis has other heads_per_layer than the other seeds of its arm"),
    ],
)  # fmt: skip
def test_what_is_unlike_or_cannot_be_read_is_left_out_with_its_reason(
    change: Callable[[dict[str, Any]], None], why: str
) -> None:
    def odd(arm: str, seed: int, record: dict[str, Any]) -> None:
        if (arm, seed) == ("eit", 2):
            change(record["analysis"])

    found = chosen(records(change=odd))
    assert [(one.arm, one.seed) for one in found.unused] == [("eit", 2)]
    assert why in found.unused[0].why
    assert [len(one.by_seed) for one in found.arms] == [3, 3, 3, 2]


def test_no_analysis_at_all_is_no_section() -> None:
    plain = [made_record("vit_x", s, 0.9) for s in range(2)]
    assert choose(ablation(plain).arms) is None
    report = section(plain)
    assert [one.anchor for one in report.sections if one.anchor == "inside"] == []
    assert "HFD" not in to_markdown(report)


def test_the_untrained_reference_is_made_as_the_means_are() -> None:
    found = analysis()
    found["untrained"] = {"frequency": found["frequency"], "heads": found["heads"]}
    assert untrained_means(read_inside(found, source="x")) == pytest.approx(found["means"])
    assert set(found["means"]) == set(QUANTITIES)
    frequency = found["frequency"]
    dc_only = {key: [[0.0] for _ in frequency[key]] for key in ("frequencies", "log_amplitude")}  # of grids of 2x2
    found["untrained"] = {"frequency": {**frequency, **dc_only}}
    assert "log_amplitude" not in untrained_means(read_inside(found, source="x"))


# ------------------------------------------------------------------------------------------------------------- sentences


def test_the_sentences_are_of_the_numbers() -> None:
    found = interpret(chosen(records()), ACC1)
    first, second, third, last = found.sentences
    # HFD share rises with the arm as accuracy does, and with the seed, where accuracy falls.
    one = found.of("hfd_share", "test/acc1")
    assert one is not None
    assert (one.runs, one.arms, one.tests, one.between.value, one.within.value) == (12, 4, 6, 1, -1)
    assert one.within.p_holm == pytest.approx(6 * 2 / 6**4)
    assert re.fullmatch(
        r"HFD share and test top-1: ρ = \+0\.\d\d, 95% CI \[[+-]\d\.\d\d, [+-]\d\.\d\d\] over 12 runs of 4 arms; between the arms' "
        r"means ρ = \+1\.00, p = 0\.083 \(4 arms cannot give less than 0\.083\); within arms ρ = -1\.00, 95% CI \[-1\.00, -0\.\d\d\], "
        r"p = 0\.002\. Corrected for 6 tests \(Holm\), significant within arms \(p = 0\.009\), not between arms\. The signs between and "
        r"within arms are opposite \(Simpson's paradox\): .*",
        first,
    )
    assert second.startswith("Head Diversity and test top-1: ρ = +")
    assert third.startswith("HFD share and Head Diversity: ρ = +1.00")
    assert "opposite" not in third
    assert last.startswith("A correlation over arms is not a cause")
    assert found.headline.startswith(
        "Inside the network, rank correlations, which are no causes: HFD share and test top-1: ρ = +"
    )
    assert found.headline.count("12 runs of 4 arms") == 2


def test_what_arms_alone_show_is_not_laid_to_the_figure() -> None:
    def change(arm: str, seed: int, record: dict[str, Any]) -> None:
        record["result"]["test/acc1"] = 0.8 + 0.03 * ARMS.index(arm) + 0.001 * ((seed + ARMS.index(arm)) % 2)

    (first, *_) = interpret(chosen(records(seeds=5, change=change)), ACC1).sentences
    assert "It is carried by differences between arms" in first


@pytest.mark.parametrize(
    ("arms", "seeds", "said", "headlines"),
    [
        (("eit",), 2, ["HFD share and test top-1: no rank correlation (2 runs: a rank correlation over runs needs 4); between the arms' means no"], 0),
        (("eit",), 5, ["no rank correlation (one arm: nothing is compared with it)", "within arms ρ = -1.00, 95% CI [-1.00, -0."], 0),
        (("vit", "eit"), 1, ["(2 runs: a rank", "between the arms' means no rank correlation (2 arms: of two means it is always 1 or -1)"], 0),
        (("vit", "eit"), 3, ["(no interval: 2 arms are too few to draw arms from) over 6 runs of 2 arms", "within arms ρ = -1.00"], 1),
        (("vit", "lsra", "eit"), 1, ["(3 runs: a rank", "means ρ = +1.00, p = 0.33 (3 arms cannot give less than 0.33)"], 0),
    ],
)  # fmt: skip
def test_too_few_runs_have_a_reason_in_the_sentence(
    arms: Sequence[str], seeds: int, said: list[str], headlines: int
) -> None:
    found = interpret(chosen(records(arms, seeds)), ACC1)
    (first, *_) = found.sentences
    for words in said:
        assert words in first
    assert found.headline.count("HFD share") == headlines
    assert any("not a cause" in one for one in found.sentences) == bool(headlines)


def test_without_attention_there_is_no_head_diversity_to_speak_of() -> None:
    def change(arm: str, seed: int, record: dict[str, Any]) -> None:
        record["analysis"] = {
            **analysis(arm, seed, without=("heads", "widths"), untrained=False),
            "heads_per_layer": None,
        }

    report = section(records(change=change))
    said = report.interpretation.sentences
    assert [one.x for one in report.interpretation.correlations if one.planned] == ["hfd_share"]
    assert "No run has Head Diversity." in said
    assert "inside_heads" not in {table.stem for table in report.tables}
    assert "inside_scatter_head_diversity" not in {drawing.stem for drawing in report.drawings}


# ------------------------------------------------------------------------------------------------------------- confounds


def lines(change: Callable[[str, int, dict[str, Any]], None] | None = None, **how: Any) -> str:
    return "\n".join(confounds(chosen(records(change=change, **how)), ACC1))


def test_the_confounds_are_in_every_report_and_say_what_is_so_here() -> None:
    said = lines()
    assert (
        "The recipe is the same in all arms, CutMix with alpha 1. It has to be: CutMix alone changes how local" in said
    )
    assert "low-pass filter, since its kernels are non-negative and sum to 1: lsra_lite has one" in said
    assert "The hidden width of the MLP (FFN) is 512 (4 x 128) in all arms" in said
    assert "All arms have 4 heads a layer" in said
    assert (
        "Channels of a head (vit, lsra and lsra_lite: 16; eit: 5 to 16, first layers narrowest). A head of 5 channels"
        in said
    )
    assert "none of these arms has one" in lines(arms=("vit", "lsra", "eit"))
    assert "more than" not in said
    assert "end of training" not in said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("recipe.cutmix_alpha", 0.0, "The recipe is not the same in all arms (recipe.cutmix_alpha: 0.0 in vit, 1.0 in lsra, lsra_lite and eit)"),
        ("recipe.lr", 0.5, "The learning rate is not the same in all arms (recipe.lr: 0.5 in vit,"),
        ("model.size.mlp_ratio", 2.0, "is not the same in all arms (256 (2 x 128) in vit; 512 (4 x 128) in lsra, lsra_lite and eit)"),
        ("model.size.embed_dim", 64, "Arms differ in more than their inductive bias (model.size.embed_dim"),
        ("model.stem.kind", "conv", "Arms differ in more than their inductive bias (model.stem.kind): a correlation across them mixes these"),
    ],
)  # fmt: skip
def test_a_confound_that_is_there_is_named(key: str, value: object, said: str) -> None:
    def change(arm: str, seed: int, record: dict[str, Any]) -> None:
        if arm == "vit":
            *parents, last = key.split(".")
            node = record["config"]
            for parent in parents:
                node = node[parent]
            node[last] = value

    assert said in lines(change)


def test_head_diversity_is_not_correlated_across_different_numbers_of_heads() -> None:
    def change(arm: str, seed: int, record: dict[str, Any]) -> None:
        if arm == "vit":
            record["analysis"] = {**analysis(arm, seed, weights="raw"), "heads_per_layer": 6}

    found = chosen(records(change=change))
    assert (
        "Arms have different numbers of heads a layer (4 in lsra, lsra_lite and eit; 6 in vit): Head Diversity"
        in lines(change)
    )
    one = interpret(found, ACC1).of("head_diversity", "test/acc1")
    assert one is not None
    assert one.pooled.value is one.between.value is one.between.p is None
    assert "4 and 6 heads a layer" in one.pooled.reason
    assert one.within.value is not None


def test_grids_depths_weights_and_the_time_of_an_analysis_are_said() -> None:
    def change(arm: str, seed: int, record: dict[str, Any]) -> None:
        if arm == "vit":
            record["analysis"] = made_inside(arm, seed, layers=2, heads=4, grid=(2, 2), pitch=8.0)
        record["analysis"] |= {"when": "while training", "weights": "ema"}

    said = lines(change)
    assert "Arms have different grids of tokens (2x2 in vit; 4x4 in lsra, lsra_lite and eit)" in said
    assert "Arms have 2 and 3 layers" in said
    assert "taken at the end of training on images held out" in said
    assert "These figures are of the averaged (EMA) weights, test top-1 is of the raw ones." in said


# ------------------------------------------------------------------------------------------------------------ every form


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's report: one run unlike, one failed."""
    made = records()
    found = [record.pop("analysis") for record in made]
    made[1] = {**made[1], "status": "failed", "result": None}
    found[5]["data"]["images"] = 77
    root = tmp_path_factory.mktemp("runs")
    plan = declared("010-ib", ARMS, factor=["model.ib"], seeds=range(3))
    folder = write_sweep(root, "010-ib", made, declaration=plan, images=0, curve=False)
    for number, one in enumerate(found):
        (root / f"010-ib-{number:04d}" / "analysis").mkdir()
        (root / f"010-ib-{number:04d}" / "analysis" / "analysis.json").write_text(json.dumps(one))
    out = tmp_path_factory.mktemp("report")
    assert main([str(folder), f"out={out}", f"records={out / 'r.jsonl'}"]) == 0
    assert "HFD share" in write_summary(folder)
    return out


def test_the_section_is_in_every_form(written: Path) -> None:
    page, text, tex = ((written / f"report.{end}").read_text() for end in ("html", "md", "tex"))
    for name in (
        "inside_scatter_hfd_share",
        "inside_scatter_head_diversity",
        "inside_hfd_share",
        "inside_attention_distance",
    ):
        assert (written / "figures" / f"{name}.png").stat().st_size > 5000
        assert f"figures/{name}.svg" in text
    assert 'id="inside"' in page
    assert page.index('id="images"') < page.index('id="inside"') < page.index('id="cost"')
    for words in (
        "CutMix alone changes how local",
        "low-pass filter",
        "not a cause",
        "hidden width of the MLP",
    ):
        assert all(words in form for form in (page, text, tex)), words
    assert "Rank correlations over runs" in page
    assert "Rank correlations over runs" in tex
    assert "| quantities | runs | arms | over all runs |" in text
    assert r"$\rho$ = " in tex
    assert "ρ" not in tex
    assert "10 of 11 runs that count" in text
    assert "| lsra | 2 | images 77, where the others have 10000" in text
    assert text.count("Inside the network, rank correlations, which are no causes") == 1
    drawn = (written / "figures" / "inside_scatter_hfd_share.svg").read_text()
    for label in (*ARMS, "HFD share", "test top-1 (%)"):
        assert f">{label}<" in drawn


def test_arms_carry_the_figures_beside_their_accuracy(written: Path) -> None:
    with (written / "arms.csv").open() as handle:
        arms = {row["arm"]: row for row in csv.DictReader(handle)}
    values = [0.2 + 0.1 + 0.01 * seed for seed in (0, 1)]  # the third is unlike
    assert float(arms["lsra"]["hfd_share"]) == pytest.approx(fmean(values))
    assert float(arms["lsra"]["hfd_share_std"]) == pytest.approx(stdev(values))
    assert float(arms["eit"]["head_diversity"]) == pytest.approx(0.131)
    text = (written / "report.md").read_text().replace("\\", "")
    assert "| arm | seeds | test top-1 (%) | std | 95% interval | HFD share | Head Diversity |" in text
    assert "| lsra | 3 | 82.90 | 0.10 | [82.65, 83.15] | 0.305 ± 0.007 | 0.111 ± 0.001 |" in text
    assert "| lsra | 2 | 0.305 ± 0.007 |" in text  # in the section's own table: of two runs


def test_csv_has_every_number(written: Path) -> None:
    with (written / "inside.csv").open() as handle:
        runs = list(csv.DictReader(handle))
    assert len(runs) == 11
    assert [row["analysed"] for row in runs].count("afterwards") == 10
    assert [float(row["hfd_share"]) for row in runs if row["arm"] == "eit"] == pytest.approx([0.5, 0.51, 0.52])
    assert all(float(row["untrained_hfd_share"]) > 0 for row in runs if row["analysed"] == "afterwards")
    with (written / "correlations.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 3 * (3 + 7)
    planned = [row for row in rows if row["planned"] == "True"]
    assert [row["level"] for row in planned] == ["all runs", "between arms", "within arms"] * 3
    assert {row["tests"] for row in planned} == {"6"}
    assert all(row["p"] == "" for row in rows if row["planned"] == "False" or row["level"] == "all runs")
    ranked = np.array([[float(row["hfd_share"]), float(row["value"])] for row in runs if row["hfd_share"]])
    assert float(planned[0]["rho"]) == pytest.approx(np.corrcoef(ranked.argsort(0).argsort(0).T)[0, 1])


def test_records_have_the_same_figures_elsewhere(written: Path) -> None:
    (source,) = read_sources([written / "r.jsonl"])
    found = chosen([dict(entry.record) for entry in source.entries])
    with (written / "inside.csv").open() as handle:
        rows = {(row["arm"], row["seed"]): row for row in csv.DictReader(handle)}
    assert found.used == 10
    for one in found.arms:
        for seed, inside in one.by_seed.items():
            assert {key: float(rows[one.arm.label, str(seed)][key]) for key in inside.means} == dict(inside.means)


@pytest.mark.slow
def test_records_draw_the_same_figures_elsewhere(written: Path, tmp_path: Path) -> None:
    assert main([str(written / "r.jsonl"), f"out={tmp_path}"]) == 0
    for path in written.rglob("*"):
        if path.is_file() and path.name != "r.jsonl" and path.suffix != ".png":
            assert (tmp_path / path.relative_to(written)).read_bytes() == path.read_bytes(), path.name


def test_latex_has_the_findings_and_names_do_nothing_in_it() -> None:
    def change(arm: str, seed: int, record: dict[str, Any]) -> None:
        record["config"]["run"]["arm"] = f"{arm}_50%&$x$"

    text = to_latex(section(records(change=change)))
    assert r"\paragraph{Inside the network: What the runs say}" in text
    assert r"lsra\_lite\_50\%\&\$x\$ has one" in text
