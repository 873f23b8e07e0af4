"""Which runs are one arm, which do not count, and the short table at the end of a sweep."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eit_lab.report.arms import Ablation, collect
from eit_lab.report.comparison import compare, compare_all
from eit_lab.report.metric import metric_of
from eit_lab.report.records import RunEntry, Source, read_sources, write_records
from eit_lab.report.summary import write_summary
from made_runs import declared, made_record, write_run, write_runs, write_sweep

ACC1 = metric_of("test/acc1")


def entries(records: Sequence[dict[str, Any]]) -> list[RunEntry]:
    return [
        RunEntry(
            record=record,
            arm=record["config"]["run"]["arm"] or record["name"],
            seed=record["seed"],
            status=record["status"],
            said="",
            name=f"run{number}",
        )
        for number, record in enumerate(records)
    ]


def ablation(
    records: Sequence[dict[str, Any]], *, declaration: dict[str, Any] | None = None, baseline: str | None = None
) -> Ablation:
    return collect([Source("s", declaration or {}, entries(records))], ACC1, baseline=baseline)


def arm_record(arm: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    """Of a declared arm."""
    record = made_record(f"{arm}_nano", seed, accuracy, **more)
    record["config"]["run"]["arm"] = arm
    return record


def seeds_by_arm(found: Ablation) -> dict[str, list[int]]:
    return {arm.label: arm.seeds for arm in found.arms}


# ----------------------------------------------------------------------------------------------------------------- summary


def test_the_table_has_known_statistics(tmp_path: Path) -> None:
    vit = [made_record("vit_x", seed, accuracy) for seed, accuracy in enumerate((0.90, 0.92, 0.94))]
    eit = [made_record("eit_x", seed, accuracy) for seed, accuracy in enumerate((0.93, 0.94, 0.98))]
    failed = made_record("eit_x", 3, 0.0, status="failed", error="OSError: disk full")
    write_runs(tmp_path, [*eit, *vit, failed], images=0)
    text = write_summary(tmp_path)
    assert "92.00 ± 2.00" in text
    assert "95.00 ± 2.65" in text
    # differences 3, 2, 4: mean 3, sd 1, t(2) = 4.303: half width 4.303 / sqrt 3 = 2.484
    assert "+3.00 [+0.52, +5.48]" in text
    assert "1,234,567" in text
    assert "2.50 M" in text
    assert "not in the table: eit_x seed 3 is failed (OSError: disk full)" in text
    assert text.index("vit_x") < text.index("eit_x")  # the plain ViT is what the others are held against
    with (tmp_path / "summary.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [(r["arm"], r["seed"], r["test_acc1"]) for r in rows[:2]] == [("vit_x", "0", "0.9"), ("vit_x", "1", "0.92")]
    assert [r["state"] for r in rows] == ["counts"] * 6 + ["failed"]
    assert "| vit_x | 1,234,567 |" in (tmp_path / "summary.md").read_text()
    image = np.asarray(Image.open(tmp_path / "accuracy.png").convert("RGB"))
    colours = {tuple(pixel) for pixel in image[::2].reshape(-1, 3).tolist()}
    assert {(0, 114, 178), (230, 159, 0)} < colours  # the first arm's and the second's
    assert "<svg" in (tmp_path / "accuracy.svg").read_text()


def test_a_folder_without_a_finished_run_says_what_is_there(tmp_path: Path) -> None:
    write_runs(tmp_path, [made_record("vit_x", 0, 0, status="running")])
    text = write_summary(tmp_path)
    assert text.splitlines() == [f"no finished run in {tmp_path}", "not in the table: vit_x seed 0 is running"]


def test_differences_are_paired_by_seed_and_unequal_seeds_are_said(tmp_path: Path) -> None:
    of = (("vit_x", 0, 0.9), ("vit_x", 1, 0.5), ("eit_x", 1, 0.6), ("eit_x", 2, 0.1))
    records = [made_record(*one) for one in of]
    (one,) = compare(ablation(records))
    assert one.seeds == (1,)
    assert one.alone == (0, 2)
    assert one.differences == pytest.approx((10,))
    write_runs(tmp_path, records, images=0)
    text = write_summary(tmp_path)
    assert "arms have different seeds (vit_x: 0, 1; eit_x: 1, 2)" in text
    assert "(one seed: no interval)" in text


def test_a_damaged_record_is_said_and_hides_no_other(tmp_path: Path) -> None:
    write_runs(tmp_path, [made_record("vit_x", 0, 0.9), made_record("vit_x", 1, 0.9)], images=0)
    (tmp_path / "run1" / "record.json").write_text('{"schema": 1, "iden')
    text = write_summary(tmp_path)
    assert "90.00" in text
    assert "not in the table: run1 seed ? is damaged" in text


def test_mixed_versions_of_the_code_are_said() -> None:
    records = [made_record("vit_x", 0, 0.9), made_record("eit_x", 0, 0.9, versions={"code": "def"})]
    assert ablation(records).unequal == [
        "runs were made with 2 versions of the code (abc, def): rerun for a fair table"
    ]


# ----------------------------------------------------------------------------------------------- runs that were not declared


def test_arms_are_told_apart_by_what_differs_when_their_name_does_not() -> None:
    found = ablation([made_record("eit_x", s, 0.9, strength=k) for k in (1.0, 0.25, 0.5) for s in (0, 1)])
    assert seeds_by_arm(found) == {
        "eit_x strength=0.25": [0, 1],
        "eit_x strength=0.5": [0, 1],
        "eit_x strength=1.0": [0, 1],
    }


def test_a_name_grows_by_as_few_keys_as_tell_its_arms_apart() -> None:
    records = [made_record("eit_x", 0, 0.9, strength=k, epochs=e) for k, e in ((0.1, 5), (0.1, 10), (0.2, 5), (0.3, 5))]
    records += [made_record("vit_x", 0, 0.9)]
    records[0]["config"]["recipe"]["lr"] = 0.5  # a third key, which is not needed
    assert {arm.label for arm in ablation(records).arms} == {
        "vit_x",
        "eit_x strength=0.1 epochs=5",
        "eit_x strength=0.1 epochs=10",
        "eit_x strength=0.2 epochs=5",
        "eit_x strength=0.3 epochs=5",
    }


def test_runs_in_other_places_are_one_arm_and_the_later_of_two_runs_counts() -> None:
    records = [made_record("vit_x", seed, 0.9, ended=f"2026-01-0{seed + 1}") for seed in range(2)]
    records[0]["config"]["trainer"] = {"devices": 8, "progress_bar": False}
    records.append(made_record("vit_x", 0, 0.5, ended="2026-01-09"))
    found = ablation(records)
    assert [arm.values(ACC1) for arm in found.arms] == [[50, 90]]
    assert [(left.name, left.state, left.why) for left in found.left_out] == [
        ("run0", "repeated", "the same arm and seed has a later run")
    ]


def test_a_difference_never_mixes_two_factors() -> None:
    records = []
    for size, width in (("s", 10), ("l", 20)):
        for arm, accuracy in (("vit", 0.80), ("eit", 0.80 + width / 1000)):
            made = made_record(f"{arm}_{size}", 0, accuracy)
            made["config"]["model"]["size"] = {"name": size, "embed_dim": width}
            records.append(made)
    found = compare(ablation(records))
    assert [one.name for one in found] == ["eit_s - vit_s", "eit_l - vit_l"]
    assert [one.differences for one in found] == [pytest.approx((1,)), pytest.approx((2,))]
    # Two sizes of EIT and no ViT differ in one key only, the width: the first is the baseline.
    (one,) = compare(ablation([record for record in records if record["name"].startswith("eit")]))
    assert one.name == "eit_l - eit_s"
    # A baseline that is asked for is taken, and what is wrong with it said.
    held = compare(ablation(records, baseline="vit_s"))
    assert [one.caveats for one in held if one.arm.label == "eit_l"] == [
        ("several factors at once (model.size, model.ib)",)
    ]
    assert [one.caveats for one in held if one.arm.label == "eit_s"] == [()]


def test_the_same_name_over_other_files_is_another_arm() -> None:
    records = [made_record("eit_x", 0, 0.9), made_record("eit_x", 0, 0.5)]
    records[1]["data"] = {"fingerprint": "4567"}
    assert list(seeds_by_arm(ablation(records))) == ["eit_x fingerprint=0123", "eit_x fingerprint=4567"]


def test_an_external_model_without_an_inductive_bias_is_an_arm_like_any_other() -> None:
    records = [made_record("vit_x", s, 0.9) for s in range(2)]
    for seed in range(2):
        other = made_record("resnet50", seed, 0.8)
        other["config"]["model"] = {"kind": "timm", "name": "resnet50", "timm_name": "resnet50"}
        records.append(other)
    found = ablation(records)
    assert seeds_by_arm(found) == {"vit_x": [0, 1], "resnet50": [0, 1]}
    assert found.pairs == []  # it differs in more than the inductive bias
    assert [one.name for one in compare(ablation(records, baseline="vit_x"))] == ["resnet50 - vit_x"]


# --------------------------------------------------------------------------------------------------------- declared ablations


def test_a_declared_arm_never_averages_over_a_run_that_is_unlike_the_others() -> None:
    records = [arm_record(arm, seed, 0.9) for arm in ("vit", "eit") for seed in range(4)]
    records[1]["config"]["recipe"]["epochs"] = 5
    records[2]["versions"] = {"code": "def"}
    records[3]["placement"] = {"precision": "bf16-mixed"}
    records[5]["data"] = {"fingerprint": "4567"}
    records[6]["config"]["model"]["ib"]["strength"] = 0.5  # inside the factor, and yet not this arm
    found = ablation(records, declaration=declared("a", ["vit", "eit"], factor=["model.ib"], seeds=range(4)))
    assert seeds_by_arm(found) == {"vit": [0], "eit": [0, 3]}
    assert [(left.arm, left.seed, left.state, left.why) for left in found.left_out] == [
        ("vit", 1, "unequal", "recipe.epochs 5, where the others have 10"),
        ("vit", 2, "unequal", "code def, where the others have abc"),
        ("vit", 3, "unequal", "precision bf16-mixed, where the others have 32-true"),
        ("eit", 1, "unequal", "data 4567, where the others have 0123"),
        ("eit", 2, "unequal", "model.ib.strength 0.5, where the others have 1.0"),
    ]


def test_the_variant_that_most_runs_of_the_ablation_share_is_kept_in_every_arm() -> None:
    new = {"versions": {"code": "def"}}
    records = [arm_record("vit", seed, 0.9, **new) for seed in range(2)] + [arm_record("vit", 9, 0.9)]
    records += [arm_record("eit", seed, 0.9) for seed in range(3)]
    found = ablation(records, declaration=declared("a", ["vit", "eit"], factor=["model.ib"], seeds=range(3)))
    # By itself the first arm would keep its two newer runs, and be compared with none of the other's.
    assert seeds_by_arm(found) == {"vit": [9], "eit": [0, 1, 2]}


def test_declared_seeds_that_were_never_started_are_missing() -> None:
    declaration = declared("a", ["vit", "eit"], factor=["model.ib"], seeds=range(2))
    found = ablation([arm_record("vit", 0, 0.9), arm_record("vit", 1, 0.9)], declaration=declaration)
    assert [(left.arm, left.seed, left.state) for left in found.left_out] == [
        ("eit", 0, "missing"),
        ("eit", 1, "missing"),
    ]
    assert found.unmet == ["eit - vit: not compared, eit has no run that counts."]


def test_planned_comparisons_are_the_declared_ones() -> None:
    records = [arm_record(arm, seed, 0.9) for arm in ("vit", "lsra", "eit") for seed in range(2)]
    plan = declared("a", ["vit", "lsra", "eit"], factor=["model.ib"], seeds=range(2))
    assert [one.name for one in compare(ablation(records, declaration=plan))] == ["lsra - vit", "eit - vit"]
    plan["compare"] = [["eit", "lsra"]]
    assert [one.name for one in compare(ablation(records, declaration=plan))] == ["eit - lsra"]
    held = ablation(records, declaration=plan, baseline="eit")  # a baseline that is asked for goes before
    assert [one.name for one in compare(held)] == ["vit - eit", "lsra - eit"]


CROSSED = ["vit_10", "eit_10", "vit_100", "eit_100"]
LARGER_LEAD = [["eit_10", "vit_10"], ["eit_100", "vit_100"]]


def crossed_record(arm: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    """Of an arm of CROSSED: a mixer at a share of the training images."""
    record = arm_record(arm, seed, accuracy, **more)
    record["config"]["data"]["train_share"] = int(arm.split()[0].rpartition("_")[2]) / 100
    return record


def crossed_plan(*interactions: Any, **more: Any) -> dict[str, Any]:
    """Two pairs and differences of their differences."""
    factor = ["model.ib", "data.train_share"]
    plan = declared("a", CROSSED, factor=factor, seeds=[0], compare=LARGER_LEAD, baseline=None)
    return {**plan, "interactions": list(interactions), **more}


def interactions_of(found: Ablation) -> list[str]:
    return [one.name for one in compare_all(found)[1]]


def test_planned_interactions_are_the_declared_ones_each_once() -> None:
    records = [crossed_record(arm, seed, 0.9) for arm in CROSSED for seed in range(2)]
    second = [["eit_100", "vit_100"], ["eit_10", "vit_100"]]
    plan = crossed_plan(LARGER_LEAD, second, LARGER_LEAD)
    found = ablation(records, declaration=plan)
    names = ["(eit_10 - vit_10) - (eit_100 - vit_100)", "(eit_100 - vit_100) - (eit_10 - vit_100)"]
    assert interactions_of(found) == names
    assert [one.name for one in compare(found)] == ["eit_10 - vit_10", "eit_100 - vit_100"]
    assert interactions_of(ablation(records, declaration=plan, baseline="vit_10")) == []  # asked for instead
    assert interactions_of(ablation(records, declaration={**plan, "interactions": []})) == []
    twice = [Source(name, plan, entries(records)) for name in ("one", "two")]
    assert interactions_of(collect(twice, ACC1)) == names


def test_an_interaction_without_runs_of_all_its_arms_is_said_and_not_made() -> None:
    of = [["eit_10", "eit_100"], ["vit_10", "vit_100"]]
    records = [crossed_record(arm, 0, 0.9) for arm in ("vit_100", "eit_100")]
    found = ablation(records, declaration=crossed_plan(of, compare=[["eit_100", "vit_100"]]))
    assert interactions_of(found) == []
    assert found.unmet == [
        "(eit_10 - eit_100) - (vit_10 - vit_100): not compared, eit_10 and vit_10 have no run that counts."
    ]


def test_interactions_are_made_at_each_value_of_a_further_axis() -> None:
    records = []
    for lr in (0.1, 0.2):
        for arm in CROSSED:
            record = crossed_record(arm, 0, 0.9)
            record["config"]["run"]["arm"] = f"{arm} recipe.lr={lr}"
            record["config"]["recipe"]["lr"] = lr
            records.append(record)
    found = ablation(records, declaration=crossed_plan(LARGER_LEAD, factor=["model.ib", "data", "recipe.lr"]))
    assert interactions_of(found) == [
        f"(eit_10 recipe.lr={lr} - vit_10 recipe.lr={lr}) - (eit_100 recipe.lr={lr} - vit_100 recipe.lr={lr})"
        for lr in (0.1, 0.2)
    ]
    assert found.unmet == []


def test_arms_of_a_matched_budget_may_differ_in_their_width_and_others_may_not() -> None:
    records = [arm_record("vit", 0, 0.9), arm_record("eit", 0, 0.9)]
    records[1]["config"]["model"]["size"] = {"name": "nano", "embed_dim": 136}
    plan = declared("a", ["vit", "eit"], factor=["model.ib"], seeds=[0])
    (one,) = compare(ablation(records, declaration=plan))
    assert one.caveats == ("model.size.embed_dim (136; 128)",)
    (one,) = compare(ablation(records, declaration={**plan, "match": "params"}))
    assert one.caveats == ()


def test_what_batch_norm_sees_must_be_equal_where_there_is_batch_norm() -> None:
    def made(seed: int, batch: int, norm: str) -> dict[str, Any]:
        record = arm_record("vit", seed, 0.9, placement={"precision": "32-true", "per_device_batch": batch})
        record["config"]["model"]["stem"] = {"kind": "conv", "norm": norm}
        return record

    plan = declared("a", ["vit"], factor=["model.ib"], seeds=range(3))
    of = [(0, 64), (1, 64), (2, 32)]
    assert seeds_by_arm(ablation([made(s, b, "layer") for s, b in of], declaration=plan)) == {"vit": [0, 1, 2]}
    assert seeds_by_arm(ablation([made(s, b, "batch") for s, b in of], declaration=plan)) == {"vit": [0, 1]}


def test_batch_norm_sees_the_images_of_all_gpus_and_is_found_in_models_by_name() -> None:
    def made(seed: int, batch: int, world_size: int, **more: Any) -> dict[str, Any]:
        placement = {"precision": "32-true", "per_device_batch": batch, "world_size": world_size, **more}
        return arm_record("resnet", seed, 0.9, placement=placement)

    def seeds(**more: Any) -> list[int]:
        records = [made(0, 64, 1, **more), made(1, 64, 1, **more), made(2, 32, 2, **more), made(3, 16, 1, **more)]
        plan = declared("a", ["resnet"], factor=["model"], seeds=range(4))
        return seeds_by_arm(ablation(records, declaration=plan))["resnet"]

    assert seeds(batch_norm=True, accelerator="cuda") == [0, 1, 2]
    assert seeds(batch_norm=True, accelerator="cpu") == [0, 1]
    assert seeds(batch_norm=False, accelerator="cuda") == [0, 1, 2, 3]


def test_runs_that_start_from_other_weights_are_other_arms() -> None:
    def made(seed: int, start: str | None, *, path: str | None = None) -> dict[str, Any]:
        record = made_record("vit_x", seed, 0.9, checkpoint=start)
        record["config"]["checkpoint"] = path
        return record

    starts = (None, "one", "two")
    found = ablation([made(seed, start) for start in starts for seed in (0, 1)])
    assert [arm.seeds for arm in found.arms] == [[0, 1]] * 3
    assert found.left_out == []
    moved = ablation([made(0, "one", path="a.pth"), made(1, "one", path="b.pth")])
    assert [arm.seeds for arm in moved.arms] == [[0, 1]]
    plan = declared("a", ["vit_x"], factor=["model.ib"], seeds=[0, 1, 2])
    mixed = ablation([made(0, "one"), made(1, "one"), made(2, None)], declaration=plan)
    assert seeds_by_arm(mixed) == {"vit_x": [0, 1]}
    assert [(left.seed, left.state) for left in mixed.left_out] == [(2, "unequal")]


def test_a_key_that_follows_the_seed_parts_no_arms() -> None:
    records = [made_record(arm, seed, 0.9) for arm in ("vit_x", "eit_x") for seed in range(3)]
    for record in records:
        record["config"]["data"]["split_seed"] = record["seed"]
    adhoc = {
        **declared("a", ["vit_x"], factor=["model", "data.split_seed"], seeds=range(3)),
        "arms": {},
        "baseline": None,
    }
    found = ablation(records, declaration=adhoc)
    assert seeds_by_arm(found) == {"vit_x": [0, 1, 2], "eit_x": [0, 1, 2]}
    (one,) = compare(found)
    assert (one.name, one.caveats) == ("eit_x - vit_x", ())
    axis = [made_record("vit_x", seed, 0.9) for seed in (0, 1, 0, 1)]
    for record, split in zip(axis, (0, 0, 1, 1), strict=True):
        record["config"]["data"]["split_seed"] = split
    found = ablation(axis, declaration={**adhoc, "factor": ["data.split_seed"]})
    assert [arm.seeds for arm in found.arms] == [[0, 1]] * 2


def test_arms_at_several_values_of_a_further_axis_are_compared_at_each_of_them() -> None:
    records = []
    for lr in (0.1, 0.2):
        for arm in ("vit", "eit", "eit x"):
            record = arm_record(arm, 0, 0.9)
            record["config"]["run"]["arm"] = f"{arm} recipe.lr={lr}"
            record["config"]["recipe"]["lr"] = lr
            records.append(record)
    plan = declared("a", ["vit", "eit", "eit x"], factor=["model.ib", "recipe.lr"], seeds=[0, 1])
    found = ablation(records, declaration=plan)
    assert [one.name for one in compare(found)] == [
        f"{arm} recipe.lr={lr} - vit recipe.lr={lr}" for lr in (0.1, 0.2) for arm in ("eit", "eit x")
    ]
    assert found.unmet == []
    assert {(left.arm, left.seed) for left in found.left_out} == {(r["config"]["run"]["arm"], 1) for r in records}


def test_an_arm_that_two_ablations_share_is_held_by_the_factor_of_each() -> None:
    def source(name: str, width: int, **more: Any) -> Source:
        records = [arm_record(arm, 0, 0.9) for arm in ("vit", "eit")]
        records[0]["config"]["model"]["size"]["embed_dim"] = width
        plan = declared(name, ["vit", "eit"], factor=["model.ib"], seeds=[0], **more)
        return Source(name, plan, [RunEntry(record=r, arm=r["config"]["run"]["arm"], seed=0, status="finished", said="", name=r["name"] + str(width if n == 0 else "")) for n, r in enumerate(records)])  # fmt: skip

    equal, matched = source("001", 128), source("005", 112, match="params", reference="eit")
    for sources in ((equal, matched), (matched, equal)):
        made = compare(collect(sources, ACC1))
        assert [one.caveats for one in made] == [(), ()]
        assert len({id(one.arm) for one in made}) == 1
    # Three of one name, each another arm.
    others = [source("same", width) for width in (128, 112, 96)]
    labels = [arm.label for arm in collect(others, ACC1).arms]
    assert labels == ["vit", "eit", "vit (same)", "vit (same) (2)"]


def test_two_folders_of_one_name_stay_two_sources_in_records(tmp_path: Path) -> None:
    plan = declared("same", ["vit", "eit"], factor=["model.ib"], seeds=[0])
    folders = [
        write_sweep(
            tmp_path / where, "same", [arm_record(arm, 0, accuracy) for arm in ("vit", "eit")], declaration=plan
        )
        for where, accuracy in (("a", 0.5), ("b", 0.6))
    ]
    write_records(tmp_path / "all.jsonl", read_sources(folders))
    again = read_sources([tmp_path / "all.jsonl"])
    assert [(source.name, len(source.entries)) for source in again] == [("same", 2), ("same-2", 2)]


@pytest.mark.parametrize("value", ["nan", None, "inf", True])
def test_a_result_that_is_no_number_is_not_averaged_over(value: object) -> None:
    records = [made_record("vit_x", 0, 0.9), made_record("vit_x", 1, 0.9)]
    records[1]["result"]["test/acc1"] = value
    found = ablation(records)
    assert seeds_by_arm(found) == {"vit_x": [0]}
    assert [left.state for left in found.left_out] == ["no metric"]


def test_what_runs_were_made_on_is_said_and_does_not_part_them() -> None:
    records = [made_record("vit_x", s, 0.9) for s in range(4)]
    records[1]["placement"] = {**records[1]["placement"], "device": "NVIDIA H100", "world_size": 8}
    records[2]["versions"] = {"code": "abc", "packages": {"torch": "2.11.0"}}
    records[2]["restarts"] = 2
    records[3]["versions"]["processor"] = "AMD EPYC"
    found = ablation(records)
    assert seeds_by_arm(found) == {"vit_x": [0, 1, 2, 3]}
    assert found.unequal == [
        "different devices: 1 x CPU, 1 thread (2 runs), 8 x NVIDIA H100 (1 run), 1 x AMD EPYC (CPU), 1 thread (1 run)",
        "different versions of torch: 2.14.1 (3 runs), 2.11.0 (1 run)",
        "stopped and gone on from their own state: vit_x seed 2 (2x)",
    ]


# -------------------------------------------------------------------------------------------------------------------- sources


def test_a_sweep_is_read_with_the_jobs_that_have_no_record_and_those_it_superseded(tmp_path: Path) -> None:
    records = [arm_record("eit", seed, 0.9) for seed in range(5)]
    records[3]["status"] = "running"  # so its process left it, and the launcher saw it end
    plan = declared("s", ["eit"], factor=["model.ib"], seeds=range(5))
    states = {2: ("waiting", ""), 4: ("failed", "exit status 137")}
    folder = write_sweep(tmp_path, "s", records, declaration=plan, states=states, images=0)
    events = folder / "events.jsonl"
    events.write_text(events.read_text().replace('"state": "running"', '"state": "failed", "said": "killed"'))
    (source,) = read_sources([folder])
    assert [(entry.seed, entry.status) for entry in source.entries] == [
        (0, "finished"),
        (1, "finished"),
        (2, "waiting"),
        (3, "failed"),
        (4, "failed"),
    ]
    assert source.entries[4].said == "exit status 137"
    # The point of seed 0 runs anew with other code: its first run is superseded, and said.
    from eit_lab.manifest import Entry, add_jobs, read_manifest

    old = read_manifest(folder).jobs["id0"].entry
    write_run(tmp_path / "again", {**records[0], "versions": {"code": "def"}}, images=0)
    new = Entry(**{**vars(old), "identity": "new", "name": "again", "folder": "../../again"})
    add_jobs(folder, [new], declaration=plan, launch={})
    (source,) = read_sources([folder])
    found = collect([source], ACC1)
    assert ("eit", 0, "superseded") in [(left.arm, left.seed, left.state) for left in found.left_out]


def test_two_sources_share_arms_that_are_the_same_and_name_apart_those_that_are_not(tmp_path: Path) -> None:
    plan = declared("one", ["vit", "eit"], factor=["model.ib"], seeds=[0, 1])
    first = [arm_record(arm, seed, 0.9) for arm in ("vit", "eit") for seed in (0, 1)]
    second = [
        arm_record(arm, seed, 0.9, epochs=99 if arm == "eit" else 10) for arm in ("vit", "eit") for seed in (1, 2)
    ]
    found = collect(
        [Source("one", plan, entries(first)), Source("two", {**plan, "name": "two"}, entries(second))], ACC1
    )
    assert seeds_by_arm(found) == {"vit": [0, 1, 2], "eit": [0, 1], "eit (two)": [1, 2]}
    assert [(a.label, b.label) for a, b in found.pairs] == [("eit", "vit"), ("eit (two)", "vit")]
