"""A small look-alike of ImageNet: photographs cut from two that scikit-learn ships, with the odd kinds of file ImageNet has.

``make_lookalike`` makes class folders; the others turn these into what else people have: the same samples, the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from eit_lab.data.variants import synsets

TRAIN_SHARD, VAL_SHARD = "imagenet1k-train-{:04d}.tar", "imagenet1k-validation-{:02d}.tar"
_ODD_EVERY = 4
Pixels = NDArray[np.uint8]


def make_lookalike(
    root: Path,
    *,
    classes: int = 40,
    per_class: int = 6,
    val_per_class: int = 2,
    seed: int = 0,
    odd: Sequence[str] | None = None,
) -> Path:
    """train/ and val/ in torchvision's layout, of ImageNet's first ``classes`` synsets. Every fourth file is an odd one.

    ``odd`` are the kinds of those, all of ODD if None; ``kinds`` tells which file is of what kind. NOTE: Pillow warns of
    "garbage_exif" whenever it opens one, as it does of some files of ImageNet.
    """
    from sklearn.datasets import load_sample_images

    photographs, rng, serial = load_sample_images().images, np.random.default_rng(seed), 0
    numbers = iter((rng.permutation(classes * val_per_class) + 1).tolist())
    chosen, table = list(ODD) if odd is None else list(odd), {}
    for split, count in (("train", per_class), ("val", val_per_class)):
        for label, name in enumerate(synsets()[:classes]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for place in range(count):
                stem = f"{name}_{10 * place + label}" if split == "train" else f"ILSVRC2012_val_{next(numbers):08d}"
                turn, rest = divmod(serial, _ODD_EVERY)
                kind = chosen[turn % len(chosen)] if chosen and not rest else "plain"
                h, w = {"tiny": (20, 30), "wide": (40, 600)}.get(kind, rng.integers(160, 320, 2))
                photo = photographs[label % 2]
                y, x = rng.integers(0, photo.shape[0] - h), rng.integers(0, photo.shape[1] - w)
                cut = np.ascontiguousarray(np.roll(photo[y : y + h, x : x + w], label, axis=2))
                (folder / f"{stem}.JPEG").write_bytes(ODD.get(kind, _plain)(cut, serial))
                table[f"{split}/{name}/{stem}.JPEG"] = kind
                serial += 1
    (root / "kinds.json").write_text(json.dumps(table))
    return root


def kinds(root: Path) -> dict[str, str]:
    """File below the root -> "plain" or a name in ODD."""
    return json.loads((root / "kinds.json").read_text())


# -------------------------------------------------------------------------------------------------------- kinds of file


def _jpeg(image: Image.Image, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **how)
    return file.getvalue()


def _plain(pixels: Pixels, serial: int) -> bytes:
    return _jpeg(Image.fromarray(pixels), quality=88 + serial % 10, subsampling="4:2:0")


def _png(pixels: Pixels, _: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _ycck(pixels: Pixels, _: int) -> bytes:
    """As Photoshop writes CMYK: inverted, and C, M, Y as Y, Cb, Cr, told by the last byte of its marker."""
    cmyk = np.asarray(Image.fromarray(pixels).convert("CMYK"))
    stored = 255 - np.asarray(Image.fromarray(np.ascontiguousarray(cmyk[..., :3])).convert("YCbCr"))
    written = Image.frombytes("CMYK", (cmyk.shape[1], cmyk.shape[0]), np.dstack([stored, cmyk[..., 3]]).tobytes())
    content = bytearray(_jpeg(written, quality=92))  # Pillow inverts it, and writes it as it is
    transform = content.index(b"Adobe") + 11
    assert content[transform] == 0
    content[transform] = 2
    return bytes(content)


def _oriented(pixels: Pixels, _: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it a quarter: what reads ImageNet does not
    return _jpeg(Image.fromarray(pixels), quality=90, exif=exif)


def _as(**how: object) -> Callable[[Pixels, int], bytes]:
    return lambda pixels, _: _jpeg(Image.fromarray(pixels), **{"quality": 90, **how})


def _as_mode(mode: str) -> Callable[[Pixels, int], bytes]:
    return lambda pixels, _: _jpeg(Image.fromarray(pixels).convert(mode), quality=90)


ODD: dict[str, Callable[[Pixels, int], bytes]] = {
    "png": _png,
    "cmyk": _as_mode("CMYK"),
    "ycck": _ycck,
    "grey": _as_mode("L"),
    "progressive": _as(progressive=True),
    "444": _as(subsampling="4:4:4"),
    "422": _as(subsampling="4:2:2"),
    "tiny": _as(),
    "wide": _as(),
    "oriented": _oriented,
    "garbage_exif": _as(exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(range(40))),
    "restarts": _as(restart_marker_blocks=7),
    "optimised": _as(optimize=True, quality=97),
    "trailing_bytes": lambda pixels, serial: _plain(pixels, serial) + b"\0after the end\0" * 3,
    "comment": _as(comment=b"made by hand"),
}
"""Name -> how it is encoded. All are named .JPEG."""


# ------------------------------------------------------------------------------------------------------- other layouts


def _samples(folder: Path, split: str) -> Iterator[tuple[int, str, Path]]:
    for label, one in enumerate(sorted(path for path in (folder / split).iterdir() if path.is_dir())):
        for path in sorted(one.glob("*.JPEG")):
            yield label, one.name, path


def _shuffled(folder: Path, split: str) -> list[tuple[int, str, Path]]:
    found = list(_samples(folder, split))
    random.Random(split).shuffle(found)
    return found


def as_tars(folder: Path, out: Path, per_tar: int = 100, *, classes: bool = True, info: bool = False) -> Path:
    """webdataset's layout as timm publishes it: KEY.cls, KEY.jpg, KEY.json, classes mixed. ``classes``: with classes.txt."""
    out.mkdir(parents=True)
    described = {}
    for split, name, pattern in (("train", "train", TRAIN_SHARD), ("val", "validation", VAL_SHARD)):
        samples = _shuffled(folder, split)
        parts = [samples[first : first + per_tar] for first in range(0, len(samples), per_tar)]
        for number, part in enumerate(parts):
            with tarfile.open(out / pattern.format(number), "w", format=tarfile.USTAR_FORMAT) as tar:
                for label, _, path in part:
                    about = {"filename": path.name, "label": label}
                    members = {"cls": str(label).encode(), "jpg": path.read_bytes(), "json": json.dumps(about).encode()}
                    for extension, content in members.items():
                        entry = tarfile.TarInfo(f"{path.stem}.{extension}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))
        described[name] = {
            "name": name,
            "num_samples": len(samples),
            "filenames": [pattern.format(number) for number in range(len(parts))],
            "shard_lengths": [len(part) for part in parts],
        }
    if classes:
        (out / "classes.txt").write_text("\n".join(sorted(path.name for path in (folder / "train").iterdir())) + "\n")
    if info:
        (out / "_info.json").write_text(json.dumps({"splits": described}))
    return out


def as_parquet(folder: Path, out: Path, per_file: int = 100, *, row_group: int = 40, mixed: bool = True) -> Path:
    """Without ``mixed`` in the order of classes. Hugging Face's layout: data/train-00000-of-00003-HASH.parquet, image as struct, class names in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (out / "data").mkdir(parents=True)
    names = sorted(path.name for path in (folder / "train").iterdir())
    label_type = {"names": names, "_type": "ClassLabel"}
    features = {"info": {"features": {"image": {"_type": "Image"}, "label": label_type}}}
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())],
        metadata={"huggingface": json.dumps(features)},
    )
    for split, shown in (("train", "train"), ("val", "validation")):
        samples = _shuffled(folder, split) if mixed else list(_samples(folder, split))
        parts = [samples[first : first + per_file] for first in range(0, len(samples), per_file)]
        for number, part in enumerate(parts):
            images = [{"bytes": path.read_bytes(), "path": path.name} for _, _, path in part]
            table = pa.table({"image": images, "label": [label for label, _, _ in part]}, schema=schema)
            digest = hashlib.sha256(f"{split}{number}".encode()).hexdigest()[:16]
            name = f"{shown}-{number:05d}-of-{len(parts):05d}-{digest}.parquet"
            pq.write_table(table, out / "data" / name, row_group_size=row_group)
    return out


def as_flat_val(folder: Path, out: Path) -> Path:
    """val/ without class folders, and the devkit that tells its classes: ids of it are not in the order of labels."""
    from scipy.io import savemat

    shutil.copytree(folder / "train", out / "train")
    (out / "val").mkdir()
    names = sorted(path.name for path in (folder / "train").iterdir())
    order = np.random.default_rng(1).permutation(len(names)) + 1
    ids = dict(zip(names, order.tolist(), strict=True))
    told = {}
    for _, name, path in _samples(folder, "val"):
        shutil.copy2(path, out / "val")
        told[path.name] = ids[name]
    data = out / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{told[name]}\n" for name in sorted(told)))
    by_id = sorted((number, name) for name, number in ids.items())
    inner = [(len(by_id) + 1, "n00000001", len(by_id))]  # a class of classes, which is no label
    fields = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    synset = np.zeros((len(by_id) + 1, 1), dtype=[(field, object) for field in fields])
    for row, (number, name, children) in enumerate([(*entry, 0) for entry in by_id] + inner):
        synset[row, 0] = (number, name, "words", "gloss", children, np.arange(1, children + 1), 0, 1300)
    savemat(data / "meta.mat", {"synsets": synset})
    return out


def as_kaggle(folder: Path, out: Path) -> Path:
    """ILSVRC/Data/CLS-LOC with val/ flat, and LOC_val_solution.csv beside it."""
    base = out / "ILSVRC" / "Data" / "CLS-LOC"
    shutil.copytree(folder / "train", base / "train")
    (base / "val").mkdir()
    rows = ["ImageId,PredictionString"]
    for _, name, path in _shuffled(folder, "val"):
        shutil.copy2(path, base / "val")
        rows.append(f"{path.stem},{name} 85 1 499 272 {name} 1 2 3 4 ")
    (out / "LOC_val_solution.csv").write_text("\n".join(rows) + "\n")
    return out


def as_tiny_imagenet(folder: Path, out: Path) -> Path:
    """train/CLASS/images/*.JPEG, val/images/*.JPEG with val_annotations.txt, wnids.txt in no order."""
    wnids, annotations = [], []
    for _, name, path in _samples(folder, "train"):
        images = out / "train" / name / "images"
        if not images.is_dir():
            images.mkdir(parents=True)
            wnids.append(name)
            (out / "train" / name / f"{name}_boxes.txt").write_text("")
        shutil.copy2(path, images)
    (out / "val" / "images").mkdir(parents=True)
    for _, name, path in _shuffled(folder, "val"):
        shutil.copy2(path, out / "val" / "images")
        annotations.append(f"{path.name}\t{name}\t0\t32\t44\t62\n")
    (out / "val" / "val_annotations.txt").write_text("".join(annotations))
    (out / "wnids.txt").write_text("\n".join(reversed(wnids)) + "\n")
    return out
