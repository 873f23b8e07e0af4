"""Which analyses of an ablation's runs can stand beside each other, and the figures of each: one comparable analysis a run.

Figures of other images, another size of them, other weights, or taken while a run trained beside such taken afterwards, are not
the same quantity. So one kind is chosen for all arms: the one made afterwards where every arm that was looked into has it, else what
most arms have. Everything else is listed with its reason.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from eit_lab.config import ConfigError
from eit_lab.report.arms import Arm, differences
from eit_lab.report.digest import AFTERWARDS, TRAINING
from eit_lab.report.inside.numbers import Frequency, Heads, Inside, read_inside
from eit_lab.report.records import RunEntry, plain_text
from eit_lab.report.stats import Estimate, estimate

HALF = 0.5
"""The cutoff of the one number that stands for all, where 1 is the Nyquist frequency."""


@dataclass(frozen=True)
class Quantity:
    """One of the figures that an analysis gives as a mean over layers."""

    key: str
    name: str
    """In a sentence."""
    title: str
    """Over a column, along an axis."""
    decimals: int | None
    """None: as many as three significant digits take."""
    of_heads: bool = False

    def text(self, value: float) -> str:
        """A value."""
        return f"{value:.{self._decimals(value)}f}"

    def mean_std(self, found: Estimate) -> str:
        """A mean with its standard deviation, to the same place; one value alone."""
        text = self.text(found.mean)
        return f"{text} ± {found.std:.{self._decimals(found.mean)}f}" if found.n > 1 else text

    def _decimals(self, value: float) -> int:
        if self.decimals is not None:
            return self.decimals
        return 3 if value == 0 else max(0, 2 - math.floor(math.log10(abs(value))))


QUANTITIES = {
    one.key: one
    for one in (
        Quantity("hfd_share", "HFD share", "HFD share", 3),
        Quantity("log_amplitude", "log amplitude", "relative log amplitude", 2),
        Quantity("hf_dc_ratio", "HF/DC ratio", "HF / DC norm", 3),
        Quantity("feature_variance", "feature variance", "feature variance", None),
        Quantity("attention_distance", "attention distance", "attention distance (px)", 2, of_heads=True),
        Quantity("head_diversity", "Head Diversity", "Head Diversity", None, of_heads=True),
        Quantity("attention_entropy", "attention entropy", "entropy", 3, of_heads=True),
        Quantity("attention_nmi", "mutual information of query and key", "NMI", None, of_heads=True),
        Quantity("cls_mass", "attention on CLS", "mass on CLS", 3, of_heads=True),
    )
}
"""By the name under which an analysis has its mean."""
ARGUED = ("hfd_share", "head_diversity")
"""What the paper's argument rests on: they stand beside every arm's accuracy."""


class Unused(NamedTuple):
    """A run that counts and has no analysis here, with the reason."""

    arm: str
    seed: int
    why: str


@dataclass(frozen=True, eq=False)
class ArmAnalyses:
    """The comparable analyses of one arm."""

    arm: Arm
    place: int
    """Of the arm among all of the report: its colour."""
    by_seed: Mapping[int, Inside]

    @property
    def first(self) -> Inside:
        """Of the smallest seed: what all have alike."""
        return next(iter(self.by_seed.values()))

    def values(self, key: str) -> dict[int, float]:
        """Seed -> mean over layers of a quantity, of the seeds that have it."""
        return {seed: one.means[key] for seed, one in self.by_seed.items() if key in one.means}

    def estimate(self, key: str) -> Estimate | None:
        """Mean over seeds; None where none has it."""
        values = list(self.values(key).values())
        return estimate(values) if values else None

    @cached_property
    def untrained(self) -> dict[str, float]:
        """The same of the models before training, mean over seeds, of what was measured of them."""
        of_seeds = [untrained_means(one) for one in self.by_seed.values()]
        keys = dict.fromkeys(key for means in of_seeds for key in means)
        return {key: fmean(means[key] for means in of_seeds if key in means) for key in keys}


@dataclass(frozen=True, eq=False)
class Analyses:
    """What a report can say of the inside of its networks."""

    arms: list[ArmAnalyses] = field(default_factory=list)
    """Those with one at least, in the order of the report."""
    unused: list[Unused] = field(default_factory=list)
    when: str = ""
    runs: int = 0
    """That count, with or without an analysis."""

    def of(self, arm: Arm) -> ArmAnalyses | None:
        """The analyses of one arm; None where it has none."""
        return next((one for one in self.arms if one.arm is arm), None)

    def has(self, key: str) -> bool:
        """Whether some run has a quantity."""
        return any(one.values(key) for one in self.arms)

    @property
    def beside(self) -> list[Quantity]:
        """Those that stand beside every arm's accuracy."""
        return [QUANTITIES[key] for key in ARGUED if self.has(key)]

    @property
    def used(self) -> int:
        """How many runs have one that is used."""
        return sum(len(one.by_seed) for one in self.arms)


@dataclass(frozen=True, eq=False)
class _Candidate:
    place: int
    seed: int
    inside: Inside
    facts: Mapping[str, str]
    """What must be equal between analyses that are compared."""
    afterwards: bool


def choose(arms: Sequence[Arm]) -> Analyses | None:
    """The comparable analyses of some arms; None where no run has one, nor one that cannot be read."""
    found: list[_Candidate] = []
    broken: dict[tuple[int, int], list[str]] = {}
    for place, arm in enumerate(arms):
        for seed in arm.seeds:
            run = arm.runs[seed]
            if run.unread:
                broken.setdefault((place, seed), []).append(run.unread)
            for analysis in _of(run):
                try:
                    inside = read_inside(analysis, source="its analysis")
                except ConfigError as error:
                    broken.setdefault((place, seed), []).append(plain_text(str(error)))
                else:
                    found.append(
                        _Candidate(place, seed, inside, _facts(inside, analysis), _when(analysis) == AFTERWARDS)
                    )
    if not found and not broken:
        return None
    kept = _most_comparable(found)
    unlike = _unlike_in_shape(kept)
    kept = [one for one in kept if (one.place, one.seed) not in unlike]
    taken = {(one.place, one.seed) for one in kept}
    made = [
        ArmAnalyses(arm, place, {one.seed: one.inside for one in kept if one.place == place})
        for place, arm in enumerate(arms)
        if any(one.place == place for one in kept)
    ]
    unused = []
    for place, arm in enumerate(arms):
        for seed in arm.seeds:
            if (place, seed) in taken:
                continue
            why = [*broken.get((place, seed), ()), *unlike.get((place, seed), ())]
            others = [one for one in found if (one.place, one.seed) == (place, seed)]
            if others and kept and not unlike.get((place, seed)):
                why += differences(others[0].facts, kept[0].facts, "{key} {a}, where the others have {b}")
            unused.append(Unused(arm.label, seed, "; ".join(why) or "it was not analysed"))
    runs = sum(len(arm.runs) for arm in arms)
    when = (AFTERWARDS if kept[0].afterwards else TRAINING) if kept else ""
    return Analyses(made, unused, when, runs)


def _of(run: RunEntry) -> list[Mapping[str, Any]]:
    analyses = (run.record.get("analysis"), run.record.get("analysis_in_training"))
    return [one for one in analyses if isinstance(one, Mapping)]


def _when(analysis: Mapping[str, Any]) -> str:
    return str(analysis.get("when") or TRAINING)


def _facts(inside: Inside, analysis: Mapping[str, Any]) -> dict[str, str]:
    settings = analysis.get("settings")
    said = settings.get("overrides") if isinstance(settings, Mapping) else None
    return {
        "analysed": _when(analysis),
        "data": inside.data,
        "part": inside.part,
        "images": str(inside.images),
        "image size": "unknown" if inside.img_size is None else "x".join(map(str, inside.img_size)),
        "weights": inside.weights,
        "settings": " ".join(map(str, said or ())) or "none",
    }


def _most_comparable(found: Sequence[_Candidate]) -> list[_Candidate]:
    """The analyses of one kind: made afterwards where all arms that have any have that, else of the most arms, then runs."""
    kinds: dict[frozenset[tuple[str, str]], list[_Candidate]] = {}
    for one in found:
        kinds.setdefault(frozenset(one.facts.items()), []).append(one)
    everywhere = len({one.place for one in found})

    def rank(kind: Sequence[_Candidate]) -> tuple[bool, int, int, bool]:
        arms = len({one.place for one in kind})
        return kind[0].afterwards and arms == everywhere, arms, len(kind), kind[0].afterwards

    return max(kinds.values(), key=rank, default=[])


def _unlike_in_shape(kept: Sequence[_Candidate]) -> dict[tuple[int, int], list[str]]:
    """Analyses that cannot be of the same model as the first one of their arm: seeds of an arm are drawn together."""
    first: dict[int, Inside] = {}
    unlike = {}
    for one in kept:
        other = first.setdefault(one.place, one.inside)
        for name in ("layers", "heads_per_layer", "points", "grid"):
            if getattr(one.inside, name) != getattr(other, name):
                unlike[one.place, one.seed] = [f"its analysis has other {name} than the other seeds of its arm"]
    return unlike


def untrained_means(inside: Inside) -> dict[str, float]:
    """The quantities of the model before training, made as ``means`` of the trained one are (docs/analysis.md)."""
    if inside.untrained is None:
        return {}
    found = _of_frequency(inside.untrained.frequency, inside.points) | _of_heads(inside.untrained.heads)
    return {key: value for key, value in found.items() if value == value}


def _of_frequency(part: Frequency | None, points: Sequence[str]) -> dict[str, float]:
    if part is None:
        return {}
    outputs = [n for n, name in enumerate(points) if name.endswith(".mlp")] or list(range(len(points)))
    found = {}
    if part.hfd_share is not None and HALF in part.cutoffs:
        found["hfd_share"] = float(part.hfd_share[part.cutoffs.index(HALF), outputs].mean())
    ends = (
        [float(part.log_amplitude[n][-1]) for n in outputs if len(part.log_amplitude[n]) > 1]
        if part.log_amplitude
        else []
    )
    if ends:  # a grid of 2x2 has DC only
        found["log_amplitude"] = fmean(ends)
    for key, values in (("hf_dc_ratio", part.hf_dc_ratio), ("feature_variance", part.feature_variance)):
        if values is not None:
            found[key] = float(values[outputs].mean())
    return found


def _of_heads(part: Heads | None) -> dict[str, float]:
    if part is None:
        return {}
    found = {}
    for key in ("attention_distance", "attention_entropy", "attention_nmi", "cls_mass"):
        layers = [float(layer.mean()) for layer in getattr(part, key) if layer is not None]
        if layers:
            found[key] = fmean(layers)
    if part.head_diversity is not None and not np.isnan(part.head_diversity).all():
        found["head_diversity"] = float(np.nanmean(part.head_diversity))
    return found
