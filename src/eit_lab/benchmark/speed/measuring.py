"""``bench model`` and ``bench step``: peers side by side, a size after the other, in rounds whose order turns around. No torch.

For each size every peer gets a process that stays; then come the warm-ups, and the rounds, in which each peer takes one turn in each
precision. A worker that does not fit, fails or takes too long is a row that says so. Peers that compile warm up together, since the
compiler works on the host; all others, and every turn, have the machine to themselves.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from eit_lab.benchmark.speed.crew import LostError, Worker
from eit_lab.benchmark.speed.options import Options
from eit_lab.benchmark.speed.peers import MATRIX_PRODUCT, OURS, Peer

_START_S, _WARM_UP_S, _TURN_S = 180.0, 300.0, 120.0  # longer than any of them should take
_LEAST_S = 30.0  # to compile in, however little of the budget is left
_Advance = Callable[[str, int, int], None]


@dataclass
class Contestant:
    """A worker, what it answered, and why it is out, if it is."""

    name: str
    peer: Peer | None
    """None of the matrix product."""
    hired: Worker | None = None
    """None before it is started."""
    facts: dict[str, Any] = field(default_factory=dict)
    warm: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By precision."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of a step, by precision, one a round."""
    lost: str | None = None

    @property
    def worker(self) -> Worker:
        """Its process."""
        assert self.hired is not None
        return self.hired

    def compiles(self, device: str) -> bool:
        """Whether its first step may wait for a compiler."""
        return self.peer is not None and (
            self.peer.compile not in ("auto", "false") or (device == "cuda" and self.peer.compile == "auto")
        )


def measure(options: Options, advance: _Advance) -> dict[str, Any]:
    """{"rows", "products", "idle_cpu_share", "load"}: a row for each size, peer and precision, a product's for each size."""
    before = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    products: list[dict[str, Any]] = []
    idle: list[tuple[float, float]] = []
    began = time.monotonic()
    for model in options.models:
        named = [(MATRIX_PRODUCT, None), *((peer.name, peer) for peer in options.peers_beside(model))]
        contestants = [Contestant(name, peer) for name, peer in named]
        left = options.budget - (time.monotonic() - began)
        if left <= 0:
            for one in contestants:
                one.lost = f"left out: the budget of {options.budget:.0f} s was spent"
        else:
            try:
                _measure_size(model, contestants, options, min(options.compile_limit, max(_LEAST_S, left)), advance)
            finally:
                for one in contestants:
                    if one.hired is not None:
                        one.hired.close()
                        idle.append((one.hired.idle_cpu_s, one.hired.idle_s))
        products += [_row(one, model, precision) for one in contestants[:1] for precision in options.precision]
        rows += [_row(one, model, precision) for one in contestants[1:] for precision in options.precision]
    waited = sum(seconds for _, seconds in idle)
    return {
        "rows": rows,
        "products": products,
        "idle_cpu_share": sum(cpu for cpu, _ in idle) / waited if waited else 0.0,
        "load": [before, os.getloadavg()[0]],
    }


def _measure_size(
    model: str, contestants: Sequence[Contestant], options: Options, compile_limit: float, advance: _Advance
) -> None:
    for one in contestants:
        contender = {
            "verb": options.verb,
            "peer": one.name,
            "model": model,
            "device": options.device,
            "batch": options.batch,
            "img_size": options.img_size,
        }
        request = {"do": "build", "keep": one.peer is not None and one.peer.keeps_memory, "contender": contender}
        one.hired = Worker()
        _try(one, lambda one=one, request=request: one.worker.send(request))  # type: ignore[misc]
    total = len(contestants) * (1 + len(options.precision))
    done = iter(range(1, total + 1))
    step = f"{model}: warming up"
    advance(step, 0, total)
    for one in contestants:
        _try(one, lambda one=one: one.facts.update(one.worker.receive(within_s=_START_S)))  # type: ignore[misc]
        advance(step, next(done), total)
    together = [one for one in contestants if one.compiles(options.device)]
    for precision in sorted(options.precision):  # bfloat16 first: its peak of memory is the lower one
        for group in ([one] for one in contestants if one not in together):
            _warm_up(group, precision, _WARM_UP_S)
            advance(step, next(done), total)
        _warm_up(together, precision, compile_limit)
        for _ in together:
            advance(step, next(done), total)
    turns = [(one, precision) for one in contestants for precision in options.precision if one.lost is None]
    for number in range(options.rounds):
        for place, (one, precision) in enumerate(turns if number % 2 == 0 else turns[::-1]):
            advance(f"{model}: in turn", number * len(turns) + place, options.rounds * len(turns))
            _try(one, lambda one=one, precision=precision: _take_turn(one, precision))  # type: ignore[misc]
    advance(f"{model}: in turn", options.rounds * len(turns), options.rounds * len(turns))


def _warm_up(group: Sequence[Contestant], precision: str, limit_s: float) -> None:
    """All of a group at once: asked, then listened to, with one time limit."""
    until = time.monotonic() + limit_s
    for one in group:
        _try(one, lambda one=one: one.worker.send({"do": "warm_up", "precision": precision}))  # type: ignore[misc]
    for one in group:

        def hear(one: Contestant = one) -> None:
            within = max(1.0, until - time.monotonic())
            try:
                one.warm[precision] = one.worker.receive(within_s=within)
            except LostError as error:
                late = str(error).startswith("took more than")
                raise LostError(f"not ready after {limit_s:.0f} s of warming up" if late else str(error)) from None

        _try(one, hear)


def _take_turn(one: Contestant, precision: str) -> None:
    request = {"do": "turn", "precision": precision, "steps": one.warm[precision]["steps"]}
    one.seconds.setdefault(precision, []).append(one.worker.ask(request, within_s=_TURN_S)["seconds"])


def _try(one: Contestant, what: Callable[[], None]) -> None:
    """Something with a worker that is still there; a worker that is lost stays lost, with its reason."""
    if one.lost is None:
        try:
            what()
        except LostError as error:
            one.lost = str(error)
            one.worker.close()


def _row(one: Contestant, model: str, precision: str) -> dict[str, Any]:
    warm = one.warm.get(precision, {})
    complete = one.lost is None
    row = {
        "model": model,
        "peer": one.name,
        "precision": precision,
        "seconds": one.seconds.get(precision, []) if complete else [],
        **{key: one.facts.get(key) for key in ("macs", "params", "img_size", "made", "kept", "compiled")},
        **{key: warm.get(key) for key in ("steps", "first_s", "first_loss", "memory_bytes")},
        "lost": one.lost,
    }
    if one.peer is not None:
        row |= {"label": one.peer.label, "what": one.peer.what, "ours": one.peer.kind == OURS}
    return row
