"""Numbers as people read them."""

from __future__ import annotations

_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def si(value: float, *, digits: int = 2) -> str:
    """Two digits and an SI prefix: 1.926e9 is '1.93 G'."""
    scale, prefix = prefix_of(value)
    return f"{value / scale:.{digits}f} {prefix}"


def prefix_of(value: float) -> tuple[float, str]:
    """(1e9, "G") of what is shown in G; (1, "") of what needs no prefix."""
    return next(((scale, prefix) for scale, prefix in _PREFIXES if value >= scale), (1.0, ""))


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; days where there are any."""
    days, rest = divmod(round(seconds), 86_400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock
