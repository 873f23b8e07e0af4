"""Benchmarks as commands: ``python -m eit_lab.bench data`` measures loading side by side with torchvision's and timm's.

Nothing is downloaded: the JPEGs are cut from photographs that scikit-learn ships, or that you name. ``bench scaling`` models and
simulates training on many GPUs.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eit_lab import command

if TYPE_CHECKING:
    from eit_lab.benchmark.results import Results

_HELP = """\
Measure what a worker delivers: torchvision, timm and eit_lab in turn, on JPEGs made here, against the goals we set.

  python -m eit_lab.bench data [images=N] [photos=FOLDER] [out=FOLDER] [rounds=N] [seconds=S] [batch=N] [cache=FOLDER] [fresh=true]

  images    JPEGs of 500x375 px, about 100 KB each                                               [2000]
  photos    photographs to cut them from (JPEG, PNG), e.g. of a Debian package of wallpapers     [scikit-learn's two]
  out       folder of the record: data.md, data.json, data.png, data.svg                         [bench-data]
  rounds    turns of each loader; what is compared is compared within a round                    [5]
  seconds   of a turn                                                                            [4]
  batch     images of a batch                                                                    [128]
  cache     where images and shards stay for the next time                                       [EIT_LAB_CACHE, ~/.cache/eit_lab]
  fresh     make them anew                                                                       [false]

Takes about six minutes; let the machine do nothing else. jpegtran is needed, and for one row a C compiler with jpeglib.h.
Exit status 0 whether the goals are met or not; 2 for wrong input.

  python -m eit_lab.bench scaling --help     what training on many GPUs would take: a model, and a simulation beside it
  python -m eit_lab.bench sweep --help       what the sweep engine costs: ten thousand jobs that do nothing
  python -m eit_lab.bench analysis --help    what looking inside a network costs, in time and memory
  python -m eit_lab.bench step --help        a training step beside the literal implementation and other models
  python -m eit_lab.bench model --help       the same of a forward pass
  python -m eit_lab.bench startup --help     from the command to the first training step
  python -m eit_lab.bench profile --help     where a training step's time goes, and its roofline
  python -m eit_lab.bench page --help        draw the tables of docs/performance.md from the records
"""
_VERBS = ("data", "scaling", "sweep", "analysis", "step", "model", "startup", "profile", "page")
_SPEED = ("step", "model", "startup")
_DEFAULTS = {
    "images": "2000", "photos": "", "out": "bench-data", "rounds": "5", "seconds": "4", "batch": "128", "cache": "", "fresh": "false",
}  # fmt: skip
_FEWEST_BATCHES = 4  # that the images must make
_CROPS_PER_S = 500  # for each second of a loader's turn: about half of it
_MEMORY_BATCHES = 10  # for each second of a loader's turns


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's words."""

    images: int
    photos: str | None
    out: Path
    rounds: int
    seconds: float
    batch: int
    cache: Path
    fresh: bool


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, 2 for wrong input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["scaling"]:
        from eit_lab.benchmark.scaling.command import HELP

        return command.run(_main, arguments, help_text=HELP)
    if arguments[:1] == ["sweep"]:
        from eit_lab.benchmark import engine

        return command.run(_main, arguments, help_text=engine.HELP)
    if arguments[:1] == ["analysis"]:
        from eit_lab.benchmark import inside

        return command.run(_main, arguments, help_text=inside.HELP)
    if arguments and arguments[0] in _SPEED:
        from eit_lab.benchmark.speed.command import HELP as SPEED_HELP

        return command.run(_main, arguments, help_text=SPEED_HELP[arguments[0]])
    if arguments[:1] == ["profile"]:
        from eit_lab.benchmark.roofline.command import HELP as PROFILE_HELP

        return command.run(_main, arguments, help_text=PROFILE_HELP)
    if arguments[:1] == ["page"]:
        from eit_lab.benchmark import page

        return command.run(_main, arguments, help_text=page.HELP)
    return command.run(_main, arguments, help_text=_HELP)


def _main(argv: list[str]) -> int:
    from eit_lab.config import ConfigError
    from eit_lab.loading import nearest

    if argv[0] not in _VERBS:
        raise ConfigError(f"bench must be one of {', '.join(_VERBS)}, got {argv[0]!r}{nearest(argv[0], _VERBS)}")
    if argv[0] == "scaling":
        from eit_lab.benchmark.scaling.command import run

        return run(argv[1:], progress=_progress)
    if argv[0] == "sweep":
        from eit_lab.benchmark import engine

        return engine.run(argv[1:])
    if argv[0] == "analysis":
        from eit_lab.benchmark import inside

        return inside.run(argv[1:], progress=_progress)
    if argv[0] in _SPEED:
        from eit_lab.benchmark.speed import command as speed

        return speed.run(argv[1:], verb=argv[0], progress=_progress)
    if argv[0] == "profile":
        from eit_lab.benchmark.roofline import command as profile

        return profile.run(argv[1:], progress=_progress)
    if argv[0] == "page":
        from eit_lab.benchmark import page

        return page.run(argv[1:])
    options = _options(argv[1:])
    from eit_lab.benchmark.results import summarise

    results = _measure(options)
    summary = summarise(results, command=f"python -m eit_lab.bench {shlex.join(argv)}")
    print("\n".join(summary.lines))
    for path in summary.save(options.out):
        print(path)
    return 0


def _options(words: Sequence[str]) -> Options:
    from eit_lab.benchmark.words import read_words
    from eit_lab.caches import user_cache
    from eit_lab.config import ConfigError

    told = read_words(words, _DEFAULTS, verb="data")
    for key in ("images", "rounds", "batch"):
        if not told[key].isdigit() or int(told[key]) == 0:
            raise ConfigError(f"{key} must be a whole number of 1 or more, got {told[key]!r}")
    try:
        seconds = float(told["seconds"])
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 3600:
        raise ConfigError(f"seconds must be a number above 0, got {told['seconds']!r}")
    if told["fresh"] not in ("true", "false"):
        raise ConfigError(f"fresh must be true or false, got {told['fresh']!r}")
    images, batch = int(told["images"]), int(told["batch"])
    if images < _FEWEST_BATCHES * batch or images < 100:
        least = max(100, _FEWEST_BATCHES * batch)
        raise ConfigError(
            f"images must be {_FEWEST_BATCHES} batches ({batch} each) or more, and 100, got {images}; nearest: {least}"
        )
    return Options(
        images=images,
        photos=told["photos"] or None,
        out=Path(told["out"]).expanduser(),
        rounds=int(told["rounds"]),
        seconds=seconds,
        batch=batch,
        cache=(Path(told["cache"]).expanduser() if told["cache"] else user_cache()) / "bench",
        fresh=told["fresh"] == "true",
    )


# -------------------------------------------------------------------------------------------------------------- measuring


def _measure(options: Options) -> Results:
    from eit_lab.benchmark.photographs import prepare
    from eit_lab.benchmark.results import Results
    from eit_lab.benchmark.turns import cores
    from eit_lab.benchmark.workers import large_root, measure

    available, before = cores(), os.getloadavg()[0]
    with _progress() as advance:
        material = prepare(
            options.cache,
            images=options.images,
            photos=options.photos,
            fresh=options.fresh,
            workers=len(available),
            on_image=lambda num: advance("JPEGs", num, options.images),
            on_packed=lambda num: advance("shards", num, options.images + 100),
        )
        large = large_root(material.shards, material.shards.with_name("large"))
        for path in [*material.files.rglob("*.JPEG"), *material.shards.rglob("*.shard")]:
            path.read_bytes()  # into the page cache
        advance("first batch, memory", 0, 1)
        alone = measure(
            material.files,
            material.shards,
            large,
            cache=options.cache,
            batch_size=options.batch,
            rounds=options.rounds,
            memory_batches=max(20, round(_MEMORY_BATCHES * options.rounds * options.seconds)),
        )
        advance("first batch, memory", 1, 1)
        rates, facts = _rates(options, material.files, material.shards, available, advance)
    return Results(
        options={key: value for key, value in asdict(options).items() if key not in ("out", "cache")},
        material=material.facts,
        cores=available,
        rates=rates,
        alone=alone,
        load=[before, os.getloadavg()[0]],
        **facts,
    )


def _rates(
    options: Options, files: Path, shards: Path, available: Sequence[int], advance: Callable[[str, int, int], None]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    import torch

    from eit_lab.benchmark.crop_limit import CropLimit, NoLimitError
    from eit_lab.benchmark.loaders import (
        FULL_RECIPE,
        DecodeAndCrop,
        TimmFolder,
        at_once,
        batch_augment_ms,
        config_of,
        ours,
        torchvision_folder,
    )
    from eit_lab.benchmark.results import name_of
    from eit_lab.benchmark.turns import LoaderTurn, interleave, on_cores

    torch.set_num_threads(1)

    def config(root: Path, recipe: str) -> Any:
        return config_of(root, recipe=recipe, batch_size=options.batch, cache=options.cache)

    full = config(shards, FULL_RECIPE)
    data_sets = {
        "torchvision": torchvision_folder(files),
        "files": ours(config(files, "basic")),
        "shards": ours(config(shards, "basic")),
        "timm": TimmFolder(files),
        "files_full": ours(config(files, FULL_RECIPE)),
        "shards_full": ours(full),
    }
    loaders = {
        name_of(name, workers): LoaderTurn(
            data_set,
            batch_size=options.batch,
            workers=workers,
            seconds=options.seconds,
            as_items=name not in ("torchvision", "timm"),
            available=available,
        )
        for name, data_set in data_sets.items()
        for workers in (1, 2)
    }
    for place, loader in enumerate(loaders.values()):
        advance("warming up", place, len(loaders))
        loader.warm_up()
    turns: dict[str, Callable[[], float]] = dict(loaders)
    crops = DecodeAndCrop(
        data_sets["shards"], batch_size=options.batch, num=max(50, round(_CROPS_PER_S * options.seconds))
    )

    def on_one_core(what: Callable[[], float]) -> Callable[[], float]:
        def turn() -> float:
            with on_cores(available[:1]):
                return what()

        return turn

    turns["decode_and_crop"] = on_one_core(crops)
    facts: dict[str, Any] = {"limit": None, "no_limit": ""}
    try:
        limit = CropLimit(options.cache)
        images, boxes = crops.files(files), crops.boxes()
        limit.run(images, boxes)
        turns["limit"] = on_one_core(lambda: len(images) / limit.run(images, boxes)[0])
        if len(available) > 1:
            turns["limit_2"] = lambda: at_once(limit, images, boxes, available[:2])
        facts["limit"] = limit.version
    except NoLimitError as error:
        facts["no_limit"] = str(error)
    crops()
    total = options.rounds * len(turns)
    done = iter(range(1, total + 1))
    rates = interleave(turns, rounds=options.rounds, on_turn=lambda: advance("in turn", next(done), total))
    some = [(0, index, 0, index) for index in range(min(options.batch, len(data_sets["shards_full"])))]
    facts["batch_augment_ms"] = batch_augment_ms(full, data_sets["shards_full"][some])
    return rates, facts


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar with the time left on a terminal's stderr, one step of the work after the other; else a line a step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def advance(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=total)
                if not console.is_terminal:
                    print(f"{time.strftime('%H:%M:%S')} {step}", file=sys.stderr, flush=True)
            bar.update(tasks[step], completed=done, total=total)

        yield advance


if __name__ == "__main__":
    sys.exit(main())
