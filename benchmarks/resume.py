"""How many kills a run survives, to the last bit: ``python benchmarks/resume.py``. The record goes to benchmarks/records/resume.md.

Each line is `python -m eit_lab.selftest resume` with other words: one process and two, every signal, accumulation, and
image files read by worker processes. Some five minutes on 2 cores.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

RECORD = Path(__file__).parent / "records" / "resume.md"
CASES = (
    "kills=12 signals=KILL,TERM,USR2 seed=3 recipe.epochs=6",
    "processes=2 kills=8 signals=KILL,TERM,USR2 seed=4 recipe.epochs=6",
    "kills=5 seed=6 trainer.check_val_every_n_epoch=2 trainer.accumulate_grad_batches=2 trainer.max_steps=50",
    "kills=4 seed=5 data=imagenet data.root={images} data.img_size=32 data.num_workers=2 recipe=debug recipe.batch_size=32 "
    "recipe.epochs=3 trainer.accelerator=cpu trainer.checkpoint_every_n_steps=3",
)


def main() -> int:
    """Run every case; write the record; 1 when one failed."""
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        _make_images(Path(scratch))
        for case in CASES:
            began = time.monotonic()
            words = case.format(images=scratch).split()
            done = subprocess.run(
                [sys.executable, "-m", "eit_lab.selftest", "resume", *words],
                capture_output=True,
                text=True,
                check=False,
            )
            failed += done.returncode != 0
            print(done.stdout or done.stderr, flush=True)
            alone, killed, verdict = (done.stdout.strip().splitlines() + [done.stderr.strip()] * 3)[:3]
            shown = shlex.join(word.replace(scratch, "IMAGES") for word in words)
            rows.append(
                f"| `{shown}` | {alone.partition(': ')[2]} | {killed.partition(': ')[2]} | {verdict.partition(':')[0]} |"
            )
            print(f"{time.monotonic() - began:.0f} s", flush=True)
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "numpy"))
    RECORD.write_text(
        "# Killed and resumed against left alone\n\n"
        f"- {time.strftime('%Y-%m-%d')}, {packages}, Python {platform.python_version()}, {platform.machine()}, CPU\n"
        "- command: `python benchmarks/resume.py`; each row is `python -m eit_lab.selftest resume` with the words shown\n"
        "- compared: weights, averaged weights, optimizer, random states, metrics, results, order of samples\n\n"
        "| words | left alone | killed | comparison |\n| --- | --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )
    return 1 if failed else 0


def _make_images(root: Path) -> None:
    """train/ and val/ of eight classes, JPEGs cut from two photographs."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 60), ("val", 6)):
        for label in range(8):
            folder = root / split / f"n0000000{label}"
            folder.mkdir(parents=True)
            for number in range(per_class):
                h, w = rng.integers(150, 400, 2)
                y, x = rng.integers(0, 427 - h), rng.integers(0, 640 - w)
                Image.fromarray(photographs[label % 2][y : y + h, x : x + w]).save(
                    folder / f"{number}.JPEG", quality=90
                )


if __name__ == "__main__":
    sys.exit(main())
