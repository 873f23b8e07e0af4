"""The parts of a training step that a reader knows, and its phases. No torch."""

from __future__ import annotations

GROUPS = (
    "matrix products", "attention", "convolution branch", "stem convolution", "max pool", "norms", "GELU", "residual sums",
    "concatenation", "casts and copies", "optimizer", "everything else",
)  # fmt: skip
"""In the order of tables and bars. Attention is the product of queries, keys and values alone: its linear layers are matrix products."""
PHASES = ("forward", "backward", "update")
