"""What a model gets wrong: confusion, the worst mistakes, and how both read."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eit_lab.training.mistakes import (
    ConfusionCount,
    Mistake,
    count_confusion,
    mistakes_figure,
    save_mistakes,
    worst_mistakes,
    write_confusion,
)


def test_confusion_counts_every_pair_that_occurs() -> None:
    label, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 0, 2])
    counts = count_confusion(label, predicted)
    assert counts == [(0, 0, 1), (0, 1, 1), (1, 1, 1), (2, 0, 2), (2, 2, 1)]
    assert sum(c.num_images for c in counts) == len(label)
    assert count_confusion(label[:0], predicted[:0]) == []


def test_confusion_csv_reads_back_with_any_class_name(tmp_path: Path) -> None:
    names = ["cat", 'a "big", dog', "n02"]
    write_confusion(tmp_path / "confusion.csv", [ConfusionCount(0, 1, 7), ConfusionCount(1, 2, 1)], class_names=names)
    with (tmp_path / "confusion.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert rows == [
        {"true": "cat", "predicted": 'a "big", dog', "images": "7"},
        {"true": 'a "big", dog', "predicted": "n02", "images": "1"},
    ]


def test_the_worst_mistakes_are_the_wrong_answers_with_the_highest_loss() -> None:
    asked = []

    def image(index: int) -> np.ndarray:
        asked.append(index)
        return np.full((3 if index % 2 else 1, 4, 5), index, dtype=np.uint8)

    found = worst_mistakes(
        index=np.array([10, 11, 12, 13, 14]),
        label=np.array([0, 1, 2, 3, 4]),
        predicted=np.array([0, 0, 0, 0, 0]),
        loss=np.array([99.0, 0.5, 2.0, np.nan, 2.0]),
        image=image,
        count=3,
    )
    assert [m.index for m in found] == [13, 12, 14]  # what is not a number first, equal ones by index
    assert asked == [13, 12, 14]
    assert found[1].probability == pytest.approx(np.exp(-2.0))
    assert found[0].probability == 0.0
    assert found[0].image.shape == (4, 5)  # three channels that say the same are grey


def test_the_figure_says_of_each_image_what_it_is_and_what_it_was_taken_for(tmp_path: Path) -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    loss = -np.log([0.25, 1e-5])
    mistakes = [Mistake(index=i, label=i, predicted=2, loss=float(x), image=image) for i, x in enumerate(loss)]
    figure = mistakes_figure(mistakes, class_names=["cat", "a name of very many letters", "dog"])
    assert [axes.get_title() for axes in figure.axes] == [
        "cat\n→ dog\np 0.25",
        "a name of very many…\n→ dog\np 1e-05",
    ]
    short = mistakes_figure(mistakes, class_names=None)
    assert short.axes[0].get_title() == "0 → 2\np 0.25"
    assert save_mistakes(tmp_path, mistakes) == tmp_path / "mistakes.png"
    with Image.open(tmp_path / "mistakes.png") as saved:
        assert saved.width > 300
    assert (tmp_path / "mistakes.svg").stat().st_size > 1000
    assert save_mistakes(tmp_path / "none", []) is None
