"""``python -m eit_lab.dashboard``: a W&B workspace and report as code. ``... view runs``: the same runs in a local web view."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from eit_lab import command

_HELP = """\
Write the W&B dashboard of a project as code, or look at runs in a local web view.

  python -m eit_lab.dashboard [project=NAME] [entity=NAME] [sweep=FOLDER] [out=FOLDER] [save=true] [timeout=S]

  project   the runs' logger.project; with a sweep, that of its runs             [eit_lab]
  entity    W&B entity                                                           [of the sweep's runs, else your default]
  sweep     a dashboard of one sweep (runs/sweeps/ID): its runs, arms and metric [all runs of the project]
  out       where workspace.json and report.json go                              [dashboard]
  save      put both on the server you are logged in to; again: replace them     [false]
  timeout   seconds to wait for the server                                       [60]

  python -m eit_lab.dashboard view [FOLDER ...] [port=N]

  FOLDER    a run, a folder of runs, a sweep; several at once                    [runs]
  port      on 127.0.0.1; 0: any that is free                                    [6006, or the next that is free]

The view needs no account and sends nothing anywhere; runs that go on are followed. Ctrl-C ends it.
Both need pip install 'eit_lab[dashboard]'. Exit status 0; 1 when the server does not answer; 2 for wrong input.
"""
_DEFAULTS = {"project": "", "entity": "", "sweep": "", "out": "dashboard", "save": "false", "timeout": "60"}
_SAVED = "saved.json"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, 1 where the server does not answer, 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "--help" in arguments or "-h" in arguments:
        print(_HELP)
        return 0
    return command.run(_main, arguments)


def _main(argv: list[str]) -> int:
    return _view(argv[1:]) if argv[:1] == ["view"] else _write(argv)


def _words(argv: Sequence[str], defaults: dict[str, str], *, of: str) -> dict[str, str]:
    from eit_lab.config import ConfigError
    from eit_lab.loading import nearest

    told = dict(defaults)
    for word in argv:
        key, equals, value = word.partition("=")
        if not equals or key not in told:
            near = nearest(key, [*told, "view"] if of == "dashboard" else list(told))
            raise ConfigError(f"{of} takes {', '.join(told)} as key=value, got {word!r}{near}")
        told[key] = value
    return told


# ----------------------------------------------------------------------------------------------------------------- W&B


def _write(argv: list[str]) -> int:
    from eit_lab.config import ConfigError
    from eit_lab.dashboard.panels import read_sweep
    from eit_lab.dashboard.workspace import build_board, write_json

    told = _words(argv, _DEFAULTS, of="dashboard")
    if told["save"] not in ("true", "false"):
        raise ConfigError(f"save must be true or false, got {told['save']!r}")
    seconds = _seconds(told["timeout"])
    sweep = read_sweep(Path(told["sweep"])) if told["sweep"] else None
    logger = sweep.logger if sweep else {}
    project = told["project"] or str(logger.get("project") or "eit_lab")
    entity = told["entity"] or str(logger.get("entity") or "")
    out = Path(told["out"])
    try:
        paths = write_json(build_board(project=project, entity=entity, sweep=sweep), out)
    except OSError as error:
        raise ConfigError(
            f"out must be a folder that can be written, got {told['out']!r}: {error.strerror or error}"
        ) from None
    for path in paths:
        print(path)
    if told["save"] == "true":
        for line in _save(out, project=project, entity=entity, sweep=told["sweep"], seconds=seconds):
            print(line)
    return 0


def _seconds(text: str) -> float:
    from eit_lab.config import ConfigError

    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 3600:
        raise ConfigError(f"timeout must be a number of seconds above 0, got {text!r}")
    return seconds


def _save(out: Path, *, project: str, entity: str, sweep: str, seconds: float) -> list[str]:
    """Save on the server; the addresses. Raises RunError in one line."""
    from eit_lab.runs import write_text

    path = out / _SAVED
    known: dict[str, Any] = {}
    with suppress(FileNotFoundError, json.JSONDecodeError):  # damaged: as if it were the first time
        known = json.loads(path.read_text())
    order = {"project": project, "entity": entity, "sweep": sweep, "known": known}
    reply = _ask(order, seconds)
    if "saved" not in reply:
        replaced = f"; {path} names what was to be replaced: delete it to make new ones" if known else ""
        raise command.RunError(f"W&B: not saved: {reply['cause']}; what was to be saved is in {out}{replaced}")
    saved = reply["saved"]
    write_text(path, json.dumps(saved, indent=1) + "\n")
    return [f"workspace {saved['workspace']['url']}", f"report    {saved['report']['url']}"]


def _ask(order: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run saving.py on an order; its reply, or the cause why there is none."""
    process = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.dashboard.saving"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"WANDB_ERROR_REPORTING": "false", **os.environ, "WANDB_SILENT": "true"},
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(json.dumps(order), timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"cause": f"no answer within {seconds:g} s"}
    finally:
        with suppress(ProcessLookupError):  # wandb's own service is of the same session
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    try:
        reply: dict[str, Any] = json.loads(out)
    except json.JSONDecodeError:
        lines = err.strip().splitlines()
        return {"cause": lines[-1] if lines else f"its process ended with status {process.returncode}"}
    return reply


# ---------------------------------------------------------------------------------------------------------------- view


def _view(argv: list[str]) -> int:
    from eit_lab.config import ConfigError

    folders = [word for word in argv if "=" not in word] or ["runs"]
    port = _words([word for word in argv if "=" in word], {"port": ""}, of="dashboard view")["port"]
    if port and not (port.isdigit() and int(port) < 65536):
        raise ConfigError(f"port must be a number from 0 to 65535, got {port!r}")
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"dashboard view: no folder {folder!r}")
    from eit_lab.dashboard.view import view

    view([Path(folder) for folder in folders], port=int(port) if port else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
