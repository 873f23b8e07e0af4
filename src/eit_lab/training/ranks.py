"""What the processes of one run tell each other beside gradients: small facts over a gloo group, which no GPU waits for.

gloo passes them through all processes one by one, so that an answer takes longer than a step where there are many (docs/scaling.md).
What a step wants to know it therefore asks without waiting (Answer), and acts on some steps later, all processes at the same one (Watch).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from eit_lab.command import RunError


class Answer:
    """What all processes said, on its way: gloo's threads bring it while the asking one goes on."""

    def __init__(self, content: torch.Tensor, work: dist.Work | None = None) -> None:
        self._content, self._work = content, work

    @property
    def is_there(self) -> bool:
        """Whether ``take`` returns at once. It may differ from process to process: nothing that all do may hang on it."""
        return self._work is None or self._work.is_completed()

    def take(self) -> torch.Tensor:
        """The answer, waiting for it where it must."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._content


class Ranks:
    """All processes of a run; with a single one, every method is a plain local answer."""

    def __init__(self, trainer: Trainer, *, timeout_minutes: float) -> None:
        """Start the process group now, before Lightning's fit would, so that ranks can agree before anything is loaded."""
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        self._group: Any = None
        if self.world_size > 1:
            trainer.strategy.setup_environment()
            self.rank = trainer.global_rank
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))

    def close(self) -> None:
        """Take leave in order: a process that ends with the group still open may abort at its very end."""
        if self._group is not None:
            self._group = None
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """True in the process that writes."""
        return self.rank == 0

    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all ranks."""
        if self._group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tuple(tensor.tolist())

    def ask_largest(self, *values: int) -> Answer:
        """The largest of each value over all ranks, (values,) int64, without waiting for it."""
        tensor = torch.tensor(values, dtype=torch.int64)
        if self._group is None:
            return Answer(tensor)
        return Answer(tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True))

    def ask_all(self, *values: float) -> Answer:
        """Every rank's values, (world_size, values) float64, without waiting for them."""
        table = torch.zeros(self.world_size, len(values), dtype=torch.float64)
        table[self.rank] = torch.tensor(values, dtype=torch.float64)
        if self._group is None:
            return Answer(table)
        return Answer(table, dist.all_reduce(table, dist.ReduceOp.SUM, group=self._group, async_op=True))

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def copy_from_main(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank the main process's values of some tensors, on whatever device they are."""
        if self._group is not None:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def must_agree(self, what: str, value: str) -> None:
        """Raises RunError, on every rank, unless all ranks have the same value."""
        values = self.gather(value)
        odd = [rank for rank, other in enumerate(values) if other != values[0]]
        if odd:
            raise RunError(
                f"every process must have the same {what}: process 0 has {values[0]}, process {odd[0]} {values[odd[0]]}; "
                "was a file changed while they started?"
            )


class Watch:
    """Numbers that any process may raise, on which all act at the same call, without waiting for each other at each.

    All processes must call ``look`` equally often. A question that is asked at one call is answered some calls later: as many as make
    a tenth of a second, sixteen at most, by the slowest process's own pace, which is part of the question and so the same everywhere.
    What a process raises is hence known to all after two such spans at most. Calls that are half a second apart wait for
    their answer (which takes milliseconds): there two spans would be long. A process alone is answered at once.
    """

    SPAN_S = 0.1
    MOST_CALLS = 16
    SLOW_S = 0.5

    def __init__(self, ranks: Ranks, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._ranks, self._clock = ranks, clock
        self._open: Answer | None = None
        self._calls = 0
        self._asked_call, self._asked_at = 0, math.nan
        self._span = 0

    def look(self, *values: int, now: bool = False) -> tuple[int, ...] | None:
        """The largest of each value over all processes, as it was when they were asked; None where nothing is to be acted on yet.

        ``now``: wait for the answer to these values, and to those of before.
        """
        if self._ranks.world_size == 1:
            return values
        self._calls += 1
        heard: list[tuple[int, ...]] = []
        if self._open is not None and (now or self._calls - self._asked_call >= self._span):
            heard.append(self._hear())
        if self._open is None:
            self._ask(values)
            if now or self._span == 0:
                heard.append(self._hear())
        return tuple(map(max, zip(*heard, strict=True))) if heard else None

    def _ask(self, values: tuple[int, ...]) -> None:
        at, before = self._clock(), self._asked_at
        pace_s = math.inf if math.isnan(before) else (at - before) / (self._calls - self._asked_call)
        self._asked_call, self._asked_at = self._calls, at
        self._open = self._ranks.ask_largest(*values, round(1e6 * min(pace_s, 1e6)))

    def _hear(self) -> tuple[int, ...]:
        assert self._open is not None
        *values, pace_us = self._open.take().tolist()
        self._open = None
        pace_s = pace_us / 1e6
        self._span = (
            0 if pace_s >= self.SLOW_S else min(self.MOST_CALLS, max(1, math.ceil(self.SPAN_S / max(pace_s, 1e-6))))
        )
        return tuple(values)
