"""An analysis on disk: numbers, figures and the page of images of one model; and the arms of several beside each other."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eit_lab.config import ConfigError
from eit_lab.report.figure import save_figure, style
from eit_lab.report.inside import NUMBERS
from eit_lab.report.inside.arms import SHOWN, arms_page, arms_panels
from eit_lab.report.inside.model import model_page, model_panels
from eit_lab.report.inside.numbers import ArmInside, Between, group, load_inside, read_between
from eit_lab.report.inside.panels import PANELS
from eit_lab.report.inside.viewer import read_pictures, write_viewer
from eit_lab.runs import json_ready, write_text

GRAMS, PICTURES = "grams.npz", "images.npz"
PAGE, IMAGES = "page.png", "images.html"


def save_model(
    out: Path,
    numbers: Mapping[str, Any],
    *,
    pictures: Mapping[str, NDArray[Any]] | None,
    grams: NDArray[np.float32] | None,
    labels: Mapping[str, str],
    figures: bool = True,
) -> list[Path]:
    """Write all of one model; returns the files. ``labels`` (model, arm) go onto the page of images.

    analysis.json is written when all numbers are: where it is, the arrays are too. Figures come last (``draw_model``).
    """
    out.mkdir(parents=True, exist_ok=True)
    for stale in (NUMBERS, PAGE, f"{Path(PAGE).stem}.svg", IMAGES, PICTURES, GRAMS):  # of an earlier analysis
        (out / stale).unlink(missing_ok=True)
    if pictures is not None:
        arrays = {**pictures, **{key: np.array(text) for key, text in labels.items()}}
        np.savez_compressed(out / PICTURES, **arrays)  # type: ignore[arg-type]
    if grams is not None:
        images = json.dumps([numbers["data"][key] for key in ("name", "part", "order")])
        np.savez_compressed(
            out / GRAMS, grams=grams, points=np.array(numbers["points"], dtype=np.str_), images=np.array(images)
        )
    write_text(out / NUMBERS, json.dumps(json_ready(numbers), separators=(",", ":")) + "\n")
    return [*(draw_model(out) if figures else []), out / NUMBERS]


def draw_model(out: Path) -> list[Path]:
    """The page, its figures and the page of images, from the numbers and arrays in a folder; the page itself last of all."""
    inside = load_inside(out / NUMBERS)
    written = []
    with style():
        drawn = model_panels(inside)
        for name, figure in drawn.items():
            _save(out / "figures", name, figure)
        for panel in PANELS:  # of an earlier analysis that had more parts
            if panel.name not in drawn:
                for suffix in (".png", ".svg"):
                    (out / "figures" / f"{panel.name}{suffix}").unlink(missing_ok=True)
        if (out / PICTURES).is_file():
            write_viewer(read_pictures(out / PICTURES), out / IMAGES)
            written.append(out / IMAGES)
        page = _save(out, Path(PAGE).stem, model_page(inside))
    return [*page, *written, out / "figures"]


class Grams(NamedTuple):
    """What similarity between models is made of."""

    grams: NDArray[np.float32]
    """(groups, P, n, n), centred."""
    points: list[str]
    images: str
    """Which images in which order; models can only be compared by the same."""


def first_grams(folders: Mapping[Path, str]) -> dict[str, Grams]:
    """Those of the first analysed model of each arm that a figure shows. Raises ConfigError for a file that is damaged."""
    return {arm: _read_grams(some[0]) for arm, some in _with_grams(folders).items()}


def seeds_grams(folders: Mapping[Path, str]) -> list[tuple[tuple[str, Grams], tuple[str, Grams]]]:
    """Those of the first two seeds of each such arm, by the names that a figure gives them."""
    pairs = []
    for arm, some in _with_grams(folders).items():
        if len(some) > 1:
            a, b = ((f"{arm}, seed {load_inside(one / NUMBERS).seed}", _read_grams(one)) for one in some[:2])
            pairs.append((a, b))
    return pairs


def _with_grams(folders: Mapping[Path, str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder, arm in folders.items():
        if (folder / GRAMS).is_file() and (arm in found or len(found) < SHOWN):
            found.setdefault(arm, []).append(folder)
    return found


def _read_grams(folder: Path) -> Grams:
    try:
        with (folder / GRAMS).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return Grams(file["grams"], file["points"].tolist(), str(file["images"]))
    except (BadZipFile, EOFError, KeyError, ValueError, zlib.error):
        raise ConfigError(
            f"{folder / GRAMS} is damaged or of another version; analyse its run anew: overwrite=true"
        ) from None


def save_arms(out: Path, folders: Mapping[Path, str], found: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the figures that compare the arms of analysed models; nothing of a single model.

    ``folders``: of the analyses, and the arm of each; ``found``: CKA between arms.
    """
    insides = [dataclasses.replace(load_inside(folder / NUMBERS), arm=arm) for folder, arm in folders.items()]
    arms = group(insides)
    if len(insides) < 2:
        return []
    out.mkdir(parents=True, exist_ok=True)
    between = [read_between(one, source=str(out / "arms.json")) for one in found]
    with style():
        written = _save(out, "arms", arms_page(arms, between=between))
        for name, (figure, _) in arms_panels(arms, between=between).items():
            _save(out / "figures", name, figure)
    captions = _captions(arms, between)
    summary = {"schema": 1, "arms": {arm.label: [one.means for one in arm.insides] for arm in arms}, "between": found}
    write_text(out / "arms.json", json.dumps(json_ready({**summary, "captions": captions}), indent=1) + "\n")
    return [*written, out / "arms.json", out / "figures"]


def _captions(arms: Sequence[ArmInside], between: Sequence[Between]) -> dict[str, str]:
    with style():
        return {name: caption for name, (_, caption) in arms_panels(arms, between=between).items()}


def _save(folder: Path, name: str, figure: Figure) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(figure, folder / name)
    return [folder / f"{name}.png", folder / f"{name}.svg"]
