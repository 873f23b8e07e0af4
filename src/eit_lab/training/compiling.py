"""How a model's passes are run in training: compiled or as written, and what is kept of them for the backward pass.

torch.compile takes a minute or more before the first step. On CPU that is for little (a step of a small model took 0.9 and 1.25
times an eager one: benchmarks/records/compile-cpu.md), so ``trainer.compile=auto`` leaves it off there. On a GPU it decides by the
whole plan: what all steps would save, against what compiling takes (plan.py says what is assumed). The whole model is one graph:
blocks of EIT differ in their channels, so that compiling them one by one spares a cold start a fifteenth and costs every step a tenth
(same record), and CUDA graphs cannot follow one another. Sharded blocks (FSDP) are gathered one by one, and are compiled so. What has
been compiled stays in the user's cache, where the next run of the same model finds it in seconds.

Every shape has a graph of its own (``dynamic=False``): which graph a batch goes through must not depend on which came first, or
a resumed run would have other digits. With a mode of max-autotune kernels are chosen by a clock: a run repeats to the last bit
only where its choices lie in the cache.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from eit_lab.caches import private_folder
from eit_lab.config import CUDA_GRAPH_MODES, CompileMode, Config, ConfigError, TimmConfig
from eit_lab.finetune import run_folder_of
from eit_lab.models.backbone import Backbone
from eit_lab.plan import COMPILE_S, Plan
from eit_lab.runs import read_record

_OLDEST_GPU = (7, 0)  # compute capability that Triton compiles for
_GRAPHS_PER_REGION = 16  # train and evaluation, each at a whole, a last and a filled-up batch; dynamo's own limit is 8


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """Whether a model is compiled, how, and why so."""

    on: bool
    why: str
    mode: CompileMode = "default"
    by_block: bool = False

    def describe(self) -> str:
        """For the summary, in a few words."""
        if not self.on:
            return f"not compiled: {self.why}"
        mode = "" if self.mode == "default" else f", mode {self.mode}"
        return f"compiled {'block by block' if self.by_block else 'whole'}{mode}: {self.why}"

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {"on": self.on, "mode": self.mode, "by_block": self.by_block, "why": self.why}


def choose_compilation(config: Config, plan: Plan, *, macs: int, device: torch.device) -> Compilation:
    """What a run's ``trainer.compile`` means for its plan, a model of ``macs`` an image, and the device of this process.

    Raises ConfigError where it asks for what cannot be.
    """
    t = config.trainer
    if t.compile is False:
        return Compilation(on=False, why="trainer.compile=false")
    _check_mode(config, device, accumulate=plan.accumulate, world_size=plan.world_size)
    obstacle = why_not(device)
    if t.compile is True:
        if obstacle:
            raise ConfigError(_impossible(obstacle))
        return _compilation(config, why="trainer.compile=true")
    if device.type == "cpu":
        return Compilation(on=False, why="on CPU it takes minutes and gains little")
    if device.type != "cuda":
        return Compilation(on=False, why=f"nobody has measured it on {device.type}")
    if obstacle:
        return Compilation(on=False, why=obstacle)
    saved, steps = plan.compile_saves(macs), f"{plan.total_steps:,} steps"
    compared = f"about {saved:,.0f} s by an estimate, compiling takes up to {COMPILE_S:.0f} s"
    if not plan.compile_pays(macs):
        return Compilation(on=False, why=f"{steps} would save {compared}")
    return _compilation(config, why=f"{steps} save {compared}")


def compilation_of_run(config: Config, files: Sequence[Path], *, device: torch.device) -> Compilation:
    """How trained weights are evaluated: as in their training, for the same digits; not where that was another kind of device.

    Raises ConfigError where ``trainer.compile=true`` cannot be.
    """
    asked = config.trainer.compile
    run = run_folder_of(files[0])
    placement = ((read_record(run) if run else None) or {}).get("placement") or {}
    trained = placement.get("compile") or {}
    if asked is False or not (asked is True or trained.get("on")):
        return Compilation(on=False, why="nor was it in training")
    if placement.get("accelerator", device.type) != device.type:
        return Compilation(on=False, why="training was on another kind of device")
    _check_mode(config, device)
    if obstacle := why_not(device):
        if asked is True:
            raise ConfigError(_impossible(obstacle))
        return Compilation(on=False, why=obstacle)
    by_block = bool(trained.get("by_block"))
    return Compilation(on=True, why="as in training", mode=config.trainer.compile_mode, by_block=by_block)


def why_not(device: torch.device) -> str:
    """What torch.compile lacks for a device, in a few words; empty where it has what it needs."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "torch.compile needs Triton, which is not installed"
        if torch.cuda.get_device_capability(device) < _OLDEST_GPU:
            return f"Triton compiles for GPUs of compute capability {'.'.join(map(str, _OLDEST_GPU))} and newer"
        if shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("clang") is None:
            return "torch.compile needs a C compiler (apt install gcc)"
    elif device.type == "cpu":
        compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
        if shutil.which(compiler) is None:
            return f"torch.compile needs a C++ compiler, and there is no {compiler}"
    return ""


def compile_model(model: nn.Module, compilation: Compilation) -> None:
    """Have a model, or each of its blocks, compiled at its first pass. Names of weights stay as they are."""
    if not compilation.on:
        return
    _keep_in_cache()
    import torch._dynamo  # a second that a run without it need not wait

    regions = list(cast(Backbone, model).blocks) if compilation.by_block else [model]
    # The graphs of all blocks are told apart under one function's name.
    room = _GRAPHS_PER_REGION * len(regions)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, room)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, room)
    warnings.filterwarnings("ignore", message=".*TensorFloat32 tensor cores.*")  # float32 stays float32 here
    for region in regions:
        region.compile(mode=compilation.mode, dynamic=False)


def recompute_blocks(model: nn.Module, config: Config) -> None:
    """``trainer.activation_checkpointing``: have the backward pass compute blocks anew. ConfigError where a model cannot."""
    if config.trainer.activation_checkpointing == "off":
        return
    theirs: Any = model
    try:
        theirs.set_grad_checkpointing(True)
    except (AttributeError, AssertionError, NotImplementedError):  # timm asserts that nobody asks for it
        name = config.model.timm_name if isinstance(config.model, TimmConfig) else config.model.name
        raise ConfigError(
            f"trainer.activation_checkpointing must be off for {name}, which cannot compute its blocks anew, got "
            f"'{config.trainer.activation_checkpointing}'; nearest: off"
        ) from None


def _compilation(config: Config, *, why: str) -> Compilation:
    return Compilation(on=True, why=why, mode=config.trainer.compile_mode, by_block=config.trainer.strategy == "fsdp")


def _impossible(obstacle: str) -> str:
    return f"trainer.compile must be auto or false here ({obstacle}), got true; nearest: auto"


def _check_mode(config: Config, device: torch.device, *, accumulate: int = 1, world_size: int = 1) -> None:
    """One line for CUDA graphs where they cannot be.

    A replayed graph writes the gradients where it wrote them before: over what the micro-batch before has left there (pytorch
    issues 169545 and 96693). With several processes, torch's graphs and reductions have crashed in evaluation (128218).
    """
    mode = config.trainer.compile_mode
    if mode not in CUDA_GRAPH_MODES:
        return
    plain = "max-autotune-no-cudagraphs" if mode == "max-autotune" else "default"
    rule = ""
    if device.type != "cuda" and config.trainer.compile is True:
        rule = "trainer.compile_mode must be one without CUDA graphs without a CUDA device"
    elif accumulate > 1:
        rule = f"trainer.compile_mode must be one without CUDA graphs with {accumulate} micro-batches a step"
    elif world_size > 1:
        rule = f"trainer.compile_mode must be one without CUDA graphs with {world_size} processes"
    if rule:
        raise ConfigError(f"{rule}, got '{mode}'; nearest: {plain}")


def _keep_in_cache() -> None:
    """Compiled graphs in the user's own cache, not in /tmp, which a machine forgets. A cache that cannot be written is none."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        return
    folder = private_folder("compiled")
    if folder is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
