"""A run's config by dotted key, as arms are told apart by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from eit_lab.report.records import RunEntry
from eit_lab.runs import PLACEMENT

_NOT_AN_ARM = (*PLACEMENT, "seed", "model.name", "model.size.name", "model.ib.name")  # labels and places


def flat_config(entry: RunEntry) -> dict[str, Any]:
    """Dotted key -> value of a run's config, without labels and places; ``checkpoint`` is the content of what it starts from."""
    config = {key: value for key, value in _flatten(entry.record["config"]).items() if not covers(_NOT_AN_ARM, key)}
    # Records from before the content was kept have the path.
    start = entry.record.get("checkpoint", entry.record["config"].get("checkpoint"))
    return config if start is None else {**config, "checkpoint": start}


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def covers(prefixes: Sequence[str], key: str) -> bool:
    """Whether a dotted key is one of these, or lies below one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which configurations differ, in their order."""
    seen: dict[str, set[str]] = {}
    for config in configs:
        for key, value in config.items():
            seen.setdefault(key, set()).add(repr(value))
    return [k for k, found in seen.items() if len(found) > 1 or any(k not in config for config in configs)]


def following(factor: Sequence[str], usable: Sequence[RunEntry]) -> list[str]:
    """The keys of a factor that follow the seed, the same in all arms (``data.split_seed=${seed}``): they part no arms."""
    configs = [(entry, flat_config(entry)) for entry in usable] if factor else []
    found = []
    for key in factor:
        of_seed: dict[Any, set[str]] = {}
        of_arm: dict[str, set[str]] = {}
        for entry, config in configs:
            value = repr(config.get(key))
            of_seed.setdefault(entry.seed, set()).add(value)
            of_arm.setdefault(entry.arm, set()).add(value)
        if all(len(values) == 1 for values in of_seed.values()) and any(len(v) > 1 for v in of_arm.values()):
            found.append(key)
    return found


def without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A mapping less some of its keys."""
    return {key: value for key, value in config.items() if key not in keys}
