"""What people have as data.root is told apart, listed alike, kept between starts; what is wrong with it is one line."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eit_lab.config import ConfigError
from eit_lab.data.cache import FileCache
from eit_lab.data.index import Container, SplitIndex, write_index
from eit_lab.data.layouts import Listing, folder, open_root
from eit_lab.data.layouts.parquet import rows, unpack
from eit_lab.data.layouts.tars import read_tar
from eit_lab.data.packed import DamagedShardError, read_footer, unpack_record
from eit_lab.data.store import Store
from eit_lab.data.variants import synsets
from imagenet_lookalike import (
    ODD,
    as_flat_val,
    as_kaggle,
    as_parquet,
    as_tars,
    as_tiny_imagenet,
    kinds,
    make_lookalike,
)

CLASSES, TRAIN, VAL = 12, 5, 3
Layouts = Mapping[str, Path]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Layouts:
    """The same samples in every layout."""
    top = tmp_path_factory.mktemp("layouts")
    source = make_lookalike(top / "folder", classes=CLASSES, per_class=TRAIN, val_per_class=VAL)
    makers = {
        "flat": as_flat_val,
        "kaggle": as_kaggle,
        "tiny": as_tiny_imagenet,
        "tars": partial(as_tars, per_tar=16),
        "parquet": partial(as_parquet, per_file=25, row_group=10),
    }
    return {"folder": source, **{name: make(source, top / name) for name, make in makers.items()}}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def stems(listing: Listing, split: str) -> dict[str, int]:
    """File name without folder and suffix -> label: what all layouts have in common."""
    index = listing.splits[split]
    return {Path(key).stem: label for key, label in zip(index.keys(), index.label.tolist(), strict=True)}


def copied(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root, tmp_path / "root")


def refused(root: Path, cache: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        open_root(str(root), cache=cache)
    line = str(caught.value)
    assert "\n" not in line
    return line


# ---------------------------------------------------------------------------------------------------------- the layouts


@pytest.mark.parametrize("name", ["folder", "flat", "kaggle", "tiny", "tars", "parquet"])
def test_every_layout_is_read_to_the_same_samples_and_labels(name: str, layouts: Layouts, cache: Path) -> None:
    listing = open_root(str(layouts[name]), cache=cache)
    source = layouts["folder"]
    assert listing.layout == {"tars": "tar", "parquet": "parquet"}.get(name, "folder")
    assert listing.class_names == synsets()[:CLASSES]
    assert listing.notes == ()
    for split, count in (("train", CLASSES * TRAIN), ("val", CLASSES * VAL)):
        files = source.glob(f"{split}/*/*.JPEG")
        assert stems(listing, split) == {path.stem: synsets().index(path.parent.name) for path in files}
        assert len(listing.splits[split]) == count
        assert sum(container.num_samples for container in listing.splits[split].containers) == count


@pytest.mark.parametrize("name", ["folder", "flat", "kaggle", "tiny"])
def test_a_file_is_found_by_root_folder_and_key(name: str, layouts: Layouts, cache: Path) -> None:
    listing = open_root(str(layouts[name]), cache=cache)
    for split, index in listing.splits.items():
        for sample in range(len(index)):
            path = layouts[name] / index.facts["folder"] / index.key(sample)
            label = synsets()[index.label[sample]]
            assert path.read_bytes() == (layouts["folder"] / split / label / path.name).read_bytes()
            assert str(path).startswith(str(layouts[name] / index.containers[index.container[sample]].name))


def test_folders_have_one_order_and_fingerprint_however_they_are_laid_out(layouts: Layouts, cache: Path) -> None:
    found = [open_root(str(layouts[name]), cache=cache) for name in ("folder", "flat", "kaggle", "tiny")]
    for split in ("train", "val"):
        assert len({tuple(stems(listing, split).items()) for listing in found}) == 1
    # The digest that runs on record were named by.
    digest = hashlib.sha256()
    for split in ("train", "val"):
        for one in sorted((layouts["folder"] / split).iterdir()):
            digest.update(f"{one.name}\n{'/'.join(sorted(os.listdir(one)))}\n".encode())  # noqa: PTH208
    assert {listing.fingerprint for listing in found} == {digest.hexdigest()[:16]}


def test_a_record_of_a_tar_file_is_read_in_place(layouts: Layouts, cache: Path) -> None:
    listing = open_root(str(layouts["tars"]), cache=cache)
    for split, index in listing.splits.items():
        for sample in range(len(index)):
            container = index.containers[index.container[sample]]
            tar = layouts["tars"] / container.name
            assert container.size == tar.stat().st_size
            with tar.open("rb") as file:
                file.seek(int(index.offset[sample]))
                record = file.read(int(index.size[sample]))
            name = synsets()[index.label[sample]]
            assert record == (layouts["folder"] / split / name / index.key(sample)).with_suffix(".JPEG").read_bytes()


def test_rows_of_parquet_files_are_where_the_index_says_also_unpacked(
    layouts: Layouts, cache: Path, tmp_path: Path
) -> None:
    index = open_root(str(layouts["parquet"]), cache=cache).splits["train"]
    for place, container in enumerate(index.containers):
        source = layouts["parquet"] / container.name
        assert container.size == source.stat().st_size
        read = list(rows(source))
        mine = np.flatnonzero(index.container == place)
        assert index.offset[mine].tolist() == list(range(len(read)))
        assert [(label, key) for _, label, key in read] == [(index.label[i], index.key(i)) for i in mine]
        unpack(source, tmp_path / "one")
        _, footer = read_footer(tmp_path / "one")
        content = (tmp_path / "one").read_bytes()
        for (image, label, key), row in zip(read, footer, strict=True):
            assert image == (layouts["folder"] / "train" / synsets()[label] / key).read_bytes()
            record = content[row.offset : row.offset + row.size]
            stored = unpack_record(record, width=row.width, height=row.height, checksum=row.checksum)
            assert (bytes(stored.data), row.label, row.key) == (image, label, key)


def test_validation_is_val_and_hidden_files_are_none(layouts: Layouts, cache: Path, tmp_path: Path) -> None:
    root = copied(layouts["folder"], tmp_path)
    (root / "val").rename(root / "validation")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / synsets()[0] / "._n01440764_0.JPEG").write_bytes(b"of macOS")
    found, expected = open_root(str(root), cache=cache), open_root(str(layouts["folder"]), cache=cache)
    assert found.fingerprint == expected.fingerprint
    assert found.splits["val"].facts == {"folder": "validation"}


@pytest.mark.parametrize("form", ["archive", "beside", "parent"])
def test_the_devkit_is_found_packed_or_beside_and_kaggles_table_above(
    form: str, layouts: Layouts, cache: Path, tmp_path: Path
) -> None:
    root = copied(layouts["kaggle" if form == "parent" else "flat"], tmp_path)
    devkit = root / "ILSVRC2012_devkit_t12"
    if form == "archive":
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
            archive.add(devkit, devkit.name)
        shutil.rmtree(devkit)
    elif form == "beside":
        for path in (devkit / "data").iterdir():
            path.rename(root / path.name)
        shutil.rmtree(devkit)
    given = root / "ILSVRC" / "Data" / "CLS-LOC" if form == "parent" else root
    assert open_root(str(given), cache=cache).fingerprint == open_root(str(layouts["folder"]), cache=cache).fingerprint


def test_a_thousand_synsets_that_are_not_as_many_images_are_noted(tmp_path: Path, cache: Path) -> None:
    for split in ("train", "val"):
        for name in synsets():
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / f"{split}.JPEG").touch()
    listing = open_root(str(tmp_path), cache=cache)
    assert listing.class_names == synsets()
    assert listing.notes == (
        "train has 1,000 images, ImageNet-1K has 1,281,167",
        "val has 1,000 images, ImageNet-1K has 50,000",
    )


def tar_of(path: Path, members: Mapping[str, bytes], *, format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("long", [False, True])
def test_tar_headers_are_read_as_pythons_tarfile_reads_them(format: int, long: bool, tmp_path: Path) -> None:
    folder = "/".join(["a" * 60, "b" * 60]) if long else "."
    members: dict[str, bytes] = {}
    for number in range(7):
        members[f"{folder}/n0_{number}.JPEG"] = bytes([number + 1]) * (500 + 7 * number)
        members[f"{folder}/n0_{number}.cls"] = b"%d\n" % number
    if format != tarfile.USTAR_FORMAT and long:
        members[f"{'é' * 150}.jpg"], members[f"{'é' * 150}.cls"] = b"umlauts", b"3"
    members["short.png"], members["short.cls"] = b"after a long name", b"8"
    path = tar_of(tmp_path / "one.tar", members, format=format)
    with tarfile.open(path, "a", format=format) as tar:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "n0_0.JPEG"
        tar.addfile(link)
        tar.add(tmp_path, "some_folder.jpg", recursive=False)
    with tarfile.open(path) as tar:
        expected = [
            (member.name.removeprefix("./"), member.offset_data, member.size)
            for member in tar
            if member.isfile() and not member.name.endswith(".cls")
        ]
    with path.open("rb") as file:
        found = read_tar(file, path.name)
    assert list(zip(found.keys, found.offset, found.size, strict=True)) == expected
    assert found.label.tolist() == [*range(7), *([3] if len(expected) == 9 else []), 8]


def test_a_tar_samples_label_and_class_may_be_in_its_json(tmp_path: Path, cache: Path) -> None:
    names = {0: "tench", 1: "goldfish"}
    for split, count in (("train", 4), ("validation", 2)):
        members = {}
        for number in range(count):
            about = {"label": number % 2, "class_name": names[number % 2]}
            members[f"{number:04d}.webp"], members[f"{number:04d}.json"] = b"pixels", json.dumps(about).encode()
        tar_of(tmp_path / "root" / f"{split}.tar", members)
    listing = open_root(str(tmp_path / "root"), cache=cache)
    assert listing.class_names == ("tench", "goldfish")
    assert listing.splits["train"].label.tolist() == [0, 1, 0, 1]
    assert listing.splits["val"].keys() == ["0000.webp", "0001.webp"]


def test_a_thousand_numbers_are_imagenets_synsets_and_fewer_are_numbers(tmp_path: Path, cache: Path) -> None:
    for root, labels in (("all", (0, 5, 999)), ("some", (0, 2))):
        for split in ("train", "val"):
            members = {}
            for label in labels:
                members[f"{label}.jpg"], members[f"{label}.cls"] = b"pixels", str(label).encode()
            tar_of(tmp_path / root / f"{split}-0.tar", members)
    assert open_root(str(tmp_path / "all"), cache=cache).class_names == synsets()
    some = open_root(str(tmp_path / "some"), cache=cache)
    assert some.class_names == ("0", "1", "2")
    assert some.notes == ("train has no image of 1 of 3 classes: 1", "val has no image of 1 of 3 classes: 1")


# -------------------------------------------------------------------------------------------------------- kept on disk


def test_a_second_start_lists_nothing_and_a_new_file_is_seen(
    layouts: Layouts, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, listed, real = copied(layouts["folder"], tmp_path), [], folder._read
    monkeypatch.setattr(folder, "_read", lambda *args: [listed.append(1), real(*args)][1])
    first = open_root(str(root), cache=cache)
    again = open_root(str(tmp_path / "." / "root"), cache=cache)
    assert len(listed) == 1
    assert again.fingerprint == first.fingerprint
    assert again.splits["val"].path == first.splits["val"].path
    path = root / "train" / synsets()[3] / "n01440764_new.JPEG"
    path.write_bytes(b"")
    more = open_root(str(root), cache=cache)
    assert len(listed) == 2
    assert len(more.splits["train"]) == len(first.splits["train"]) + 1
    assert first.splits["train"].path.is_file()  # a running process may have to map it again
    path.unlink()
    assert open_root(str(root), cache=cache).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["tars", "parquet"])
def test_a_packed_file_that_changed_is_indexed_again(name: str, layouts: Layouts, cache: Path, tmp_path: Path) -> None:
    root = copied(layouts[name], tmp_path)
    first = open_root(str(root), cache=cache)
    assert open_root(str(root), cache=cache).splits["train"].path == first.splits["train"].path
    path = root / first.splits["train"].containers[0].name
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    again = open_root(str(root), cache=cache)
    assert again.splits["train"].path != first.splits["train"].path
    assert again.fingerprint == first.fingerprint


@pytest.mark.parametrize("file", ["train.index", "val.index", "listing.json"])
def test_a_damaged_index_is_made_again(file: str, layouts: Layouts, cache: Path) -> None:
    first = open_root(str(layouts["folder"]), cache=cache)
    path = first.splits["train"].path.with_name(file)
    whole = path.read_bytes()
    content = bytearray(whole)
    content[-20] ^= 1
    path.write_bytes(content)
    again = open_root(str(layouts["folder"]), cache=cache)
    assert again.fingerprint == first.fingerprint
    assert again.class_names == first.class_names
    assert path.read_bytes() == whole


def _list_beside(root: str, cache: Path, barrier: multiprocessing.synchronize.Barrier, told: Path) -> None:
    real = folder._read

    def slow(*args: object) -> object:
        told.with_name(f"listed-{os.getpid()}").touch()
        time.sleep(0.3)  # longer than the others need to come here
        return real(*args)

    folder._read = slow
    barrier.wait()
    (told.with_name(f"found-{os.getpid()}")).write_text(open_root(root, cache=cache).fingerprint)


def test_of_two_processes_one_lists_and_both_find_the_same(layouts: Layouts, cache: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    args = (str(layouts["folder"]), cache, barrier, tmp_path / "told")
    processes = [context.Process(target=_list_beside, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(list(tmp_path.glob("listed-*"))) == 1
    found = [path.read_text() for path in tmp_path.glob("found-*")]
    assert found == [open_root(str(layouts["folder"]), cache=cache).fingerprint] * 2
    assert not list(cache.rglob("*.part"))


def test_a_cache_that_cannot_be_written_is_named(layouts: Layouts, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert str(tmp_path / "cache") in refused(layouts["folder"], tmp_path / "cache")


def test_an_index_of_imagenets_size_opens_at_once(tmp_path: Path) -> None:
    count = 1_281_167
    key, labels = b"n01440764/n01440764_10026.JPEG", np.arange(count) // 1282
    columns = {name: np.zeros(count, dtype=np.uint8) for name in ("offset", "size", "checksum", "width", "height")}
    columns |= {"container": labels, "label": labels, "key_end": np.arange(1, count + 1) * len(key)}
    containers = [Container(name=f"train/{name}", num_samples=1282) for name in synsets()]
    write_index(tmp_path / "train.index", columns, key * count, containers=containers, facts={})
    took = []
    for _ in range(3):
        began = time.perf_counter()
        index = SplitIndex(tmp_path / "train.index")
        took.append(time.perf_counter() - began)
    assert index.key(count - 1) == key.decode()
    assert int(index.label[count - 1]) == 999
    assert min(took) < 0.2


# ------------------------------------------------------------------------------------------------------------ wrong roots


def _empty_class(root: Path) -> None:
    for path in (root / "train" / synsets()[2]).iterdir():
        path.unlink()


def _half_sorted(root: Path) -> None:
    shutil.copy2(next(root.glob("val/*/*.JPEG")), root / "val")


def _without_devkit(root: Path) -> None:
    shutil.rmtree(root / "ILSVRC2012_devkit_t12")


def _not_extracted(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "ILSVRC2012_img_train.tar").touch()


def _classes_not_extracted(root: Path) -> None:
    shutil.rmtree(root / "train")
    (root / "train").mkdir()
    for name in synsets()[:3]:
        (root / "train" / f"{name}.tar").touch()


def _gap_of_tars(root: Path) -> None:
    (root / "imagenet1k-train-0002.tar").unlink()


def _cut_tar(root: Path, *, keep: int) -> None:
    os.truncate(root / "imagenet1k-train-0001.tar", keep)


def _flipped_header(root: Path) -> None:
    path = root / "imagenet1k-train-0001.tar"
    content = bytearray(path.read_bytes())
    content[1024 + 124] ^= 1  # the second member's size
    path.write_bytes(content)


def _only(split: str, root: Path) -> None:
    for path in [*root.glob("*.tar"), *root.glob("data/*.parquet")]:
        if split not in path.name:
            path.unlink()


def _gap_of_parquet(root: Path) -> None:
    next(root.glob("data/train-00001-of-*")).unlink()


def _last_of_parquet(root: Path) -> None:
    next(root.glob("data/train-00002-of-*")).unlink()


def _cut_parquet(root: Path) -> None:
    path = next(root.glob("data/train-00001-of-*"))
    os.truncate(path, path.stat().st_size - 100)


def _pointer(root: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    next(root.glob("data/train-00001-of-*")).write_text(text)


@pytest.mark.parametrize(
    ("layout", "spoil", "line"),
    [
        ("folder", shutil.rmtree, r"must hold the folders train/ and val/, got '.*root': no such folder"),
        ("folder", lambda r: shutil.rmtree(r / "val"), r"train/ and val/, got .*: found kinds.json, train there"),
        ("folder", lambda r: [shutil.rmtree(r), r.mkdir()], r"train/ and val/, got .*: found nothing there"),
        ("folder", lambda r: [shutil.rmtree(r), r.touch()], r"train/ and val/, got .*: it is a file"),
        ("folder", lambda r: shutil.rmtree(r / "val" / synsets()[1]), r"train/ \(12\) and val/ \(11\), .*n01443537"),
        (
            "folder",
            _empty_class,
            r"images in every class folder, got none in '.*/train/n01484850' \(1 empty in train/\)",
        ),
        ("folder", _half_sorted, r"either in class folders or flat, got 12 folders and 1 images beside them"),
        ("folder", _not_extracted, r"ILSVRC2012_img_train.tar is not extracted yet"),
        (
            "folder",
            _classes_not_extracted,
            r"one folder a class in train/, found none .*n01440764.tar and 2 others are not ex",
        ),
        (
            "flat",
            _without_devkit,
            r"classes of the 36 images that lie flat in val/: the devkit \(ILSVRC2012_devkit_t12",
        ),
        (
            "flat",
            lambda r: (r / "val" / "ILSVRC2012_val_00000007.JPEG").unlink(),
            r"all 36 images .* 35: .*_00000007.JPEG is",
        ),
        (
            "flat",
            lambda r: (r / "val" / "cat.JPEG").touch(),
            r"ground_truth.txt tells the class of, got cat.JPEG \(1 of 37\)",
        ),
        ("flat", lambda r: os.truncate(next(r.rglob("meta.mat")), 300), r"not ImageNet's devkit, or damaged"),
        (
            "tiny",
            lambda r: (r / "val" / "val_annotations.txt").write_text(""),
            r"val_annotations.txt tells the class of",
        ),
        ("tars", _gap_of_tars, r"all files of a split, got .*: imagenet1k-train-0002 is missing: 3 of 4 files"),
        (
            "tars",
            partial(_only, "train"),
            r"named train... and val... .*: none of val among 4 \(imagenet1k-train-0000.tar",
        ),
        (
            "tars",
            partial(_cut_tar, keep=40_000),
            r"train-0001.tar is cut short at 40,000 bytes: its member .* reaches to byte",
        ),
        (
            "tars",
            partial(_cut_tar, keep=1024),
            r"train-0001.tar is cut short at 1,024 bytes: its mark of the end is missing",
        ),
        ("tars", partial(_cut_tar, keep=1100), r"train-0001.tar is cut short at 1,100 bytes: it ends within a header"),
        ("tars", partial(_cut_tar, keep=0), r"train-0001.tar is not a tar file"),
        ("tars", _flipped_header, r"train-0001.tar is damaged at byte 1,024 \(no tar header\)"),
        ("parquet", _gap_of_parquet, r"train-00001-of-00003 is missing: 2 of 3 files; download the others"),
        ("parquet", _last_of_parquet, r"train-00002-of-00003 is missing: 2 of 3 files; download the others"),
        ("parquet", _cut_parquet, r"train-00001-of-00003-\w+.parquet is cut short at [\d,]+ bytes"),
        ("parquet", _pointer, r"parquet is a pointer of Git LFS, not the file itself: run git lfs pull"),
    ],
)
def test_a_wrong_root_is_one_line(
    layout: str, spoil: Callable[[Path], object], line: str, layouts: Layouts, cache: Path, tmp_path: Path
) -> None:
    root = copied(layouts[layout], tmp_path)
    spoil(root)
    found = refused(root, cache)
    assert re.search(line, found), found
    assert not list(cache.rglob("*.index"))


def test_train_given_for_its_parent_is_told(layouts: Layouts, cache: Path) -> None:
    assert "give the folder above train/" in refused(layouts["folder"] / "train", cache)


def test_a_shard_that_timms_info_names_or_counts_is_missed(layouts: Layouts, cache: Path, tmp_path: Path) -> None:
    root = as_tars(layouts["folder"], tmp_path / "root", per_tar=16, info=True)
    assert len(open_root(str(root), cache=cache).splits["train"]) == CLASSES * TRAIN
    last = root / "imagenet1k-train-0003.tar"
    shutil.copy2(root / "imagenet1k-train-0000.tar", last)
    assert "imagenet1k-train-0003.tar has 16 samples, _info.json says 12" in refused(root, cache)
    last.unlink()
    assert "imagenet1k-train-0003.tar is missing: 3 of 4 files" in refused(root, cache)


@pytest.mark.parametrize(
    ("members", "line"),
    [
        ({"a.jpg": b"1"}, "must tell the label of 'a', as a number in KEY.cls or as label in KEY.json, got None"),
        ({"a.jpg": b"1", "a.cls": b"cat"}, "must have a number in a.cls, got 'cat'"),
        ({"a.jpg": b"1", "a.json": b"{"}, "has a damaged a.json"),
        ({"a.jpg": b"1", "a.png": b"1", "a.cls": b"1"}, "one image a sample, 'a' has two"),
        ({"a.cls": b"1"}, "has no image with the label of 'a'"),
        ({"a.txt": b"1"}, "holds no samples in webdataset's layout"),
    ],
)
def test_a_tar_sample_that_is_none_is_named(members: dict[str, bytes], line: str, tmp_path: Path, cache: Path) -> None:
    tar_of(tmp_path / "root" / "train-0.tar", members)
    tar_of(tmp_path / "root" / "val-0.tar", members)
    found = refused(tmp_path / "root", cache)
    assert "train-0.tar" in found
    assert line in found


def test_rows_of_a_parquet_file_cut_while_training_stop_the_run(layouts: Layouts, tmp_path: Path) -> None:
    path = shutil.copy2(next(layouts["parquet"].glob("data/train-00001-of-*")), tmp_path / "one.parquet")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DamagedShardError, match=r"one.parquet is cut short at [\d,]+ bytes"):
        unpack(path, tmp_path / "made")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["one.parquet"]


def test_parquet_without_pyarrow_names_what_to_install(
    layouts: Layouts, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'eit_lab[parquet]'" in refused(layouts["parquet"], cache)


# -------------------------------------------------------------------------------------------------------------- a server


class _Quiet(SimpleHTTPRequestHandler):
    lists = True

    def list_directory(self, path: str | os.PathLike[str]) -> io.BytesIO | None:
        if self.lists:
            return super().list_directory(path)
        self.send_error(404)
        return None

    def log_message(self, format: str, *args: object) -> None:
        pass


class _QuietWithoutLists(_Quiet):
    lists = False


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    servers = []

    def start(folder: Path, *, lists: bool = True) -> str:
        handler = partial(_Quiet if lists else _QuietWithoutLists, directory=str(folder))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", ["tars", "parquet"])
def test_packed_files_of_a_server_are_listed_as_those_of_a_disk(
    name: str, layouts: Layouts, cache: Path, serve: Callable[..., str]
) -> None:
    url = serve(layouts[name])
    files = FileCache(cache / "files", limit_bytes=1 << 30, store=Store(url))
    found, local = open_root(url, cache=cache, files=files), open_root(str(layouts[name]), cache=cache)
    assert found.fingerprint == local.fingerprint
    assert found.class_names == local.class_names
    for split, index in found.splits.items():
        assert index.offset.tolist() == local.splits[split].offset.tolist()
        assert [c.name for c in index.containers] == [c.name for c in local.splits[split].containers]
    assert open_root(url, cache=cache, files=files).splits["val"].path == found.splits["val"].path


def test_a_server_without_lists_is_read_by_timms_info_else_refused(
    layouts: Layouts, cache: Path, serve: Callable[..., str], tmp_path: Path
) -> None:
    root = as_tars(layouts["folder"], tmp_path / "root", info=True)
    url = serve(root, lists=False)
    files = FileCache(cache / "files", limit_bytes=1 << 30, store=Store(url))
    assert len(open_root(url, cache=cache, files=files).splits["val"]) == CLASSES * VAL
    (root / "_info.json").unlink()
    with pytest.raises(
        ConfigError, match=r"tar or parquet files to be read from a server, got .*: found no list of files"
    ):
        open_root(url, cache=cache, files=files)


def test_single_files_of_a_server_are_refused(layouts: Layouts, cache: Path, serve: Callable[..., str]) -> None:
    with pytest.raises(
        ConfigError, match=r"found .*train.*; single image files are read from a local or mounted folder"
    ):
        open_root(serve(layouts["folder"]), cache=cache)


# --------------------------------------------------------------------------------------------------------- the look-alike


def test_the_lookalike_has_every_odd_kind_of_file_and_shows_photographs(tmp_path: Path) -> None:
    root = make_lookalike(tmp_path / "root", classes=40, per_class=2, val_per_class=1)
    of_kind = {kind: root / name for name, kind in kinds(root).items()}
    assert of_kind.keys() == {"plain", *ODD}
    assert (
        make_lookalike(tmp_path / "again", classes=40, per_class=2, val_per_class=1).joinpath("kinds.json").read_text()
        == (root / "kinds.json").read_text()
    )
    images = {kind: Image.open(path) for kind, path in of_kind.items() if kind != "garbage_exif"}
    assert (images["png"].format, images["cmyk"].mode, images["ycck"].mode, images["grey"].mode) == (
        "PNG", "CMYK", "CMYK", "L",
    )  # fmt: skip
    assert images["progressive"].info["progressive"]
    assert (images["cmyk"].info["adobe_transform"], images["ycck"].info["adobe_transform"]) == (0, 2)
    assert images["oriented"].getexif()[0x0112] == 6
    assert (images["tiny"].size, images["wide"].size) == ((30, 20), (600, 40))
    layers = {kind: images[kind].layer[0][1:3] for kind in ("plain", "444", "422")}
    assert layers == {"plain": (2, 2), "444": (1, 1), "422": (2, 1)}
    assert b"\xff\xdd" in of_kind["restarts"].read_bytes()
    with pytest.warns(UserWarning, match="Corrupt EXIF"):
        images["garbage_exif"] = Image.open(of_kind["garbage_exif"])
    for kind, image in images.items():
        spread = np.asarray(image.convert("RGB"), dtype=float).std()
        assert spread > 15, kind
