"""Shards: lossless, built again to the byte after a kill, and nothing damaged that verify does not name."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eit_lab.command import RunError
from eit_lab.config import ConfigError
from eit_lab.data.decode import DecodeError, Decoder
from eit_lab.data.layouts import open_root
from eit_lab.data.packing import SPLITS
from eit_lab.data.pool import run_all
from eit_lab.data.reading import SampleReader
from eit_lab.data.store import Store
from eit_lab.shards import _open, main
from imagenet_lookalike import as_parquet, as_tars, kinds, make_lookalike

pytestmark = pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not installed")
BUILD = ("--shard-mb", "1", "--workers", "1")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lookalike(tmp_path_factory.mktemp("source") / "imagenet", classes=10, per_class=14, val_per_class=2)


@pytest.fixture(scope="module")
def built(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("built") / "shards"
    assert main(["build", str(source), str(target), *BUILD]) == 0
    return target


@pytest.fixture
def shards(built: Path, tmp_path: Path) -> Path:
    """A copy to do harm to."""
    return Path(shutil.copytree(built, tmp_path / "shards"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_lookalike(tmp_path / "small", classes=3, per_class=4, val_per_class=1, odd=())


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def manifest_of(root: Path) -> dict:
    return json.loads((root / "manifest.json").read_text())


def compare(root: Path, source: Path) -> int:
    """Check every sample of shards against the folder; how many have segments."""
    mine, theirs = _open(str(root), "DST"), _open(str(source), "SRC")
    decoder, segmented = Decoder(), 0
    assert mine.listing.class_names == theirs.listing.class_names
    for split in SPLITS:
        stored, original = mine.listing.splits[split], theirs.listing.splits[split]
        assert stored.keys() == original.keys()
        assert stored.label.tolist() == original.label.tolist()
        reader, other = mine.reader(split), theirs.reader(split)
        for sample in range(len(stored)):
            wanted = decoder.decode(other.read(sample).data).copy()
            data, segments = reader.read(sample)
            assert np.array_equal(decoder.decode(data), wanted), reader.name(sample)
            h, w = wanted.shape[:2]
            assert (w, h) == (stored.width[sample], stored.height[sample])
            box = (h // 3, w // 5, h // 2, w // 2)
            crop = decoder.crop(data, segments, box=box)
            assert np.array_equal(crop, wanted[box[0] : box[0] + box[2], box[1] : box[1] + box[3]])
            segmented += segments is not None
    return segmented


# -------------------------------------------------------------------------------------------------------------- building


def test_every_sample_has_the_number_label_and_pixels_of_the_source(built: Path, source: Path) -> None:
    manifest = manifest_of(built)
    assert manifest["splits"]["train"]["num_samples"] == 140
    assert manifest["splits"]["train"]["num_shards"] >= 3
    rewritten = sum(split["rewritten"] for split in manifest["splits"].values())
    assert compare(built, source) == rewritten
    # A run on either is the same run.
    listings = [open_root(str(root), cache=built.parent / "cache") for root in (built, source)]
    assert listings[0].fingerprint == listings[1].fingerprint == manifest["fingerprint"]
    assert (listings[0].layout, listings[1].layout) == ("shards", "folder")


def test_what_cannot_be_rewritten_stays_as_it_was_and_is_counted_by_kind(built: Path, source: Path) -> None:
    there = Counter(kinds(source).values())
    told = Counter[str]()
    for split in manifest_of(built)["splits"].values():
        told.update(split["as_they_were"])
    wanted = {"CMYK": there["cmyk"] + there["ycck"], "PNG": there["png"], "progressive": there["progressive"]}
    assert told == wanted
    root = _open(str(built), "DST")
    for split in SPLITS:
        index, reader = root.listing.splits[split], root.reader(split)
        for sample in range(len(index)):
            if kinds(source)[f"{split}/{index.key(sample)}"] in ("cmyk", "ycck", "png", "progressive"):
                data, segments = reader.read(sample)
                assert segments is None
                assert data == (source / split / index.key(sample)).read_bytes()


def test_every_shard_mixes_classes(built: Path) -> None:
    index = _open(str(built), "DST").listing.splits["train"]
    for place in range(len(index.containers)):
        assert len(set(index.label[index.container == place].tolist())) >= 8


def start(source: Path, target: Path, workers: int, **how: object) -> subprocess.Popen[str]:
    """A real build, after its first shard and before its last."""
    command = [sys.executable, "-m", "eit_lab.shards", "build", source, target, "--shard-mb", "1"]
    process = subprocess.Popen([*command, "--workers", str(workers)], stderr=subprocess.PIPE, text=True, **how)
    until = time.monotonic() + 60
    while not list(target.glob("*/*.shard")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    return process


@pytest.mark.slow
def test_a_killed_build_goes_on_and_gives_the_same_bytes(
    built: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "killed"
    process = start(source, target, workers=2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    there = {path: path.stat().st_mtime_ns for path in target.glob("*/*.shard")}
    assert there
    assert not (target / "manifest.json").exists()
    with pytest.raises(ConfigError, match=r"data\.root"):
        open_root(str(target), cache=tmp_path / "cache")
    until = time.monotonic() + 20
    while list(target.rglob(".*.part")) and time.monotonic() < until:  # its workers end by themselves
        time.sleep(0.01)
    (target / "train" / ".00009.shard.1.part").write_bytes(b"of a worker that was killed too")
    assert main(["build", str(source), str(target), "--shard-mb", "1", "--workers", "2"]) == 0
    assert "were there)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert files_of(target) == files_of(built)


@pytest.mark.parametrize(("signum", "status", "workers"), [(signal.SIGINT, 130, 2), (signal.SIGTERM, 75, 1)])
def test_a_build_that_is_asked_to_stop_leaves_nothing_half_written(
    signum: int, status: int, workers: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "stopped"
    process = start(source, target, workers, start_new_session=True)
    os.kill(process.pid, signal.SIGSTOP)
    assert main(["build", str(source), str(target), *BUILD]) == 2
    assert "is being built by another process" in capsys.readouterr().err
    os.killpg(process.pid, signum)  # as a terminal and Slurm do
    os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=20)
    lines = [line for line in err.splitlines() if not line.startswith("build: ")]
    assert process.returncode == status
    assert len(lines) == 1
    assert signal.Signals(signum).name in lines[0]
    assert lines[0].endswith("finished, the same command goes on")
    assert list(target.rglob("*.shard"))
    assert not list(target.rglob(".*"))
    assert not (target / "manifest.json").exists()


def work_that_is_killed(task: int) -> int:
    if task == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_a_worker_that_is_killed_ends_the_command_in_one_line() -> None:
    with pytest.raises(RunError, match="a worker process was killed"):
        list(run_all(work_that_is_killed, [0, 1, 2], workers=2, on_progress=lambda num: None))


def test_a_second_build_finds_all_shards_and_mends_what_is_damaged(
    shards: Path, built: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = sum(split["num_shards"] for split in manifest_of(shards)["splits"].values())
    build = ["build", str(source), str(shards), *BUILD]
    assert main(build) == 0
    assert f"({count} were there)" in capsys.readouterr().out
    (shards / "train" / "00000.shard").unlink()
    flip(shards / "train" / "00001.shard", 5000)
    assert main(build) == 0
    assert f"({count - 2} were there)" in capsys.readouterr().out
    assert files_of(shards) == files_of(built)


def test_shards_of_another_source_or_of_other_options_are_refused(
    shards: Path, source: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(shards)
    for argv, words in (
        ((str(small), str(shards), *BUILD), "source was"),
        ((str(source), str(shards), *BUILD, "--no-rewrite"), "rewrite was True, got False"),
        ((str(source), str(shards), "--shard-mb", "2"), "shard_mb was 1, got 2"),
    ):
        assert main(["build", *argv]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1
    assert files_of(shards) == before
    assert main(["build", str(small), str(shards), *BUILD, "--overwrite"]) == 0
    compare(shards, small)
    assert len(list(shards.glob("train/*.shard"))) == 1


def test_a_full_disk_is_one_line_and_finished_shards_stay(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, build = tmp_path / "full", ["build", str(small), str(tmp_path / "full"), "--workers", "1"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))
    try:
        status = main(build)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = capsys.readouterr().err.splitlines()[-1]
    assert status == 1
    assert line.startswith("eit_lab: ")
    assert "make room, and the same command goes on" in line
    assert not list(target.rglob(".*"))
    assert not (target / "manifest.json").exists()
    assert main(build) == 0
    compare(target, small)


def test_without_jpegtran_the_line_says_where_it_is_to_be_had(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["build", str(small), str(tmp_path / "shards")]) == 2
    err = capsys.readouterr().err
    assert "libjpeg-turbo-progs" in err
    assert "--no-rewrite" in err
    assert main(["build", str(small), str(tmp_path / "shards"), "--no-rewrite", "--workers", "1"]) == 0
    assert compare(tmp_path / "shards", small) == 0
    original = sum(path.stat().st_size for path in (small / "train").rglob("*.JPEG"))
    assert original < manifest_of(tmp_path / "shards")["splits"]["train"]["bytes"] < original + 3000


@pytest.mark.parametrize("make", [as_tars, as_parquet])
def test_tar_and_parquet_files_build_too(make: Callable[..., Path], small: Path, tmp_path: Path) -> None:
    other = make(small, tmp_path / "packed", 5)
    assert main(["build", str(other), str(tmp_path / "shards"), "--workers", "1"]) == 0
    assert main(["verify", str(tmp_path / "shards"), "--full", "--workers", "1"]) == 0
    compare(tmp_path / "shards", other)


# ---------------------------------------------------------------------------------------------------- damage in the source


@pytest.fixture
def spoilt(small: Path) -> Path:
    """The third class's first two images cannot be decoded, in files that are there."""
    first, second, *_ = sorted(sorted((small / "train").iterdir())[2].iterdir())
    first.write_bytes(first.read_bytes()[:-2000])
    second.write_bytes(b"")
    return small


def test_images_that_cannot_be_decoded_stop_the_build_once_all_are_known(
    spoilt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "shards"
    build = ["build", str(spoilt), str(target), "--workers", "1"]
    assert main(build) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    first, second, *_ = sorted(sorted((spoilt / "train").iterdir())[2].iterdir())
    assert "2 images cannot be decoded" in err
    assert first.name in err
    assert [line.split("\t")[0] for line in (target / "damaged.txt").read_text().splitlines()] == [
        str(first),
        str(second),
    ]
    assert list(target.glob("*/*.shard")) == [target / "val" / "00000.shard"]

    assert main([*build, "--damaged", "skip"]) == 0
    assert "(1 were there)" in capsys.readouterr().out
    clean, root = _open(str(spoilt), "SRC").listing, _open(str(target), "DST").listing
    keys = clean.splits["train"].keys()
    assert root.splits["train"].keys() == [k for k in keys if Path(k).name not in (first.name, second.name)]
    assert root.fingerprint != clean.fingerprint
    assert manifest_of(target)["splits"]["train"]["left_out"] == 2
    assert main(["verify", str(target), "--full", "--workers", "1"]) == 0

    assert main([*build, "--damaged", "keep"]) == 0
    again = _open(str(target), "DST")
    kept = again.listing.splits["train"]
    stored = kept.keys()
    assert again.listing.splits["val"].keys() == clean.splits["val"].keys()
    assert [key for key in keys if key not in stored] == [f"{second.parent.name}/{second.name}"]
    data = again.reader("train").read(stored.index(f"{first.parent.name}/{first.name}")).data
    assert data == first.read_bytes()
    with pytest.raises(DecodeError):
        Decoder().decode(data)


# --------------------------------------------------------------------------------------------------------------- verifying


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def verify(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[str], str]:
    """(status, lines of damage, the last line of stderr)."""
    capsys.readouterr()
    status = main(["verify", str(root), "--workers", "1", *words])
    out, err = capsys.readouterr()
    return (
        status,
        [line for line in out.splitlines() if ": " in line and not line.startswith(str(root))],
        (err.splitlines() or [""])[-1],
    )


def test_whole_shards_pass(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["verify", str(shards), "--full", "--workers", "2"]) == 0
    out = capsys.readouterr().out
    assert "no damage" in out
    assert "160 compared with the source pixel for pixel" in out
    assert manifest_of(shards)["hash"] in out
    assert main(["verify", str(shards), "--sample", "7", "--workers", "1"]) == 0
    assert "7 compared with" in capsys.readouterr().out


def test_a_flipped_byte_is_found_by_the_name_of_its_image(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = _open(str(shards), "DST").listing.splits["train"]
    sample = int(np.flatnonzero(index.container == 1)[3])
    flip(shards / "train" / "00001.shard", int(index.offset[sample]) + 700)
    status, lines, err = verify(shards, capsys)
    assert status == 1
    assert lines == [
        "train/00001.shard: its checksum differs",
        f"train/00001.shard ({index.key(sample)}): its checksum differs",
    ]
    assert "2 damages in 1 file" in err
    flip(shards / "train" / "00001.shard", int(index.offset[sample]) + 700)
    flip(shards / "train" / "00001.shard", -40)  # outside of all images
    assert verify(shards, capsys)[:2] == (1, ["train/00001.shard: its checksum differs"])


def test_truncated_and_missing_shards_are_named_with_their_images(
    shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = _open(str(shards), "DST").listing.splits["train"]
    path = shards / "train" / "00002.shard"
    size, cut = path.stat().st_size, path.stat().st_size // 2
    os.truncate(path, cut)
    (shards / "val" / "00000.shard").unlink()
    status, lines, err = verify(shards, capsys)
    of_shard = index.container == 2
    behind = int(np.count_nonzero(of_shard & (index.offset + index.size > cut)))
    assert status == 1
    assert f"train/00002.shard: has {cut:,} bytes, must have {size:,}" in lines
    assert "val/00000.shard: is missing, with 20 images" in lines
    assert len([line for line in lines if line.startswith("train/00002.shard (")]) == behind > 5
    assert f"{behind + 2} damages in 2 files" in err


@pytest.mark.parametrize("place", [3, 300, -1])
def test_a_damaged_index_is_named(place: int, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(shards / "train.index", place)
    status, lines, _ = verify(shards, capsys)
    assert status == 1
    assert lines[0].startswith("train.index: ")


def test_a_damaged_manifest_is_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (shards / "manifest.json").read_text()
    (shards / "manifest.json").write_text(text.replace('"num_samples": 140', '"num_samples": 141'))
    status, _, err = verify(shards, capsys)
    assert status == 2
    assert "manifest.json is damaged" in err


def test_a_source_that_changed_since_is_found_image_by_image(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "shards"
    assert main(["build", str(small), str(target), "--workers", "1"]) == 0
    path = sorted((small / "train").rglob("*.JPEG"))[5]
    pixels = np.asarray(Image.open(path)).copy()
    pixels[10, 10] ^= 255
    Image.fromarray(pixels).save(path, quality=95)
    status, lines, _ = verify(target, capsys, "--full")
    key = f"{path.parent.name}/{path.name}"
    assert (status, lines) == (1, [f"train/00000.shard ({key}): its pixels are not those of {path}"])
    moved = small.rename(tmp_path / "moved")
    assert verify(target, capsys)[0] == 0  # checksums alone
    assert verify(target, capsys, "--full")[0] == 2
    assert verify(target, capsys, "--full", "--source", str(moved))[0] == 1


# ---------------------------------------------------------------------------------------------------- opening, unpacking


def test_opening_names_the_shard_that_is_missing_short_or_of_another_build(
    shards: Path, small: Path, tmp_path: Path
) -> None:
    path = shards / "train" / "00001.shard"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ConfigError, match=rf"00001.shard has {size - 1:,} bytes, must have {size:,}"):
        open_root(str(shards), cache=tmp_path)
    path.unlink()
    with pytest.raises(ConfigError, match=r"00001.shard is missing"):
        open_root(str(shards), cache=tmp_path)
    assert main(["build", str(small), str(tmp_path / "other"), "--workers", "1"]) == 0
    shutil.copy(shards / "val.index", tmp_path / "other" / "val.index")
    with pytest.raises(ConfigError, match=r"val.index"):
        open_root(str(tmp_path / "other"), cache=tmp_path)


def test_original_files_come_back_byte_for_byte_where_they_were_kept(
    source: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, out = tmp_path / "shards", tmp_path / "out"
    assert main(["build", str(source), str(target), *BUILD, "--keep-original"]) == 0
    assert main(["extract", str(target), str(out), "--workers", "1"]) == 0
    assert "byte for byte" in capsys.readouterr().out
    wanted = files_of(source)
    del wanted["kinds.json"]
    assert files_of(out) == wanted
    flip(target / "originals" / "train-00001.tar", 6000)
    assert verify(target, capsys)[:2] == (1, ["originals/train-00001.tar: its checksum differs"])

    assert main(["extract", str(built), str(tmp_path / "pixels"), "--split", "val", "--workers", "1"]) == 0
    assert "the pixels are the originals', not the bytes" in capsys.readouterr().out
    for path in sorted((source / "val").rglob("*.JPEG")):
        stored = tmp_path / "pixels" / "val" / path.parent.name / path.name
        decoders = Decoder(), Decoder()
        assert np.array_equal(decoders[0].decode(stored.read_bytes()), decoders[1].decode(path.read_bytes()))
    assert not (tmp_path / "pixels" / "train").exists()
    assert main(["extract", str(built), str(tmp_path / "pixels"), "--split", "val"]) == 2


def test_a_reader_travels_between_processes_and_reads_the_same(built: Path) -> None:
    import pickle

    listing = open_root(str(built), cache=built.parent / "cache")
    reader = SampleReader(listing.splits["val"], store=Store(str(built)), files=None, layout="shards")
    again = pickle.loads(pickle.dumps(reader))
    assert bytes(again.read(7).data) == bytes(reader.read(7).data)


@pytest.mark.parametrize("layout", ["shards", "folder"])
def test_info_counts_and_shows_samples_of_any_layout(
    layout: str, built: Path, source: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = built if layout == "shards" else source
    assert main(["info", str(root), "--out", "sheet.png"]) == 0
    out = capsys.readouterr().out
    assert layout in out
    for cells in (("images", "140", "20"), ("classes", "10", "10")):
        assert any(line.split() == list(cells) for line in out.splitlines())
    with Image.open(here / "sheet.png") as sheet:
        assert sheet.width > 1000
        assert len(set(np.asarray(sheet).reshape(-1, 3)[:, 0].tolist())) > 200
    if layout == "shards":
        assert main(["info", str(root), "--split", "val"]) == 0
        assert (here / "shards.png").is_file()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("biuld", "nearest: build"),
        ("build SRC", "DST must be given: shards build SRC DST"),
        ("build SRC dst --worker 2", "nearest: --workers"),
        ("build SRC dst --workers 0", "--workers must be a whole number of 1 or more, got '0'"),
        ("build SRC dst --damaged skp", "nearest: skip"),
        ("build SRC dst third", "takes SRC and DST, got 'third' besides"),
        ("build nowhere dst", "SRC must hold the folders train/ and val/, got 'nowhere': no such folder"),
        ("build SRC SRC/train/new", "DST must lie outside SRC"),
        ("build SRC full", "DST must be a new or empty folder, or shards, got 'full' with letter.txt in it"),
        ("build SRC s3://bucket/x", "DST must be a local folder"),
        ("verify SRC", "there is no manifest.json"),
        ("verify BUILT --full --sample 5", "give one of them"),
        ("verify BUILT --source full", "--source must hold the folders"),
        ("info SRC --out sheet.jpg", "--out must end in .png"),
        ("extract BUILT full/no --split test", "--split must be one of train, val"),
    ],
)  # fmt: skip
def test_wrong_input_is_one_line(
    words: str, said: str, built: Path, source: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "full").mkdir()
    (here / "full" / "letter.txt").write_text("not ours")
    argv = [word.replace("SRC", str(source)).replace("BUILT", str(built)) for word in words.split()]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert err.count("\n") == 1
    assert out == ""
    assert (here / "full" / "letter.txt").exists()
    assert not (source / "train" / "new").exists()
