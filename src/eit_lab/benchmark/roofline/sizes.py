"""What each size of EIT needs for one image of a training step, counted: whose work it is, before anything is timed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from eit_lab import create_model
from eit_lab.benchmark.roofline.work import Operator, operators
from eit_lab.benchmark.table import Cell, markdown_table
from eit_lab.models.backbone import Backbone

SIZES = ("eit_mini", "eit_tiny", "eit_base", "eit_large")
_HEAD = [
    "one image, 224 px", "forward, GFLOP", "linear layers", "attention proper", "convolution branch", "stem",
    "forward and backward, GFLOP", "widths of a head", "exponentials, M",
]  # fmt: skip


def sizes_section() -> str:
    """A table, in Markdown."""
    return "\n".join(markdown_table(_HEAD, list(_rows())))


def _rows() -> Iterator[Cell]:
    for name in SIZES:
        with torch.device("meta"):
            backbone = create_model(name)
        assert isinstance(backbone, Backbone)
        work = operators(backbone, batch=1, precision="float32")
        forward = _flops(work, phase="forward")
        shares = [
            f"{100 * _flops(work, phase='forward', group=group) / forward:.1f}%"
            for group in ("matrix products", "attention", "convolution branch", "stem convolution")
        ]
        widths = [split.attn_dim // backbone.config.size.num_heads for split in backbone.config.layer_splits()]
        yield (
            name,
            f"{forward / 1e9:.2f}",
            *shares,
            f"{(forward + _flops(work, phase='backward')) / 1e9:.2f}",
            " ".join(map(str, widths)),
            f"{sum(one.exponentials for one in work) / 1e6:.1f}",
        )


def _flops(work: list[Operator], *, phase: str, group: str | None = None) -> int:
    return sum(one.flops for one in work if one.phase == phase and group in (None, one.group))
