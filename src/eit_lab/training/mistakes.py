"""What a model gets wrong: the confusion of classes, and the wrong answers with the highest loss, as a figure.

From arrays to arrays; no model, no loader, no W&B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from eit_lab.runs import write_text

_COLUMNS = 8
_INCHES = 1.45  # side of one image in the figure
_NAME_LETTERS = 20  # above an image; more would reach into the next title


class ConfusionCount(NamedTuple):
    """How often one class was taken for another, or for itself."""

    label: int
    predicted: int
    num_images: int


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One wrong answer."""

    index: int
    """Place of the image in the data set."""
    label: int
    predicted: int
    loss: float
    """Cross entropy in nats, without smoothing."""
    image: NDArray[np.uint8]
    """(H, W) grey, or (H, W, 3)."""

    @property
    def probability(self) -> float:
        """What the model gave the true class, in [0, 1]."""
        return math.exp(-self.loss) if math.isfinite(self.loss) else 0.0


def count_confusion(label: NDArray[Any], predicted: NDArray[Any]) -> list[ConfusionCount]:
    """Every pair (true, predicted) that occurs in two (N,) arrays of classes, with its number, sorted by class."""
    assert label.shape == predicted.shape, "one answer an image"
    if not len(label):
        return []
    pairs, counts = np.unique(np.stack([label, predicted], axis=-1), axis=0, return_counts=True)
    return [ConfusionCount(int(t), int(p), int(n)) for (t, p), n in zip(pairs, counts, strict=True)]


def worst_mistakes(
    *,
    index: NDArray[Any],
    label: NDArray[Any],
    predicted: NDArray[Any],
    loss: NDArray[Any],
    image: Callable[[int], NDArray[np.uint8]],
    count: int,
) -> list[Mistake]:
    """The ``count`` wrong answers with the highest loss, worst first; equal ones by index. All arrays are (N,).

    ``image`` gives the raw image of an index as (C, H, W) uint8, and is asked for the chosen ones only. A loss that is not a
    number counts as the worst.
    """
    wrong = np.flatnonzero(label != predicted)
    badness = np.nan_to_num(loss[wrong].astype(np.float64), nan=np.inf, posinf=np.inf)
    chosen = wrong[np.lexsort((index[wrong], -badness))[:count]]
    return [
        Mistake(
            index=int(index[i]),
            label=int(label[i]),
            predicted=int(predicted[i]),
            loss=float(loss[i]),
            image=_as_shown(image(int(index[i]))),
        )
        for i in chosen
    ]


def _as_shown(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(C, H, W) -> (H, W) where the channels are one or say the same, (H, W, 3) where there are three, else the first."""
    assert image.ndim == 3, f"an image is (C, H, W), got {image.shape}"
    assert image.dtype == np.uint8, f"a raw image is uint8, got {image.dtype}"
    if image.shape[0] == 3 and (image != image[:1]).any():
        return np.ascontiguousarray(image.transpose(1, 2, 0))
    return np.ascontiguousarray(image[0])


def class_name(label: int, names: Sequence[str] | None) -> str:
    """The class's name, or its number where there are no names."""
    return str(label) if names is None else names[label]


def write_confusion(path: Path, counts: Sequence[ConfusionCount], *, class_names: Sequence[str] | None = None) -> None:
    """confusion.csv: true, predicted, images; a row for each pair that occurs."""
    rows = [[class_name(c.label, class_names), class_name(c.predicted, class_names), str(c.num_images)] for c in counts]
    write_text(path, "".join(",".join(map(_quoted, row)) + "\n" for row in (["true", "predicted", "images"], *rows)))


def _quoted(cell: str) -> str:
    return f'"{cell.replace(chr(34), chr(34) * 2)}"' if set(cell) & set(',"\n') else cell


def mistakes_figure(mistakes: Sequence[Mistake], *, class_names: Sequence[str] | None = None) -> Figure:
    """The images in rows of eight, worst first; above each what it is and what it was taken for."""
    columns = min(_COLUMNS, max(1, len(mistakes)))
    rows = max(1, math.ceil(len(mistakes) / columns))
    titles = _titles(mistakes, class_names)
    lines = max((title.count("\n") + 1 for title in titles), default=1)
    height = rows * (_INCHES + 0.17 * lines) + 0.4
    figure = Figure(figsize=(_INCHES * max(columns, 3), height), layout="constrained")
    figure.suptitle("worst mistakes: true class → answer, p of the true class", fontsize=9)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for place, axes in enumerate(places):
        axes.set_axis_off()
        if place < len(mistakes):
            axes.imshow(mistakes[place].image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(titles[place], fontsize=8)
    return figure


def _titles(mistakes: Sequence[Mistake], class_names: Sequence[str] | None) -> list[str]:
    """Short names side by side, long ones on lines of their own; the same way in the whole figure."""
    pairs = [[_short(class_name(c, class_names)) for c in (m.label, m.predicted)] for m in mistakes]
    long = any(len(" → ".join(pair)) > _NAME_LETTERS for pair in pairs)
    between = "\n→ " if long else " → "
    return [f"{between.join(pair)}\np {_probability(m.probability)}" for pair, m in zip(pairs, mistakes, strict=True)]


def _short(name: str) -> str:
    return name if len(name) <= _NAME_LETTERS else f"{name[: _NAME_LETTERS - 1]}…"


def _probability(value: float) -> str:
    return f"{value:.2f}" if value >= 0.005 else f"{value:.0e}" if value > 0 else "0"


def save_mistakes(
    folder: Path, mistakes: Sequence[Mistake], *, class_names: Sequence[str] | None = None
) -> Path | None:
    """mistakes.png and mistakes.svg in a folder; returns the PNG, or None where nothing was wrong."""
    if not mistakes:
        return None
    figure = mistakes_figure(mistakes, class_names=class_names)
    figure.savefig(folder / "mistakes.svg", metadata={"Date": None})
    figure.savefig(folder / "mistakes.png", dpi=160)
    return folder / "mistakes.png"
