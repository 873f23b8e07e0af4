"""The exponential moving average of the weights: kept beside them, evaluated beside them, in a section of its own in files.

Source: ema <- decay * ema + (1 - decay) * weights after every optimizer step, buffers copied, as in the published runs
(arXiv:2203.07116; decay 0.99996). Where we differ: there it was kept and never evaluated, and a resume lost it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class WeightAverage:
    """An averaged copy of a model. It is no submodule of anything: optimizers, DDP and state dicts do not see it."""

    def __init__(self, model: nn.Module, *, decay: float, dtype: torch.dtype = torch.float32) -> None:
        """``dtype`` is the average's own: a step of 1 - decay of a weight is lost in half precision."""
        self.decay, self.updates = decay, 0
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards the weights of a model after its optimizer step."""
        mine = [p.detach() for p in self.model.parameters()]
        theirs = [p.detach().to(own.dtype) for p, own in zip(model.parameters(), mine, strict=True)]
        torch._foreach_lerp_(mine, theirs, 1 - self.decay)
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The section ``ema`` of a checkpoint: decay, updates, and the weights under the backbone's own names."""
        weights: dict[str, Tensor] = self.model.state_dict()
        return {"decay": self.decay, "updates": self.updates, "state_dict": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's section."""
        self.model.load_state_dict(state["state_dict"])
        self.updates = state["updates"]
