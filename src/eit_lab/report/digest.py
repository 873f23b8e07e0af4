"""An analysis as records keep it: its numbers with as many digits as matter, and nothing of where it was made.

``FOLDER/analysis/analysis.json`` has all of it, among them pictures of a few thousand numbers that no report draws. What is kept
here is what a report needs to be drawn anew: some 30 kB of a model with twelve layers and sixteen heads. A report from run folders reads
through the same sieve, so that it is the same as one from a ``records.jsonl``. Only keys that are known travel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eit_lab.runs import PLACEMENT

AFTERWARDS, TRAINING = "afterwards", "while training"
"""When an analysis was made: by ``python -m eit_lab.analyze``, of all images and with every part; or by the run itself."""

_DIGITS, _FEWER, _CKA_DIGITS = 6, 4, 3
"""Significant ones: fewer of what is a reference line, or was measured on some hundred images; of means all six."""
_PARTS = ("frequency", "heads")
_TEXTS = ("model", "arm", "weights", "identity", "device", "precision", "when")
_COUNTS = (
    "schema", "seed", "grid", "pitch_px", "layers", "heads_per_layer", "seconds", "share_of_training", "epoch", "step",
)  # fmt: skip


def read_analysis(folder: Path, *, identity: object) -> tuple[dict[str, Any] | None, str]:
    """``analysis/analysis.json`` of a run's folder, where it is there and of this run; else None and why not ("" without a file)."""
    try:
        found = json.loads((folder / "analysis" / "analysis.json").read_text())
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"analysis.json cannot be read ({type(error).__name__})"
    if not isinstance(found, dict):
        return None, "analysis.json is no analysis"
    if found.get("identity") != identity or identity is None:
        return None, f"analysis.json is of another run ({found.get('identity') or 'without an identity'})"
    return digest({**found, "when": AFTERWARDS}), ""


def digest(found: Mapping[str, Any]) -> dict[str, Any]:
    """What a record keeps of an analysis; of its own result, the same again."""
    kept: dict[str, Any] = {key: found[key] for key in _TEXTS if isinstance(found.get(key), str)}
    kept |= {key: _numbers(found[key], _DIGITS) for key in _COUNTS if key in found}
    if isinstance(found.get("checkpoint"), str):
        kept["checkpoint"] = Path(found["checkpoint"]).name
    for key, value in (("points", found.get("points")), ("missing", found.get("missing"))):
        if value is not None:
            kept[key] = value
    if isinstance(data := found.get("data"), Mapping):
        kept["data"] = {key: data[key] for key in ("name", "part") if isinstance(data.get(key), str)}
        kept["data"] |= {key: data[key] for key in ("images", "img_size", "num_classes") if key in data}
        kept["data"] |= {"acc1": _numbers(data["acc1"], _DIGITS)} if "acc1" in data else {}
    if isinstance(settings := found.get("settings"), Mapping):
        kept["settings"] = {"overrides": _overrides(settings.get("overrides"))}
    kept |= {key: _numbers(found[key], _DIGITS) for key in ("means", "widths", "filters") if key in found}
    digits = _FEWER if found.get("when") == TRAINING else _DIGITS
    kept |= {key: _numbers(found[key], digits) for key in _PARTS if key in found}
    if "similarity" in found:
        kept["similarity"] = _numbers(found["similarity"], _CKA_DIGITS)
    if isinstance(
        field := found.get("receptive_field"), Mapping
    ):  # its map is most of the file; rollout is a map as well
        kept["receptive_field"] = {key: _numbers(value, _DIGITS) for key, value in field.items() if key != "map"}
    if isinstance(untrained := found.get("untrained"), Mapping):
        kept["untrained"] = {key: _numbers(untrained[key], _FEWER) for key in _PARTS if key in untrained}
    return kept


def _numbers(value: Any, digits: int) -> Any:
    """Nested numbers, rounded to so many significant digits; texts in them are left out, but for the names of nan and inf."""
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _numbers(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(item, digits) for item in value]
    return value if value in ("nan", "inf", "-inf") else None


def _overrides(words: Any) -> list[str]:
    """What was said of the data on the command line, but for where it lies or how it is fetched: the images depend on it."""
    said = [word for word in words if isinstance(word, str)] if isinstance(words, list | tuple) else []
    return [word for word in said if word.partition("=")[0].lstrip("+~") not in PLACEMENT]
