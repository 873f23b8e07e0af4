"""``python -m eit_lab.search KEY=interval(..) ...``: search any keys of the config, each trial an ordinary run.

A mistake is one line, before Optuna is imported and before anything runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eit_lab import command

if TYPE_CHECKING:
    from eit_lab.config import Config
    from eit_lab.launchers import Launcher
    from eit_lab.search.request import Request
    from eit_lab.search.trials import Runs

_HEAD = """\
Search any keys of the config for what does best on the held-out slice of the training images. Trials are ordinary runs.

  python -m eit_lab.search data=digits model=eit_nano recipe.lr='tag(log,interval(1e-4,1e-2))' recipe.epochs=5
  python -m eit_lab.search model=eit_nano model/ib='choice(none,lsra,eit)' recipe.weight_decay='interval(0.01,0.3)' data=digits
  python -m eit_lab.search data=digits model=vit_nano,eit_nano per=model recipe.lr='tag(log,interval(1e-4,1e-2))'
  python -m eit_lab.search space=FILE.yaml hydra/launcher=local pruner=median
  python -m eit_lab.search data=digits recipe.lr='tag(log,interval(1e-4,1e-2))' wandb=sweep.yaml       writes a W&B sweep

SPACE  (what is searched; every other word is train's, see python -m eit_lab.train --help)
  key=interval(a,b)            any number from a to b           key=int(interval(a,b))   any whole number from a to b
  key=tag(log,interval(a,b))   the same, by its logarithm       key=range(a,b,step)      a list of numbers, without b
  key=choice(a,b,c), key=a,b   one of a list; groups too        seed=0,1,2               seeds of every trial: their mean counts

OPTIONS"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 done, 1 a trial failed, 2 wrong input, 75 asked to stop, 130 interrupted."""
    return command.run(_main, argv)


def _main(argv: list[str]) -> int:
    if not argv or "--help" in argv or "-h" in argv:
        print(_help())
        return 0
    from eit_lab.compose import parse_flags
    from eit_lab.config import ConfigError
    from eit_lab.search.matched import check_match, match_request
    from eit_lab.search.request import read_request

    flags = parse_flags(argv)
    if flags.multirun or flags.wants_hydra:
        raise ConfigError("search takes no -m and shows no config; what is searched is a list, a range or an interval")
    request = read_request(flags)
    check_match(request)
    request = match_request(request, flags)
    if request.options.wandb is not None:
        from eit_lab.search.sweep_file import write_sweep_files

        for path in write_sweep_files(request):
            print(f"wrote {path}; wandb sweep {path} starts the sweep and says how to run its agents")
        return 0
    return search(request, argv)


def search(request: Request, argv: Sequence[str]) -> int:
    """Run the search, or go on with it; returns the exit status."""
    from eit_lab.launchers import load_launcher
    from eit_lab.manifest import locked
    from eit_lab.search.outcome import write_outcome
    from eit_lab.search.running import Searching
    from eit_lab.search.study import ArmStudy, import_optuna, open_storage
    from eit_lab.search.trials import Runs
    from eit_lab.sweep.engines import build_engine

    launcher = load_launcher(request.space.composed.launcher)
    _check_launcher(launcher)
    content = _content(request, Runs(request, launcher, Path(request.config.run.root)))
    folder = _folder(request, content)
    import_optuna()
    runs = Runs(request, launcher, folder)
    engine = build_engine(launcher, _configs(request), folder=folder)
    began = time.monotonic()
    try:
        _make(folder, request)
        with locked(folder):
            _write_search(folder, content, argv)
            storage = open_storage(folder)
            studies = [ArmStudy(request, arm, storage, name=folder.name) for arm in request.space.arms]
        per_arm = f"{request.trials} trials" + (f" for each of {len(studies)} arms" if len(studies) > 1 else "")
        print(f"search {folder.name}: {per_arm}, folder {folder}", flush=True)
        status = Searching(request, runs, studies, folder, engine, launcher).run()
    except BrokenPipeError:  # the reader of our output has gone: command.run knows
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise command.RunError(
            f"search {folder.name} stopped: {error.strerror}{where}; the same command goes on"
        ) from error
    finally:
        engine.close()
    print(write_outcome(request, studies, runs, folder))
    jobs = ", and the jobs in the queue go on without it" if engine.survives else ""
    rest = "" if status in (0, command.EXIT_FAILED) else f"; not ended: the same command goes on{jobs}"
    there = ", ".join(name for name in ("trials.csv", "best.yaml", "search.png") if (folder / name).is_file())
    print(f"\n{time.monotonic() - began:.0f} s{rest}; in {folder}: {there}")
    return status


def _check_launcher(launcher: Launcher) -> None:
    from eit_lab.config import ConfigError

    if getattr(launcher, "wait", True) is False:
        raise ConfigError(
            "hydra.launcher.wait must be true: what comes next follows from the trials before, got false; nearest: true"
        )


def _configs(request: Request) -> list[Config]:
    """As many as there will be runs, for the engine to share the machine among."""
    count = request.trials * len(request.space.arms) * len(request.space.seeds)
    return [request.config] * count


def _content(request: Request, runs: Runs) -> dict[str, Any]:
    """What makes a search the one it is: what is searched and how, and the configuration, code and data of its runs."""
    from eit_lab.runs import code_hash
    from eit_lab.search.study import describe

    return {**describe(request), "runs": runs.check(), "code": code_hash()}


def _folder(request: Request, content: dict[str, Any]) -> Path:
    digits = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]
    return Path(request.config.run.root) / "searches" / (request.options.name or digits)


def _make(folder: Path, request: Request) -> None:
    from eit_lab.config import ConfigError

    try:
        (folder / "jobs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        root = request.config.run.root
        raise ConfigError(f"run.root must be a folder that can be written, got {root!r}: {error.strerror}") from None


def _write_search(folder: Path, content: dict[str, Any], argv: Sequence[str]) -> None:
    """search.json and the manifest; refuses a folder that holds another search. Call inside the folder's lock."""
    from eit_lab.config import ConfigError
    from eit_lab.manifest import add_jobs
    from eit_lab.runs import code_state, versions, write_text

    path = folder / "search.json"
    content = json.loads(json.dumps(content))
    if path.is_file():
        before = json.loads(path.read_text())["search"]
        other = [key for key in content if before.get(key) != content[key]]
        other = [key for key in other if key != "runs" or "code" not in other] or other  # code changes every identity
        if other:
            raise ConfigError(
                f"name={folder.name} is a search with other {', '.join(other)}, and its trials cannot be compared with "
                "these; name=OTHER starts a new one"
            )
    else:
        write_text(path, json.dumps({"schema": 1, "search": content}, indent=1) + "\n")
    commit, diff = code_state()
    write_text(folder / "code.diff", diff)
    started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    said = {"command": list(argv), "commit": commit, "time": started, "versions": versions()}
    add_jobs(folder, [], declaration=None, launch=said)


def _help() -> str:
    from eit_lab.search.request import SearchOptions

    width = min(120, max(80, shutil.get_terminal_size().columns))
    lines = [_HEAD]
    fields = dataclasses.fields(SearchOptions)
    column = 2 + max(len(field.name) for field in fields) + 2
    for field in fields:
        default = field.default
        shown = "" if default is None or default == () else f"  [{default}]"
        line = f"  {field.name:<{column - 2}}{field.metadata['help']}{shown}"
        lines += textwrap.wrap(line, width, subsequent_indent=" " * column, break_on_hyphens=False)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
