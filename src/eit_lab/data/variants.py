"""Folders of labelled images to test a model on: which data set a folder is, and which of the model's classes its own are.

Known by their layout: one folder a class (by the run's class names, by WordNet id, or by number), ImageNet-V2
(arXiv:1902.10811; its folders are numbers), -A (arXiv:1907.07174), -R (arXiv:2006.16241), -Sketch (arXiv:1905.13549),
-C (arXiv:1903.12261; corruption/severity/class), and the ReaL labels (arXiv:2006.07159) of the validation set.
The order of the 1000 classes, the lists of -A and -R, the lemmas and the ReaL labels are timm's files. No torch.

A folder with some of the model's classes restricts its answers to these, as -A and -R are defined.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eit_lab.config import ConfigError
from eit_lab.data.catalog import class_files
from eit_lab.data.layouts.listing import IMAGE_SUFFIXES

NO_CLASS = -1
"""Fills up the rows of ``Variant.targets``."""
_DEEPEST = 3  # folders between the given one and class folders: group/corruption/severity
_SEVERITIES = ("1", "2", "3", "4", "5")
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.")
# (classes, how they were told, images): what each data set has as published.
_PUBLISHED = {
    "ImageNet's validation set": ("all", "WordNet id", 50_000),
    "ImageNet-Sketch": ("all", "WordNet id", 50_889),
    "ImageNet-V2": ("all", "number", 10_000),
    "ImageNet-A": ("a", "WordNet id", 7_500),
    "ImageNet-R": ("r", "WordNet id", 30_000),
}
CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The 15 corruptions of ImageNet-C that its published means are over; a copy may have four more."""


class FileList:
    """Paths, compactly: ImageNet-C has 3.75 million, and every worker process holds them."""

    def __init__(self, folders: Sequence[tuple[Path, Sequence[str]]]) -> None:
        self._folders = [str(folder) for folder, _ in folders]
        counts = [len(names) for _, names in folders]
        self._folder = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
        self._names = np.array([os.fsencode(name) for _, names in folders for name in names], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Path:
        return Path(self._folders[self._folder[index]], os.fsdecode(self._names[index]))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """N labelled images in G groups, as a model of K classes is tested on them."""

    title: str
    files: FileList
    groups: tuple[tuple[str, str], ...]
    """(corruption, severity) of each group; a single ("", "") where there are none."""
    group: NDArray[np.int64]
    """(N,) place in ``groups``."""
    targets: NDArray[np.int64]
    """(N, T) classes of the model that count as right; NO_CLASS fills up."""
    classes: NDArray[np.int64] | None
    """The model's classes that may be answered, sorted; None: all."""
    mapped: str
    """How the folders' names were told: "class name", "WordNet id", "number", "file name"."""
    notes: tuple[str, ...]
    """One line each: what was left out, what is not as published."""


# -------------------------------------------------------------------------------------------------- timm's ImageNet files


@cache
def synsets(subset: str = "all") -> tuple[str, ...]:
    """WordNet ids in label order: of all 1000 classes, or of the 200 of ImageNet-A ("a") or -R ("r")."""
    name = "imagenet_synsets.txt" if subset == "all" else f"imagenet_{subset}_synsets.txt"
    return tuple(_timm_file(name).read_text().split())


@cache
def lemmas() -> Mapping[str, str]:
    """WordNet id -> words, e.g. n01440764 -> "tench, Tinca tinca"."""
    rows = (line.split("\t", 1) for line in _timm_file("imagenet_synset_to_lemma.txt").read_text().splitlines())
    return {wnid: words.strip('"') for wnid, words in rows}


def _timm_file(name: str) -> Path:
    # NOTE: importing timm for a list of names would import torch and all of its models.
    spec = find_spec("timm")
    path = Path(spec.origin).parent / "data" / "_info" / name if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise ConfigError(
            f"ImageNet's class lists need timm (its file {name}), which is not installed; pip install timm"
        )
    return path


# ------------------------------------------------------------------------------------------------------------ recognition


def recognise(
    root: str | Path, *, num_classes: int, class_names: Sequence[str] | None = None, labels: str | None = None
) -> Variant:
    """What a folder of images is, for a model of ``num_classes`` with these ``class_names`` in label order, if known.

    ``labels``: "real", or a JSON file of label lists (by place in the validation set, or by file name). Raises ConfigError
    where no folder can be told to be one of the model's classes.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ConfigError(f"data must be a folder of images, got {str(root)!r}: no such folder")
    if class_names is None and num_classes == len(synsets()):
        class_names = synsets()
    if labels is not None:
        return _with_label_lists(root, labels, num_classes=num_classes, class_names=class_names)
    roots = _class_roots(root)
    if () in roots or len(roots) == 1:
        return _one(root.joinpath(*roots[0]), num_classes=num_classes, class_names=class_names)
    if ("val",) in roots:  # ImageNet's own layout
        return _one(root / "val", num_classes=num_classes, class_names=class_names)
    if roots and all(parts[-1] in _SEVERITIES for parts in roots):
        return _corrupted(root, roots, num_classes=num_classes, class_names=class_names)
    if not roots:
        flat = _holds_images(root)
        raise ConfigError(
            f"data must hold one folder a class with images in it, got {str(root)!r}"
            + (": images without class folders; labels=real or labels=FILE.json tells their classes" if flat else "")
        )
    names = ", ".join("/".join(parts) for parts in roots[:3])
    raise ConfigError(
        f"data must be one data set, got {str(root)!r} with {len(roots)}: {names}{' ...' if len(roots) > 3 else ''}"
    )


def map_classes(
    names: Sequence[str], *, num_classes: int, class_names: Sequence[str] | None
) -> tuple[dict[str, int], str]:
    """({folder name: class}, how): by the way that tells the most of the names, "class name", "WordNet id" or "number"."""
    ways: dict[str, dict[str, int]] = {}
    if class_names is not None:
        by_name = {name: label for label, name in enumerate(class_names)}
        ways["WordNet id" if tuple(class_names) == synsets() else "class name"] = {
            name: by_name[name] for name in names if name in by_name
        }
    numbers = {name: int(name) for name in names if name.isdecimal()}
    if class_names is not None and set(class_names) <= set(
        synsets()
    ):  # numbers are ImageNet's, some of which it may lack
        of_imagenet = synsets()
        numbers = {
            name: by_name[of_imagenet[number]]
            for name, number in numbers.items()
            if number < len(of_imagenet) and of_imagenet[number] in by_name
        }
    ways["number"] = {name: number for name, number in numbers.items() if number < num_classes}
    how = max(ways, key=lambda way: len(ways[way]))  # the first of equals
    return ways[how], how


def _one(folder: Path, *, num_classes: int, class_names: Sequence[str] | None) -> Variant:
    found = class_files(folder)
    told, how = map_classes(list(found), num_classes=num_classes, class_names=class_names)
    _refuse_untold(folder, found, told, num_classes=num_classes, class_names=class_names)
    chosen = {name: found[name] for name in found if name in told and found[name]}
    files = FileList([(folder / name, names) for name, names in chosen.items()])
    label = np.repeat([told[name] for name in chosen], [len(names) for names in chosen.values()])
    title, surprise = _title(told, how, num_images=len(files))
    return Variant(
        title=title,
        files=files,
        groups=(("", ""),),
        group=np.zeros(len(files), dtype=np.int64),
        targets=label.astype(np.int64)[:, None],
        classes=_restricted(label, num_classes),
        mapped=how,
        notes=(*_left_out(found, told), *surprise),
    )


def _corrupted(
    root: Path, roots: Sequence[tuple[str, ...]], *, num_classes: int, class_names: Sequence[str] | None
) -> Variant:
    by_group = {}
    for parts in roots:
        corruption = parts[-2] if len(parts) > 1 else root.name
        if (corruption, parts[-1]) in by_group:
            raise ConfigError(f"data must have each corruption once, got {corruption} twice in {str(root)!r}")
        by_group[corruption, parts[-1]] = root.joinpath(*parts)
    folders, labels, group, notes = [], [], [], []
    for place, folder in enumerate(by_group.values()):
        found = class_files(folder)
        told, how = map_classes(list(found), num_classes=num_classes, class_names=class_names)
        _refuse_untold(folder, found, told, num_classes=num_classes, class_names=class_names)
        for name, names in found.items():
            if name in told and names:
                folders.append((folder / name, names))
                labels.append(np.full(len(names), told[name]))
                group.append(np.full(len(names), place))
        notes += [f"{folder.relative_to(root)}: {note}" for note in _left_out(found, told)]
    label = np.concatenate(labels).astype(np.int64)
    return Variant(
        title="ImageNet-C" if num_classes == len(synsets()) else "corruptions",
        files=FileList(folders),
        groups=tuple(by_group),
        group=np.concatenate(group).astype(np.int64),
        targets=label[:, None],
        classes=_restricted(label, num_classes),
        mapped=how,
        notes=tuple(notes),
    )


def _with_label_lists(root: Path, labels: str, *, num_classes: int, class_names: Sequence[str] | None) -> Variant:
    if labels == "real" and (class_names is None or tuple(class_names) != synsets()):
        raise ConfigError(f"labels=real are of ImageNet's 1000 classes, and the model has {num_classes} others")
    by_name = _read_label_lists(labels, num_classes=num_classes)
    split = root / "val" if (root / "val").is_dir() else root
    listing = [
        (split, sorted(_image_names(split))),
        *((split / name, names) for name, names in class_files(split).items()),
    ]
    kept, rows, unknown, empty = [], [], 0, 0
    for folder, names in listing:
        told = [name for name in names if Path(name).stem in by_name]
        some = [name for name in told if by_name[Path(name).stem]]
        unknown += len(names) - len(told)
        empty += len(told) - len(some)
        kept.append((folder, some))
        rows += [by_name[Path(name).stem] for name in some]
    if not rows:
        raise ConfigError(
            f"labels={labels} must tell the classes of images in {str(split)!r} by their file names, and tells none of "
            f"{unknown + empty}; ImageNet's are ILSVRC2012_val_00000001.JPEG and so on"
        )
    targets = np.full((len(rows), max(map(len, rows))), NO_CLASS, dtype=np.int64)
    for place, row in enumerate(rows):
        targets[place, : len(row)] = row
    notes = [f"{empty:,} images whose list of labels is empty are left out"] if empty else []
    notes += [f"{unknown:,} images that the labels do not name are left out"] if unknown else []
    return Variant(
        title="ReaL labels of ImageNet's validation set" if labels == "real" else f"labels of {labels}",
        files=FileList(kept),
        groups=(("", ""),),
        group=np.zeros(len(rows), dtype=np.int64),
        targets=targets,
        classes=None,
        mapped="file name",
        notes=tuple(notes),
    )


def _read_label_lists(labels: str, *, num_classes: int) -> dict[str, list[int]]:
    """File name without its suffix -> classes."""
    path = _timm_file("imagenet_real_labels.json") if labels == "real" else Path(labels).expanduser()
    try:
        content = json.loads(path.read_text())
    except OSError:
        raise ConfigError(f"labels must be real or a JSON file, got {labels!r}: no such file") from None
    except ValueError as error:
        raise ConfigError(f"labels must be real or a JSON file, got {labels!r}: {error}") from None
    if isinstance(content, list):
        content = {f"ILSVRC2012_val_{place:08d}": row for place, row in enumerate(content, start=1)}
    rows: dict[str, Any] = {"": content}
    if isinstance(content, dict):
        rows = {Path(name).stem: row for name, row in content.items()}
        if len(rows) < len(content):
            stems = [Path(name).stem for name in content]
            twice = next(stem for stem in stems if stems.count(stem) > 1)
            raise ConfigError(f"labels must name each file once, got {twice!r} more than once in {labels!r}")
    for name, row in rows.items():
        good = isinstance(row, list) and all(type(label) is int and 0 <= label < num_classes for label in row)
        if not good:
            raise ConfigError(
                f"labels must be lists of classes 0 to {num_classes - 1}, by place or by file name, got {row!r} "
                f"for {name!r} in {labels!r}"
            )
    return rows


# ---------------------------------------------------------------------------------------------------------------- helpers


def _class_roots(root: Path) -> list[tuple[str, ...]]:
    """Where class folders lie: the path of each folder below ``root`` whose own folders hold images, () for root itself."""

    def walk(folder: Path, parts: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        below = _subfolders(folder)
        if any(_holds_images(folder / name) for name in below):
            yield parts
        elif len(parts) < _DEEPEST:
            for name in below:
                yield from walk(folder / name, (*parts, name))

    return list(walk(root, ()))


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir())


def _image_names(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.is_file())


def _holds_images(folder: Path) -> bool:
    return bool(list(islice(_image_names(folder), 1)))


def _refuse_untold(
    folder: Path,
    found: Mapping[str, Sequence[str]],
    told: Mapping[str, int],
    *,
    num_classes: int,
    class_names: Sequence[str] | None,
) -> None:
    if not told:
        theirs, ours = ", ".join(list(found)[:3]), ", ".join((class_names or [str(n) for n in range(num_classes)])[:3])
        raise ConfigError(
            f"data must have class folders that are the model's ({num_classes} classes: {ours} ...), got {len(found)} others "
            f"in {str(folder)!r}: {theirs} ..."
        )
    if not any(found[name] for name in told):
        raise ConfigError(f"data must hold images in its class folders, got none in {str(folder)!r}")


def _left_out(found: Mapping[str, Sequence[str]], told: Mapping[str, int]) -> list[str]:
    notes = []
    for names, words in (
        ([name for name in found if name not in told], "folders are not the model's classes and are left out"),
        ([name for name in told if not found[name]], "class folders are empty"),
    ):
        if names:
            notes.append(f"{len(names)} {words}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")
    return notes


def _restricted(label: NDArray[np.int64], num_classes: int) -> NDArray[np.int64] | None:
    classes = np.unique(label)
    return classes if len(classes) < num_classes else None


def _title(told: Mapping[str, int], how: str, *, num_images: int) -> tuple[str, list[str]]:
    """(title, what is not as published): by classes and, where two data sets have the same, by the number of images."""
    fits = [
        (title, published)
        for title, (subset, told_by, published) in _PUBLISHED.items()
        if told_by == how and (len(told) == len(synsets()) if how == "number" else told.keys() == set(synsets(subset)))
    ]
    if not fits:
        return "folder of images", []
    for title, published in fits:
        if published == num_images:
            return title, []
    title, published = fits[0]
    if len(fits) > 1:
        return "ImageNet's 1000 classes", []
    return f"the classes of {title}", [f"{title} has {published:,} images as published, here are {num_images:,}"]
