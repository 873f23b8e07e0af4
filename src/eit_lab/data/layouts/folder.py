"""Images in files: ImageNet as people have it on a disk, and any data set in its layout. No torch.

  train/CLASS/*.JPEG, val/CLASS/*.JPEG      torchvision's ImageFolder; validation/ for val/ too
  val/*.JPEG                                flat, its classes in the devkit (torchvision.datasets.ImageNet reads the same) or
                                            in Kaggle's LOC_val_solution.csv
  ILSVRC/Data/CLS-LOC/{train,val}           Kaggle's archive
  train/CLASS/images, val/images            Tiny-ImageNet, with val/val_annotations.txt

Labels are places in the sorted class names, and samples are in the order of (label, file name): a flat val/ has the order,
and the fingerprint, that it has in class folders.

Where we differ from torchvision: folders in class folders are not walked (but Tiny-ImageNet's images/), names that begin
with a dot are no images (._x.JPEG of macOS is not one), and a class without images is refused.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import tarfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eit_lab.config import ConfigError
from eit_lab.data.index import Container, write_index
from eit_lab.data.layouts.listing import (
    IMAGE_SUFFIXES,
    SPLITS,
    THREADS,
    Listing,
    Summary,
    imagenet_notes,
    kept,
    progress,
)

_FOLDERS = {"train": ("train",), "val": ("val", "validation")}
_BASES = ("", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
_DEVKIT = "ILSVRC2012_devkit_t12"
_GROUND_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_KAGGLE = "LOC_val_solution.csv"
_TINY = "val_annotations.txt"
_INNER = "images"  # Tiny-ImageNet's folder between a class and its files
# A file made in the same tick of the disk's clock as the folder was looked at leaves its time of change as it was.
_TICK_NS = 20_000_000


@dataclass(frozen=True, kw_only=True)
class _Split:
    """Where one split's files lie."""

    path: Path
    classes: tuple[str, ...] = ()
    """Class folders, sorted; none: the files lie together and ``labels`` tells their classes."""
    inner: str = ""
    """Folder between a class (or the split) and its files."""
    labels: Path | None = None

    def folders(self) -> list[Path]:
        """Those that hold the files."""
        return [self.path / name / self.inner for name in self.classes] or [self.path / self.inner]


# ------------------------------------------------------------------------------------------------------------ recognition


def list_folder(root: Path, *, cache: Path, shown: str) -> Listing:
    """The listing of a local folder; ``shown`` is the root as it was given. Raises ConfigError, in one line."""
    try:
        splits = _recognise(root, shown)
        stamp = _stamp(root, splits)
    except OSError as error:
        raise _unreadable(error) from None

    def build(target: Path) -> Summary:
        try:
            classes = _read(splits, shown)
        except OSError as error:
            raise _unreadable(error) from None
        for name in SPLITS:
            _write(target / f"{name}.index", root, splits[name], classes[name], sorted(classes["train"]))
        counts = {name: sum(map(len, classes[name].values())) for name in SPLITS}
        names = sorted(classes["train"])
        return Summary(class_names=names, fingerprint=fingerprint(classes), notes=imagenet_notes(names, counts))

    return kept(cache, root=os.path.realpath(root), layout="folder", stamp=stamp, build=build)


def fingerprint(classes: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """16 hex digits of {split: {class: sorted file names or keys}}: the folders that the files lie in do not count."""
    digest = hashlib.sha256()
    for split in SPLITS:
        for name in sorted(classes[split]):
            files = sorted(key.rpartition("/")[2] for key in classes[split][name])
            digest.update(f"{name}\n{'/'.join(files)}\n".encode())
    return digest.hexdigest()[:16]


def holds_class_folders(root: Path) -> bool:
    """Whether there is a train/ with folders in it: then the root is one of files, whatever else lies there."""
    for base in _BASES:
        train = root / base / "train"
        if train.is_dir() and _folders_of(train):
            return True
    return False


def not_a_root(root: Path, shown: str) -> ConfigError:
    """What to say of a root without train/ or val/."""
    expected = f"data.root must hold the folders train/ and val/, got {shown!r}"
    if not root.exists():
        return ConfigError(f"{expected}: no such folder")
    if not root.is_dir():
        return ConfigError(f"{expected}: it is a file; name the folder that holds it, or that it is to be extracted to")
    names = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    found = f"{expected}: found {', '.join(names[:5]) or 'nothing'} there"
    if "build.json" in names:
        return ConfigError(f"{found}; its build has not ended: python -m eit_lab.shards build goes on")
    packed = next((name for name in names if name.startswith("ILSVRC2012_img_") and name.endswith(".tar")), None)
    if packed is not None:
        return ConfigError(f"{found}; {packed} is not extracted yet (it is not a shard: its files have no labels)")
    if root.name in ("train", "val", "validation"):
        return ConfigError(f"{found}; give the folder above {root.name}/")
    return ConfigError(found)


def _recognise(root: Path, shown: str) -> dict[str, _Split]:
    for base in (root / base for base in _BASES):
        paths = {
            split: next((base / name for name in names if (base / name).is_dir()), None)
            for split, names in _FOLDERS.items()
        }
        if paths["train"] is not None and paths["val"] is not None:
            train = _class_split(paths["train"], shown, "train")
            return {"train": train, "val": _val_split(paths["val"], root, base, shown)}
    raise not_a_root(root, shown)


def _class_split(path: Path, shown: str, split: str) -> _Split:
    names = _folders_of(path)
    if not names:
        tars = sorted(name for name in _names(path) if name.endswith(".tar"))
        reason = f"; {tars[0]} and {len(tars) - 1} others are not extracted yet" if tars else ""
        raise ConfigError(f"data.root must hold one folder a class in {split}/, found none in {str(path)!r}{reason}")
    return _Split(path=path, classes=tuple(names), inner=_INNER if (path / names[0] / _INNER).is_dir() else "")


def _val_split(path: Path, root: Path, base: Path, shown: str) -> _Split:
    annotations = path / _TINY
    if annotations.is_file() and (path / _INNER).is_dir() and _images_of(path / _INNER):
        return _Split(path=path, inner=_INNER, labels=annotations)
    loose, folders = _images_of(path), _folders_of(path)
    if annotations.is_file() and _INNER in folders:  # sorted into class folders, the empty one left
        folders.remove(_INNER)
    if folders and loose:
        raise ConfigError(
            f"data.root must hold {path.name}/ either in class folders or flat, got {len(folders)} folders and {len(loose)} "
            f"images beside them in {str(path)!r}: sort these into their folders too"
        )
    if folders:
        return _Split(path=path, classes=tuple(folders), inner=_INNER if (path / folders[0] / _INNER).is_dir() else "")
    if not loose:
        raise ConfigError(
            f"data.root must hold one folder a class in {path.name}/, or the images themselves, found none in {str(path)!r}"
        )
    labels = _ground_truth(path, root, base)
    if labels is None:
        raise ConfigError(
            f"data.root must hold what tells the classes of the {len(loose):,} images that lie flat in {path.name}/: the devkit "
            f"({_DEVKIT}, or its .tar.gz) or Kaggle's {_KAGGLE}, got {shown!r} without; or sort them into class folders"
        )
    return _Split(path=path, labels=labels)


def _ground_truth(path: Path, root: Path, base: Path) -> Path | None:
    """The file that tells a flat val's classes: the devkit's list, its archive, or Kaggle's table."""
    # Kaggle's table lies beside its folder ILSVRC, of which a root may be a part.
    above = [base, *base.parents[:3]] if base.name == "CLS-LOC" else [base]
    places = list(dict.fromkeys([root, *above, path]))
    for place in places:
        for below in (f"{_DEVKIT}/data", "data", ""):
            if (place / below / _GROUND_TRUTH).is_file() and (place / below / _META).is_file():
                return place / below / _GROUND_TRUTH
        for name in (f"{_DEVKIT}.tar.gz", f"{_DEVKIT}.tgz", _KAGGLE):
            if (place / name).is_file():
                return place / name
    return None


def _stamp(root: Path, splits: Mapping[str, _Split]) -> list[tuple[str, int]]:
    """Times of change, in ns, of all folders that are listed, and of the files that tell labels."""
    paths = [path for split in splits.values() for path in (split.path, *split.folders())]
    for split in splits.values():
        if split.labels is not None:
            meta = split.labels.with_name(_META)
            paths += [split.labels] + ([meta] if meta.is_file() else [])

    def changed(path: Path) -> int:
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:  # Tiny-ImageNet's inner folder, missing in one class: refused where it is listed
            return 0

    with ThreadPoolExecutor(THREADS) as pool:
        times = list(pool.map(changed, paths))
        if 0 <= time.time_ns() - max(times) < _TICK_NS:
            time.sleep(_TICK_NS / 1e9)
            times = list(pool.map(changed, paths))
    return [(os.path.relpath(path, root), at) for path, at in zip(paths, times, strict=True)]


# ---------------------------------------------------------------------------------------------------------------- listing


def _read(splits: Mapping[str, _Split], shown: str) -> dict[str, dict[str, list[str]]]:
    """{split: {class: sorted keys}}, found fit to train on."""
    total = sum(len(split.folders()) for split in splits.values())
    with progress(f"listing {shown}, folders", total) as advance, ThreadPoolExecutor(THREADS) as pool:

        def images(folder: Path) -> list[str]:
            names = _images_of(folder) if folder.is_dir() else []
            advance()
            return names

        listed = {name: list(pool.map(images, split.folders())) for name, split in splits.items()}
    classes: dict[str, dict[str, list[str]]] = {}
    for name, split in splits.items():
        inner = f"{split.inner}/" if split.inner else ""
        if split.labels is None:
            classes[name] = {
                folder: [f"{folder}/{inner}{file}" for file in files]
                for folder, files in zip(split.classes, listed[name], strict=True)
            }
        else:
            told = _told(split.labels, listed[name][0])
            classes[name] = {label: [] for label in sorted(set(told.values()))}
            for file in listed[name][0]:
                classes[name][told[file]].append(f"{inner}{file}")
    train, val = classes["train"], classes["val"]
    if train.keys() != val.keys():
        odd = sorted(train.keys() ^ val.keys())
        what = "class folders" if splits["val"].labels is None else "classes"
        raise ConfigError(
            f"data.root must hold the same {what} in train/ ({len(train)}) and {splits['val'].path.name}/ ({len(val)}), "
            f"got {shown!r}; on one side only: {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}"
        )
    for name, split in splits.items():
        empty = [folder for folder, files in classes[name].items() if not files]
        if empty:
            raise ConfigError(
                f"data.root must hold images in every class folder, got none in {str(split.path / empty[0])!r} "
                f"({len(empty)} empty in {split.path.name}/)"
            )
    return classes


def _write(path: Path, root: Path, split: _Split, classes: Mapping[str, Sequence[str]], names: Sequence[str]) -> None:
    counts = np.array([len(classes[name]) for name in names])
    keys = [key for name in names for key in classes[name]]
    folder = os.path.relpath(split.path, root)
    try:
        encoded = [key.encode() for key in keys]
    except UnicodeEncodeError:
        raise ConfigError(f"data.root must hold files with names in UTF-8, got others in {str(split.path)!r}") from None
    labels = np.repeat(np.arange(len(names)), counts)
    nothing = np.zeros(len(keys), dtype=np.uint8)
    if split.classes:
        containers = [
            Container(name=f"{folder}/{name}", num_samples=int(count))
            for name, count in zip(names, counts, strict=True)
        ]
    else:
        containers = [Container(name=folder, num_samples=len(keys))]
    columns = {
        "container": labels if split.classes else nothing,
        "label": labels,
        "key_end": np.cumsum(np.fromiter(map(len, encoded), dtype=np.uint64, count=len(encoded))),
        **dict.fromkeys(("offset", "size", "checksum", "width", "height"), nothing),
    }
    write_index(path, columns, b"".join(encoded), containers=containers, facts={"folder": folder})


def _names(folder: Path) -> list[str]:
    return os.listdir(folder)  # noqa: PTH208 -- names alone: half the time of entries, of 1.28 million files


def _images_of(folder: Path) -> list[str]:
    return sorted(name for name in _names(folder) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != ".")


def _folders_of(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.name[0] != "." and entry.is_dir())


def _unreadable(error: OSError) -> ConfigError:
    return ConfigError(f"data.root: {error.filename} cannot be read: {error.strerror or error}")


# ----------------------------------------------------------------------------------------------------- labels of a flat val


def _told(labels: Path, files: Sequence[str]) -> dict[str, str]:
    """File name -> class, of all files. Raises ConfigError for a file without, and for a list of which files are missing."""
    if labels.name == _TINY:
        rows = (line.split("\t") for line in labels.read_text().splitlines())
        by_name = {row[0]: row[1] for row in rows if len(row) > 1}
        told = {file: by_name[file] for file in files if file in by_name}
    else:
        by_stem = _kaggle(labels) if labels.name == _KAGGLE else _devkit(labels)
        by_name = {f"{stem}.JPEG": label for stem, label in by_stem.items()}
        told = {file: by_stem[stem] for file in files if (stem := Path(file).stem) in by_stem}
    if len(told) < len(files):
        other = next(file for file in files if file not in told)
        raise ConfigError(
            f"data.root must hold in val/ only images that {labels.name} tells the class of, got {other} "
            f"({len(files) - len(told)} of {len(files)})"
        )
    if len(told) < len(by_name):
        stems = {Path(file).stem for file in told}
        absent = next(name for name in sorted(by_name) if Path(name).stem not in stems)
        raise ConfigError(
            f"data.root must hold all {len(by_name):,} images in val/ that {labels.name} names, got {len(told):,}: "
            f"{absent} is missing"
        )
    return told


def _kaggle(table: Path) -> dict[str, str]:
    """Stem -> class: the first word of each image's answer, ``n03995372 85 1 499 272 ...``."""
    with table.open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if row.get("ImageId") and (row.get("PredictionString") or "").split()
        ]
    if not rows:
        raise ConfigError(f"data.root: {table} must have the columns ImageId and PredictionString, and rows")
    return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}


def _devkit(source: Path) -> dict[str, str]:
    """Stem -> class: line i of the ground truth is the ILSVRC2012_ID of ILSVRC2012_val_i; meta.mat tells its WordNet id."""
    import zlib

    from scipy.io import loadmat

    def damaged(error: Exception) -> ConfigError:
        return ConfigError(f"data.root: {source} is not ImageNet's devkit, or damaged ({error}): fetch it again")

    if source.name == _GROUND_TRUTH:
        truth, meta = source.read_bytes(), source.with_name(_META).read_bytes()
    else:
        try:
            with tarfile.open(source) as archive:
                parts = [archive.extractfile(f"{_DEVKIT}/data/{name}") for name in (_GROUND_TRUTH, _META)]
                truth, meta = (part.read() if part is not None else b"" for part in parts)
        except (tarfile.TarError, EOFError, zlib.error, KeyError) as error:
            raise damaged(error) from None
    try:
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]  # the others are classes of classes
        by_id = {int(number): str(name) for number, name in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)}
        ids = [int(line) for line in truth.split()]
        return {f"ILSVRC2012_val_{place:08d}": by_id[number] for place, number in enumerate(ids, start=1)}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        zlib.error,
    ) as error:  # of bytes in memory: what is damaged
        raise damaged(error) from None
