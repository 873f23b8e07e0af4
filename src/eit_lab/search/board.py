"""A search's terminal: a live table of the trials at work and the best so far; off a terminal, a line for each trial that ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from eit_lab.search.request import Request
from eit_lab.search.study import ArmStudy
from eit_lab.search.trials import Trial

_REFRESH_S = 1.0
_SHOWN = 16


class Board:
    """Shows a search while it runs."""

    def __init__(self, request: Request, studies: Sequence[ArmStudy], folder: Path) -> None:
        self._request, self._studies, self._folder = request, studies, folder
        self._console = Console(stderr=True)
        self._live: Live | None = None
        self._drawn = 0.0

    def __enter__(self) -> Board:
        if self._console.is_terminal:
            self._live = Live(Text(""), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, line: str, *, style: str = "") -> None:
        """One line that stays."""
        self._console.print(Text(line, style=style), soft_wrap=True)

    def over(self, trial: Trial, how: str, *, style: str = "") -> None:
        """A trial has ended."""
        best = best_so_far(trial.study)
        mine = best is not None and best[0] == trial.number
        said = "" if best is None else "  (best so far)" if mine else f"  (best {best[1]:.4f}, trial {best[0] + 1})"
        self.say(f"{trial.label}: {how}{said}", style=style)

    def refresh(self, trials: Sequence[Trial]) -> None:
        """Draw anew, but not more than once a second."""
        if self._live is not None and time.monotonic() - self._drawn > _REFRESH_S:
            self._drawn = time.monotonic()
            self._live.update(self._draw(trials), refresh=True)

    def _draw(self, trials: Sequence[Trial]) -> RenderableType:
        return Group(Text(""), self._heads(), self._at_work(trials))

    def _heads(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in (f"search {self._folder.name}", "trials", "best", "with"):
            table.add_column(name, justify="right" if name in ("trials", "best") else "left")
        for study in self._studies:
            over = sum(trial.state.is_finished() for trial in study.trials())
            best = best_so_far(study)
            value, values = ("", "") if best is None else (f"{best[1]:.4f}", self._values(study, best[0]))
            table.add_row(Text(study.arm.label), f"{over}/{self._request.trials}", value, Text(values))
        return table

    def _values(self, study: ArmStudy, number: int) -> str:
        return self._request.space.short(study.trial(number).params)

    def _at_work(self, trials: Sequence[Trial]) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("at work", "epoch", self._request.options.objective, "values"):
            table.add_column(name, justify="right" if name in ("epoch", self._request.options.objective) else "left")
        for trial in trials[:_SHOWN]:
            done = max(trial.curve, default=0)
            now = f"{trial.curve[done]:.4f}" if done else ""
            of = f"/{self._request.epochs}" if self._request.epochs is not None else ""
            table.add_row(Text(trial.title), f"{done}{of}", now, Text(self._request.space.short(trial.values)))
        if len(trials) > _SHOWN:
            table.add_row(f"and {len(trials) - _SHOWN} more")
        elsewhere = sum(t.state.name == "RUNNING" for study in self._studies for t in study.trials()) - len(trials)
        if elsewhere > 0:
            table.add_row(f"{elsewhere} at other launchers")
        return table


def best_so_far(study: ArmStudy) -> tuple[int, float] | None:
    """(number, value) of an arm's best trial; the earlier of equal ones."""
    done = [(trial.number, trial.value) for trial in study.trials() if trial.state.name == "COMPLETE"]
    known = [(number, value) for number, value in done if value is not None]
    sign = 1 if study.request.options.maximize else -1
    return max(known, key=lambda pair: (sign * pair[1], -pair[0]), default=None)
