"""Runs -> arms: what is the same but for the seed. Runs that cannot count are left out by name, never averaged over.

A run counts when it is finished, has the metric, and is equal to the other runs of its arm in all that can change a result:
configuration, code, data, precision, and the batch that batch norm sees. Where runs of one arm differ in those, the
variant that most runs of the whole ablation share is kept. Machines, devices and restarts do not change what a run computes
beyond rounding; they are listed, and speeds of different devices are not averaged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from eit_lab.config import ConfigError
from eit_lab.loading import nearest
from eit_lab.report.keys import covers, flat_config, following, varying, without
from eit_lab.report.made_on import unequal
from eit_lab.report.metric import Metric, number
from eit_lab.report.records import RunEntry, Source, plain_text
from eit_lab.report.stats import Estimate, estimate

_SHOWN_KEYS = 4


@dataclass(eq=False)
class Arm:
    """One configuration and its runs that count, by seed."""

    label: str
    runs: dict[int, RunEntry] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value of all that is not a label or a place."""
    setup: dict[str, str] = field(default_factory=dict)
    """What must be equal between arms that are compared, and is not part of the declared factor."""
    point: dict[str, Any] = field(default_factory=dict)
    """The keys in which the arms differ, with this arm's values."""
    source: str = ""
    declared: bool = False
    """By an ablation that says which factor the arms differ in."""
    matched: tuple[str, ...] = ()
    """Keys in which arms of a matched budget differ on purpose."""
    setups: dict[str, dict[str, str]] = field(default_factory=dict)
    """Source -> its set-up there, of every source that has this arm: another factor leaves other keys outside it."""

    @property
    def plain(self) -> bool:
        """Attention only: rule none, or strength 0."""
        return self.config.get("model.ib.rule") == "none" or self.config.get("model.ib.strength") == 0

    @property
    def seeds(self) -> list[int]:
        """Ascending."""
        return sorted(self.runs)

    def values(self, metric: Metric) -> list[float]:
        """The shown metric of each seed, seeds ascending."""
        return [value for seed in self.seeds if (value := metric.of(self.runs[seed].record)) is not None]

    def estimate(self, metric: Metric) -> Estimate:
        """Mean over seeds."""
        return estimate(self.values(metric))

    def fact(self, part: str, key: str) -> Any:
        """What every run has alike, such as ``cost``, ``macs``; None where it is not known."""
        return (next(iter(self.runs.values())).record.get(part) or {}).get(key)


@dataclass(frozen=True)
class LeftOut:
    """A run that is not averaged over, and why."""

    arm: str
    seed: int | None
    name: str
    state: str
    why: str
    entry: RunEntry | None = None


Pair: TypeAlias = tuple[Arm, Arm]
"""(arm, what it is held against)."""


@dataclass
class Ablation:
    """The arms of a report, the comparisons that were planned, and what is not equal."""

    metric: Metric
    arms: list[Arm] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    interactions: list[tuple[Pair, Pair]] = field(default_factory=list)
    """The first difference is held against the second."""
    unmet: list[str] = field(default_factory=list)
    """Comparisons that cannot be made, a sentence each."""
    unequal: list[str] = field(default_factory=list)
    """What differs between the runs that count, a sentence each."""


def collect(sources: Sequence[Source], metric: Metric, *, baseline: str | None = None) -> Ablation:
    """The arms of all sources. Runs of declared ablations are grouped as declared, all others by their configuration.

    Raises ConfigError where ``baseline`` is no arm's label.
    """
    found = Ablation(metric)
    pools = [(source.declaration, [source]) for source in sources if source.declaration.get("arms")]
    loose = [source for source in sources if not source.declaration.get("arms")]
    if loose:
        swept = next((s.declaration for s in loose if s.declaration), {})
        pools.append((swept if len(loose) == 1 else {}, loose))
    for declaration, members in pools:
        _add_pool(found, declaration, members, planned=baseline is None)
    _name_apart(found)
    _set_points(found.arms)
    if baseline is not None:
        against = _find_baseline(found, baseline)
        found.pairs = [(arm, against) for arm in found.arms if arm is not against] if against else []
        if against is None:
            found.unmet.append(f"The baseline {baseline} has no run that counts: nothing is held against it.")
    found.unequal = unequal({arm.label: arm.runs for arm in found.arms})
    return found


def _add_pool(found: Ablation, declaration: Mapping[str, Any], sources: Sequence[Source], *, planned: bool) -> None:
    entries = _once([entry for source in sources for entry in source.entries])
    usable, left_out = _usable(entries, found.metric)
    for old in (entry for source in sources for entry in source.superseded):
        if old.name not in {entry.name for entry in entries}:
            left_out.append(_left(old, "superseded", "its code, data or configuration has a newer version"))
    declaration = _along_axes(declaration, {entry.arm for entry in entries})
    declared = list(declaration.get("arms") or ())
    matched = ("model.size.embed_dim",) if declaration.get("match") else ()
    factor = declaration.get("factor") or ()
    follow = following(factor, usable)
    if declared:
        arms, unlike = _declared_arms(usable, declared, (*factor, *matched), follow)
        left_out += _missing(declaration, entries)
    else:
        arms, unlike = _loose_arms(usable, follow)
    for arm in arms:
        arm.source, arm.declared, arm.matched = sources[0].name, bool(declared), matched
        arm.setups = {arm.source: arm.setup}
    found.arms += arms
    found.left_out += left_out + unlike
    if not planned:
        return
    wanted = [tuple(pair) for pair in declaration.get("compare") or ()]
    against = declaration.get("baseline")
    if not wanted and against:
        wanted = [(label, against) for label in (declared or [arm.label for arm in arms]) if label != against]
    if not wanted:
        _set_points(arms)
        pairs = [(arm, other) for arm in arms if (other := baseline_of(arm, arms)) is not None]
        found.pairs += [(arm, other) for arm, other in pairs if arm is not other]
    by_label = {arm.label: arm for arm in arms}
    for label, other in wanted:
        if _are_there((label, other), by_label, found.unmet, name=f"{label} - {other}"):
            found.pairs.append((by_label[label], by_label[other]))
    for (a, b), (c, d) in declaration.get("interactions") or ():
        if _are_there((a, b, c, d), by_label, found.unmet, name=f"({a} - {b}) - ({c} - {d})"):
            found.interactions.append(((by_label[a], by_label[b]), (by_label[c], by_label[d])))


def _are_there(labels: Sequence[str], arms: Collection[str], unmet: list[str], *, name: str) -> bool:
    """Whether all arms of a planned comparison have runs that count; if not, it is added to what is unmet."""
    absent = [label for label in dict.fromkeys(labels) if label not in arms]
    if absent:
        has = "have" if len(absent) > 1 else "has"
        unmet.append(f"{name}: not compared, {' and '.join(absent)} {has} no run that counts.")
    return not absent


def _along_axes(declaration: Mapping[str, Any], labels: Collection[str]) -> Mapping[str, Any]:
    """The declaration of a sweep with further axes (``vit recipe.lr=0.1``): its arms and comparisons at each of their values."""
    arms = list(declaration.get("arms") or ())
    further: dict[str, None] = {}
    for label in sorted(set(labels) - set(arms)):
        arm = max((arm for arm in arms if label.startswith(f"{arm} ")), key=len, default=None)
        if arm is not None:
            further[label.removeprefix(arm)] = None
    if not further:
        return declaration
    values = ["", *further] if any(arm in labels for arm in arms) else list(further)
    pairs = [tuple(pair) for pair in declaration.get("compare") or ()]
    if not pairs and (against := declaration.get("baseline")):
        pairs = [(arm, against) for arm in arms if arm != against]
    return {
        **declaration,
        "arms": [f"{arm}{value}" for value in values for arm in arms],
        "compare": [(f"{arm}{value}", f"{against}{value}") for value in values for arm, against in pairs],
        "interactions": [
            tuple((f"{arm}{value}", f"{against}{value}") for arm, against in pairs_of)
            for value in values
            for pairs_of in declaration.get("interactions") or ()
        ],
    }


def _once(entries: Iterable[RunEntry]) -> list[RunEntry]:
    """Without the runs that two sources share."""
    kept: dict[tuple[str, str], RunEntry] = {}
    for entry in entries:
        kept.setdefault((entry.name, entry.arm), entry)
    return list(kept.values())


def _usable(entries: Iterable[RunEntry], metric: Metric) -> tuple[list[RunEntry], list[LeftOut]]:
    usable, left_out = [], []
    for entry in entries:
        if entry.status != "finished":
            left_out.append(_left(entry, entry.status, entry.said))
        elif not isinstance(entry.seed, int) or not isinstance(entry.record.get("config"), Mapping):
            left_out.append(_left(entry, "damaged", "its record has no seed or no config"))
        elif metric.of(entry.record) is None:
            said = (entry.record.get("result") or {}).get(metric.key)
            why = f"its {metric.key} is {said}" if said is not None else f"its result has no {metric.key}"
            left_out.append(_left(entry, "no metric", why))
        else:
            usable.append(entry)
    return usable, left_out


def _left(entry: RunEntry, state: str, why: str) -> LeftOut:
    return LeftOut(entry.arm, entry.seed, entry.name, state, plain_text(why), entry)


def _missing(declaration: Mapping[str, Any], entries: Sequence[RunEntry]) -> list[LeftOut]:
    there = {(entry.arm, entry.seed) for entry in entries}
    wanted = [(arm, seed) for arm in declaration["arms"] for seed in declaration.get("seeds") or ()]
    return [
        LeftOut(arm, seed, "", "missing", "declared, and never started")
        for arm, seed in wanted
        if (arm, seed) not in there
    ]


# ---------------------------------------------------------------------------------------------------------------- grouping


def _declared_arms(
    usable: Sequence[RunEntry], labels: Sequence[str], factor: Sequence[str], follow: Collection[str]
) -> tuple[list[Arm], list[LeftOut]]:
    """One arm a label; what its runs must share is the whole configuration, all arms what lies outside the factor."""
    groups: dict[str, list[_Run]] = {label: [] for label in labels}
    for entry in usable:
        config = without(flat_config(entry), follow)
        outside = {key: repr(value) for key, value in config.items() if not covers(factor, key)}
        inside = {key: repr(value) for key, value in config.items() if covers(factor, key)}
        groups.setdefault(entry.arm, []).append(
            _Run(entry, config, {**_facts(entry, factor), **outside}, {**_own_facts(entry), **inside})
        )
    return _pick(groups)


def _loose_arms(usable: Sequence[RunEntry], follow: Collection[str]) -> tuple[list[Arm], list[LeftOut]]:
    """One arm for each configuration there is; the plain ViT first, then in the order of the records."""
    configs = [without(flat_config(entry), follow) for entry in usable]
    for entry, config in zip(usable, configs, strict=True):  # the same name over other files is another data set
        config["data.fingerprint"] = (entry.record.get("data") or {}).get("fingerprint")
    keys = varying(configs)
    groups: dict[str, list[_Run]] = {}
    for entry, config in zip(usable, configs, strict=True):
        point = repr([config.get(key) for key in keys])
        groups.setdefault(point, []).append(_Run(entry, config, _facts(entry, keys), _own_facts(entry)))
    arms, unlike = _pick(groups)
    by_label: dict[str, list[Arm]] = {}
    for arm in arms:
        by_label.setdefault(arm.label, []).append(arm)
    for same in by_label.values():
        if len(same) > 1:
            _tell_apart(same)
    return _in_order(arms, keys), unlike


def _tell_apart(arms: Sequence[Arm]) -> None:
    """Add to a name that does not tell arms apart in which keys they differ: those with the most values, as many as it takes."""
    values = {key: [plain_text(arm.config.get(key)) for arm in arms] for key in varying([arm.config for arm in arms])}
    ends = Counter(key.rpartition(".")[2] for key in values)
    chosen: list[str] = []
    for key in sorted(values, key=lambda key: -len(set(values[key])))[:_SHOWN_KEYS]:
        chosen.append(key)
        if len(set(zip(*(values[k] for k in chosen), strict=True))) == len(arms):
            break
    seen: Counter[str] = Counter()
    for place, arm in enumerate(arms):
        for key in chosen:
            end = key.rpartition(".")[2]
            arm.label += f" {end if ends[end] == 1 else key}={values[key][place]}"
        seen[arm.label] += 1
        if seen[arm.label] > 1:  # they differ in more keys than a name can hold
            arm.label += f" ({seen[arm.label]})"


def _in_order(arms: Sequence[Arm], keys: Sequence[str]) -> list[Arm]:
    """By the number they differ in, where that is all; else what is compared together stands together, the plain ViT first."""
    numbers = [number(arm.config.get(keys[0])) for arm in arms] if len(keys) == 1 else [None]
    if None not in numbers:
        return sorted(arms, key=lambda arm: float(arm.config[keys[0]]))
    outside = [repr([arm.config.get(key) for key in keys if not key.startswith("model.ib.")]) for arm in arms]
    place = {id(arm): (outside.index(point), not arm.plain) for arm, point in zip(arms, outside, strict=True)}
    return sorted(arms, key=lambda arm: place[id(arm)])


@dataclass(frozen=True)
class _Run:
    entry: RunEntry
    config: dict[str, Any]
    setup: dict[str, str]
    """Shared by all arms that are compared fairly."""
    own: dict[str, str]
    """Shared by the runs of one arm."""

    @property
    def ended(self) -> str:
        return str(self.entry.record.get("ended", ""))


def _pick(groups: Mapping[str, list[_Run]]) -> tuple[list[Arm], list[LeftOut]]:
    """Of each group, the runs of one variant, one a seed; and what was left out of it."""
    shared = Counter(_key(run.setup) for runs in groups.values() for run in runs)
    arms, left_out = [], []
    for runs in groups.values():
        if not runs:
            continue
        variants: dict[tuple[object, object], list[_Run]] = {}
        for run in runs:
            variants.setdefault((_key(run.setup), _key(run.own)), []).append(run)
        rank = {key: (shared[key[0]], len(made), max(run.ended for run in made)) for key, made in variants.items()}
        chosen = max(variants, key=rank.__getitem__)
        kept = variants[chosen][0]
        arm = Arm(kept.entry.arm, config=kept.config, setup=kept.setup)
        for key, made in variants.items():
            for run in made:
                if key != chosen:
                    left_out.append(_left(run.entry, "unequal", _unlike(run, kept)))
                    continue
                assert run.entry.seed is not None
                other = arm.runs.get(run.entry.seed)
                later = other is None or str(other.record.get("ended", "")) <= run.ended
                old = other if later else run.entry
                if later:
                    arm.runs[run.entry.seed] = run.entry
                if old is not None:
                    left_out.append(_left(old, "repeated", "the same arm and seed has a later run"))
        arms.append(arm)
    return arms, left_out


def _key(facts: Mapping[str, str]) -> object:
    return frozenset(facts.items())


def _unlike(run: _Run, kept: _Run) -> str:
    return "; ".join(
        differences({**run.setup, **run.own}, {**kept.setup, **kept.own}, "{key} {a}, where the others have {b}")
    )


def differences(a: Mapping[str, str], b: Mapping[str, str], form: str) -> list[str]:
    """In what two mappings differ: the form with key, a and b filled in, for the first few keys."""
    keys = [key for key in dict.fromkeys((*a, *b)) if a.get(key) != b.get(key)]
    shown = [
        form.format(key=key, a=plain_text(a.get(key, "nothing")), b=plain_text(b.get(key, "nothing")))
        for key in keys[:_SHOWN_KEYS]
    ]
    return shown + ([f"and {len(keys) - _SHOWN_KEYS} more keys"] if len(keys) > _SHOWN_KEYS else [])


def _facts(entry: RunEntry, varied: Sequence[str]) -> dict[str, str]:
    """What a result depends on beside the configuration, but for what is varied on purpose."""
    record = entry.record
    placement = record.get("placement") or {}
    facts = {"code": (record.get("versions") or {}).get("code")}
    if not any(key == "data" or key.startswith("data.") for key in varied):
        facts["data"] = (record.get("data") or {}).get("fingerprint")
    if not covers(varied, "trainer.precision"):
        facts["precision"] = placement.get("precision")
    if not covers(varied, "trainer.compile"):
        facts["compiled"] = (placement.get("compile") or {}).get("on")
    return {key: str(value) for key, value in facts.items() if value is not None}


def _own_facts(entry: RunEntry) -> dict[str, str]:
    """What the runs of one arm must share beside that; other arms may have no such thing."""
    stem = (entry.record["config"].get("model") or {}).get("stem") or {}
    placement = entry.record.get("placement") or {}
    batch = placement.get("per_device_batch")
    if batch is None or not placement.get("batch_norm", stem.get("norm") == "batch"):
        return {}
    if placement.get("accelerator") == "cuda":  # the processes of a GPU run take their statistics together
        batch *= placement.get("world_size", 1)
    return {"images that batch norm sees": str(batch)}


def _set_points(arms: Sequence[Arm]) -> None:
    keys = varying([arm.config for arm in arms])
    if not all("data.fingerprint" in arm.config for arm in arms):  # declared arms have it in their set-up
        keys = [key for key in keys if key != "data.fingerprint"]
    for arm in arms:
        arm.point = {key: arm.config.get(key) for key in keys}


def _name_apart(found: Ablation) -> None:
    """Arms of two sources that have one label: one arm where they are the same, else the source's name is added."""
    known: dict[str, list[Arm]] = {}
    taken = {arm.label for arm in found.arms}
    stands_for: dict[int, Arm] = {}
    for arm in found.arms:
        others = known.setdefault(arm.label, [])
        same = next((other for other in others if _is_same(arm, other)), None)
        if same is not None:
            for seed in arm.runs.keys() & same.runs.keys():
                if arm.runs[seed].name != same.runs[seed].name:
                    found.left_out.append(_left(arm.runs[seed], "repeated", f"{same.source} has this arm and seed too"))
            same.runs = {**arm.runs, **same.runs}
            same.setups = {**arm.setups, **same.setups}
            stands_for[id(arm)] = same
            continue
        others.append(arm)
        if len(others) > 1:
            label = f"{arm.label} ({arm.source})"
            names = (label, *(f"{label} ({count})" for count in range(2, len(found.arms) + 2)))
            arm.label = next(name for name in names if name not in taken)
            taken.add(arm.label)
    found.arms = [arm for arm in found.arms if id(arm) not in stands_for]

    def kept(pair: Pair) -> Pair:
        return stands_for.get(id(pair[0]), pair[0]), stands_for.get(id(pair[1]), pair[1])

    found.pairs = list(dict.fromkeys(map(kept, found.pairs)))
    found.interactions = list(dict.fromkeys((kept(first), kept(second)) for first, second in found.interactions))


def _is_same(arm: Arm, other: Arm) -> bool:
    keys = (arm.config.keys() | other.config.keys()) - {"data.fingerprint"}
    facts = arm.setup.keys() & other.setup.keys()
    return all(arm.config.get(k) == other.config.get(k) for k in keys) and all(
        arm.setup[k] == other.setup[k] for k in facts
    )


# ---------------------------------------------------------------------------------------------------------------- baselines


def baseline_of(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The arm to hold this one against: the plain ViT that differs in nothing but the inductive bias.

    Where the arms differ in one key only, it is the first of them. Else a difference would mix factors: None.
    """
    if len(arm.point) == 1:
        return arms[0]

    def outside(other: Arm) -> dict[str, str]:
        return {key: repr(value) for key, value in other.point.items() if not key.startswith("model.ib.")}

    return next((other for other in arms if other.plain and outside(other) == outside(arm)), None)


def _find_baseline(found: Ablation, label: str) -> Arm | None:
    arm = next((arm for arm in found.arms if arm.label == label), None)
    known = dict.fromkeys([*(arm.label for arm in found.arms), *(left.arm for left in found.left_out)])
    if arm is None and label not in known:
        raise ConfigError(
            f"baseline must be one of the arms {', '.join(known)}, got {label!r}{nearest(label, list(known))}"
        )
    return arm
