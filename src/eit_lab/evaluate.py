"""Test trained weights: a run's own number again, to the last digit, or any folder of images.

``python -m eit_lab.evaluate run=FOLDER``; with ``data=FOLDER``, see data/variants.py for what is recognised.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eit_lab import command

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eit_lab.data.variants import Variant
    from eit_lab.trained import Trained, Words

_HELP = """\
Test trained weights: a run on its own test set, compared with its record, or on any folder of images.

  python -m eit_lab.evaluate run=FOLDER [weights=raw|ema] [checkpoint=...] [part=test|val] [data.root=PATH] ...
  python -m eit_lab.evaluate run=FOLDER data=IMAGES [labels=real|FILE.json] ...
  python -m eit_lab.evaluate checkpoint=FILE model=eit_base data=IMAGES ...

  run         folder of a run (python -m eit_lab.train prints it)
  checkpoint  best: best validation accuracy; last: the end of training; epoch-0007; a file;     [recipe.select of the run]
              epochs: all epochs that were kept; a,b,c: the mean of their weights, in float64
  model       name of a model, for a file that belongs to no run (the authors', timm's); timm, with model.timm_name=NAME, is an
              architecture of timm
  weights     raw, or ema: the averaged ones                                [raw; both where the record has both]
  part        test, or val: the held-out slice of train                                                          [test]
  data        folder of images, known by its layout: one folder a class (the run's class names, WordNet ids, or
              numbers), ImageNet-V2, -A, -R, -Sketch, -C; some of the classes only restrict the answers to these
  labels      real: the ReaL labels of ImageNet's validation set; or a JSON file of lists of classes
  data.*, trainer.*   data.img_size=N: at another resolution; where the data lies, what to run on, as in train
"""
_OPTIONS: dict[str, Sequence[str] | None] = {"part": ("test", "val"), "data": None, "labels": None}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, 1 when the number differs from the record, 2 for wrong input."""
    return command.run(_main, argv, help_text=_HELP)


def _main(argv: list[str]) -> int:
    from eit_lab.config import ConfigError
    from eit_lab.processes import count_ranks, die_with_parent, run_ranks, started_by_launcher, typed_command
    from eit_lab.trained import find, take_apart

    argv = typed_command(argv)
    words = take_apart(argv, command="evaluate", options=_OPTIONS)
    trained = find(words, command="evaluate")
    if _is_own_layout(trained, words):
        words = words.without("data", f"data.root={words.options['data']}")
        trained = find(words, command="evaluate")
    if "part" in words.options and ("data" in words.options or "labels" in words.options):
        raise ConfigError("part is of the run's own data, got part with data or labels; leave it out")
    variant = _variant(trained, words)
    if not started_by_launcher() and (count := count_ranks(trained.config)) > 1:
        return run_ranks("eit_lab.evaluate", "", count=count, command=argv)
    die_with_parent()
    if variant is None:
        return _on_own_data(trained, words)
    limited = any(word.startswith("trainer.limit_test_batches=") for word in words.overrides)
    return _on_variant(trained, variant, limited=limited)


def _is_own_layout(trained: Trained, words: Words) -> bool:
    """Whether data=FOLDER has train/ and val/ with the run's own classes, or packed files: that is data.root=FOLDER."""
    from eit_lab.config import ImageNetData

    if "data" not in words.options or "labels" in words.options or not isinstance(trained.config.data, ImageNetData):
        return False
    from eit_lab.data.layouts import is_packed

    root = Path(words.options["data"]).expanduser()
    if is_packed(words.options["data"]):
        return trained.run is not None
    if trained.run is None or not ((root / "train").is_dir() and (root / "val").is_dir()):
        return False
    return trained.class_names == tuple(sorted(path.name for path in (root / "train").iterdir() if path.is_dir()))


def _variant(trained: Trained, words: Words) -> Variant | None:
    """The folder of images that is meant, or None: the run's own data."""
    from eit_lab.config import ConfigError, ImageNetData
    from eit_lab.data.variants import recognise

    folder, labels = words.options.get("data"), words.options.get("labels")
    if folder is None and labels is None:
        if trained.run is None:
            raise ConfigError(
                "data must be given with a file of weights: evaluate checkpoint=FILE model=NAME data=FOLDER"
            )
        return None
    if folder is None:
        folder = trained.config.data.root if isinstance(trained.config.data, ImageNetData) else None
        if folder is None:
            raise ConfigError(f"data must name the folder of the images with labels={labels}")
    return recognise(folder, num_classes=_num_classes(trained), class_names=trained.class_names, labels=labels)


def _num_classes(trained: Trained) -> int:
    if trained.num_classes is not None:
        return trained.num_classes
    from eit_lab.models.checkpoints import count_classes

    return count_classes(trained.files, trained.config.model)


# ---------------------------------------------------------------------------------------------------------- its own data


def _on_own_data(trained: Trained, words: Words) -> int:
    from eit_lab.data.catalog import describe
    from eit_lab.models.checkpoints import Weights
    from eit_lab.runs import is_main_process, read_record
    from eit_lab.training.evaluate import evaluate

    assert trained.run is not None
    part = words.options.get("part", "test")
    record = (read_record(trained.run) or {}).get("result") if part == "test" and trained.as_recorded else None
    weights: tuple[Weights, ...] = (trained.weights,)
    if "weights" not in words.options and f"{part}/acc1_ema" in (record or {}):
        weights = ("raw", "ema")
    facts = describe(trained.config.data)
    result = evaluate(trained.config, trained.files, num_classes=facts.num_classes, part=part, weights=weights)
    if not is_main_process():
        return 0
    print("  ".join(f"{name} {value:.6g}" for name, value in result.items()))
    known = {name: value for name, value in (record or {}).items() if name in result}
    if not known:
        return 0
    if known == result:
        print("the same as on record, to the last digit")
        return 0
    print("on record: " + "  ".join(f"{name} {value:.6g}" for name, value in known.items()))
    same_accuracy = all(known[name] == result[name] for name in known if "/acc1" in name)
    return 0 if same_accuracy else command.EXIT_FAILED


# ------------------------------------------------------------------------------------------------------ a folder of images


def _on_variant(trained: Trained, variant: Variant, *, limited: bool) -> int:
    from eit_lab.runs import is_main_process
    from eit_lab.training.evaluate import evaluate_variant

    num_classes = _num_classes(trained)
    if is_main_process():
        print(f"model  {trained.describe()}")
        print(f"data   {_what(variant, num_classes)}")
        for note in variant.notes:
            print(f"       {note}")
        sys.stdout.flush()
    config = trained.config
    if not limited:  # a run's own limit is of its own test set
        config = dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, limit_test_batches=1.0))
    counts = evaluate_variant(config, trained.files, variant, num_classes=num_classes, weights=trained.weights)
    if is_main_process():
        if len(variant.groups) > 1:
            print("\n".join(_corruption_table(variant.groups, counts)))
        print(_accuracies(counts.sum(axis=0)))
    return 0


def _what(variant: Variant, num_classes: int) -> str:
    images = f"{len(variant.files):,} images"
    if len(variant.groups) > 1:
        corruptions = {corruption for corruption, _ in variant.groups}
        images += f", {len(corruptions)} corruptions"
    if variant.mapped == "file name":
        return f"{variant.title}: {images}"
    if variant.classes is None:
        return f"{variant.title}: {images} in all {num_classes} classes, by {variant.mapped}"
    here = len(variant.classes)
    return f"{variant.title}: {images} in {here} classes, by {variant.mapped}; answers restricted to these {here} of {num_classes}"


def _accuracies(counts: NDArray[Any]) -> str:
    images, top1, top5 = (int(count) for count in counts)
    parts = []
    for name, right in (("top-1", top1), ("top-5", top5)):
        share = right / images
        parts.append(f"{name} {100 * share:.2f}% (+-{100 * math.sqrt(share * (1 - share) / images):.2f} binomial)")
    return f"{', '.join(parts)}, {images:,} images"


def _corruption_table(groups: Sequence[tuple[str, str]], counts: NDArray[Any]) -> Iterator[str]:
    """Top-1 in percent: a row a corruption, a column a severity; the means are of the columns, then of the rows."""
    from eit_lab.data.variants import CORRUPTIONS

    share = {group: 100 * int(row[1]) / int(row[0]) for group, row in zip(groups, counts, strict=True) if row[0]}
    rows = list(dict.fromkeys(corruption for corruption, _ in groups))
    severities = sorted({severity for _, severity in groups})
    width = max(len(row) for row in (*rows, "corruption"))
    yield f"{'corruption':<{width}}" + "".join(f"{severity:>7}" for severity in severities) + f"{'mean':>7}"
    means = {}
    for row in rows:
        there = [share[row, severity] for severity in severities if (row, severity) in share]
        if not there:
            continue
        means[row] = sum(there) / len(there)
        cells = [f"{share[row, s]:7.2f}" if (row, s) in share else f"{'-':>7}" for s in severities]
        yield f"{row:<{width}}{''.join(cells)}{means[row]:7.2f}"
    published = [means[row] for row in CORRUPTIONS if row in means]
    yield f"mean over {len(means)} corruptions: top-1 {sum(means.values()) / len(means):.2f}%"
    if len(published) == len(CORRUPTIONS) < len(means):
        yield f"mean over the {len(published)} of ImageNet-C: top-1 {sum(published) / len(published):.2f}%"


if __name__ == "__main__":
    sys.exit(main())
