"""The panels as W&B's workspace and report: the JSON that is sent, and the sending.

NOTE: wandb-workspaces has no public way to serialise, so this uses ``_to_model``, which is private, and two private fields by
which a saved workspace is found again. That is why only the versions of ``VERSIONS`` are taken.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from eit_lab.command import RunError
from eit_lab.config import ConfigError
from eit_lab.dashboard.panels import (
    DEFAULT_METRIC,
    X_AXIS,
    Bars,
    Comparer,
    Dots,
    Key,
    Lines,
    Panel,
    Parallel,
    Pictures,
    Section,
    Sweep,
    build_sections,
)
from eit_lab.runs import write_text

PACKAGE = "wandb-workspaces"
VERSIONS = (0, 4, 13), (0, 5)
"""Those of wandb-workspaces that are taken: from the first, below the second; pyproject.toml has the same."""
INSTALL = "pip install 'eit_lab[dashboard]'"
# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
_COLUMNS_OF_RUNS = ("seed",)
_MOST_RUNS = 200
_IDS = re.compile(r'"__id__":\s*"([^"]+)"')


@dataclass(frozen=True, kw_only=True)
class Board:
    """What is to be made: a workspace and a report of a project, or of one sweep in it."""

    project: str
    entity: str
    sections: tuple[Section, ...]
    metric: str
    sweep: Sweep | None = None

    @property
    def title(self) -> str:
        """Of the workspace and the report."""
        return f"eit_lab: {self.sweep.name}" if self.sweep else "eit_lab: ViT, LSRA, EIT"


def build_board(*, project: str, entity: str, sweep: Sweep | None) -> Board:
    """The sections for a project, or for what one of its sweeps compares."""
    metric = sweep.metric if sweep else DEFAULT_METRIC
    factors = sweep.declaration.factor if sweep and sweep.declaration else ()
    sections = build_sections(metric=metric, factors=factors)
    return Board(project=project, entity=entity, sections=sections, metric=metric, sweep=sweep)


def load_library() -> tuple[ModuleType, ModuleType]:
    """(workspaces, reports) of wandb-workspaces. Raises ConfigError in one line where it is not there, or not one we know."""
    try:
        found = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        raise ConfigError(f"dashboard needs {PACKAGE}, which is not installed: {INSTALL}") from None
    lowest, above = VERSIONS
    version = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    if not lowest <= version < above:
        raise ConfigError(
            f"dashboard needs {PACKAGE} of {_dotted(lowest)} or later, below {_dotted(above)}, got {found}: {INSTALL}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library itself: it uses pydantic's old names
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    return workspaces, reports


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def build_workspace(board: Board) -> Any:
    """The ``Workspace`` of wandb-workspaces, not saved."""
    ws, wr = load_library()
    sections = [
        ws.Section(name=section.name, panels=[_panel(wr, panel) for panel in section.panels], is_open=section.is_open)
        for section in board.sections
    ]
    arms = board.sweep.arms if board.sweep else ()
    runset = ws.RunsetSettings(
        groupby=[ws.Metric("JobType")],  # the arm's label, which every run has
        filters=_of_sweep(board.sweep) if board.sweep else "",
        pinned_columns=[f"summary:{board.metric}", *(f"config:{key}" for key in _COLUMNS_OF_RUNS)],
        group_colors={arm: _COLOURS[place % len(_COLOURS)] for place, arm in enumerate(arms)},
    )
    return ws.Workspace(
        entity=board.entity,
        project=board.project,
        name=board.title,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=X_AXIS, max_runs=_MOST_RUNS),
        runset_settings=runset,
    )


def build_report(board: Board, *, online: bool) -> Any:
    """The ``Report`` of wandb-workspaces, not saved; ``online`` asks the server for the id of the runs' project."""
    _, wr = load_library()
    place = {"entity": board.entity, "project": board.project} if online else {}
    blocks = [wr.P(text=board.sweep.question)] if board.sweep and board.sweep.question else []
    blocks += [wr.P(text="Written by python -m eit_lab.dashboard, which writes it again."), wr.TableOfContents()]
    for section in board.sections:
        runset = wr.Runset(
            name="runs by arm",
            groupby=["run.jobType"],
            filters=_of_sweep(board.sweep) if board.sweep else "",
            **place,
        )
        grid = wr.PanelGrid(runsets=[runset], panels=[_panel(wr, panel) for panel in section.panels])
        blocks += [wr.H2(text=section.name), wr.P(text=section.note), grid]
    return wr.Report(entity=board.entity, project=board.project, title=board.title, width="fluid", blocks=blocks)


def _of_sweep(sweep: Sweep) -> Any:
    from wandb_workspaces import expr

    return expr.And(expr.Metric("Group") == sweep.name)


def _panel(wr: ModuleType, panel: Panel) -> Any:
    by_arm = {"groupby": wr.Metric("JobType"), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    match panel:
        case Lines():
            grouped = by_arm if panel.by_arm else {}
            return wr.LinePlot(
                title=panel.title, x=panel.x, y=list(panel.y), log_y=panel.log_y, max_runs_to_show=_MOST_RUNS, **grouped
            )
        case Bars():
            return wr.BarPlot(
                title=panel.title, metrics=[wr.SummaryMetric(panel.metric)], orientation="v", max_runs_to_show=_MOST_RUNS, **by_arm
            )  # fmt: skip
        case Dots():
            return wr.ScatterPlot(
                title=panel.title, x=_key(wr, panel.x), y=_key(wr, panel.y), log_x=panel.log_x, regression=False
            )
        case Parallel():
            columns = [wr.ParallelCoordinatesPlotColumn(metric=_key(wr, key)) for key in panel.columns]
            return wr.ParallelCoordinatesPlot(title=panel.title, columns=columns)
        case Pictures():
            return wr.MediaBrowser(title=panel.title, media_keys=list(panel.names))
        case Comparer():
            return wr.RunComparer(diff_only="split")


def _key(wr: ModuleType, key: Key) -> Any:
    return wr.Config(key.name) if key.of == "config" else wr.SummaryMetric(key.name)


# ---------------------------------------------------------------------------------------------------------------- JSON


def write_json(board: Board, folder: Path) -> list[Path]:
    """workspace.json and report.json: what a save would send. The same board is the same file to the last byte."""
    models = {"workspace": build_workspace(board)._to_model(), "report": build_report(board, online=False)._to_model()}
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, model in models.items():
        spec = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
        plain = {"project": board.project, "entity": board.entity or None, "displayName": board.title, "spec": spec}
        path = folder / f"{name}.json"
        write_text(path, _with_own_ids(json.dumps(plain, indent=1)) + "\n")
        paths.append(path)
    return paths


def _with_own_ids(text: str) -> str:
    """The library draws an id for each panel and runset at random: number them."""
    ids = dict.fromkeys(_IDS.findall(text))
    runsets = re.findall(r'"runSets": \[\s*\{\s*"id": "([^"]+)"', text)
    for number, found in enumerate(dict.fromkeys([*ids, *runsets])):
        text = text.replace(found, f"eitlab{number:05d}")
    return text


# ---------------------------------------------------------------------------------------------------------------- save


def save(board: Board, known: Mapping[str, Any]) -> dict[str, Any]:
    """Save both on the server and return what finds them again; ``known`` is what an earlier save returned.

    Call in a process of its own (saving.py): it waits for the server as long as wandb likes.
    """
    workspace, report = build_workspace(board), build_report(board, online=True)
    earlier = known if known.get("place") == [board.entity, board.project] else {}
    if earlier:
        workspace._internal_name, workspace._internal_id = earlier["workspace"]["name"], earlier["workspace"]["id"]
        report.id = earlier["report"]["id"]
    report.save()
    workspace.save()
    found = {
        "place": [board.entity, board.project],
        "workspace": {"name": workspace._internal_name, "id": workspace._internal_id, "url": workspace.url},
        "report": {"id": report.id, "url": report.url},
    }
    if not workspace._internal_id or not report.id:
        raise RunError("the server took neither workspace nor report")
    return found
