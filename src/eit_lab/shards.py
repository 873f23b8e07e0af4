"""Data sets as packed shards: ``python -m eit_lab.shards build|verify|info|extract``.

Lossless: JPEGs get restart markers, after which a crop decodes alone (data/restart.py); the pixels stay as they are.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from eit_lab import command
from eit_lab.caches import user_cache
from eit_lab.processes import count_cores

if TYPE_CHECKING:
    from eit_lab.data.roots import OpenRoot, Split

_HELP = """\
Pack a data set into shards, check them, look at them, unpack them.

  python -m eit_lab.shards build SRC DST [--workers N] [--shard-mb N] [--keep-original] [--no-rewrite]
                                         [--damaged stop|skip|keep] [--overwrite]
  python -m eit_lab.shards verify DST [--source SRC] [--full | --sample N] [--workers N]
  python -m eit_lab.shards info ROOT [--split train|val] [--out FILE.png]
  python -m eit_lab.shards extract DST OUT [--split train|val] [--workers N]

build     SRC is whatever data.root can be: folders, tar or parquet files, on disk or on a server. JPEGs get restart markers,
          losslessly, each compared pixel for pixel; what cannot be rewritten is stored as it is. The same command goes on
          after a kill, and mends shards that were lost or damaged.
  --workers        processes                                                                     [all cores]
  --shard-mb       size of a shard in MB                                                         [128]
  --keep-original  the files themselves too, byte for byte, in tar files beside the shards (twice the disk)
  --no-rewrite     pack the files as they are: no jpegtran is needed, and crops do not decode alone
  --damaged        images that cannot be decoded: stop names all of them and stops, skip leaves them out, keep stores
                   them as they are, for the loader to complain of                               [stop]
  --overwrite      build anew what was built from another source or with other options
verify    compares every checksum, and pixels and labels with the source, where that is there.
  --source         the source                                                                    [where it was]
  --sample, --full images whose pixels are compared; all of them                                 [1000]
info      prints a table, and writes a sheet of samples as PNG. ROOT may be of any layout.
  --out            the sheet                                                                     [ROOT's name.png, here]
extract   writes class folders again: the original files with --keep-original, else the files as they are stored.

Remote files are kept in EIT_LAB_CACHE [~/.cache/eit_lab]. Exit status 0; 1 for damage, a full disk; 2 for wrong input; 130
after Ctrl-C and 75 after SIGTERM, after which the same build goes on.
"""
_SAMPLE = 1000
_CACHE_GB = 200
_LINE_S = 30.0
_LINE_SHARE = 0.1
_REDRAW_S = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 0, 1 for damage or a full disk, 2 for wrong input."""
    return command.run(_main, argv, help_text=_HELP)


def _main(argv: list[str]) -> int:
    from eit_lab.config import ConfigError
    from eit_lab.loading import nearest

    commands = {"build": _build, "verify": _verify, "info": _info, "extract": _extract}
    if argv[0] not in commands:
        raise ConfigError(
            f"shards must be one of {', '.join(commands)}, got {argv[0]!r}{nearest(argv[0], list(commands))}"
        )
    before = {signum: signal.signal(signum, _stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        return commands[argv[0]](argv[1:])
    except _StopError as asked:
        print(f"eit_lab: stopped by {asked}", file=sys.stderr)
        return command.EXIT_INTERRUPTED if asked.signum == signal.SIGINT else command.EXIT_PREEMPTED
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class _StopError(BaseException):
    """Somebody asked the command to stop. BaseException, as KeyboardInterrupt is."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum, self.advice = signum, ""

    def __str__(self) -> str:
        return f"{self.args[0]}{self.advice}"


def _stop(signum: int, frame: FrameType | None) -> None:
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, lambda number, _: os._exit(128 + number))
    raise _StopError(signum)


# ------------------------------------------------------------------------------------------------------------ the commands


def _build(argv: list[str]) -> int:
    from eit_lab.data.building import DAMAGED, Options, build
    from eit_lab.units import si

    words = _Words("build", "SRC", "DST")
    words.add_argument("--workers", type=_whole, default=count_cores())
    words.add_argument("--shard-mb", type=_whole, default=Options.shard_mb)
    words.add_argument("--keep-original", action="store_true")
    words.add_argument("--no-rewrite", action="store_true")
    words.add_argument("--damaged", type=_one_of("stop", "skip", "keep"), default="stop")
    words.add_argument("--overwrite", action="store_true")
    told = words.take(argv)
    target = Path(told.dst).expanduser()
    if "://" in told.dst:
        raise words.wrong(f"DST must be a local folder, got {told.dst!r}; build here, then copy it there")
    options = Options(
        shard_mb=told.shard_mb, rewrite=not told.no_rewrite, keep_original=told.keep_original, damaged=told.damaged
    )
    source = _open(told.src, "SRC")
    total = sum(len(index) for index in source.listing.splits.values())
    began = time.monotonic()
    try:
        with _progress("build", total) as advance:
            built = build(source, target, options, workers=told.workers, overwrite=told.overwrite, on_progress=advance)
    except _StopError as asked:
        done = sum(1 for split in ("train", "val") for _ in (target / split).glob("*.shard"))
        asked.advice = f"; {done} shard{'s' * (done != 1)} finished, the same command goes on"
        raise
    manifest, seconds = built.manifest, time.monotonic() - began
    splits = manifest["splits"].values()
    stored = sum(split["bytes"] for split in splits)
    before = f" ({built.num_found} were there)" if built.num_found else ""
    print(
        f"{target}: {sum(split['num_samples'] for split in splits):,} images in {built.num_shards} shards{before}, "
        f"{si(stored)}B, {seconds:.0f} s"
    )
    rewritten = sum(split["rewritten"] for split in splits)
    others: dict[str, int] = {}
    for split in splits:
        for kind, number in split["as_they_were"].items():
            others[kind] = others.get(kind, 0) + number
    as_they_were = ", ".join(f"{number:,} {kind}" for kind, number in sorted(others.items()))
    print(f"rewritten {rewritten:,}; as they were: {as_they_were or 'none'}")
    left_out = sum(split["left_out"] for split in splits)
    if left_out or others.get("damaged"):
        print(f"cannot be decoded: {left_out} left out, {others.get('damaged', 0)} kept; {target / DAMAGED} names them")
    print(f"hash {manifest['hash']}")
    return 0


def _verify(argv: list[str]) -> int:
    from eit_lab.config import ConfigError
    from eit_lab.data.verifying import manifest_of, verify

    words = _Words("verify", "DST")
    words.add_argument("--source")
    words.add_argument("--full", action="store_true")
    words.add_argument("--sample", type=_whole)
    words.add_argument("--workers", type=_whole, default=count_cores())
    told = words.take(argv)
    if told.full and told.sample is not None:
        raise words.wrong("--full compares all images, --sample some: give one of them")
    if "://" in told.dst:
        raise words.wrong(
            f"DST must be a local folder, got {told.dst!r}; a server's shards are checked as they are fetched"
        )
    root = Path(told.dst).expanduser()
    try:
        manifest = manifest_of(root)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.root", "DST")) from None
    source, without, asked = None, "", told.full or told.sample is not None
    where = told.source or manifest["source"]
    if told.source is not None or Path(where).is_dir() or ("://" in where and asked):
        source = _open(where, "--source")
    elif "://" in where:  # some images of each file: nearly all of it would be fetched
        without = f"; --source {where} compares them too"
    elif asked:
        raise words.wrong(f"--source must name the source: it is no longer at {where}")
    else:
        without = f"; the source is no longer at {where}, --source names it"
    total = sum(split["num_samples"] for split in manifest["splits"].values())
    with _progress("verify", total) as advance:
        done = verify(
            root,
            manifest,
            source=source,
            sample=None if told.full else told.sample or _SAMPLE,
            workers=told.workers,
            on_progress=advance,
        )
    for name, reason in done.damages:
        print(f"{name}: {reason}")
    compared = (
        f"{done.num_compared:,} compared with the source pixel for pixel" if source else f"pixels not compared{without}"
    )
    looked = f"{done.num_files} files, {done.num_records:,} images, {compared}"
    if done.damages:
        files = len({damage.name.partition(" ")[0] for damage in done.damages})
        raise command.RunError(
            f"{root}: {len(done.damages)} damages in {files} file{'s' * (files > 1)} ({looked}); the command that built the "
            "shards writes these files again, and no others"
        )
    print(f"{root}: no damage; {looked}")
    print(f"hash {manifest['hash']}")
    return 0


def _info(argv: list[str]) -> int:
    from eit_lab.data.survey import contact_sheet

    words = _Words("info", "ROOT")
    words.add_argument("--split", type=_one_of("train", "val"), default="train")
    words.add_argument("--out")
    told = words.take(argv)
    out = Path(told.out or f"{told.root.rstrip('/').rpartition('/')[2].strip('.') or 'root'}.png").expanduser()
    if out.suffix.lower() != ".png":
        raise words.wrong(f"--out must end in .png, got {str(out)!r}")
    if not out.parent.is_dir():
        raise words.wrong(f"--out must lie in a folder that exists, got {str(out)!r}")
    root = _open(told.root, "ROOT")
    _print_table(root)
    try:
        contact_sheet(root, told.split).save(out)
    except OSError as error:
        raise command.RunError(f"{out}: {error.strerror or error}") from None
    print(f"samples of {told.split}: {out}")
    return 0


def _extract(argv: list[str]) -> int:
    from eit_lab.data.extracting import extract

    words = _Words("extract", "DST", "OUT")
    words.add_argument("--split", type=_one_of("train", "val"))
    words.add_argument("--workers", type=_whole, default=count_cores())
    told = words.take(argv)
    root, target = _open(told.dst, "DST"), Path(told.out).expanduser()
    splits: list[Split] = [told.split] if told.split else ["train", "val"]
    total = sum(len(root.listing.splits[split]) for split in splits)
    with _progress("extract", total) as advance:
        original = extract(root, target, splits=splits, workers=told.workers, on_progress=advance)
    print(f"{target}: {total:,} images, {'the original files, byte for byte' if original else 'as they are stored'}")
    if not original:
        print("the pixels are the originals', not the bytes: only shards built with --keep-original have those")
    return 0


# ------------------------------------------------------------------------------------------------------------ what they say


def _print_table(root: OpenRoot) -> None:
    from rich.console import Console
    from rich.table import Table

    from eit_lab.data.survey import PERCENTILES, survey
    from eit_lab.units import si

    listing = root.listing
    surveys = [survey(root, split) for split in ("train", "val")]
    table = Table(title=f"{root.store.root}: {listing.layout}", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for found in surveys:
        table.add_column(found.split, justify="right")

    def row(name: str, cells: Sequence[str]) -> None:
        table.add_row(name, *cells)

    row("images", [f"{s.num_images:,}" for s in surveys])
    row("classes", [f"{s.num_classes:,}" for s in surveys])
    row("images of a class", [f"{s.fewest:,} to {s.most:,}" for s in surveys])
    row("class folders" if listing.layout == "folder" else "files", [f"{s.num_files:,}" for s in surveys])
    row(
        "bytes",
        [("" if _told(root, s.split) else "about ") + f"{si(s.bytes_per_image * s.num_images)}B" for s in surveys],
    )
    row("bytes of an image", [f"{si(s.bytes_per_image)}B" for s in surveys])
    for name, sizes in (("width", [s.widths for s in surveys]), ("height", [s.heights for s in surveys])):
        cells = [" ".join(f"{p:.0f}" for p in _percentiles(px, PERCENTILES)) for px in sizes]
        row(f"{name}, px ({', '.join(map(str, PERCENTILES))} %)", cells)
    row("with restart segments", [f"{100 * s.segmented_share:.1f}%" for s in surveys])
    row("segments of an image", [f"{s.segments:.0f}" if s.segments else "-" for s in surveys])
    manifest = _manifest(root)
    if manifest is not None:
        splits = [manifest["splits"][s.split] for s in surveys]
        shares = [100 * split["rewritten"] / split["num_samples"] for split in splits]
        row("rewritten", [f"{split['rewritten']:,} ({x:.1f}%)" for split, x in zip(splits, shares, strict=True)])
        for kind in sorted({kind for split in splits for kind in split["as_they_were"]}):
            row(f"  as it was: {kind}", [f"{split['as_they_were'].get(kind, 0):,}" for split in splits])
        row("left out", [f"{split['left_out']:,}" for split in splits])
    Console().print(table)
    looked_at = max(s.looked_at for s in surveys)
    if looked_at:
        print(f"sizes of images are of {looked_at} that were looked at")
    print(f"fingerprint {listing.fingerprint}" + (f"  hash {manifest['hash']}" if manifest else ""))
    for note in listing.notes:
        print(f"note: {note}")


def _told(root: OpenRoot, split: Split) -> bool:
    return bool(root.listing.splits[split].size.any())


def _percentiles(px: Any, which: Sequence[int]) -> Sequence[float]:
    import numpy as np

    return [float(p) for p in np.percentile(px, which, method="nearest")] if len(px) else []


def _manifest(root: OpenRoot) -> dict[str, Any] | None:
    from eit_lab.data.layouts.shards import MANIFEST, read_manifest

    if root.listing.layout != "shards":
        return None
    return read_manifest(root.store.read(MANIFEST), root.store.address(MANIFEST))


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with rate and time left on a terminal's stderr; else a line every tenth or half minute. Yields what to call
    with the number of images done.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    began = last_at = time.monotonic()
    last_share = 0.0
    if not console.is_terminal:

        def say(done: int) -> None:
            nonlocal last_at, last_share
            now, share = time.monotonic(), min(1.0, done / max(1, total))
            if share - last_share < _LINE_SHARE and now - last_at < _LINE_S:
                return
            last_at, last_share = now, share
            rate = done / max(1e-9, now - began)
            left = f", {(total - done) / rate:.0f} s left" if rate > 0 and done < total else ""
            print(f"{what}: {min(done, total):,} of {total:,} images, {rate:.0f}/s{left}", file=sys.stderr, flush=True)

        yield say
        return
    bar = Progress(
        TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TextColumn("left"),
        TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip
    task = bar.add_task(what, total=total, rate="")

    def draw(done: int) -> None:
        nonlocal last_at
        now = time.monotonic()
        if now - last_at >= _REDRAW_S:
            last_at = now
            bar.update(task, completed=min(done, total), rate=f"{done / max(1e-9, now - began):.0f} images/s")

    with bar:
        yield draw


# --------------------------------------------------------------------------------------------------------- the command line


class _Words(argparse.ArgumentParser):
    """A subcommand's words. What is wrong with them is a ConfigError, in one line."""

    def __init__(self, name: str, *places: str) -> None:
        super().__init__(prog=f"shards {name}", add_help=False, allow_abbrev=False)
        self.name, self.places = name, places
        for place in places:
            self.add_argument(place.lower(), nargs="?")

    def take(self, argv: list[str]) -> argparse.Namespace:
        """The words as attributes. Raises ConfigError."""
        from eit_lab.loading import nearest

        told, rest = self.parse_known_args(argv)
        flags = sorted(self._option_string_actions)
        for word in rest:
            if word.startswith("-"):
                flag = word.partition("=")[0]
                raise self.wrong(f"{flag} is not one of {', '.join(flags)}{nearest(flag, flags)}")
            raise self.wrong(f"takes {' and '.join(self.places)}, got {word!r} besides")
        for place in self.places:
            if getattr(told, place.lower()) is None:
                raise self.wrong(f"{place} must be given: shards {self.name} {' '.join(self.places)}")
        return told

    def error(self, message: str) -> NoReturn:
        """Called by argparse: ``argument --workers: must be ...``."""
        flag, _, rule = message.removeprefix("argument ").partition(": ")
        raise self.wrong(f"{flag} {rule}")

    def wrong(self, rule: str) -> Exception:
        """What to raise for wrong words."""
        from eit_lab.config import ConfigError

        return ConfigError(rule if rule[:1].isupper() or rule.startswith("-") else f"shards {self.name} {rule}")


def _whole(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {word!r}")
    return int(word)


def _one_of(*choices: str) -> Callable[[str], str]:
    def check(word: str) -> str:
        from eit_lab.loading import nearest

        if word not in choices:
            raise argparse.ArgumentTypeError(
                f"must be one of {', '.join(choices)}, got {word!r}{nearest(word, choices)}"
            )
        return word

    return check


def _open(word: str, name: str) -> OpenRoot:
    """A root of any layout; ``name`` stands for data.root in what is said of it."""
    from eit_lab.config import ConfigError
    from eit_lab.data.roots import open_at

    try:
        return open_at(word, cache=user_cache(), cache_gb=_CACHE_GB)
    except ConfigError as error:
        raise ConfigError(str(error).replace("data.root", name)) from None


if __name__ == "__main__":
    sys.exit(main())
