"""``python -m eit_lab.bench profile``: where a training step's time goes, and the roofline of each of its operators."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eit_lab.benchmark.roofline.peers import Peer, read_peer
from eit_lab.benchmark.words import read_words
from eit_lab.config import ConfigError
from eit_lab.loading import nearest

HELP = """\
Say where a training step's time goes (torch.profiler), by what a reader knows: products, attention, convolutions, stem, norms, copies,
optimizer; and beside each the least time that this machine allows it: its roofline.

  python -m eit_lab.bench profile [model=NAME] [batch=N] [img_size=N] [precision=P,P] [peers=P,P] [steps=N] [device=D]
                                  [before=FILE,FILE] [title=WORDS] [out=FOLDER]

  model      one of ours with depthwise convolutions                                          [eit_base]
  batch      images of a step                                                                 [8 on CPU, 256 on a GPU]
  img_size   in px                                                                            [224]
  precision  float32, bfloat16 (autocast)                                                     [both on CPU, bfloat16 on a GPU]
  peers      literal: as the authors wrote it; eit_lab: ours as it trains, eager; with settings: literal:memory=kept,
             eit_lab:attention=sdpa:depthwise=conv2d:head_multiple=8:memory=plain             [literal,eit_lab]
  steps      profiled, and as many timed without the profiler before and after                [5]
  device     auto, cpu or cuda                                                                [auto]
  before     earlier records, drawn beside the new one: what a change brought                 [none]
  title      what the record is of, where it is drawn beside later ones                       [its date]
  out        folder of the record: profile-cpu or profile-gpu .md, .json, .png, .svg          [bench-profile]

Takes about three minutes on two cores; let the machine do nothing else.
"""
_DEFAULTS = {
    "model": "eit_base", "batch": "", "img_size": "224", "precision": "", "peers": "literal,eit_lab", "steps": "5", "device": "auto",
    "before": "", "title": "", "out": "bench-profile",
}  # fmt: skip
_PRECISIONS = ("float32", "bfloat16")
_DEVICES = ("auto", "cpu", "cuda")

Progress = Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's words."""

    model: str
    batch: int
    img_size: int
    precision: tuple[str, ...]
    peers: tuple[Peer, ...]
    steps: int
    device: str
    before: tuple[dict[str, Any], ...]
    title: str
    out: Path


def run(argv: Sequence[str], *, progress: Progress, alone: bool = True) -> int:
    """Profile, print and write the record. Returns 0; raises ConfigError for wrong words, RunError where a process dies.

    ``alone``: each implementation in a process of its own, which it needs for its allocator.
    """
    options = _options(argv)
    command = f"python -m eit_lab.bench profile {shlex.join(argv)}".strip()
    with progress() as advance:
        record = _profile(options, command, advance, alone=alone)
    from eit_lab.benchmark.roofline.tables import as_text

    print("\n".join(as_text(record)))
    for path in save(record, options.out):
        print(path)
    return 0


def save(record: dict[str, Any], folder: Path) -> Iterator[Path]:
    """The record's four files in ``folder``. ConfigError where they cannot be written."""
    from eit_lab.benchmark.roofline.figure import profile_figure
    from eit_lab.benchmark.roofline.tables import as_markdown
    from eit_lab.benchmark.table import write
    from eit_lab.report.figure import save_figure, style

    name = f"profile-{'cpu' if record['device'].startswith('cpu') else 'gpu'}"
    try:
        yield write(folder, f"{name}.json", [json.dumps(record, indent=1)])
        yield write(folder, f"{name}.md", as_markdown(record))
        with style():
            save_figure(profile_figure(record), folder / name)
    except OSError as error:
        raise ConfigError(f"out must be a folder that can be written: {error}") from None
    yield folder / f"{name}.png"
    yield folder / f"{name}.svg"


def _options(words: Sequence[str]) -> Options:
    from eit_lab.benchmark.roofline.record import read_record

    told = read_words(words, _DEFAULTS, verb="profile")
    if told["device"] not in _DEVICES:
        raise ConfigError(
            f"device must be one of {', '.join(_DEVICES)}, got {told['device']!r}{nearest(told['device'], _DEVICES)}"
        )
    peers = tuple(read_peer(one) for one in told["peers"].split(","))
    before = tuple(read_record(Path(one).expanduser()) for one in told["before"].split(",") if one)
    import torch

    has_gpu = torch.cuda.is_available()
    if told["device"] == "cuda" and not has_gpu:
        raise ConfigError("device must be cpu or auto where there is no GPU, got 'cuda'; nearest: cpu")
    device = "cuda" if told["device"] != "cpu" and has_gpu else "cpu"
    told["batch"] = told["batch"] or ("256" if device == "cuda" else "8")
    for key in ("batch", "img_size", "steps"):
        if not told[key].isdecimal() or int(told[key]) == 0:
            raise ConfigError(f"{key} must be a whole number of 1 or more, got {told[key]!r}")
    default = "bfloat16" if device == "cuda" else ",".join(_PRECISIONS)
    precision = tuple((told["precision"] or default).split(","))
    for one in precision:
        if one not in _PRECISIONS:
            raise ConfigError(f"precision must be of {', '.join(_PRECISIONS)}, got {one!r}{nearest(one, _PRECISIONS)}")
    for record in before:
        for key in ("model", "batch", "img_size"):
            if str(record[key]) != told[key]:
                raise ConfigError(f"{key} must be {record[key]}, as in the record of before, got {told[key]}")
    return Options(
        model=told["model"],
        batch=int(told["batch"]),
        img_size=int(told["img_size"]),
        precision=precision,
        peers=peers,
        steps=int(told["steps"]),
        device=device,
        before=before,
        title=told["title"],
        out=Path(told["out"]).expanduser(),
    )


def _profile(
    options: Options, command: str, advance: Callable[[str, int, int], None], *, alone: bool
) -> dict[str, Any]:
    import torch

    from eit_lab import create_model
    from eit_lab.benchmark.roofline import peaks
    from eit_lab.benchmark.roofline.measure import Setting, measure, measure_alone
    from eit_lab.benchmark.roofline.record import assemble
    from eit_lab.benchmark.roofline.work import check, operators
    from eit_lab.models.backbone import Backbone
    from eit_lab.training.trainer import device_name

    with torch.device("meta"):
        backbone = create_model(options.model, img_size=options.img_size)
    check(backbone)
    assert isinstance(backbone, Backbone)
    work = {one: operators(backbone, batch=options.batch, precision=one) for one in options.precision}
    device = torch.device(options.device)
    advance("what the machine can do", 0, 2)
    found = peaks.measure(device, options.precision)
    advance("what the machine can do", 1, 2)
    settings = [
        Setting(
            model=options.model,
            peer=peer,
            precision=precision,
            batch=options.batch,
            img_size=options.img_size,
            steps=options.steps,
            device=options.device,
        )
        for precision in options.precision
        for peer in options.peers
    ]
    runs: list[dict[str, Any]] = []
    for setting in settings:
        advance("profiling steps", len(runs), len(settings))
        runs.append((measure_alone if alone else measure)(setting))
    advance("profiling steps", len(runs), len(settings))
    found = peaks.better(found, peaks.measure(device, options.precision))
    advance("what the machine can do", 2, 2)
    facts = {
        "command": command,
        "title": options.title,
        "model": options.model,
        "batch": options.batch,
        "img_size": options.img_size,
        "steps": options.steps,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }
    return assemble(runs, work, found, facts=facts, before=options.before)
