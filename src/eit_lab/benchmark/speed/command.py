"""``python -m eit_lab.bench model | step | startup``: what the words mean, and the record that is kept."""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from eit_lab.benchmark.speed.options import Options, StartupOptions, read_options, read_startup_options
from eit_lab.config import ConfigError
from eit_lab.runs import code_state, versions

_WORDS = """\
  models         sizes of ours, each beside its peers                          [eit_base; on a GPU eit_base,eit_large,eit_tiny,eit_mini]
  precision      float32, bfloat16 (autocast)                                  [both; on a GPU bfloat16]
  batch          images                                                        [8; on a GPU 256]
  img_size       px                                                            [224]
  device         auto, cpu, cuda                                               [auto]
  rounds         turns of each; what is compared is compared within a round    [5]
  peers          of eit_lab, literal, timm_vit, vit_b_16, convit; with settings: eit_lab:memory=plain, literal:memory=kept,
                 timm_vit:compile=max-autotune, eit_lab:compile=false:attention=sdpa:depthwise=conv2d:head_multiple=8:checkpoint=true
                                                                               [those of the device]
  compile_limit  seconds until a compiled peer must be ready, else it is out   [120]
  budget         seconds after which no other size is begun                    [none; on a GPU {budget}]
  out            folder of the record: {verb}-DEVICE.md and .json{pad}           [bench-{verb}]
"""
STEP_HELP = f"""\
Time a training step (forward, backward, AdamW) of EIT as eit_lab trains it, beside the literal implementation and other models.

  python -m eit_lab.bench step [models=NAME,NAME] [precision=P,P] [batch=N] [rounds=N] [peers=P,P] [device=D] [out=FOLDER] ...

{_WORDS.format(verb="step", pad="   ", budget=270)}
Takes about five minutes on two cores; let the machine do nothing else. Exit status 0 whether the goals are met or not.
"""
MODEL_HELP = f"""\
Time a forward pass (evaluation, inference mode) of EIT as eit_lab runs it, beside the literal implementation and other models.

  python -m eit_lab.bench model [models=NAME,NAME] [precision=P,P] [batch=N] [rounds=N] [peers=P,P] [device=D] [out=FOLDER] ...

{_WORDS.format(verb="model", pad="  ", budget=150)}
Takes about two minutes on two cores; let the machine do nothing else. Exit status 0 whether the goals are met or not.
"""
STARTUP_HELP = """\
Time the way from `python -m eit_lab.train` to the end of the first training step on CPU, beside imports and a model by hand.

  python -m eit_lab.bench startup [model=NAME] [rounds=N] [out=FOLDER]

  model     what is trained, on synthetic data                                 [eit_mini]
  rounds    starts of each                                                     [5]
  out       folder of the record: startup-DEVICE.md and .json                  [bench-startup]

Takes about three minutes on two cores; let the machine do nothing else. Exit status 0 whether the goal is met or not.
"""
HELP = {"step": STEP_HELP, "model": MODEL_HELP, "startup": STARTUP_HELP}

Progress = Callable[[], AbstractContextManager[Callable[[str, int, int], None]]]


def run(argv: Sequence[str], *, verb: str, progress: Progress) -> int:
    """``bench VERB``: measure, print and write the record. Returns 0; raises ConfigError for wrong words, RunError where a start fails.

    ``progress``: a bar, told of a step's name, what of it is done, and all of it.
    """
    from eit_lab.benchmark.speed.tables import tables

    options: Options | StartupOptions
    command = f"python -m eit_lab.bench {verb} {shlex.join(argv)}".strip()
    if verb == "startup":
        options = read_startup_options(argv)
        with progress() as advance:
            from eit_lab.benchmark.speed import startup

            found = startup.measure(options, advance)
        asked: dict[str, Any] = {"device_kind": "cpu", "rounds": options.rounds}
    else:
        options = read_options(argv, verb=verb)
        with progress() as advance:
            from eit_lab.benchmark.speed import measuring

            found = measuring.measure(options, advance)
        asked = {
            "device_kind": options.device,
            "models": options.models,
            "precision": options.precision,
            "batch": options.batch,
            "img_size": options.img_size,
            "rounds": options.rounds,
        }
    record = {"kind": verb, "command": command, **_facts(asked["device_kind"]), **asked, **found}
    text = tables(record)
    print(text)
    name = f"{verb}-{slug(record['device'])}"
    for suffix, content in (("json", json.dumps(record, indent=1) + "\n"), ("md", text)):
        path = options.out / f"{name}.{suffix}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        except OSError as error:
            raise ConfigError(f"out must be a folder that can be written: {error}") from None
        print(path)
    return 0


def _facts(device: str) -> Mapping[str, Any]:
    """What the figures were made with: device, processor, threads, versions, date, commit."""
    import torch

    from eit_lab.processor import machine
    from eit_lab.training.peak import known_peak

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    made = versions()
    peak = known_peak(name, None) if device == "cuda" else None
    commit, changes = code_state()
    return {
        "device": name,
        "machine": machine(),
        "instructions": _instructions(),
        "threads": torch.get_num_threads(),
        "peak_flops": {"bfloat16": peak and peak.flops},
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "changed": bool(changes),
        "code": made["code"],
        **{key: made[key] for key in ("eit_lab", "python", "packages", "platform")},
    }


def _instructions() -> list[str]:
    """What of the processor decides how fast products are, as Linux names it."""
    path = Path("/proc/cpuinfo")
    flags = set(path.read_text().split()) if path.is_file() else set()
    return [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]


def slug(device: str) -> str:
    """A device's name in a file's: NVIDIA H100 80GB HBM3 -> h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-")
