"""A run's identity, its folder, and its record. No torch.

The identity is a hash of what the result depends on: the resolved config (seed included), the data's fingerprint and the
package's own source. It names the folder, so the same command finds its own run again, finished or half done, and two
different runs can never share a folder. Where a run is placed (devices, workers, folders, loggers) is not part of it: a
run may be resumed on other hardware.

A folder holds config.yaml, versions.json, code.diff, checkpoints/, metrics.csv, and record.json, which later tools read.
"""

from __future__ import annotations

import ast
import errno
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

from omegaconf import OmegaConf

from eit_lab.caches import user_cache
from eit_lab.config import Config, ConfigError
from eit_lab.finetune import checkpoint_hash
from eit_lab.loading import dump
from eit_lab.processor import machine
from eit_lab.version import __version__

RECORD_SCHEMA = 1
PLACEMENT = (
    "run",
    "logger",
    "analysis",  # it looks on: the weights are the same to the last bit
    "data.root",
    "data.download",
    "data.num_workers",
    "data.max_unread",
    "data.shuffle_window",  # where it matters it is part of the fingerprint
    "data.cache_dir",
    "data.cache_gb",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.micro_batch_size",
    "trainer.accumulate_grad_batches",
    "trainer.activation_checkpointing",  # the same gradients to the last bit
    "trainer.log_every_n_steps",
    "trainer.checkpoint_every_minutes",
    "trainer.checkpoint_every_n_steps",
    "trainer.keep_epochs",
    "trainer.record_samples",
    "trainer.process_timeout_minutes",
    "trainer.peak_tflops",
    "trainer.profiler",
    "trainer.progress_bar",
    "checkpoint",  # its content counts, not its path
)
# Rooms whose code can change a result; reports, launchers and entry points cannot.
_RESULT_ROOMS = (
    "config.py", "loading.py", "schedule.py", "learning_rate.py", "plan.py", "models", "data", "training",
)  # fmt: skip
_CODE_DIGITS = 10
_PACKAGES = (
    "torch", "torchvision", "timm", "lightning", "torchmetrics", "hydra-core", "omegaconf", "numpy", "scipy", "scikit-learn",
    "pillow", "simplejpeg", "opencv-python-headless", "xxhash", "fsspec", "wandb",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a data set is, found without reading its images (data/catalog.py)."""

    num_classes: int
    num_train: int
    """Training images, the held-out slice taken off."""
    num_val: int
    num_test: int
    fingerprint: str
    """Hash of the files that a result depends on, not of where they lie."""


# ------------------------------------------------------------------------------------------------------------- identity


def identity(config: Config, facts: DataFacts) -> str:
    """Ten hex digits: the hash of the resolved config, the data, the weights it starts from, the code; not of its placement."""
    plain = dump(config)
    for key in PLACEMENT:
        *parents, last = key.split(".")
        node = plain
        for parent in parents:
            node = node[parent]
        node.pop(last, None)
    content = {"config": plain, "data": asdict(facts), "code": code_hash(), "checkpoint": checkpoint_hash(config)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


@cache
def code_hash() -> str:
    """Hash of the package's code that a result depends on; comments, docstrings and layout do not count.

    Taking the code apart costs half a second, more than a small run's first step: what was found for these very files is kept
    in the user's cache.
    """
    here, files = Path(__file__).parent, list[Path]()
    for room in _RESULT_ROOMS:
        path = here / room
        files += sorted([*path.rglob("*.py"), *path.rglob("*.[ch]")]) if path.is_dir() else [path]
    contents = {str(file.relative_to(here)): file.read_bytes() for file in files}
    plain = hashlib.sha256(
        f"1 {sys.version}".encode()
    )  # what _without_words does, and the tree's form, which is Python's own
    for name, content in contents.items():
        plain.update(f"{name}\n{len(content)}\n".encode() + content)
    known = user_cache() / "code" / plain.hexdigest()[:32]
    with suppress(OSError):
        if len(found := known.read_text()) == _CODE_DIGITS:
            return found
    digest = hashlib.sha256()
    for name, content in contents.items():
        digest.update(f"{name}\n".encode() + (_without_words(content) if name.endswith(".py") else content) + b"\n")
    found = digest.hexdigest()[:_CODE_DIGITS]
    with suppress(OSError):  # a cache that cannot be written is none
        known.parent.mkdir(parents=True, exist_ok=True)
        write_text(known, found)
    return found


def _without_words(source: bytes) -> bytes:
    """The syntax tree of a module without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()


def run_name(config: Config, run_id: str) -> str:
    """The folder's name: arm, data, seed, identity."""
    return f"{config.model.name}-{config.data.name}-s{config.seed}-{run_id}"


def is_main_process() -> bool:
    """False in the processes that a launcher started beside the first one of a run."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID"))
    return all(rank == "0" for rank in ranks)


# --------------------------------------------------------------------------------------------------------------- folder


@dataclass
class Run:
    """A claimed run folder; ``state`` says what was found there."""

    folder: Path
    run_id: str
    state: Literal["new", "resume", "finished"]
    lock: IO[str] | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        if self.lock is not None:
            _HELD.discard(self.lock)
            self.lock.close()

    @property
    def last_checkpoint(self) -> Path:
        """Where the newest training state is kept."""
        return self.folder / "checkpoints" / "last.ckpt"

    @property
    def previous_checkpoint(self) -> Path:
        """The one before it, for when the newest is damaged."""
        return self.folder / "checkpoints" / "previous.ckpt"

    def resume_candidates(self) -> tuple[Path, Path]:
        """Where a state to go on from may be, the newest first."""
        return self.last_checkpoint, self.previous_checkpoint

    @property
    def best_checkpoint(self) -> Path:
        """Where the weights with the best validation accuracy are kept."""
        return self.folder / "checkpoints" / "best.ckpt"


def claim(config: Config, facts: DataFacts) -> Run:
    """Make or find the run's folder, and hold it until this process ends.

    A new folder is made exclusively. A finished run is left alone unless ``run.overwrite``, which moves it aside. An
    unfinished one is resumed, or refused with one line while another process holds it.
    """
    run_id = identity(config, facts)
    folder = Path(config.run.root) / run_name(config, run_id)
    if not is_main_process():  # rank 0 claims; what it found is told to all ranks once they are connected
        record = read_record(folder)
        if record is not None and record["status"] == "finished" and not config.run.overwrite:
            return Run(folder, run_id, "finished")
        return Run(folder, run_id, "new")
    try:
        return _claim(config, folder, run_id)
    except OSError as error:
        raise ConfigError(
            f"run.root must be a folder that can be written, got {config.run.root!r}: {error.strerror} "
            f"({error.filename})"
        ) from None


def _claim(config: Config, folder: Path, run_id: str) -> Run:
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
        return Run(folder, run_id, "new", _hold(folder))
    except FileExistsError:
        if not folder.is_dir():
            raise
    record = read_record(folder)
    finished = record is not None and record["status"] == "finished"
    if finished and not config.run.overwrite:
        return Run(folder, run_id, "finished")
    lock = _hold(folder)
    # A run that itself began by overwriting goes on: else a command that a scheduler repeats would never end.
    began_so = record is not None and not finished and record["config"]["run"]["overwrite"]
    if config.run.overwrite and not began_so:
        aside = folder.parent / ".replaced" / f"{folder.name}-{time.time_ns()}"
        aside.parent.mkdir(exist_ok=True)
        folder.rename(aside)
        _HELD.discard(lock)
        lock.close()
        folder.mkdir()
        return Run(folder, run_id, "new", _hold(folder))
    run = Run(folder, run_id, "new", lock)
    if any(path.exists() for path in run.resume_candidates()):
        run.state = "resume"
    return run


_HELD: set[IO[str]] = set()


def _forget_locks() -> None:
    """In a forked process, a loader's worker: it must not go on holding a run when its parent has been killed."""
    while _HELD:
        _HELD.pop().close()


os.register_at_fork(after_in_child=_forget_locks)


def _hold(folder: Path) -> IO[str]:
    """Lock a run folder for the life of this process; the operating system lets go, whatever ends the process."""
    handle = (folder / "lock").open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        handle.close()
        if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
            raise OSError(error.errno, error.strerror, handle.name) from None
        raise ConfigError(f"{folder} is being run by {holder}; wait for it, or stop it") from None
    handle.seek(0)
    handle.truncate()
    handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    handle.flush()
    _HELD.add(handle)
    return handle


def holder(folder: Path) -> str | None:
    """Who runs the run of a folder at this moment, as far as this machine's file system knows; None: nobody."""
    try:
        with (folder / "lock").open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except OSError:
        return (folder / "lock").read_text().strip() or "another process"
    return None


def write_manifest(run: Run, config: Config, argv: list[str]) -> None:
    """config.yaml (resolved), versions.json (packages, commit, host), code.diff (what is not committed)."""
    (run.folder / "checkpoints").mkdir(exist_ok=True)
    write_text(run.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(dump(config))))
    commit, diff = code_state()
    write_text(run.folder / "versions.json", json.dumps({**versions(), "commit": commit, "command": argv}, indent=2))
    write_text(run.folder / "code.diff", diff)


@cache
def _packages() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def versions() -> dict[str, Any]:
    """Python, packages and host, as a record of what a result was made with."""
    return {
        "eit_lab": __version__,
        "code": code_hash(),
        "python": sys.version.split()[0],
        "packages": dict(_packages()),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "processor": machine(),
    }


def code_state() -> tuple[str | None, str]:
    """(commit, diff against it) of the checkout this package runs from; (None, "") for an installed wheel."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file() or shutil.which("git") is None:
        return None, ""
    commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    diff = subprocess.run(["git", "-C", str(root), "diff", "HEAD"], capture_output=True, text=True, check=False)
    return commit.stdout.strip() or None, diff.stdout


# --------------------------------------------------------------------------------------------------------------- record


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OSError with the file's name."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None  # a failing write does not name its file


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """The run's record, atomically."""
    write_text(folder / "record.json", json.dumps(json_ready(record), indent=2, sort_keys=True) + "\n")


def json_ready(value: Any) -> Any:
    """The same, every number that JSON does not know (nan, inf) as its name."""
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> dict[str, Any] | None:
    """The run's record, or None where there is none yet."""
    path = folder / "record.json"
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError:
        raise ConfigError(f"{path} is damaged; move its folder away to start that run anew") from None
    return record
