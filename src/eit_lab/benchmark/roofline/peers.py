"""Whose step is profiled: the literal implementation, ours as it trains, or ours with one choice undone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from eit_lab.benchmark.peer_words import read_words

_KEYS = {"eit_lab": ("attention", "head_multiple", "depthwise", "memory"), "literal": ("memory",)}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """``literal`` or ``eit_lab``, with choices forced: ``eit_lab:attention=sdpa:memory=plain``, ``literal:memory=kept``."""

    name: str
    forced: Mapping[str, str] = field(default_factory=dict)

    @property
    def literal(self) -> bool:
        """Whether it is the implementation as the authors wrote it."""
        return self.name.partition(":")[0] == "literal"

    @property
    def keeps_memory(self) -> bool:
        """Whether its process keeps freed memory, as our training does; the literal one has torch's defaults."""
        return self.forced.get("memory", "plain" if self.literal else "kept") == "kept"

    def keep_memory(self) -> None:
        """To be called once in its process."""
        from eit_lab.memory import keep_memory

        keep_memory()

    @contextmanager
    def paths(self) -> Iterator[None]:
        """In here the forced ways to compute hold."""
        from eit_lab.models import paths

        multiple = self.forced.get("head_multiple")
        with paths.use(
            attention=self.forced.get("attention"),
            head_multiple=None if multiple is None else int(multiple),
            depthwise=self.forced.get("depthwise"),
        ):
            yield


def read_peer(text: str) -> Peer:
    """Of a word of the command. ConfigError in one line for a name, a key or a value that there is not."""
    _, forced = read_words(text, _KEYS)
    return Peer(name=text, forced=forced)
