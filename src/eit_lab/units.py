"""Numbers as people read them."""

from __future__ import annotations

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, *, digits: int = 2) -> str:
    """Two digits and an SI prefix: 1.926e9 is '1.93 G'."""
    for scale, prefix in _PREFIXES:
        if value >= scale:
            return f"{value / scale:.{digits}f} {prefix}"
    return f"{value:.{digits}f} "
