"""A launcher's terminal: the live state of the sweep below, what happened above; off a terminal, lines alone."""

from __future__ import annotations

import time

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from eit_lab.manifest import Manifest
from eit_lab.sweep.status import Watch, render

_REFRESH_S = 1.0


class Screen:
    """Shows a sweep while it runs."""

    def __init__(self, manifest: Manifest) -> None:
        self._console = Console(stderr=True)
        self._watch = Watch(manifest)
        self._live: Live | None = None
        self._drawn = 0.0

    def __enter__(self) -> Screen:
        if self._console.is_terminal:
            self._live = Live(self._draw(), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str, *, style: str | None = None) -> None:
        """One line that stays."""
        self._console.print(Text(line, style=style or ""), soft_wrap=True)

    def refresh(self, *, now: bool = False) -> None:
        """Draw anew, but not more than once a second."""
        if self._live is not None and (now or time.monotonic() - self._drawn > _REFRESH_S):
            self._drawn = time.monotonic()
            self._watch.refresh()
            self._live.update(self._draw(), refresh=True)

    def _draw(self) -> RenderableType:
        return Group(Text(""), render(self._watch))
