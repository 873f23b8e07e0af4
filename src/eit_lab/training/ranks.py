"""What the processes of one run tell each other beside gradients: small facts over a gloo group, which no GPU waits for."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from eit_lab.command import RunError


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

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """Each flag, true when it is true on any rank."""
        return tuple(bool(value) for value in self.largest(*(int(flag) for flag in flags)))

    def largest(self, *values: int) -> tuple[int, ...]:
        """The largest of each value over all ranks."""
        if self._group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tuple(tensor.tolist())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean of a small tensor over all ranks, on the host, in float64."""
        values = values.detach().to("cpu", torch.float64)
        if self._group is not None:
            dist.all_reduce(values, dist.ReduceOp.SUM, group=self._group)
            values /= self.world_size
        return values

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
