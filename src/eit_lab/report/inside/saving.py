"""An analysis on disk: numbers, figures and the page of images of one model; and the arms of several beside each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eit_lab.report.figure import save_figure, style
from eit_lab.report.inside.model import model_page, model_panels
from eit_lab.report.inside.numbers import ArmInside, Between, group, load_inside, read_between, read_inside
from eit_lab.report.inside.viewer import write_viewer
from eit_lab.runs import json_ready, write_text

NUMBERS, GRAMS, PICTURES = "analysis.json", "grams.npz", "images.npz"


def save_model(
    out: Path,
    numbers: Mapping[str, Any],
    *,
    pictures: Mapping[str, NDArray[Any]] | None,
    grams: NDArray[np.float32] | None,
    labels: Mapping[str, str],
) -> list[Path]:
    """Write all of one model; returns the files, the page first. ``labels`` (model, arm) go onto the page of images.

    analysis.json is written last: where it is, all of it is.
    """
    out.mkdir(parents=True, exist_ok=True)
    inside = read_inside(json_ready(numbers), source=str(out / NUMBERS))
    with style():
        written = _save(out, "page", model_page(inside))
        for name, figure in model_panels(inside).items():
            _save(out / "figures", name, figure)
    if pictures is not None:
        arrays = {**pictures, **{key: np.array(text) for key, text in labels.items()}}
        np.savez_compressed(out / PICTURES, **arrays)  # type: ignore[arg-type]
        write_viewer(arrays, out / "images.html")
        written.append(out / "images.html")
    if grams is not None:
        np.savez_compressed(out / GRAMS, grams=grams, points=np.array(numbers["points"], dtype=np.str_))
    write_text(out / NUMBERS, json.dumps(json_ready(numbers), separators=(",", ":")) + "\n")
    return [*written, out / NUMBERS, out / "figures"]


def first_grams(folders: Sequence[Path]) -> dict[str, tuple[NDArray[np.float32], list[str]]]:
    """Gram matrices (groups, P, n, n) and points of the first analysed model of each arm that a figure shows."""
    from eit_lab.report.inside.arms import SHOWN

    found: dict[str, tuple[NDArray[np.float32], list[str]]] = {}
    for folder in folders:
        if (folder / NUMBERS).is_file() and (folder / GRAMS).is_file():
            arm = load_inside(folder / NUMBERS).arm
            if arm not in found and len(found) < SHOWN:
                with np.load(folder / GRAMS, allow_pickle=False) as file:
                    found[arm] = file["grams"], file["points"].tolist()
    return found


def save_arms(out: Path, folders: Sequence[Path], found: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write the figures that compare the arms of analysed models; nothing of a single model. ``found``: CKA between arms."""
    from eit_lab.report.inside.arms import arms_page, arms_panels

    insides = [load_inside(folder / NUMBERS) for folder in folders if (folder / NUMBERS).is_file()]
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
    from eit_lab.report.inside.arms import arms_panels

    with style():
        return {name: caption for name, (_, caption) in arms_panels(arms, between=between).items()}


def _save(folder: Path, name: str, figure: Figure) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(figure, folder / name)
    return [folder / f"{name}.png", folder / f"{name}.svg"]
