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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eit_lab import command

if TYPE_CHECKING:
    from eit_lab.targets import Target
    from eit_lab.trained import Trained, Words
    from eit_lab.training.analysis import Analysis, Request

_HELP = """\
Look inside networks: what every layer does with frequencies, and every head with distances; figures, numbers, a page of images.

  python -m eit_lab.analyze run=FOLDER [weights=raw|ema] [checkpoint=...] [part=test|val] [images=N] ...
  python -m eit_lab.analyze FOLDER [FOLDER ...] ...                   runs, sweeps, experiments: each finished run, then the arms
  python -m eit_lab.analyze checkpoint=FILE model=eit_base data=imagenet data.root=PATH ...
  python -m eit_lab.analyze model=timm model.timm_name=NAME data=digits ...                with its weights drawn anew
  python -m eit_lab.analyze ANALYSIS ANALYSIS ...                     folders of earlier analyses, side by side

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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, 1 where one of several runs could not be analysed, 2 for wrong input."""
    return command.run(_main, argv, help_text=_HELP)


def _main(argv: list[str]) -> int:
    from eit_lab.processes import die_with_parent, typed_command
    from eit_lab.targets import file_of, folders_of, targets_of
    from eit_lab.trained import take_apart

    words = take_apart(typed_command(argv), command="analyze", options=_OPTIONS, takes_files=True)
    request = _request(words)
    folders = folders_of(words)
    die_with_parent()
    if not folders:
        return _one(file_of(words), words, request)
    targets, left_out = targets_of(folders, words)
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


# ----------------------------------------------------------------------------------------------------------------- one model


def _trained(target: Target, words: Words) -> Trained:
    from eit_lab.targets import refuse_words
    from eit_lab.trained import find

    options = {key: value for key, value in words.options.items() if key != "run"}
    if target.run is not None:
        return find(dataclasses.replace(words, options=options | {"run": str(target.run)}, rest=()), command="analyze")
    if "checkpoint" in options:
        seed = (f"seed={options['seed']}",) if "seed" in options else ()
        named = dataclasses.replace(words, rest=(), overrides=(*words.overrides, *seed))
        trained = find(named, command="analyze", data=options.get("data", "imagenet"))
        if trained.run is not None:
            refuse_words(("data", "seed"), options)
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


def _one(target: Target, words: Words, request: dict[str, Any]) -> int:
    from eit_lab.runs import is_main_process

    status, said = _analyse(target, words, request)
    if is_main_process() and said:
        print(said)
    return status


def _analyse(target: Target, words: Words, request: dict[str, Any]) -> tuple[int, str]:
    """Analyse one model unless that is done already; (exit status, a line)."""
    from eit_lab.processes import count_ranks, run_ranks, started_by_launcher
    from eit_lab.report.inside import NUMBERS
    from eit_lab.runs import is_main_process

    if target.is_done:
        return 0, f"{target.out}: an analysis, taken as it is"
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
        if (target.out / NUMBERS).is_file():
            print(f"{target.out}: replaces the analysis that is there", flush=True)
    analysis = _run(trained, request)
    if not is_main_process():
        return 0, ""
    numbers = analysis.numbers | _origin(target, trained) | {"settings": settings}
    written = _save(target, numbers, analysis, figures=words.options.get("figures") != "false")
    more = f" (and {', '.join(path.name for path in written[1:])})" if len(written) > 1 else ""
    return 0, f"{_summary(numbers)}\nanalysis {written[0]}{more}"


def _command(target: Target, words: Words) -> list[str]:
    """What analyses this one model alone."""
    kept = {key: value for key, value in words.options.items() if key not in ("run", "out")}
    run = [] if target.run is None else [f"run={target.run}"]
    return [*run, *(f"{key}={value}" for key, value in kept.items()), f"out={target.out}", *words.overrides]


def _settings(trained: Trained, request: dict[str, Any], words: Words) -> dict[str, Any]:
    """What the figures depend on: the words, and the files of weights as they are now."""
    from eit_lab.runs import PLACEMENT
    from eit_lab.version import __version__

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
        "version": __version__,
    }


def _done(target: Target, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The numbers of an earlier analysis with these settings."""
    from eit_lab.report.inside import NUMBERS

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


def _origin(target: Target, trained: Trained) -> dict[str, Any]:
    """Whose numbers these are."""
    from eit_lab.runs import read_record

    record = (read_record(target.run) if target.run is not None else None) or {}
    return {
        "arm": target.arm,
        "seed": trained.config.seed,
        "identity": record.get("identity"),
        "checkpoint": ", ".join(path.stem for path in trained.files) or None,
    }


def _draw_what_is_missing(target: Target, words: Words) -> None:
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


def _save(target: Target, numbers: dict[str, Any], analysis: Analysis, *, figures: bool) -> list[Path]:
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
    units = {"attention_distance": f" px (uniform: {(numbers['heads'] or {}).get('uniform_distance', 0):.4g})"}
    units |= {"hfd_share": " above half of the Nyquist frequency", "head_diversity": " of the uniform distance"}
    lines += [f"  {name:<20}{value:.4g}{units.get(name, '')}" for name, value in means.items() if value is not None]
    if numbers["weights"] == "untrained" and numbers["settings"]["filter_images"]:
        lines.append("  no accuracy under filters: the weights are drawn anew")
    if numbers.get("missing"):
        lines.append(f"  no figures of heads: {numbers['missing']}")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- several runs


def _several(
    targets: Sequence[Target],
    left_out: Sequence[str],
    words: Words,
    request: dict[str, Any],
    *,
    folders: Sequence[Path],
) -> int:
    """Each model, then the arms beside each other. What cannot be analysed is said, and the others go on."""
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
    """Minibatch CKA between every two arms, and between two seeds of each: how alike two trainings of one model are.

    The Gram matrices are of the same images, so none goes through a network again.
    """
    from itertools import chain, combinations

    import torch

    from eit_lab.analysis.similarity import MinibatchCKA
    from eit_lab.report.inside.saving import first_grams, seeds_grams

    found = []
    for (a, x), (b, y) in chain(combinations(first_grams(folders).items(), 2), seeds_grams(folders)):
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
