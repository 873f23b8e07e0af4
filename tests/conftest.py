"""Shared by the tests: the real commands as subprocesses, and small data that the tests make themselves."""

from __future__ import annotations

import atexit
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

for name in ("EIT_LAB_IMAGENET", "EIT_LAB_DATA", "EIT_LAB_RUNS", "WANDB_MODE"):
    os.environ.pop(name, None)
# Lists of files that the tests' roots leave behind do not belong into the user's own cache.
# pytest's workers share one: the kernels for CPUs are compiled once.
if "EIT_LAB_TESTS_CACHE" not in os.environ:
    os.environ["EIT_LAB_TESTS_CACHE"] = tempfile.mkdtemp(prefix="eit_lab-tests-")
    atexit.register(shutil.rmtree, os.environ["EIT_LAB_TESTS_CACHE"], ignore_errors=True)
os.environ["EIT_LAB_CACHE"] = os.environ["EIT_LAB_TESTS_CACHE"]


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str
    cpu_seconds: float
    """User and system time: what the command itself needs, whatever else the machine does."""


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Done]:
    """Run ``python -m eit_lab.NAME ...`` in an empty folder, as a user would."""

    def run(name: str, *args: str, env: dict[str, str] | None = None) -> Done:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", f"eit_lab.{name}", *args],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Done(done.returncode, done.stdout, done.stderr, spent)

    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only_run(root: Path) -> Path:
    """The folder of the one run below a root."""
    (folder,) = (path.parent for path in root.glob("*/record.json"))
    return folder


def record_of(folder: Path) -> dict:
    """A run's record."""
    return json.loads((folder / "record.json").read_text())


@pytest.fixture(scope="session")
def lookalike(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small look-alike of ImageNet: train/ and val/, four classes, JPEGs of odd sizes cut from two real photographs."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("imagenet")
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 8), ("val", 3)):
        for label in range(4):
            folder = root / split / f"n0000000{label}"
            folder.mkdir(parents=True)
            for number in range(per_class):
                photo = photographs[label % 2]
                h, w = rng.integers(180, 320, 2)
                y, x = rng.integers(0, photo.shape[0] - h), rng.integers(0, photo.shape[1] - w)
                image = photo[y : y + h, x : x + w] if label < 2 else 255 - photo[y : y + h, x : x + w]
                Image.fromarray(image).save(folder / f"{folder.name}_{number}.JPEG", quality=90)
    return root


@pytest.fixture(scope="session")
def damaged(lookalike: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The look-alike with every image of one class cut short, under names of their own."""
    root = tmp_path_factory.mktemp("damaged") / "imagenet"
    shutil.copytree(lookalike, root)
    for path in (root / "train" / "n00000000").iterdir():
        path.with_stem(f"cut_{path.stem}").write_bytes(path.read_bytes()[:2000])
        path.unlink()
    return root


# Small and quick: what a test of the program, not of the model, trains.
TINY_MODEL = (
    "model=eit_nano",
    "model.size.embed_dim=16",
    "model.size.depth=2",
    "model.size.num_heads=4",
    "recipe=small",
    "recipe.batch_size=16",
    "recipe.epochs=2",
    "recipe.warmup_epochs=0.0",
    "logger=none",
    "trainer.accelerator=cpu",
)
TINY = (*TINY_MODEL, "data=synthetic", "data.img_size=8", "data.num_samples=64")
