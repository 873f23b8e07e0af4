"""The numbers of an analysis as figures take them: one typed value, checked when it is read.

What is read is the JSON that an analysis writes (schema 1), a mapping of parts each of which may be missing: a run that was
analysed while it trained has fewer of them than one analysed afterwards, a network without attention has no heads. What is
there must fit together: a number a point, a layer, a head. Everything in [0, 1] is a share, distances are in pixels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from eit_lab.config import ConfigError
from eit_lab.report.inside.checked import FloatArray, Part, shown

SCHEMA = 1
PerHead = tuple[FloatArray | None, ...]
"""For each layer its heads' values (H,); None for a layer without attention."""
_BLOCK = re.compile(r"blocks\.(\d+)(?:\.(mixer|mlp))?")
_STEMS = ("stem", "patch_embed")


@dataclass(frozen=True, eq=False)
class Frequency:
    """The residual stream's spectra at P points."""

    cutoffs: tuple[float, ...] = ()
    """Radii, 1 is the Nyquist frequency of an axis."""
    hfd_share: FloatArray | None = None
    """(cutoffs, P)."""
    hfd_share_no_dc: FloatArray | None = None
    """(cutoffs, P), the DC term left out of the whole."""
    frequencies: tuple[FloatArray, ...] = ()
    """For each point the frequencies (F,) on the half diagonal, in units of pi."""
    log_amplitude: tuple[FloatArray, ...] = ()
    """For each point (F,), relative to DC."""
    hf_dc_ratio: FloatArray | None = None
    """(P,)."""
    feature_variance: FloatArray | None = None
    """(P,)."""


@dataclass(frozen=True, eq=False)
class Heads:
    """What the heads of L layers attend to."""

    uniform_distance: float | None = None
    """Mean attention distance of uniform attention, px."""
    attention_distance: PerHead = ()
    """px."""
    attention_entropy: PerHead = ()
    attention_nmi: PerHead = ()
    cls_mass: PerHead = ()
    head_diversity: FloatArray | None = None
    """(L,), nan for a layer without attention; so are the others."""
    head_range: FloatArray | None = None
    head_cv: FloatArray | None = None
    head_cosine: FloatArray | None = None
    head_js: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class ReceptiveField:
    """Where the gradient of the centre token lies."""

    images: int | None
    map: FloatArray
    """(rows, columns), binned from the image's pixels, sums to 1."""
    shares: tuple[float, ...]
    side_px: tuple[float, ...]
    """Of the smallest centred square that holds each share."""
    centre_px: tuple[float, float] | None
    """(row, column) of the token, whole numbers are the middles of pixels; None, where it is not known: the image's middle."""


@dataclass(frozen=True, eq=False)
class Curves:
    """Accuracy in [0, 1] of one place that is filtered: (cutoffs,), (cutoffs,), (centres,); None where it was not measured."""

    low: FloatArray | None
    high: FloatArray | None
    band: FloatArray | None

    def get(self, kind: str) -> FloatArray | None:
        """``low``, ``high`` or ``band``."""
        return {"low": self.low, "high": self.high, "band": self.band}[kind]


@dataclass(frozen=True, eq=False)
class Filters:
    """Accuracy of filtered inputs, and of filtered tokens."""

    images: int | None
    acc1: float | None
    """Unfiltered, of the same images."""
    cutoffs: FloatArray
    centres: FloatArray
    band_width: float | None
    noise_std: float | None
    input: Curves | None
    tokens: Mapping[str, Curves]
    """By the point whose tokens are filtered."""


@dataclass(frozen=True, eq=False)
class Untrained:
    """The same model with its weights drawn anew: the reference line."""

    frequency: Frequency | None
    heads: Heads | None


@dataclass(frozen=True)
class Axis:
    """Where points of the residual stream lie in depth, as far as their names tell.

    The stem is 0, the mixer of layer n (from 1) n - 0.5, its MLP n. Where some name tells no layer, points are counted 0, 1, 2.
    """

    points: tuple[str, ...]

    @cached_property
    def is_layers(self) -> bool:
        """Whether every name tells its layer."""
        return all(_depth_of(name) is not None for name in self.points)

    @cached_property
    def depth(self) -> FloatArray:
        """(P,)."""
        found = [_depth_of(name) for name in self.points]
        return np.array([n if at is None or not self.is_layers else at for n, at in enumerate(found)], dtype=np.float64)

    @cached_property
    def outputs(self) -> list[int]:
        """Places of the points after the stem and after each block; of all points where names do not tell."""
        if not self.is_layers:
            return list(range(len(self.points)))
        return [n for n, at in enumerate(self.depth) if at == int(at)]

    @property
    def last(self) -> float:
        """Where the axis ends; 1 or more."""
        return float(max([1.0, *self.depth]))

    @property
    def word(self) -> str:
        """What the axis is called."""
        return "layer" if self.is_layers else "point"

    def of(self, point: str) -> float | None:
        """Where one point lies; None for a name that is no point and tells no layer."""
        if self.is_layers or point not in self.points:
            return _depth_of(point)
        return float(self.points.index(point))

    def after(self, at: float) -> str:
        """A place on it in words."""
        return "stem" if self.is_layers and at == 0 else f"{self.word} {at:g}"


@dataclass(frozen=True, eq=False)
class Inside:
    """One analysed model; a part that was not measured is None."""

    model: str
    arm: str
    seed: int | None
    weights: str
    checkpoint: str
    identity: str | None
    data: str
    part: str
    images: int | None
    img_size: tuple[int, int] | None
    acc1: float | None
    num_classes: int | None
    grid: tuple[int, int] | None
    pitch_px: tuple[float, float] | None
    layers: int
    heads_per_layer: int | None
    head_width: tuple[int, ...] | None
    """Channels of one head, by layer."""
    points: tuple[str, ...]
    frequency: Frequency | None
    heads: Heads | None
    cka_group: int | None
    cka: FloatArray | None
    """(P, P)."""
    rollout: FloatArray | None
    """(h, w), the CLS row."""
    receptive_field: ReceptiveField | None
    filters: Filters | None
    untrained: Untrained | None
    means: Mapping[str, float]
    source: str
    """Where it was read, in words."""

    @cached_property
    def axis(self) -> Axis:
        """Where its points lie in depth."""
        return Axis(self.points)


def _depth_of(point: str) -> float | None:
    if point in _STEMS:
        return 0.0
    block = _BLOCK.fullmatch(point)
    return None if block is None else int(block[1]) + (0.5 if block[2] == "mixer" else 1.0)


@dataclass(frozen=True, eq=False)
class ArmInside:
    """The analysed seeds of one arm. Raises ConfigError where they do not have the same shape."""

    label: str
    insides: Sequence[Inside]
    place: int | None = None
    """Which colour and marker it has; None: its place among the arms that are drawn."""

    def __post_init__(self) -> None:
        if not self.insides:
            raise ConfigError(f"analysis of arm {self.label}: no result")
        first, shape = self.insides[0], _shape(self.insides[0])
        for other in self.insides[1:]:
            for name, value in _shape(other).items():
                if None not in (value, shape[name]) and value != shape[name]:
                    raise ConfigError(
                        f"analysis of arm {self.label}: {name} must be the same in all seeds, {shown(shape[name])} in {first.source}, got {shown(value)} in {other.source}"
                    )

    @property
    def first(self) -> Inside:
        """The first seed: what is the same in all of them."""
        return self.insides[0]

    def over_seeds(self, value: Callable[[Inside], FloatArray | None]) -> FloatArray | None:
        """(seeds, ...): a value of every seed that has it; None where none has."""
        found = [one for inside in self.insides if (one := value(inside)) is not None]
        return np.stack(found) if found else None


def _shape(inside: Inside) -> dict[str, object]:
    """What must be the same in all seeds of an arm, by its key; None where a seed does not have it."""
    frequency, heads, filters = inside.frequency, inside.heads, inside.filters
    return {
        "layers": inside.layers,
        "points": inside.points or None,
        "grid": inside.grid,
        "heads_per_layer": inside.heads_per_layer,
        "widths.head": inside.head_width,
        "frequency.cutoffs": None if frequency is None else frequency.cutoffs,
        "frequency.frequencies": None if frequency is None else [one.tolist() for one in frequency.frequencies],
        "heads.uniform_distance": None if heads is None else heads.uniform_distance,
        "filters.cutoffs": None if filters is None else filters.cutoffs.tolist(),
        "filters.centres": None if filters is None else filters.centres.tolist(),
    }


def group(insides: Iterable[Inside]) -> list[ArmInside]:
    """Results by arm, in the order in which arms come, seeds upwards.

    Raises ConfigError where two results are of the same arm and seed, or the seeds of an arm do not have the same shape.
    """
    arms: dict[str, list[Inside]] = {}
    for inside in insides:
        arms.setdefault(inside.arm, []).append(inside)
    for arm, members in arms.items():
        taken: dict[int, Inside] = {}
        for inside in members:
            if inside.seed is not None and (other := taken.setdefault(inside.seed, inside)) is not inside:
                raise ConfigError(
                    f"analysis of arm {arm}: a seed counts once, got two results of seed {inside.seed}: {other.source}, {inside.source}"
                )
        members.sort(key=lambda inside: -1 if inside.seed is None else inside.seed)
    return [ArmInside(arm, members) for arm, members in arms.items()]


@dataclass(frozen=True, eq=False)
class Between:
    """CKA between two arms: (points of a, points of b)."""

    a: str
    b: str
    points_a: tuple[str, ...]
    points_b: tuple[str, ...]
    cka: FloatArray


# ----------------------------------------------------------------------------------------------------------------- reading


def load_inside(path: Path) -> Inside:
    """Read ``analysis.json``. Raises ConfigError, in one line, for a file that is damaged or not one of these."""
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{path} is damaged: it is no JSON; analyse its run anew") from None
    return read_inside(found, source=str(path))


def read_inside(found: object, *, source: str = "analysis") -> Inside:
    """Check one result; ``source`` is where it came from, in words. Raises ConfigError, in one line."""
    top = Part(found, source=source)
    if top.get("schema") != SCHEMA:
        top.wrong("schema", f"must be {SCHEMA}", top.get("schema"))
    data = top.part("data") or Part({}, source=source, key="data")
    points, heads = top.names("points"), top.part("heads")
    layers = top.count("layers")
    if layers is None:
        layers = _count_layers(points, heads)
    widths, untrained = top.part("widths"), top.part("untrained")
    similarity, rollout = top.part("similarity"), top.part("rollout")
    model = top.text("model") or "model"
    return Inside(
        model=model,
        arm=top.text("arm") or model,
        seed=top.count("seed"),
        weights=top.text("weights"),
        checkpoint=top.text("checkpoint"),
        identity=top.text("identity") or None,
        data=data.text("name"),
        part=data.text("part"),
        images=data.count("images"),
        img_size=data.counts("img_size"),
        acc1=data.number("acc1"),
        num_classes=data.count("num_classes"),
        grid=top.counts("grid"),
        pitch_px=top.pair("pitch_px"),
        layers=layers,
        heads_per_layer=top.count("heads_per_layer"),
        head_width=None if widths is None else _widths(widths, layers),
        points=points,
        frequency=_frequency(top.part("frequency"), len(points)),
        heads=_heads(heads, layers),
        cka_group=None if similarity is None else similarity.count("group"),
        cka=None if similarity is None else similarity.array("cka", (len(points), len(points))),
        rollout=None if rollout is None else rollout.array("cls", (None, None)),
        receptive_field=_receptive_field(top.part("receptive_field")),
        filters=_filters(top.part("filters")),
        untrained=None if untrained is None else Untrained(
            _frequency(untrained.part("frequency"), len(points)), _heads(untrained.part("heads"), layers)
        ),
        means=_means(top.part("means")),
        source=source,
    )  # fmt: skip


def read_between(found: object, *, source: str = "analysis") -> Between:
    """Check a matrix of CKA between two arms. Raises ConfigError, in one line."""
    part = Part(found, source=source)
    points_a, points_b = part.names("points_a"), part.names("points_b")
    cka = part.array("cka", (len(points_a), len(points_b)))
    if cka is None or not cka.size:
        part.wrong("cka", "must be a matrix", part.get("cka"))
    return Between(part.text("a"), part.text("b"), points_a, points_b, cka)


def _count_layers(points: Sequence[str], heads: Part | None) -> int:
    blocks = [int(block[1]) + 1 for name in points if (block := _BLOCK.fullmatch(name))]
    per_layer = None if heads is None else heads.get("attention_distance")
    return max([0, *blocks, len(per_layer) if isinstance(per_layer, list) else 0])


def _widths(part: Part, layers: int) -> tuple[int, ...] | None:
    found = part.array("head", (layers,))
    return None if found is None else tuple(0 if np.isnan(width) else int(width) for width in found)


def _frequency(part: Part | None, points: int) -> Frequency | None:
    if part is None:
        return None
    cutoffs = part.array("cutoffs", (None,))
    num = 0 if cutoffs is None else len(cutoffs)
    frequencies = part.arrays("frequencies", [None] * points, null=False)
    if part.get("log_amplitude") is not None and not frequencies:
        part.wrong("frequencies", "must be there with log_amplitude", part.get("frequencies"))
    lengths = [len(one) for one in frequencies if one is not None]
    amplitude = part.arrays("log_amplitude", lengths, null=False)
    return Frequency(
        cutoffs=() if cutoffs is None else tuple(map(float, cutoffs)),
        hfd_share=part.array("hfd_share", (num, points)),
        hfd_share_no_dc=part.array("hfd_share_no_dc", (num, points)),
        frequencies=tuple(one for one in frequencies if one is not None),
        log_amplitude=tuple(one for one in amplitude if one is not None),
        hf_dc_ratio=part.array("hf_dc_ratio", (points,)),
        feature_variance=part.array("feature_variance", (points,)),
    )


def _heads(part: Part | None, layers: int) -> Heads | None:
    if part is None:
        return None
    return Heads(
        uniform_distance=part.number("uniform_distance"),
        attention_distance=_per_head(part, "attention_distance", layers),
        attention_entropy=_per_head(part, "attention_entropy", layers),
        attention_nmi=_per_head(part, "attention_nmi", layers),
        cls_mass=_per_head(part, "cls_mass", layers),
        head_diversity=part.array("head_diversity", (layers,)),
        head_range=part.array("head_range", (layers,)),
        head_cv=part.array("head_cv", (layers,)),
        head_cosine=part.array("head_cosine", (layers,)),
        head_js=part.array("head_js", (layers,)),
    )


def _per_head(part: Part, key: str, layers: int) -> PerHead:
    return tuple(one if one is not None and one.size else None for one in part.arrays(key, [None] * layers, null=True))


def _receptive_field(part: Part | None) -> ReceptiveField | None:
    contribution = None if part is None else part.array("map", (None, None))
    if part is None or contribution is None:
        return None
    shares = part.array("shares", (None,))
    sides = part.array("side_px", (0 if shares is None else len(shares),))
    return ReceptiveField(
        images=part.count("images"),
        map=contribution,
        shares=() if shares is None or sides is None else tuple(map(float, shares)),
        side_px=() if sides is None else tuple(map(float, sides)),
        centre_px=part.pair("centre_px"),
    )


def _filters(part: Part | None) -> Filters | None:
    if part is None:
        return None
    cutoffs, centres = (_or_empty(part.array(key, (None,))) for key in ("cutoffs", "centres"))

    def curves(of: Part) -> Curves:
        low, high = (of.array(key, (len(cutoffs),)) for key in ("low", "high"))
        return Curves(low, high, of.array("band", (len(centres),)))

    images, tokens = part.part("input"), part.part("tokens")
    return Filters(
        images=part.count("images"),
        acc1=part.number("acc1"),
        cutoffs=cutoffs,
        centres=centres,
        band_width=part.number("band_width"),
        noise_std=part.number("noise_std"),
        input=None if images is None else curves(images),
        tokens={} if tokens is None else {
            point: curves(found) for point in tokens.keys() if (found := tokens.part(point)) is not None  # noqa: SIM118
        },
    )  # fmt: skip


def _or_empty(found: FloatArray | None) -> FloatArray:
    return np.zeros(0) if found is None else found


def _means(part: Part | None) -> Mapping[str, float]:
    return {} if part is None else {key: one for key in part.keys() if (one := part.number(key)) is not None}  # noqa: SIM118
