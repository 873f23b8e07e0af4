"""A word of ``peers=``: a name and the choices of it that are forced, ``eit_lab:attention=sdpa:memory=plain``. No torch for itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from eit_lab.config import CompileMode, ConfigError
from eit_lab.loading import nearest


def read_words(text: str, keys: Mapping[str, Sequence[str]]) -> tuple[str, dict[str, str]]:
    """(name, its settings); ``keys``: which each name takes. ConfigError in one line for a name, a key or a value that there is not."""
    name, *settings = text.split(":")
    if name not in keys:
        raise ConfigError(f"peers must be of {', '.join(keys)}, got {text!r}{nearest(name, list(keys))}")
    told: dict[str, str] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in keys[name]:
            raise ConfigError(
                f"peers: {name} takes {', '.join(keys[name])} as :key=value, got {setting!r}{nearest(key, keys[name])}"
            )
        known = _known(key)
        if value not in known:
            raise ConfigError(f"peers: {key} must be one of {', '.join(known)}, got {value!r}{nearest(value, known)}")
        told[key] = value
    return name, told


def _known(key: str) -> tuple[str, ...]:
    match key:
        case "memory":
            return ("kept", "plain")
        case "compile":
            return ("auto", "false", *get_args(CompileMode))
        case "checkpoint":
            return ("true", "false")
    from eit_lab.models import paths  # torch with it

    values = {"attention": paths.ATTENTION, "head_multiple": paths.HEAD_MULTIPLES, "depthwise": paths.DEPTHWISE}[key]
    return tuple(map(str, values))
