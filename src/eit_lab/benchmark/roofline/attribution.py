"""From a profile's events to what a reader knows: each event's own time, to an operator of the model and a phase of the step.

Forwards, hooks open a scope at each module that has a name here, and an event belongs to the nearest scope above it. Backwards there
are no modules, but torch numbers the operations: an operation takes a sequence number when it makes its node of the graph, the
backward event of that node carries the number, and so leads to the scope that the node was made in. Several events may carry a
number, as those that make no node leave it to the next one: the last that began is the one that made it.

What the events of a scope are called decides the rest: a product, a norm, a cast. Everything in the scope of attention proper or of a
convolution branch is theirs, copies and casts included, since another implementation needs none; a copy elsewhere is a copy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

from torch import nn
from torch.profiler import record_function

from eit_lab.models.backbone import Backbone

STEP = "eit_lab/step"
_SCOPE = "eit_lab/scope/"
_ENGINE = "autograd::engine::evaluate_function: "
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "aten::matmul", "aten::mkldnn_linear")
_PRODUCT_NODES = ("Addmm", "Mm", "Bmm", "Linear", "TBackward")
_SPLITS = ("aten::cat", "aten::slice", "aten::split", "aten::narrow", "aten::select", "aten::concat")
_SPLIT_NODES = ("Cat", "Slice", "Split", "Select", "Narrow")
_COPIES = ("aten::copy_", "aten::clone", "aten::contiguous")


class Event(Protocol):
    """What is read of torch's FunctionEvent."""

    @property
    def name(self) -> str: ...
    @property
    def cpu_parent(self) -> Event | None: ...
    @property
    def sequence_nr(self) -> int: ...
    @property
    def thread(self) -> int: ...
    @property
    def fwd_thread(self) -> int | None: ...
    @property
    def time_range(self) -> Any: ...
    @property
    def self_cpu_time_total(self) -> float: ...
    @property
    def self_device_time_total(self) -> float: ...


class Scope(NamedTuple):
    """Where in the model an event is."""

    kind: str
    place: str


class Key(NamedTuple):
    """What a share of the time belongs to."""

    group: str
    phase: str
    place: str


@dataclass
class Times:
    """Seconds by key, all profiled steps together; of these, seconds of copies and casts; and seconds by name of the event."""

    seconds: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    copies: dict[Key, float] = field(default_factory=lambda: defaultdict(float))
    names: dict[tuple[str, str, str], float] = field(default_factory=lambda: defaultdict(float))
    """By (group, phase, name)."""

    def total(self) -> float:
        """All of it."""
        return sum(self.seconds.values())


# ---------------------------------------------------------------------------------------------------------------- scopes


@contextmanager
def scopes(model: nn.Module) -> Iterator[None]:
    """Hooks that open a scope in each module of a backbone, or of its literal copy, that has a name here."""
    opened: list[Any] = []

    def enter(name: str, module: nn.Module, args: object) -> None:
        scope: Any = record_function(name)
        scope.__enter__()
        opened.append(scope)

    def leave(module: nn.Module, args: object, output: object) -> None:
        opened.pop().__exit__(None, None, None)

    with ExitStack() as stack:
        for place, module in model.named_modules():
            kind = kind_of(place, module, literal=not isinstance(model, Backbone))
            if kind is not None:
                name = f"{_SCOPE}{kind}/{place}"
                stack.callback(module.register_forward_pre_hook(partial(enter, name)).remove)
                stack.callback(module.register_forward_hook(leave).remove)
        yield


def kind_of(place: str, module: nn.Module, *, literal: bool = True) -> str | None:
    """What a module is, by its place and its type; None for one that has no scope of its own. ``literal``: not of our backbone."""
    last = place.rpartition(".")[2]
    if place == "":
        return "model"
    if place.startswith("stem"):
        return "stem" if place == "stem" else None
    if ".mixer.conv" in place:
        return "conv" if last == "conv" and place.endswith(".mixer.conv") else None
    if place.endswith((".mlp.act", ".mlp.fc2")) and not literal:
        return None  # ours may compute both in one, unless somebody listens to them
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.LayerNorm):
        return "norm"
    if place.count(".") == 1 and place.startswith("blocks."):
        return "block"
    return {"mixer": "mixer", "attn": "attention", "mlp": "mlp", "act": "mlp"}.get(last)


# ----------------------------------------------------------------------------------------------------------- attribution


def attribute(events: Sequence[Event], *, on_device: bool = False) -> Times:
    """Each event's own time to its key. ``on_device``: the time of the kernels that it started, else the host's.

    The host's counts only inside a step, and adds up to all of it: what Python does between operations is in there.
    """
    makers = _makers(events)
    times = Times()
    for event in events:
        microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
        if microseconds <= 0:
            continue
        chain = list(_chain(event))
        if not on_device and all(one.name != STEP for one in chain):
            continue
        key, copy = _key(chain, makers)
        seconds = microseconds / 1e6
        times.seconds[key] += seconds
        times.names[key.group, key.phase, event.name.removeprefix(_SCOPE)] += seconds
        if copy:
            times.copies[key] += seconds
    return times


def _chain(event: Event) -> Iterator[Event]:
    """The event, and what it lies in, outwards."""
    one: Event | None = event
    while one is not None:
        yield one
        one = one.cpu_parent


def _makers(events: Iterable[Event]) -> dict[tuple[int, int], Scope | None]:
    """(thread, sequence number) of a forward operation -> the scope that the last event to begin with it lies in."""
    last: dict[tuple[int, int], Event] = {}
    for event in events:
        if event.sequence_nr < 0 or event.fwd_thread:  # those with a forward thread are the backward's
            continue
        key = (event.thread, event.sequence_nr)
        if key not in last or event.time_range.start >= last[key].time_range.start:
            last[key] = event
    return {key: _scope_of(_chain(event)) for key, event in last.items()}


def _scope_of(chain: Iterable[Event]) -> Scope | None:
    for one in chain:
        if one.name.startswith(_SCOPE):
            kind, _, place = one.name.removeprefix(_SCOPE).partition("/")
            return Scope(kind, place)
        if one.name.startswith(_ENGINE):
            return None
    return None


def _key(chain: Sequence[Event], makers: dict[tuple[int, int], Scope | None]) -> tuple[Key, bool]:
    """What an event belongs to, and whether it copies or casts."""
    names: list[str] = []  # of the event and what it lies in, up to its scope
    node, scope, phase = "", None, "forward"
    for one in chain:
        if one.name.startswith("Optimizer.step"):
            return Key("optimizer", "update", ""), False
        if one.name.startswith("Optimizer.zero_grad"):
            return Key("everything else", "update", ""), False
        if one.name.startswith(_ENGINE):
            node, phase = one.name.removeprefix(_ENGINE), "backward"
            scope = makers.get((one.fwd_thread or one.thread, one.sequence_nr))
            break
        if one.name.startswith(_SCOPE):
            scope = _scope_of([one])
            break
        names.append(one.name)
    cast = "aten::_to_copy" in names or node.startswith("ToCopy")
    copy = cast or any(name.startswith(_COPIES) for name in names)
    if "AccumulateGrad" in node:
        return Key("casts and copies" if copy else "everything else", phase, ""), copy
    if scope is None:
        return Key("everything else", phase, ""), copy
    group = _group(scope.kind, names, node, cast=cast, copy=copy)
    return Key(group, phase, _place(group, scope)), copy


def _group(kind: str, names: Sequence[str], node: str, *, cast: bool, copy: bool) -> str:
    """Of an event with these names above it, in a scope of this kind; ``node``: of the graph, in the backward."""
    everything = [*names, node]
    if kind == "conv":
        return "convolution branch"
    if kind == "attention":
        product = any(one in ("aten::linear", "aten::addmm", "aten::mm") for one in names)
        return "matrix products" if product or node.startswith(("Addmm", "Mm", "Linear")) else "attention"
    if kind == "stem":
        if any("max_pool" in one.lower() or "maxpool" in one.lower() for one in everything):
            return "max pool"
        return "casts and copies" if cast else "stem convolution"
    if not everything[0]:
        return "everything else"  # a scope's own time: Python
    if kind == "mixer" and any("conv" in one.lower() for one in everything):
        return "convolution branch"  # of a kernel that writes both branches' result
    if node.startswith(_SPLIT_NODES) or any(one.startswith(_SPLITS) for one in names):
        return "concatenation"
    if copy:
        return "casts and copies"
    if any("gelu" in one.lower() for one in everything):
        return "GELU"
    if kind == "mlp" and any("_Activated" in one for one in everything):  # ours: the activation and fc2 are one node
        product = any(one.startswith((*_PRODUCTS, "mkldnn::", "aten::sum")) for one in names)
        return "matrix products" if product else "GELU"
    # A gradient that two branches share is summed in the engine, outside the node that made its last part.
    summed = bool(names) and names[-1] in ("aten::add", "aten::add_")
    if any("layer_norm" in one or "LayerNorm" in one for one in everything):
        return "residual sums" if node and summed else "norms"
    if kind == "linear" or node.startswith(_PRODUCT_NODES) or any(one.startswith(_PRODUCTS) for one in names):
        return "matrix products"
    return {"block": "residual sums", "mixer": "concatenation", "norm": "norms"}.get(kind, "everything else")


def _place(group: str, scope: Scope) -> str:
    """A module's place, as the operators of ``work`` have it: the linear layer itself, else its block, or the stem."""
    if group == "matrix products":
        return f"{scope.place}.fc2" if scope.kind == "mlp" else scope.place
    parts = scope.place.split(".")
    return ".".join(parts[:2]) if parts[0] == "blocks" else ("stem" if parts[0] == "stem" else "")
