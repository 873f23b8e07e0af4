"""The key=value words of a ``bench`` verb."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eit_lab.config import ConfigError
from eit_lab.loading import nearest


def read_words(words: Sequence[str], defaults: Mapping[str, str], *, verb: str) -> dict[str, str]:
    """The defaults, with what was said in their place. ConfigError in one line for a word that is none of them."""
    told = dict(defaults)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in told:
            raise ConfigError(
                f"bench {verb} takes {', '.join(told)} as key=value, got {word!r}{nearest(key, list(told))}"
            )
        told[key] = value
    return told
