"""The words of ``bench model``, ``bench step`` and ``bench startup``. No torch, except to see what devices there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eit_lab.benchmark.speed.peers import Peer, default_peers, read_peer
from eit_lab.benchmark.words import read_words
from eit_lab.config import ConfigError
from eit_lab.loading import nearest

_DEFAULTS = {
    "models": "", "precision": "", "batch": "", "img_size": "224", "device": "auto", "rounds": "5", "peers": "",
    "compile_limit": "120", "budget": "", "out": "",
}  # fmt: skip
_STARTUP_DEFAULTS = {"model": "eit_mini", "rounds": "5", "out": ""}
_MODELS = {"cpu": "eit_base", "cuda": "eit_base,eit_large,eit_tiny,eit_mini"}  # the last ones fall to a budget first
_NO_BUDGET = "86400"
_BUDGET = {
    ("step", "cuda"): "270",
    ("model", "cuda"): "150",
}  # so that everything on a GPU takes less than eight minutes
_PRECISION = {"cpu": "float32,bfloat16", "cuda": "bfloat16"}
_BATCH = {"cpu": "8", "cuda": "256"}
_PRECISIONS = ("float32", "bfloat16")
_DEVICES = ("auto", "cpu", "cuda")
_LEAST_PX = 16


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    verb: str
    """step or model."""
    models: tuple[str, ...]
    precision: tuple[str, ...]
    batch: int
    img_size: int
    device: str
    """cpu or cuda."""
    rounds: int
    peers: tuple[Peer, ...]
    """As asked for; () for those of the device."""
    compile_limit: float
    """Seconds."""
    budget: float
    """Seconds after which no other size is begun, and nothing more is compiled."""
    out: Path

    def peers_beside(self, model: str) -> tuple[Peer, ...]:
        """Those that are measured beside a size."""
        return self.peers or default_peers(model, verb=self.verb, device=self.device, models=self.models)


@dataclass(frozen=True, kw_only=True)
class StartupOptions:
    """What is started."""

    model: str
    rounds: int
    out: Path


def read_options(words: Sequence[str], *, verb: str) -> Options:
    """Of the command's words. Raises ConfigError in one line."""
    told = read_words(words, _DEFAULTS, verb=verb)
    device = _device(told["device"])
    for key, default in (("models", _MODELS), ("precision", _PRECISION), ("batch", _BATCH)):
        told[key] = told[key] or default[device]
    told["budget"] = told["budget"] or _BUDGET.get((verb, device), _NO_BUDGET)
    for key in ("batch", "img_size", "rounds", "compile_limit", "budget"):
        _check_whole(key, told[key], least=_LEAST_PX if key == "img_size" else 1)
    precision = tuple(told["precision"].split(","))
    for one in precision:
        if one not in _PRECISIONS:
            raise ConfigError(
                f"precision must be of {', '.join(_PRECISIONS)}, got {one!r}{nearest(one, list(_PRECISIONS))}"
            )
    models = tuple(told["models"].split(","))
    for model in models:
        _check_model(model)
    peers = tuple(read_peer(text) for text in told["peers"].split(",")) if told["peers"] else ()
    for key, listed in (("models", models), ("precision", precision), ("peers", tuple(one.name for one in peers))):
        if len(set(listed)) < len(listed):
            raise ConfigError(f"{key} must name each once, got {','.join(listed)}")
    return Options(
        verb=verb,
        models=models,
        precision=precision,
        batch=int(told["batch"]),
        img_size=int(told["img_size"]),
        device=device,
        rounds=int(told["rounds"]),
        peers=peers,
        compile_limit=float(told["compile_limit"]),
        budget=float(told["budget"]),
        out=Path(told["out"] or f"bench-{verb}").expanduser(),
    )


def read_startup_options(words: Sequence[str]) -> StartupOptions:
    """Of the command's words. Raises ConfigError in one line."""
    told = read_words(words, _STARTUP_DEFAULTS, verb="startup")
    _check_whole("rounds", told["rounds"], least=1)
    _check_model(told["model"])
    return StartupOptions(
        model=told["model"], rounds=int(told["rounds"]), out=Path(told["out"] or "bench-startup").expanduser()
    )


def _check_whole(key: str, text: str, *, least: int) -> None:
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{key} must be a whole number of {least} or more, got {text!r}; nearest: {least}")


def _check_model(name: str) -> None:
    from eit_lab.compose import compose_model
    from eit_lab.config import ModelConfig

    config = compose_model(name)
    if not isinstance(config, ModelConfig) or config.ib.conv != "depthwise" or config.stem.kind != "eit":
        raise ConfigError(
            f"models must have EIT's stem and depthwise convolutions, as the literal implementation, got {name!r}"
        )


def _device(told: str) -> str:
    if told not in _DEVICES:
        raise ConfigError(f"device must be one of {', '.join(_DEVICES)}, got {told!r}{nearest(told, list(_DEVICES))}")
    import torch

    if told == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda needs a CUDA device, got none; nearest: cpu")
    return "cpu" if told == "cpu" or not torch.cuda.is_available() else "cuda"
