"""Look inside networks: frequencies, heads, similarity, rollout, receptive field, filters, as numbers, figures and a page of images.

``python -m eit_lab.analyze run=FOLDER``, or a sweep's folder: every finished run of it, then its arms beside each other.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eit_lab import command

if TYPE_CHECKING:
    from eit_lab.report.records import RunEntry
    from eit_lab.trained import Trained, Words
    from eit_lab.training.analysis import Analysis, Request

_HELP = """\
Look inside networks: what every layer does with frequencies, and every head with distances; figures, numbers, a page of images.

  python -m eit_lab.analyze run=FOLDER [weights=raw|ema] [checkpoint=...] [part=test|val] [images=N] ...
  python -m eit_lab.analyze FOLDER [FOLDER ...] ...                   runs, sweeps, experiments: each finished run, then the arms
  python -m eit_lab.analyze checkpoint=FILE model=eit_base data=imagenet data.root=PATH ...
  python -m eit_lab.analyze model=timm model.timm_name=NAME data=digits ...                with its weights drawn anew

  run, checkpoint, weights, model    as in python -m eit_lab.evaluate; run=A,B takes several
  data            group of the data set, where there is no run to tell it: digits, fashion_mnist, imagenet, folder, ...
  part            test, or val: the held-out slice of train                                                    [test]
  images          how many images, of a fixed order that all models share                                      [all]
  untrained_images   how many of them the model before training sees, the reference line; 0: none              [1024]
  filter_images   how many are filtered; each goes through the network some 30 times and more; 0: none         [1024]
  filter_layers   points whose tokens are filtered, such as stem,blocks.2.mlp; none: only the input      [stem and middle]
  field_images    how many the effective receptive field is of; 0: none                                        [128]
  pictures        how many images are on the page of images; 0: no page                                        [16]
  similarity      CKA between all layers, true or false                                                        [true]
  batch_size      images of one forward pass, a multiple of 32; changes no figure                              [32]
  seed            of the weights, where they are drawn anew                                                    [0]
  out             folder of the result                    [analysis/ in the run, or in the sweep; ./analysis for a file]
  figures         page, figures and page of images of each model; false: the numbers only, and the same
                  command with true draws them later                                                           [true]
  overwrite       analyse anew what has been analysed with the same words                                      [false]
  data.*, trainer.*   where the data lies, what to run on, as in train

A model's folder gets analysis.json (all numbers), page.png and .svg, each figure of the page alone under figures/, images.html and
what that page shows as arrays, images.npz. Of several runs, the arms beside each other: arms.png and .svg, figures/, and
arms.json with the similarity between arms. python -m eit_lab.report takes the numbers in. Interrupted, the same command goes on.
"""
_OPTIONS: dict[str, Sequence[str] | None] = {
    "part": ("test", "val"), "images": None, "untrained_images": None, "filter_images": None, "filter_layers": None, "field_images": None,
    "pictures": None, "similarity": ("true", "false"), "batch_size": None, "seed": None, "data": None, "out": None,
    "figures": ("true", "false"), "overwrite": ("true", "false"),
}  # fmt: skip
_DEFAULTS = {"untrained_images": 1024, "filter_images": 1024, "field_images": 128, "pictures": 16, "batch_size": 32}
_GROUP = 32  # eit_lab.analysis.profile.GROUP, which would import torch
NUMBERS = "analysis.json"


@dataclass(frozen=True)
class _Target:
    """One model to look into."""

    run: Path | None
    arm: str
    seed: int | None
    out: Path


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, 1 where one of several runs could not be analysed, 2 for wrong input."""
    return command.run(_main, argv, help_text=_HELP)


def _main(argv: list[str]) -> int:
    from eit_lab.processes import die_with_parent, typed_command
    from eit_lab.trained import take_apart

    words = take_apart(typed_command(argv), command="analyze", options=_OPTIONS, takes_files=True)
    request = _request(words)
    folders = _folders(words)
    die_with_parent()
    if not folders:
        return _one(_file(words), words, request)
    targets, left_out = _targets(folders, words)
    if len(targets) == 1 and not left_out:
        return _one(targets[0], words, request)
    return _several(targets, left_out, words, request, folders=folders)


def _request(words: Words) -> dict[str, Any]:
    """The words that say what to look at; a key of Request each."""
    from eit_lab.config import ConfigError

    options = words.options
    found: dict[str, Any] = {
        "part": options.get("part", "test"),
        "images": _number(options, "images", least=4) if "images" in options else None,
        "filter_layers": _layers(options["filter_layers"]) if "filter_layers" in options else None,
        "similarity": options.get("similarity", "true") == "true",
    }
    for key, default in _DEFAULTS.items():
        found[key] = _number(options, key, least=0) if key in options else default
    if found["batch_size"] % _GROUP or not found["batch_size"]:
        nearest = max(_GROUP, round(found["batch_size"] / _GROUP) * _GROUP)
        raise ConfigError(f"batch_size must be a multiple of {_GROUP}, got {found['batch_size']}; nearest: {nearest}")
    return found


def _layers(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(text.split(","))


def _number(options: Any, key: str, *, least: int) -> int:
    from eit_lab.config import ConfigError

    text = options[key]
    if not text.isdecimal() or int(text) < least:
        raise ConfigError(f"{key} must be a whole number of {least} or more, got {text!r}; nearest: {least}")
    return int(text)


def _folders(words: Words) -> list[Path]:
    """The folders of runs that were named."""
    from eit_lab.config import ConfigError

    named = words.options.get("run", "")
    several = [named] if Path(named).expanduser().exists() else named.split(",")
    folders = [Path(name).expanduser() for name in [*(several if named else []), *words.rest]]
    if folders:
        _must_not_say(("data", "seed", "model"), words.options)
    elif "model" not in words.options and "checkpoint" not in words.options:
        raise ConfigError("analyze needs a run, a sweep or a model: analyze run=FOLDER, or checkpoint=FILE model=NAME")
    return folders


def _must_not_say(keys: Sequence[str], options: Mapping[str, str]) -> None:
    """Raise ConfigError for the first of some words that a run says itself."""
    from eit_lab.config import ConfigError

    for key in keys:
        if key in options:
            raise ConfigError(f"{key} is the run's own, got {options[key]!r}; leave it out")


def _targets(folders: Sequence[Path], words: Words) -> tuple[list[_Target], list[str]]:
    """Every finished run of the folders; and a line for each that is not."""
    from eit_lab.config import ConfigError
    from eit_lab.report.records import read_sources

    try:
        entries = [entry for source in read_sources(folders) for entry in source.entries]
    except ConfigError as error:
        raise ConfigError(f"analyze: {str(error).removeprefix('report: ')}") from None
    targets, left_out = [], []
    labels = _told_apart(entries)
    for entry in entries:
        if entry.folder is None:
            raise ConfigError(
                f"analyze needs the runs themselves, with their checkpoints; {folders[0]} has records only"
            )
        if len(entries) > 1 and entry.status != "finished":
            left_out.append(f"left out: {entry.label}, {entry.status}")
            continue
        run = _from_here(entry.folder)
        out = Path(words.options["out"]) if "out" in words.options and len(entries) == 1 else run / "analysis"
        targets.append(_Target(run, labels[entry], entry.seed, out))
    if not targets:
        raise ConfigError(f"no run in {', '.join(map(str, folders))} has finished; {left_out[0]}")
    return targets, left_out


def _told_apart(entries: Sequence[RunEntry]) -> dict[RunEntry, str]:
    """The arm of each run. Where the runs of an arm have different configurations, they are several: eit_base, eit_base (2)."""
    from eit_lab.runs import PLACEMENT

    kinds: dict[str, list[str]] = {}
    labels = {}
    for entry in entries:
        config = json.loads(json.dumps(entry.record.get("config") or {}))
        for key in ("seed", *PLACEMENT):
            *parents, last = key.split(".")
            node = config
            for parent in parents:
                node = node.get(parent) or {}
            node.pop(last, None)
        kind = json.dumps(config, sort_keys=True)
        known = kinds.setdefault(entry.arm, [])
        if kind not in known:
            known.append(kind)
        number = known.index(kind) + 1
        labels[entry] = entry.arm if number == 1 else f"{entry.arm} ({number})"
    return labels


def _from_here(folder: Path) -> Path:
    """As a user would type it."""
    whole, here = folder.resolve(), Path.cwd().resolve()
    return whole.relative_to(here) if whole.is_relative_to(here) else whole


def _file(words: Words) -> _Target:
    options = words.options
    name = options.get("model.timm_name") or options.get("model") or "model"
    return _Target(None, name, None, Path(options.get("out", "analysis")))


# ----------------------------------------------------------------------------------------------------------------- one model


def _trained(target: _Target, words: Words) -> Trained:
    from eit_lab.trained import find

    options = {key: value for key, value in words.options.items() if key != "run"}
    if target.run is not None:
        return find(dataclasses.replace(words, options=options | {"run": str(target.run)}, rest=()), command="analyze")
    if "checkpoint" in options:
        seed = (f"seed={options['seed']}",) if "seed" in options else ()
        named = dataclasses.replace(words, rest=(), overrides=(*words.overrides, *seed))
        trained = find(named, command="analyze", data=options.get("data", "imagenet"))
        if trained.run is not None:
            _must_not_say(("data", "seed"), options)
        return trained
    return _untrained(options, words.overrides)


def _untrained(options: Any, overrides: Sequence[str]) -> Trained:
    """A model that nothing was loaded into."""
    from eit_lab.compose import compose_one
    from eit_lab.trained import Trained

    model = [f"{key}={options[key]}" for key in ("model", "model.timm_name") if key in options]
    config = compose_one(
        [*model, f"data={options.get('data', 'imagenet')}", f"seed={options.get('seed', 0)}", "logger=none", *overrides]
    )
    return Trained(
        config=config, files=(), weights="raw", run=None, num_classes=None, class_names=None, as_recorded=False
    )


def _one(target: _Target, words: Words, request: dict[str, Any]) -> int:
    from eit_lab.runs import is_main_process

    status, said = _analyse(target, words, request)
    if is_main_process() and said:
        print(said)
    return status


def _analyse(target: _Target, words: Words, request: dict[str, Any]) -> tuple[int, str]:
    """Analyse one model unless that is done already; (exit status, a line)."""
    from eit_lab.processes import count_ranks, run_ranks, started_by_launcher
    from eit_lab.runs import is_main_process

    trained = _trained(target, words)
    settings = _settings(trained, request, words)
    if words.options.get("overwrite") != "true" and (done := _done(target, settings)) is not None:
        if is_main_process():
            _draw_what_is_missing(target, words)
        return 0, f"{target.out}: has been analysed ({done['data']['images']:,} images); overwrite=true does it again"
    if not started_by_launcher() and (count := count_ranks(trained.config)) > 1:
        return run_ranks("eit_lab.analyze", "", count=count, command=_command(target, words)), ""
    if is_main_process():
        _must_be_writable(target.out)
    analysis = _run(trained, request)
    if not is_main_process():
        return 0, ""
    numbers = analysis.numbers | _origin(target, trained) | {"settings": settings}
    written = _save(target, numbers, analysis, figures=words.options.get("figures") != "false")
    more = f" (and {', '.join(path.name for path in written[1:])})" if len(written) > 1 else ""
    return 0, f"{_summary(numbers)}\nanalysis {written[0]}{more}"


def _command(target: _Target, words: Words) -> list[str]:
    """What analyses this one model alone."""
    kept = {key: value for key, value in words.options.items() if key not in ("run", "out")}
    run = [] if target.run is None else [f"run={target.run}"]
    return [*run, *(f"{key}={value}" for key, value in kept.items()), f"out={target.out}", *words.overrides]


def _settings(trained: Trained, request: dict[str, Any], words: Words) -> dict[str, Any]:
    """What the figures depend on: the words, and the files of weights as they are now."""
    from eit_lab.runs import PLACEMENT

    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in trained.files if path.exists()]
    kept = {key: value for key, value in request.items() if key != "batch_size"}
    changed = [word for word in words.overrides if not word.startswith(PLACEMENT)]
    named = {key: words.options[key] for key in ("model", "model.timm_name", "data") if key in words.options}
    return {
        **kept,
        **named,
        "weights": trained.weights,
        "files": files,
        "overrides": changed,
        "seed": trained.config.seed,
    }


def _done(target: _Target, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The numbers of an earlier analysis with these settings."""
    try:
        numbers: dict[str, Any] = json.loads((target.out / NUMBERS).read_text())
    except (OSError, ValueError):
        return None
    return numbers if numbers.get("settings") == json.loads(json.dumps(settings)) else None


def _run(trained: Trained, request: dict[str, Any]) -> Analysis:
    from eit_lab.data.catalog import describe
    from eit_lab.models.checkpoints import count_classes
    from eit_lab.training.analysis import Request, analyse

    num_classes = trained.num_classes
    if num_classes is None:
        of_file = bool(trained.files)
        num_classes = (
            count_classes(trained.files, trained.config.model) if of_file else describe(trained.config.data).num_classes
        )
    wanted: Request = Request(**request)
    return analyse(
        trained.config,
        trained.files,
        num_classes=num_classes,
        weights=trained.weights,
        request=wanted,
        class_names=trained.class_names,
    )


def _origin(target: _Target, trained: Trained) -> dict[str, Any]:
    """Whose numbers these are."""
    from eit_lab.runs import read_record

    record = (read_record(target.run) if target.run is not None else None) or {}
    return {
        "arm": target.arm,
        "seed": trained.config.seed,
        "identity": record.get("identity"),
        "checkpoint": ", ".join(path.stem for path in trained.files) or None,
    }


def _draw_what_is_missing(target: _Target, words: Words) -> None:
    """Figures that an earlier command left out, or did not come to."""
    from eit_lab.report.inside.saving import PAGE, draw_model

    if words.options.get("figures") != "false" and not (target.out / PAGE).is_file():
        draw_model(target.out)


def _must_be_writable(out: Path) -> None:
    """Find out before the work rather than after it."""
    from eit_lab.config import ConfigError

    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(f"out must be a folder that can be written, got {str(out)!r}: {error.strerror}") from None


def _save(target: _Target, numbers: dict[str, Any], analysis: Analysis, *, figures: bool) -> list[Path]:
    from eit_lab.config import ConfigError
    from eit_lab.report.inside.saving import save_model

    labels = {
        "model": numbers["model"],
        "arm": target.arm,
        "data": f"{numbers['data']['name']}, {numbers['data']['part']}",
    }
    try:
        return save_model(
            target.out, numbers, pictures=analysis.pictures, grams=analysis.grams, labels=labels, figures=figures
        )
    except OSError as error:
        raise ConfigError(
            f"out must be a folder that can be written, got {str(target.out)!r}: {error.strerror}"
        ) from None


def _summary(numbers: dict[str, Any]) -> str:
    """The model's figures in a few lines."""
    means, data = numbers["means"], numbers["data"]
    accuracy = "" if data["acc1"] is None else f", top-1 {100 * data['acc1']:.2f}%"
    lines = [
        f"{numbers['model']}, {numbers['weights']} weights, {data['images']:,} images of {data['name']} ({data['part']}){accuracy}"
    ]
    lines += [f"  {name:<20}{value:.4g}" for name, value in means.items() if value is not None]
    if numbers.get("missing"):
        lines.append(f"  no figures of heads: {numbers['missing']}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- several runs


def _several(
    targets: Sequence[_Target],
    left_out: Sequence[str],
    words: Words,
    request: dict[str, Any],
    *,
    folders: Sequence[Path],
) -> int:
    """Each run, then the arms beside each other. What cannot be analysed is said, and the others go on."""
    from eit_lab.config import ConfigError
    from eit_lab.processes import started_by_launcher
    from eit_lab.units import duration

    if started_by_launcher() and len(targets) > 1:
        raise ConfigError(
            f"several runs are analysed by one process that starts others, got {len(targets)}; name one run"
        )
    print("\n".join(left_out), end="\n" if left_out else "")
    failed, began, worked = 0, time.monotonic(), 0
    analysed: dict[Path, str] = {}
    for place, target in enumerate(targets):
        since = time.monotonic()
        try:
            status, said = _analyse(target, words, request)
        except (ConfigError, command.RunError) as error:
            status, said = command.EXIT_FAILED, str(error).splitlines()[0]
        failed += status != 0
        if not status:
            analysed[target.out] = target.arm
        worked += time.monotonic() - since > 1
        left = (time.monotonic() - began) / max(1, worked) * (len(targets) - place - 1)
        if status in (command.EXIT_INTERRUPTED, command.EXIT_PREEMPTED):  # processes that were asked to stop
            return status
        known = said.startswith(f"{target.out}: ")  # has been analysed
        head = (said or f"ended with status {status}").splitlines()[0] if status or known else str(target.out)
        print(f"{place + 1}/{len(targets)}  {target.arm} seed {target.seed}  {head}  left {duration(left)}", flush=True)
    out = Path(words.options.get("out") or (folders[0] / "analysis" if len(folders) == 1 else "analysis"))
    from eit_lab.report.inside.saving import save_arms

    try:
        written = save_arms(out, analysed, _between(analysed))
    except OSError as error:
        raise ConfigError(f"out must be a folder that can be written, got {str(out)!r}: {error.strerror}") from None
    if written:
        print(f"arms {written[0]} (and {', '.join(path.name for path in written[1:])})")
    if failed:
        print(f"{failed} of {len(targets)} runs could not be analysed", file=sys.stderr)
    return command.EXIT_FAILED if failed else 0


def _between(folders: Mapping[Path, str]) -> list[dict[str, Any]]:
    """Minibatch CKA between every two arms. Their Gram matrices are of the same images, so none goes through a network again."""
    from itertools import combinations

    import torch

    from eit_lab.analysis.similarity import MinibatchCKA
    from eit_lab.report.inside.saving import first_grams

    found = []
    for (a, x), (b, y) in combinations(first_grams(folders).items(), 2):
        if x.images != y.images:
            print(f"no similarity between {a} and {b}: they were shown other images")
            continue
        cka = MinibatchCKA(len(x.points), len(y.points))
        for one, other in zip(x.grams, y.grams, strict=False):  # groups of the same images, as far as both have them
            cka.update(torch.from_numpy(one), torch.from_numpy(other))
        matrix = cka.compute().reshape(len(x.points), -1).tolist()
        found.append({"a": a, "b": b, "points_a": x.points, "points_b": y.points, "cka": matrix})
    return found


if __name__ == "__main__":
    sys.exit(main())
