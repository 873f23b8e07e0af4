"""Fine-tuning before any weight is read: what ``checkpoint=...`` means for a config, and which file it names. No torch.

A run's own checkpoint brings its model and its image size along, so that ``checkpoint=RUN data=cifar100 recipe=finetune``
says everything. Files that do not say what they hold (the authors', timm's) change nothing: the model is then for the user
to name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from eit_lab.config import Config, ConfigError

METADATA_KEY = "eit_lab"
"""Of a .safetensors file's metadata: JSON with model, num_classes, img_size, in_chans, mean, std, identity."""
_LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a checkpoint was trained as."""

    model: dict[str, Any]
    img_size: int | list[int]
    in_chans: int


def checkpoint_file(config: Config) -> Path | None:
    """The file that ``config.checkpoint`` names, or None where a run starts from nothing. Raises ConfigError in one line."""
    return None if config.checkpoint is None else resolve(config.checkpoint)


def checkpoint_hash(config: Config) -> str | None:
    """16 hex digits of the content of ``checkpoint_file``: what a result depends on is the weights, not where they lie."""
    path = checkpoint_file(config)
    if path is None:
        return None
    stat = path.stat()
    return _hash(path.absolute(), stat.st_size, stat.st_mtime_ns)


@cache  # of a sweep's many jobs from one file
def _hash(path: Path, size: int, modified_ns: int) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def resolve(name: str | Path) -> Path:
    """The weights' file of a run folder (best or last, as its recipe selects), or the file itself."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise ConfigError(f"checkpoint must be a run folder or a file of weights, got {str(name)!r}: no such file")
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"checkpoint must be a run folder (with config.yaml) or a file of weights, got {str(name)!r}")
    select = (_run_config(path).get("recipe") or {}).get("select", "best")
    file = path / "checkpoints" / f"{select}.ckpt"
    if not file.is_file():
        raise ConfigError(f"checkpoint: {path} has no {file.name} in checkpoints/; has it trained for an epoch?")
    return file


def origin_of(name: str | Path) -> Origin | None:
    """What a run folder, a checkpoint inside one, or an exported .safetensors was trained as; None for any other file."""
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        told = read_metadata(path)
        return Origin(**{key: told[key] for key in ("model", "img_size", "in_chans")}) if told else None
    run = run_folder_of(path)
    if run is None:
        return None
    plain = _run_config(run)
    try:
        data = plain["data"]
        return Origin(model=plain["model"], img_size=data["img_size"], in_chans=data["in_chans"])
    except (KeyError, TypeError):
        raise ConfigError(f"checkpoint: {run / 'config.yaml'} is not the config of a run") from None


def run_folder_of(path: Path) -> Path | None:
    """The run folder that ``path`` is, or whose checkpoints/ it lies in; None where there is no config.yaml."""
    folder = path if path.is_dir() else path.parent.parent if path.parent.name == "checkpoints" else None
    return folder if folder is not None and (folder / "config.yaml").is_file() else None


def read_metadata(path: Path) -> dict[str, Any] | None:
    """What our export wrote into a .safetensors file's header; None where another program wrote the file.

    The format: the header's length as 8 bytes, little-endian, then the header as JSON, then the tensors.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError), path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length <= _LARGEST_HEADER:
            header = json.loads(handle.read(length))
            told: dict[str, Any] = json.loads(header["__metadata__"][METADATA_KEY])
            return told
    return None


def _run_config(run: Path) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError):
        plain = None
    if not isinstance(plain, dict):
        raise ConfigError(f"checkpoint: {run / 'config.yaml'} is damaged")
    return {str(key): value for key, value in plain.items()}


# ------------------------------------------------------------------------------------------- the checkpoint's own config


def follow_checkpoint(job: DictConfig, keys: Sequence[str]) -> None:
    """Put the model and the image size of ``job.checkpoint`` into a composed, unresolved config, where none were chosen.

    ``keys`` are those of the command line. A model, size, bias or stem that is named there stays; single values
    (``model.drop_path_rate=0.1``) are laid over the checkpoint's model. Data of one channel are repeated to the checkpoint's
    number of channels.
    """
    name = job.get("checkpoint")
    if not isinstance(name, str):
        return
    resolve(name)  # one line for a checkpoint that does not exist, before anything that follows from it
    origin = origin_of(name)
    if origin is None:
        return
    if not any(key == "model" or key.startswith("model/") for key in keys):
        chosen = {key: OmegaConf.select(job, key) for key in keys if key.startswith("model.")}
        _set(job, "model", origin.model)
        for key, value in chosen.items():
            _set(job, key, value)
    if "data.img_size" not in keys:
        _set(job, "data.img_size", origin.img_size)
    in_chans = OmegaConf.select(job, "data.in_chans", default=3)
    if "data.in_chans" not in keys and in_chans != origin.in_chans:
        if in_chans != 1:
            raise ConfigError(
                f"data.in_chans must be {origin.in_chans} for this checkpoint ({name}), got {in_chans} "
                f"(data={job.data.name}); only images of one channel can be made to fit"
            )
        _set(job, "data.in_chans", origin.in_chans)
        for key in ("data.mean", "data.std"):
            values = OmegaConf.select(job, key)
            if values is not None and len(values) == 1:
                _set(job, key, list(values) * origin.in_chans)


def _set(job: DictConfig, key: str, value: Any) -> None:
    OmegaConf.update(job, key, value, merge=False, force_add=True)
