"""The benchmark of data loading: what it makes, what it compares, and what it leaves behind."""

from __future__ import annotations

import io
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eit_lab.bench import main
from eit_lab.benchmark.crop_limit import CropLimit, NoLimitError
from eit_lab.benchmark.gpu import appetites
from eit_lab.benchmark.photographs import prepare
from eit_lab.benchmark.results import LABELS, Results, name_of, summarise
from eit_lab.benchmark.turns import LoaderTurn, TurnBatches, cores, interleave
from eit_lab.benchmark.workers import large_root
from eit_lab.data.decode import Decoder
from eit_lab.data.index import SplitIndex
from eit_lab.data.layouts import open_root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


def made(cache: Path, *, fresh: bool = False, photos: str | None = None):
    drawn: list[int] = []
    material = prepare(
        cache, images=100, photos=photos, fresh=fresh, workers=1, on_image=drawn.append, on_packed=lambda num: None
    )
    return material, drawn


@pytest.mark.slow
def test_the_pictures_are_like_imagenets_and_made_once(cache: Path) -> None:
    material, drawn = made(cache)
    assert drawn[:3] == [1, 2, 3]
    files = sorted((material.files / "train").rglob("*.JPEG"))
    sizes = [path.stat().st_size for path in files]
    assert len(files) == 100
    assert 85_000 < np.mean(sizes) < 115_000
    assert material.facts["mean_bytes"] == round(np.mean(sizes))
    with Image.open(files[0]) as image:
        assert image.size == (500, 375)
        assert image.layer[0][1:3] == (2, 2)  # 4:2:0
    assert len({path.parent for path in files}) == 100
    before = [path.stat().st_mtime_ns for path in files]
    again, drawn = made(cache)
    assert drawn == [100]
    assert again == material
    assert [path.stat().st_mtime_ns for path in files] == before
    assert (
        open_root(str(material.shards), cache=cache).fingerprint
        == open_root(str(material.files), cache=cache).fingerprint
    )


@pytest.mark.slow
def test_photographs_of_a_folder_are_reduced_before_they_are_cut(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    stripes = np.zeros((800, 2500, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # two pixels become one grey one
    Image.fromarray(stripes).save(tmp_path / "photos" / "stripes.png")
    material, _ = made(tmp_path / "cache", photos=str(tmp_path / "photos"))
    with Image.open(next((material.files / "train").rglob("*.JPEG"))) as image:
        assert np.asarray(image).std() < 3
    assert material.facts["photographs"] == ["stripes.png"]


@pytest.mark.slow
def test_the_limit_decodes_the_pixels_of_the_crop(cache: Path) -> None:
    try:
        limit = CropLimit(cache)
    except NoLimitError as error:
        pytest.skip(str(error))
    material, _ = made(cache)
    data = next((material.files / "train").rglob("*.JPEG")).read_bytes()
    whole = Decoder().decode(data)
    for top, left, height, width in ((0, 0, 375, 500), (37, 101, 200, 300), (90, 7, 64, 33)):
        seconds, pixels, first = limit.run([data], np.array([[top, left, height, width]], dtype=np.int32))
        assert seconds > 0
        assert first <= left
        crop = pixels[:, left - first : left - first + width]
        # The outermost columns and rows miss the neighbours of their chroma.
        expected = whole[top : top + height, left : left + width]
        assert np.array_equal(crop[2:-2, 2:-2], expected[2:-2, 2:-2])


def test_a_damaged_file_ends_the_limit_with_its_number(cache: Path) -> None:
    try:
        limit = CropLimit(cache)
    except NoLimitError as error:
        pytest.skip(str(error))
    image = io.BytesIO()
    Image.new("RGB", (64, 64)).save(image, "JPEG")
    with pytest.raises(NoLimitError, match="image 1"):
        limit.run([image.getvalue(), b"no JPEG"], np.array([[0, 0, 8, 8]] * 2, dtype=np.int32))


def test_no_compiler_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoLimitError, match="apt install gcc"):
        CropLimit(tmp_path)


class Numbered:
    """Gives the indices it was asked for, a batch at a time."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, items: list[tuple[int, int, int, int]]) -> list[int]:
        return [item[1] for item in items]


def test_a_turn_leaves_nothing_over_and_goes_on_through_the_epoch() -> None:
    batches = TurnBatches(10, batch_size=3, as_items=True)
    batches.num = 3
    first, second = list(batches), list(batches)
    assert [len(batch) for batch in first] == [3, 3, 3]
    assert len({item[1] for batch in first for item in batch}) == 9  # no sample twice in an epoch
    assert {item[0] for batch in first for item in batch} == {0}
    assert {item[0] for batch in second for item in batch} == {1}
    turn = LoaderTurn(Numbered(), batch_size=2, workers=2, seconds=0.01, as_items=True, available=cores())
    turn.warm_up()
    workers = {process.pid for process in multiprocessing.active_children()}
    assert turn() > 0
    assert {process.pid for process in multiprocessing.active_children()} == workers
    assert len(workers) == 2


def test_rounds_take_every_loader_once_and_turn_the_order_around() -> None:
    seen: list[str] = []

    def turn(name: str) -> float:
        seen.append(name)
        return float(len(seen))

    rates = interleave({name: lambda name=name: turn(name) for name in "abc"}, rounds=2, on_turn=lambda: None)
    assert seen == ["a", "b", "c", "c", "b", "a"]
    assert rates == {"a": [1.0, 6.0], "b": [2.0, 5.0], "c": [3.0, 4.0]}


@pytest.mark.slow
def test_the_large_index_reads_the_same_records(cache: Path) -> None:
    material, _ = made(cache)
    large = large_root(material.shards, cache / "large", num_samples=250)
    index, small = SplitIndex(large / "train.index"), SplitIndex(material.shards / "train.index")
    assert len(index) == 250
    assert index.key(249) == small.key(49)
    assert index.offset[149] == small.offset[49]
    assert len(open_root(str(large), cache=cache).splits["train"]) == 250


def test_the_appetite_of_a_gpu_follows_from_the_published_macs() -> None:
    base = next(one for one in appetites() if one.model == "eit_base")
    assert base.images_per_s[0] == pytest.approx(0.35 * 989e12 / (6 * base.macs))
    assert base.cores(500.0)[1] == pytest.approx(base.images_per_s[1] / 500)


def some_results(**changes: object) -> Results:
    rates = {name_of(name, workers): [100.0 * workers, 110.0 * workers] for name in LABELS for workers in (1, 2)}
    rates["shards_1"], rates["limit"], rates["decode_and_crop"] = [330.0, 330.0], [1000.0, 1000.0], [790.0, 800.0]
    memory = {
        "batches": 20,
        **{key: {"rss": 590.0, "pss": 200.0, "uss": 50.0} for key in ("peak_mb", "early_mb", "late_mb")},
    }
    alone = {
        "first_batch_s": {"files": [0.4, 0.4], "shards": [0.6, 0.6]},
        "open_index_s": [0.01],
        "open_root_s": [0.02],
        "index_bytes": 1e8,
        "index_samples": 1_281_167,
        "memory": memory,
        "memory_large": {**memory, "late_mb": {"rss": 590.0, "pss": 200.0, "uss": 90.0}},
    }
    facts = {"images": 100, "size": [500, 375], "mean_bytes": 1e5, "qualities": [91, 97], "photographs": ["a.jpg"]}
    return Results(
        options={"batch": 128, "rounds": 2}, material=facts, cores=[0, 1], rates=rates, alone=alone, load=[0.0, 1.0],
        **{"limit": "3.2.0", "no_limit": "", "batch_augment_ms": 1.0, **changes},
    )  # fmt: skip


def test_each_goal_is_met_or_missed_in_words() -> None:
    verdicts = {row.what.strip(): row.verdict for row in summarise(some_results(), command="").rows}
    assert verdicts["crop and flip, shards over torchvision"] == "MISSED"  # median of 3.3 and 3.0
    assert verdicts["two workers over one, shards, crop and flip"] == "MISSED"
    assert verdicts["decode and crop over libjpeg-turbo's crop-only rate"] == "MISSED"
    assert verdicts["first batch after the workers start, files, DeiT recipe"] == "met"
    assert verdicts["first batch after the workers start, shards, DeiT recipe"] == "MISSED"
    assert verdicts["growth of USS from the second tenth to the last"] == "MISSED"
    assert verdicts["opening a root of 1,281,167 images"] == "met"
    assert verdicts["DeiT recipe, files over timm"] == ""


@pytest.mark.slow
def test_a_missing_compiler_leaves_the_row_with_its_reason(tmp_path: Path) -> None:
    summary = summarise(some_results(limit=None, no_limit="no C compiler here"), command="x")
    (row,) = [row for row in summary.rows if "libjpeg-turbo" in row.what]
    assert (row.measured, row.verdict) == ("no C compiler here", "not measured")
    paths = list(summary.save(tmp_path))
    assert [path.name for path in paths] == ["data.json", "data.md", "data.png", "data.svg"]
    assert all(path.stat().st_size for path in paths)
    assert "no C compiler here" in (tmp_path / "data.md").read_text()
    record = json.loads((tmp_path / "data.json").read_text())
    assert record["rates"]["shards_1"] == [330.0, 330.0]
    assert set(record) >= {"date", "command", "cpu", "versions", "options", "material", "alone", "rows", "gpu", "load"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["dota"],
            "bench must be one of data, scaling, sweep, analysis, step, model, startup, profile, page, got 'dota'; nearest: data",
        ),
        (["data", "image=5"], "got 'image=5'; nearest: images"),
        (["data", "images=200"], "images must be 4 batches (128 each) or more, and 100, got 200; nearest: 512"),
        (["data", "seconds=0"], "seconds must be a number above 0, got '0'"),
        (["data", "fresh=yes"], "fresh must be true or false, got 'yes'"),
        (["analysis", "model=eit_mini"], "got 'model=eit_mini'; nearest: models"),
        (["analysis", "batch=48"], "batch must be a multiple of 32, got 48; nearest: 32"),
        (["analysis", "rounds=0"], "rounds must be a whole number of 1 or more, got '0'"),
        (["analysis", "device=tpu"], "device must be cpu, or cuda where there is one, got 'tpu'; nearest: cpu"),
        (["analysis", "models=eit_huge"], "create_model: model must be one of"),
        (["data", "photos=/nowhere"], "photos must be a folder of photographs, got '/nowhere'"),
    ],
)
def test_a_wrong_word_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str], here: Path) -> None:
    assert main([*words, f"cache={here}"] if words[0] == "data" else words) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_command_measures_every_row_and_keeps_a_record(command, tmp_path: Path) -> None:
    done = command("bench", "data", "images=100", "batch=8", "seconds=0.05", "rounds=2", "cache=cache", "out=out")
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "out" / "data.json").read_text())
    names = {name_of(name, workers) for name in LABELS for workers in (1, 2)} | {"decode_and_crop"}
    assert names <= set(record["rates"])
    assert all(len(rates) == 2 and min(rates) > 0 for rates in record["rates"].values())
    for row in record["rows"]:
        assert row["what"].strip() in done.out
    assert record["alone"]["index_samples"] == 1_281_167
    assert (
        record["command"] == "python -m eit_lab.bench data images=100 batch=8 seconds=0.05 rounds=2 cache=cache out=out"
    )
    assert "## Cores that keep one H100 fed" in (tmp_path / "out" / "data.md").read_text()


@pytest.mark.slow
def test_the_cost_of_an_analysis_is_measured_in_time_and_memory(command, tmp_path: Path) -> None:
    done = command("bench", "analysis", "models=eit_nano", "memory=eit_nano", "images=32", "rounds=1", "out=out")
    assert done.status == 0, done.err
    record = json.loads((tmp_path / "out" / "analysis.json").read_text())
    whats = {"plain", "two", "everything"}
    assert set(record["seconds"]) == {f"eit_nano {p} {what}" for p in ("float32", "bfloat16") for what in whats}
    assert 0 < record["memory"]["gb_half_way"] <= record["memory"]["gb_forward"] <= record["memory"]["gb"] < 4
    assert (tmp_path / "out" / "analysis.md").read_text().count("eit_nano") >= 3
