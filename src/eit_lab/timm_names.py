"""The names of timm's architectures, without importing timm, which would import torch: a typo answers at once.

timm registers an architecture with a decorator on the function of that name, so its source has them all. A test holds the list
against timm's own.
"""

from __future__ import annotations

import difflib
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_REGISTERED = re.compile(r"^@register_model\s*\ndef\s+(\w+)", re.MULTILINE)


@cache
def timm_names() -> frozenset[str]:
    """What ``timm.list_models()`` lists with the installed version, read from its source in some 40 ms."""
    spec = find_spec("timm")
    assert spec is not None, "timm is one of our dependencies"
    assert spec.origin is not None
    files = sorted((Path(spec.origin).parent / "models").glob("*.py"))
    return frozenset(name for file in files for name in _REGISTERED.findall(file.read_text(encoding="utf-8")))


def check_timm_name(name: str) -> None:
    """Raises ValueError in one line, with the nearest name, for what is no architecture of timm."""
    names = timm_names()
    if name in names:
        return
    plain, _, tag = name.partition(".")
    if tag and plain in names:
        raise ValueError(
            "model.timm_name must be an architecture alone, without the tag of trained weights, since none are loaded, "
            f"got {name!r}; nearest: {plain}"
        )
    close = difflib.get_close_matches(name.lower(), sorted(names), n=1, cutoff=0.5)
    hint = f"nearest: {close[0]}" if close else "timm.list_models() lists them"
    raise ValueError(f"model.timm_name must be an architecture of timm, got {name!r}; {hint}")
