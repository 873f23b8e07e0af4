"""What a trained model sees in image files: ``python -m eit_lab.predict run=FOLDER image.jpg`` prints the top 5."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eit_lab import command

if TYPE_CHECKING:
    from eit_lab.trained import Trained

_TOP = 5
_HELP = """\
Print the five likeliest classes of each image file, with their probabilities.

  python -m eit_lab.predict run=FOLDER image.jpg [more.png ...] [weights=raw|ema] [checkpoint=...] [data.img_size=N]
  python -m eit_lab.predict checkpoint=FILE model=eit_base image.jpg ...

The options are those of python -m eit_lab.evaluate. Images are resized and cropped as in the run's own evaluation, made grey
or coloured as the model needs them.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, 2 for wrong input or a file that is no image."""
    return command.run(_main, argv, help_text=_HELP)


def _main(argv: list[str]) -> int:
    from eit_lab.config import ConfigError
    from eit_lab.trained import find, take_apart

    words = take_apart(argv, command="predict", options={}, takes_files=True)
    trained = find(words, command="predict")
    if not words.rest:
        raise ConfigError("predict needs an image file: predict run=FOLDER image.jpg")
    missing = next((word for word in words.rest if not Path(word).is_file()), None)
    if missing is not None:  # before torch is loaded
        raise ConfigError(f"{missing}: no such file")
    return _predict(trained, words.rest)


def _predict(trained: Trained, paths: Sequence[str]) -> int:
    import torch

    from eit_lab.data.augment import BatchAugment
    from eit_lab.data.folders import read_image
    from eit_lab.models.checkpoints import load_backbone

    config = trained.config
    images = [read_image(Path(path), config.data) for path in paths]
    model = load_backbone(
        config.model,
        trained.files,
        img_size=config.data.img_size,
        in_chans=config.data.in_chans,
        num_classes=trained.num_classes,
        weights=trained.weights,
    )
    normalise = BatchAugment(config.data, config.recipe, num_classes=model.num_classes, seed=config.seed).normalise
    print(f"model  {trained.describe()}")
    for path, image in zip(paths, images, strict=True):
        with torch.inference_mode():
            probabilities = model(normalise(image[None]))[0].float().softmax(dim=-1)
        print(path)
        for share, label in zip(*probabilities.topk(min(_TOP, model.num_classes)), strict=True):
            print(f"  {100 * share.item():6.2f}%  {_class_name(int(label), trained, model.num_classes)}")
    return 0


def _class_name(label: int, trained: Trained, num_classes: int) -> str:
    """Its folder's name, in words where that is a WordNet id; else its number."""
    from eit_lab.data.variants import lemmas, synsets

    names = trained.class_names
    if names is None and trained.run is None and num_classes == len(synsets()):  # as the authors', timm's
        names = synsets()
    if names is None:
        return f"class {label}"
    words = lemmas().get(names[label])
    return f"{names[label]}  {words}" if words else names[label]


if __name__ == "__main__":
    sys.exit(main())
