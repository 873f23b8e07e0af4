"""python -m eit_lab.analyze through the real command: figures against a slow reference, batches and ranks, several runs, mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import TINY, Done, only_run
from eit_lab import create_model
from eit_lab.analysis.profile import GROUP, Profile
from eit_lab.analyze import main
from eit_lab.models.intermediates import Tap

QUICK = ("figures=false", "filter_images=0", "field_images=0", "pictures=0", "untrained_images=0")


def numbers_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "analysis.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run with 40 test images: one group of 32 for similarity, and one of 8."""
    from eit_lab.train import main as train

    root = tmp_path_factory.mktemp("analyze")
    words = ("data.num_samples=160", "trainer.progress_bar=false", "analysis.every_n_epochs=0", f"run.root={root}")
    assert train([*TINY, *words]) == 0
    return only_run(root)


# ------------------------------------------------------------------------------------------------------------------ figures


class _All(Tap):
    """Keeps everything."""

    def __init__(self) -> None:
        self.points: dict[str, torch.Tensor] = {}
        self.attentions: dict[int, torch.Tensor] = {}

    def tokens(self, name: str, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        self.points[name] = x[:, 1:].unflatten(1, grid)
        return x

    def attention(self, layer: int, maps: Any) -> None:
        self.attentions[layer] = maps.maps()


def test_figures_are_those_of_a_slow_reference_over_all_test_images(run: Path, tmp_path: Path) -> None:
    from eit_lab.data.augment import BatchAugment
    from eit_lab.data.module import ImageData
    from eit_lab.models.checkpoints import load_weights
    from eit_lab.trained import load_run

    assert main([f"run={run}", f"out={tmp_path}", *QUICK]) == 0
    found = numbers_of(tmp_path)
    assert (found["data"]["part"], found["data"]["images"], found["weights"], found["grid"]) == (
        "test",
        40,
        "raw",
        [4, 4],
    )

    config = load_run(run)
    data = ImageData(config)
    data.setup("test")
    batch = data.part("test")[[(0, i, 0, 0) for i in range(40)]]
    model = create_model("eit_nano", num_classes=10, img_size=8)
    from eit_lab.models.build import build_model

    model = build_model(config.model, num_classes=10, img_size=8).eval()
    load_weights(model, run / "checkpoints" / "best.ckpt")
    seen = _All()
    with torch.no_grad():
        images = BatchAugment(config.data, config.recipe, num_classes=10, seed=0).normalise(batch.images)
        logits = model(images, tap=seen)
    assert found["data"]["acc1"] == pytest.approx((logits.argmax(-1) == batch.labels).float().mean().item())
    assert found["points"] == list(seen.points)
    for place, tokens in enumerate(seen.points.values()):
        spectrum = np.abs(np.fft.fft2(tokens.double().numpy(), axes=(1, 2))) ** 2
        f = np.fft.fftfreq(4)
        high = 2 * np.hypot(f[:, None], f[None]) > 0.5
        energy = spectrum.sum(-1)
        share = (energy * high).sum((1, 2)) / energy.sum((1, 2))
        assert found["frequency"]["hfd_share"][2][place] == pytest.approx(share.mean(), rel=1e-5)
    for layer, A in seen.attentions.items():
        rows = A[:, :, 1:, 1:].double().numpy()
        rows = rows / rows.sum(-1, keepdims=True)
        place = np.stack(np.divmod(np.arange(16), 4), -1)
        distance = 2.0 * np.hypot(*(place[:, None] - place[None]).transpose(2, 0, 1))
        expected = (rows * distance).sum((-2, -1)).mean(0) / 16
        assert found["heads"]["attention_distance"][layer] == pytest.approx(expected.tolist(), rel=1e-5)
        assert found["heads"]["head_diversity"][layer] == pytest.approx(
            expected.std() / found["heads"]["uniform_distance"], abs=1e-6
        )
    outputs = [found["frequency"]["hfd_share"][2][place] for place in (2, 4)]
    assert found["means"]["hfd_share"] == pytest.approx(np.mean(outputs))


def test_a_profile_is_the_same_for_any_batch_size() -> None:
    torch.manual_seed(0)
    model = create_model("lsra_lite_nano", num_classes=10, img_size=8).eval()
    images = torch.randn(4 * GROUP + 6, 3, 8, 8)
    found = []
    for batch in (GROUP, 2 * GROUP, 5 * GROUP):
        profile = Profile(model, 8, similarity=True, rollout=True)
        for first in range(0, len(images), batch):
            profile.update(images[first : first + batch], first=first)
        found.append(profile.result())

    def numbers(part: Any) -> list[float]:
        if isinstance(part, dict):
            return [x for value in part.values() for x in numbers(value)]
        if isinstance(part, list):
            return [x for value in part for x in numbers(value)]
        return [part] if isinstance(part, float) else []

    first, *others = map(numbers, found)
    assert len(first) > 200
    for other in others:
        assert other == pytest.approx(first, rel=1e-5, abs=1e-6)


def test_groups_of_similarity_stay_where_they_were_when_images_could_not_be_read() -> None:
    torch.manual_seed(0)
    model = create_model("vit_nano", num_classes=10, img_size=8).eval()
    images = torch.randn(3 * GROUP, 3, 8, 8)
    read = torch.ones(3 * GROUP, dtype=torch.bool)
    read[[2, 5, GROUP]] = False
    found = []
    for batch in (GROUP, 3 * GROUP):
        profile = Profile(model, 8, heads=(), similarity=True)
        for first in range(0, len(images), batch):
            kept = read[first : first + batch]
            profile.update(images[first : first + batch][kept], first=first, kept=kept.nonzero()[:, 0])
        found.append(np.array(profile.result()["similarity"]["cka"]))
    np.testing.assert_allclose(*found, rtol=1e-5)
    shifted = Profile(model, 8, heads=(), similarity=True)
    shifted.update(images[read])
    assert (
        np.abs(np.array(shifted.result()["similarity"]["cka"]) - found[0]).max() > 1e-7
    )  # the figure does depend on groups


def test_the_reference_line_is_of_as_many_images_as_asked_for_whatever_the_batch(run: Path, tmp_path: Path) -> None:
    found = []
    for batch in (32, 64):
        words = [f"run={run}", f"out={tmp_path / str(batch)}", *QUICK, "untrained_images=10", f"batch_size={batch}"]
        assert main(words) == 0
        found.append(numbers_of(tmp_path / str(batch))["untrained"])
    assert found[0]["frequency"]["hf_dc_ratio"] == pytest.approx(found[1]["frequency"]["hf_dc_ratio"], rel=1e-6)


def test_all_parts_of_an_analysis_are_there(run: Path, tmp_path: Path) -> None:
    assert (
        main([f"run={run}", f"out={tmp_path}", "filter_images=32", "field_images=4", "pictures=3", "figures=false"])
        == 0
    )
    found = numbers_of(tmp_path)
    assert set(found["filters"]["tokens"]) == {"stem", "blocks.0.mlp"} | set(found["filters"]["tokens"])
    assert found["filters"]["images"] == 32
    assert len(found["receptive_field"]["side_px"]) == 4
    cka = np.array(found["similarity"]["cka"])
    assert cka.shape == (5, 5)
    assert np.diag(cka) == pytest.approx(1)
    assert 0 < np.sum(found["rollout"]["cls"]) < 1  # the rest is CLS's own
    assert found["untrained"]["frequency"]["hfd_share"][2] != found["frequency"]["hfd_share"][2]
    with np.load(tmp_path / "images.npz", allow_pickle=False) as pictures:
        assert pictures["images"].shape == (3, 8, 8, 3)
        assert pictures["attention"].shape == (3, 2, 4, 17, 16)
        assert pictures["attention"].max() == 255
    with np.load(tmp_path / "grams.npz", allow_pickle=False) as file:
        assert file["grams"].shape == (1, 5, GROUP, GROUP)


# --------------------------------------------------------------------------------------------------------------- the command


def test_what_has_been_analysed_is_not_analysed_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run={run}", f"out={tmp_path}", *QUICK]
    assert main(words) == 0
    first = (tmp_path / "analysis.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*words, "batch_size=64"]) == 0  # which changes no figure
    assert "has been analysed (40 images)" in capsys.readouterr().out
    assert (tmp_path / "analysis.json").stat().st_mtime_ns == first
    assert main([*words, "images=36"]) == 0
    assert numbers_of(tmp_path)["data"]["images"] == 36
    again = (tmp_path / "analysis.json").stat().st_mtime_ns
    assert main([*words, "images=36", "overwrite=true"]) == 0
    assert (tmp_path / "analysis.json").stat().st_mtime_ns > again


def test_another_model_in_the_same_folder_is_analysed(here: Path) -> None:
    words = ["data=synthetic", "data.img_size=8", "data.num_samples=64", "trainer.accelerator=cpu", *QUICK, "out=one"]
    for name in ("vit_nano", "lsra_nano"):
        assert main([f"model={name}", *words]) == 0
        assert numbers_of(here / "one")["model"] == name


def test_a_pass_whose_default_is_half_precision_is_analysed(run: Path, tmp_path: Path) -> None:
    words = [f"run={run}", "filter_images=4", "field_images=4", "pictures=1", "images=8", "figures=false"]
    assert main([*words, f"out={tmp_path / 'half'}", "trainer.precision=bf16-true"]) == 0
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    half, whole = numbers_of(tmp_path / "half"), numbers_of(tmp_path / "whole")
    assert half["precision"] == "bf16-true"
    assert half["means"]["hfd_share"] == pytest.approx(whole["means"]["hfd_share"], rel=0.02)
    assert np.array(half["rollout"]["cls"]).sum() == pytest.approx(np.array(whole["rollout"]["cls"]).sum(), rel=0.02)


def test_no_place_of_a_machine_is_in_the_numbers(run: Path, tmp_path: Path) -> None:
    assert main([f"run={run}", f"out={tmp_path}", *QUICK, "data.num_workers=0"]) == 0
    text = (tmp_path / "analysis.json").read_text()
    assert str(tmp_path) not in text
    assert str(run.parent) not in text


def test_an_untrained_model_has_figures_and_no_accuracy(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=vit_nano", "data=synthetic", "data.img_size=8", "data.num_samples=160", "trainer.accelerator=cpu"]
    assert main([*words, *QUICK, "out=one"]) == 0
    assert main([*words, *QUICK, "out=other", "seed=1"]) == 0
    one, other = numbers_of(here / "one"), numbers_of(here / "other")
    assert one["weights"] == "untrained"
    assert one["data"]["acc1"] is None
    assert one["means"]["hfd_share"] != other["means"]["hfd_share"]
    assert "top-1" not in capsys.readouterr().out


def test_a_model_of_timm_says_what_it_cannot_give(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=timm", "model.timm_name=resnet18", "data=synthetic", "data.img_size=32", "data.num_samples=64"]
    assert main([*words, *QUICK, "out=one", "trainer.accelerator=cpu"]) == 0
    found = numbers_of(here / "one")
    assert found["heads"] is None
    assert len(found["points"]) == len(found["frequency"]["hfd_share"][0]) == 5
    assert "no figures of heads: ResNet hands out features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run=nix"], "no folder 'nix'"),
        (["RUN", "batch_size=33"], "batch_size must be a multiple of 32, got 33; nearest: 32"),
        (["RUN", "images=3"], "images must be a whole number of 4 or more, got '3'; nearest: 4"),
        (["RUN", "part=all"], "part must be one of test, val, got 'all'"),
        (["RUN", "imags=8"], "nearest: images"),
        (["RUN", "data=digits"], "data is the run's own, got 'digits'; leave it out"),
        (["RUN", "model=eit_nano"], "model is the run's own, got 'eit_nano'; leave it out"),
        (["figures=false"], "analyze needs a run, a sweep or a model"),
        (["RUN", "out=/proc/nowhere"], "out must be a folder that can be written, got '/proc/nowhere'"),
        (["model=eit_nano", "data=digit"], "data must be one of"),
        (["RUN", "filter_layers=bogus", "filter_images=0"], "filter_layers must be stem or blocks.l.mlp with l < 1"),
        (["FILE", "seed=1"], "seed is the run's own, got '1'; leave it out"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"RUN": f"run={run}", "FILE": f"checkpoint={run / 'checkpoints' / 'best.ckpt'}"}
    assert main([named.get(word, word) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("eit_lab: ")
    assert said in err
    assert err.count("\n") == 1


def test_help_whose_reader_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-m", "eit_lab.analyze", "--help"]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------------------- several runs


@pytest.mark.slow
def test_several_runs_are_put_beside_each_other_and_a_damaged_one_stops_none(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main as train

    words = ("data.num_samples=160", "trainer.progress_bar=false", "recipe.epochs=1", "analysis.every_n_epochs=0")
    shutil.copytree(run, here / "runs" / run.name)
    assert train([*TINY, *words, "model/ib=none", "run.arm=plain"]) == 0
    assert train([*TINY, *words, "seed=1", "run.arm=broken"]) == 0
    assert train([*TINY, *words, "recipe.lr=0.01"]) == 0  # as many seeds 0 of an arm as there are learning rates
    (broken,) = (path.parent for path in here.glob("runs/*/record.json") if "-s1-" in path.parent.name)
    (broken / "checkpoints" / "best.ckpt").write_bytes(b"nothing")
    capsys.readouterr()
    assert main(["runs", *QUICK]) == 1
    out, err = capsys.readouterr()
    assert "1 of 4 runs could not be analysed" in err
    assert "cannot be read as a file of tensors" in out
    compared = json.loads((here / "runs" / "analysis" / "arms.json").read_text())
    assert set(compared["arms"]) == {"eit_nano", "eit_nano (2)", "plain"}
    assert len(compared["between"]) == 3
    for between in compared["between"]:
        cka = np.array(between["cka"])
        assert cka.shape == (5, 5)
        assert np.abs(cka).max() <= 1
    assert (here / "runs" / "analysis" / "arms.png").stat().st_size > 10_000
    assert (here / "runs" / "analysis" / "arms.svg").read_text().count("plain") >= 1


def _copy(run: Path, to: Path, *, arm: str) -> Path:
    """A run of another arm."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("analysis"))
    record = json.loads((to / "record.json").read_text())
    record["config"]["run"]["arm"] = arm
    (to / "record.json").write_text(json.dumps(record))
    return to


@pytest.mark.slow
def test_models_that_were_shown_other_images_are_not_compared(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _copy(run, here / "a", arm="plain")
    config = _copy(run, here / "b", arm="shuffled") / "config.yaml"
    config.write_text(config.read_text().replace("split_seed: 0", "split_seed: 1"))
    assert main(["a", "b", *QUICK, "out=both"]) == 0
    assert "no similarity between plain and shuffled: they were shown other images" in capsys.readouterr().out
    assert json.loads((here / "both" / "arms.json").read_text())["between"] == []
    whole = (here / "a" / "analysis" / "grams.npz").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"nothing", b""):
        (here / "a" / "analysis" / "grams.npz").write_bytes(damaged)
        assert main(["a", "b", *QUICK, "out=both"]) == 2
        out, err = capsys.readouterr()
        assert "1/2  plain seed 0  a/analysis: has been analysed (40 images)" in out
        assert (
            err
            == "eit_lab: a/analysis/grams.npz is damaged or of another version; analyse its run anew: overwrite=true\n"
        )


@pytest.mark.parametrize(("status", "analysed"), [(130, 1), (1, 2)])
def test_processes_that_are_interrupted_stop_all_and_those_that_fail_stop_none(
    status: int, analysed: int, run: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eit_lab import processes

    for name in ("a", "b"):
        _copy(run, here / name, arm=name)
    started: list[str] = []

    def run_ranks(module: str, frozen: str, *, count: int, command: list[str]) -> int:
        started.append(module)
        return status

    monkeypatch.setattr(processes, "run_ranks", run_ranks)
    assert main(["a", "b", *QUICK, "trainer.devices=2"]) == status
    assert len(started) == analysed


@pytest.mark.slow
def test_the_model_page_and_the_page_of_images_are_drawn_later_too(run: Path, tmp_path: Path) -> None:
    words = [f"run={run}", f"out={tmp_path}", "filter_images=0", "field_images=0", "pictures=2", "images=32"]
    assert main([*words, "figures=false"]) == 0
    assert not (tmp_path / "page.png").exists()
    stale = tmp_path / "figures" / "filters_input.png"  # of an analysis that had them
    stale.parent.mkdir()
    stale.write_bytes(b"")
    assert main(words) == 0
    assert {path.name for path in stale.parent.iterdir()} >= {"hfd_share.png", "hfd_share.svg"}
    assert not stale.exists()
    assert (tmp_path / "page.png").stat().st_size > 10_000
    assert "HFD share" in (tmp_path / "page.svg").read_text()
    assert "eit_nano" in (tmp_path / "images.html").read_text()


@pytest.mark.slow
def test_two_ranks_find_the_figures_of_one(run: Path, tmp_path: Path, command: Callable[..., Done]) -> None:
    every = ["filter_images=40", "field_images=36", "pictures=2", "figures=false", "untrained_images=16"]
    for ranks in (1, 2, 3):  # of three, one has no image
        done = command("analyze", f"run={run}", f"out={tmp_path / str(ranks)}", f"trainer.devices={ranks}", *every)
        assert done.status == 0, done.err
    one, *others = (numbers_of(tmp_path / str(ranks)) for ranks in (1, 2, 3))
    for other in others:
        for part in (
            "frequency",
            "heads",
            "similarity",
            "rollout",
            "filters",
            "receptive_field",
            "untrained",
            "means",
            "data",
        ):
            assert _close(one[part], other[part]), part


def _close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return set(a) == set(b) and all(_close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_close, a, b))
    return a == pytest.approx(b, rel=1e-6, abs=1e-9) if isinstance(a, float) else a == b


def test_analyses_are_put_beside_each_other_as_they_are(
    run: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ("data=synthetic", "data.img_size=8", "data.num_samples=160", "trainer.accelerator=cpu")
    assert main(["model=vit_nano", *data, *QUICK, "out=drawn"]) == 0
    assert main([f"run={run}", *QUICK, "out=trained"]) == 0
    before = (here / "trained" / "analysis.json").stat().st_mtime_ns
    assert main(["trained", "drawn", "out=both"]) == 0
    assert "trained: an analysis, taken as it is" in capsys.readouterr().out
    assert (here / "trained" / "analysis.json").stat().st_mtime_ns == before
    compared = json.loads((here / "both" / "arms.json").read_text())
    assert set(compared["arms"]) == {"eit_nano", "vit_nano"}
    assert len(compared["between"]) == 1
    assert main(["trained", "images=8", *QUICK]) == 0  # one alone: nothing to compare, nothing done
    assert main([f"run={run}", *QUICK, "images=8", "out=trained"]) == 0
    assert "trained: replaces the analysis that is there" in capsys.readouterr().out


def test_two_seeds_of_an_arm_are_compared_and_the_baseline_comes_first(run: Path, here: Path) -> None:
    from eit_lab.train import main as train

    words = ("data.num_samples=160", "trainer.progress_bar=false", "recipe.epochs=1", "analysis.every_n_epochs=0")
    for seed in (0, 1):
        assert train([*TINY, *words, f"seed={seed}"]) == 0
    assert train([*TINY, *words, "model=vit_nano", "model.size.embed_dim=16", "model.size.depth=2", "model.size.num_heads=4"]) == 0  # fmt: skip
    assert main(["runs", *QUICK]) == 0
    compared = json.loads((here / "runs" / "analysis" / "arms.json").read_text())
    assert list(compared["arms"]) == ["vit_nano", "eit_nano"]  # as in a report
    within = compared["between"][-1]
    assert (within["a"], within["b"]) == ("eit_nano, seed 0", "eit_nano, seed 1")
    cka = np.array(within["cka"])
    assert 0 < cka.diagonal().min() < cka.diagonal().max() < 1
    svg = (here / "runs" / "analysis" / "figures" / "cka_eit_nano-seed-0_eit_nano-seed-1.svg").read_text()
    assert "eit_nano, seed 1" in svg
