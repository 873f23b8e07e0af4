"""What a search found: its table, trials.csv, and best.yaml with the commands that train what is best. No torch.

NOTE. The best of many trials is the best partly by luck of its seed. best.yaml therefore trains with seeds that the search
has not seen, and its numbers, not the search's, are what an ablation compares.
"""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from eit_lab.runs import write_text
from eit_lab.search.board import best_so_far
from eit_lab.search.request import Request
from eit_lab.search.study import RETRY_OF, ArmStudy, ended, is_impossible
from eit_lab.search.trials import Runs

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_SHOWN_TRIALS = 5
_NEW_SEEDS = 3
_WIDTH = 110


def write_outcome(request: Request, studies: Sequence[ArmStudy], runs: Runs, folder: Path) -> str:
    """Write trials.csv, best.yaml and the figure, as far as there is something to say; returns the table as text."""
    from eit_lab.search.figure import save_search_figure

    write_text(folder / "trials.csv", _csv(request, studies, runs))
    if any(best_so_far(study) is not None for study in studies):
        write_text(folder / "best.yaml", _best(request, studies))
        save_search_figure(request, studies, folder / "search")
    return _text(request, studies)


def state_of(trial: FrozenTrial) -> str:
    """A trial's state in our words."""
    if is_impossible(trial):
        return "impossible"
    if trial.state.name == "PRUNED":
        return "diverged" if ended(trial).startswith("diverged") else "pruned"
    return {"COMPLETE": "finished", "FAIL": "failed", "RUNNING": "open", "WAITING": "waiting"}[trial.state.name]


# ---------------------------------------------------------------------------------------------------------------- table


def _text(request: Request, studies: Sequence[ArmStudy]) -> str:
    console = Console(file=io.StringIO(), width=_WIDTH, highlight=False)
    for study in studies:
        if best_so_far(study) is not None:
            console.print(_table(request, study))
        elif study.arm.label:
            console.print(Text(study.arm.label))
        for line in _notes(study):
            console.print(Text(line), soft_wrap=True)
        console.print()
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def _table(request: Request, study: ArmStudy) -> Table:
    """The best trials of an arm."""
    o = request.options
    done = [trial for trial in study.trials() if trial.state.name == "COMPLETE" and trial.value is not None]
    done.sort(key=lambda trial: (-(trial.value or 0) if o.maximize else (trial.value or 0), trial.number))
    table = Table(box=None, pad_edge=False, header_style="", title_justify="left")
    table.add_column(study.arm.label or "best trials")
    table.add_column(o.objective, justify="right")
    for axis in request.space.axes:
        table.add_column(axis.key, justify="right")
    for trial in done[:_SHOWN_TRIALS]:
        cells = [axis.short(trial.params[axis.key]) for axis in request.space.axes]
        table.add_row(f"trial {trial.number + 1}", f"{trial.value:.4f}", *(Text(cell) for cell in cells))
    return table


def _notes(study: ArmStudy) -> list[str]:
    trials = study.trials()
    again = {trial.user_attrs.get(RETRY_OF) for trial in trials}
    states = [state_of(trial) for trial in trials if trial.number not in again]
    counts = {state: states.count(state) for state in dict.fromkeys(sorted(states))}
    lines = (
        [f"{len(states)} trials: {', '.join(f'{count} {state}' for state, count in counts.items())}"] if states else []
    )
    shares = study.importances()
    if shares:
        lines.append(
            "share of the spread that each explains: " + ", ".join(f"{k} {100 * v:.0f}%" for k, v in shares.items())
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------- files


def _csv(request: Request, studies: Sequence[ArmStudy], runs: Runs) -> str:
    """A line for each trial; numbers in full."""
    keys = [axis.key for axis in request.space.axes]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["arm", "trial", "state", request.options.objective, *keys, "epochs", "retry_of", "said", "runs"])
    for study in studies:
        for trial in study.trials():
            possible = bool(trial.params) and not is_impossible(trial)
            names = [entry.name for entry in runs.trial(study, trial.number, trial.params).entries] if possible else []
            first = trial.user_attrs.get(RETRY_OF)
            writer.writerow(
                [
                    study.arm.label, trial.number + 1, state_of(trial),
                    repr(trial.value) if trial.state.name == "COMPLETE" else "",
                    *(axis.text(trial.params[axis.key]) if trial.params else "" for axis in request.space.axes),
                    max(trial.intermediate_values, default=0), "" if first is None else first + 1, ended(trial),
                    " ".join(names),
                ]
            )  # fmt: skip
    return out.getvalue()


def _best(request: Request, studies: Sequence[ArmStudy]) -> str:
    """The best trial of every arm as overrides, in the words of an experiment, and the command that trains it anew."""
    seeds = [max(request.space.seeds) + 1 + n for n in range(_NEW_SEEDS)]
    base = [text for text in request.space.composed.fixed if not text.startswith(("seed=", "hydra"))]
    arms: dict[str, Any] = {}
    for study in studies:
        best = best_so_far(study)
        if best is None:
            continue
        number, value = best
        overrides = [*study.arm.overrides, *request.space.overrides(study.trial(number).params)]
        words = ["python", "-m", "eit_lab.train", "-m", *base, *overrides, f"seed={','.join(map(str, seeds))}"]
        arms[study.arm.label or request.config.model.name] = {
            "trial": number + 1,
            "value": value,
            "overrides": overrides,
            "command": shlex.join(words),
        }
    head = (
        f"# The best trial of each arm, by {request.options.objective} on the held-out slice of the training images.\n"
        "# The seeds are new: a best trial is the best partly by luck of the seeds it was searched with.\n"
    )
    plain = {"objective": request.options.objective, "at": request.at, "base": base, "seeds": seeds, "arms": arms}
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=10_000)
    return head + text
