"""Whether the arms of a sweep differ in their declared factor and in nothing else, and the seeds of an arm in the seed.

Compared are the resolved configs, key by key, with the content of what runs start from and of the data set. Labels and the
places of runs (runs.PLACEMENT) do not count.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

from eit_lab.config import Config, ConfigError
from eit_lab.declaration import Declaration
from eit_lab.finetune import checkpoint_hash
from eit_lab.loading import dump
from eit_lab.runs import PLACEMENT, DataFacts
from eit_lab.sweep.arms import Sweep

LABELS = ("model.name", "model.size.name", "model.ib.name", "data.name", "recipe.name", "recipe.reference")
"""Keys that name things, or say beside which published curve a run is drawn."""
CHECKPOINT, FILES = "checkpoint (content)", "data (content)"
MATCHED = "model.size.embed_dim"
_ABSENT = object()
_PARTS = tuple(item.name for item in dataclasses.fields(Config) if item.name not in ("seed", "run", "logger"))
_SHOWN_ARMS = 12


def compare_arms(sweep: Sweep, facts: Sequence[DataFacts]) -> None:
    """Raises ConfigError, and prints what differs, where the arms of a sweep are not to be compared.

    ``facts`` are those of each point's data, in the order of the points.
    """
    flat = _Flat()
    content = [flat.of(point.config, known) for point, known in zip(sweep.points, facts, strict=True)]
    arms = sweep.arms()
    factor = sweep.declaration.factor
    for arm, places in arms.items():
        first = content[places[0]]
        for place in places[1:]:
            named = {key: "checkpoint" if key == CHECKPOINT else key for key in _differing([first, content[place]])}
            keys = [key for key, name in named.items() if name not in factor]
            if keys:
                seeds = [str(sweep.points[n].config.seed) for n in (places[0], place)]
                _show(keys, {f"seed {seed}": at for seed, at in zip(seeds, (first, content[place]), strict=True)})
                raise ConfigError(
                    f"guard: the seeds of {arm} must differ in nothing but the seed, got {', '.join(keys)}"
                )
    first_of = {arm: content[places[0]] for arm, places in arms.items()}
    keys = [key for key in _differing(list(first_of.values())) if not _declared(key, sweep.declaration)]
    if keys:
        said = ", ".join(factor)
        print(f"the arms differ beyond the declared factor ({said}):")
        _show(keys, first_of)
        ways = ",".join(key for key in keys if key not in (CHECKPOINT, FILES)) or "checkpoint,data"
        raise ConfigError(
            f"guard: arms must differ in nothing but the factor {said}, got {', '.join(keys)}; "
            f"make them equal, or declare them too: factor={ways}"
        )


def _declared(key: str, declaration: Declaration) -> bool:
    """Whether arms may differ in a key."""
    if key == MATCHED and declaration.match is not None:
        return True
    for factor in declaration.factor:
        if key == factor or key.startswith(f"{factor}."):
            return True
        if (key, factor.partition(".")[0]) in ((FILES, "data"), (CHECKPOINT, "checkpoint")):
            return True
    return False


def _differing(contents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that have not the same value everywhere."""
    first, *others = contents
    different = {id(content): content for content in others if content is not first}.values()
    keys = dict.fromkeys(key for content in contents for key in content) if different else {}
    return [key for key in keys if any(first.get(key, _ABSENT) != other.get(key, _ABSENT) for other in different)]


class _Flat:
    """Configs by dotted key; the same content is the same object, so ten thousand seeds cost ten thousand look-ups."""

    def __init__(self) -> None:
        self._known: dict[Hashable, dict[str, Any]] = {}

    def of(self, config: Config, facts: DataFacts) -> dict[str, Any]:
        """What counts in a comparison."""
        parts: Hashable = (*(getattr(config, name) for name in _PARTS), facts.fingerprint)
        try:
            known = self._known.get(parts)
        except TypeError:  # a value that cannot be hashed
            parts = repr(parts)
            known = self._known.get(parts)
        if known is None:
            content = {key: value for key, value in _flatten(dump(config)) if _counts(key)}
            known = {**content, CHECKPOINT: checkpoint_hash(config), FILES: facts.fingerprint}
            # The same content under another placement is the same object too.
            known = self._known.setdefault(repr(sorted(known.items())), known)
            self._known[parts] = known
        return known


def _counts(key: str) -> bool:
    left_out = (*PLACEMENT, *LABELS, "seed")
    return not any(key == name or key.startswith(f"{name}.") for name in left_out)


def _flatten(node: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _show(keys: Sequence[str], contents: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each key, with its value in each arm."""
    width = max(map(len, keys))
    for key in keys:
        shown = [f"{arm}: {content.get(key, '-')}" for arm, content in list(contents.items())[:_SHOWN_ARMS]]
        more = [f"and {len(contents) - _SHOWN_ARMS} more"] if len(contents) > _SHOWN_ARMS else []
        print(f"  {key:<{width}}  {'   '.join([*shown, *more])}")
