"""One peer of a speed benchmark in a process: its model, its optimizer, and turns of steps that are timed.

The same images and labels for all (drawn once, seeded), the same loss (cross entropy on class indices), autocast to bfloat16 or
none. A training step is forward, backward, AdamW and zero_grad, without a loader and without Lightning's loop; inference is a
forward pass in evaluation mode under inference_mode. torch is imported by this module, so an allocator is set before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eit_lab.benchmark.speed.peers import LITERAL, MATRIX_PRODUCT, OURS, Peer, read_peer
from eit_lab.config import ModelConfig, RecipeConfig
from eit_lab.models import paths
from eit_lab.models.backbone import Backbone
from eit_lab.models.create import create_model
from eit_lab.models.linear import linear

if TYPE_CHECKING:
    from eit_lab.config import Config
    from eit_lab.plan import Plan
    from eit_lab.training.compiling import Compilation

VERBS = ("step", "model")
NUM_CLASSES = 1000
_CONVITS = ("convit_tiny", "convit_small", "convit_base")
_PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
_LR = 1e-4
_WARM_UP = {"cpu": 2, "cuda": 5}
_UNTIMED = {"cpu": 0, "cuda": 2}  # of a turn: memory is asked for anew, the clock goes up
_TURN_S = {"cpu": 1.0, "cuda": 0.5}
_MOST_STEPS = 50
_TRIES = 3


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a worker is asked to be."""

    verb: str
    """One of VERBS."""
    peer: str
    model: str
    """The size that the peer stands beside, e.g. eit_base."""
    device: str
    """cpu or cuda."""
    batch: int
    img_size: int


class Contender:
    """A built peer. Raises ValueError where it cannot be built, torch's own errors where it cannot run."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.device = torch.device(request.device)
        self._compiled = ""
        """How it is compiled, in words."""
        torch.manual_seed(0)
        self.model: nn.Module | None = None
        self._peer: Peer | None = None
        if request.peer == MATRIX_PRODUCT:
            self._before = _status("VmRSS")
            side = _PRODUCT_SIDE[request.device]
            self.macs, self.params, self.img_size = side**3, 0, 0
            self._factors = torch.randn(2, side, side, device=self.device)
            self._product: dict[str, Callable[[], Tensor]] = {}
            return
        self._peer = read_peer(request.peer)
        with torch.device("meta"):  # a twin without memory
            twin, self.img_size = _build(self._peer.kind, request.model, request.img_size)
        self.macs, self.params = _count_macs(twin, self.img_size), sum(p.numel() for p in twin.parameters())
        self._before = _status("VmRSS")  # libraries are loaded by now
        model, _ = _build(self._peer.kind, request.model, request.img_size)
        self.model = model.to(self.device).train(request.verb == "step")
        self._optimizer = self._build_optimizer(self._peer) if request.verb == "step" else None
        self._set_up(self._peer)
        generator = torch.Generator().manual_seed(1)
        shape = (request.batch, 3, self.img_size, self.img_size)
        self._images = torch.randn(shape, generator=generator).to(self.device)
        self._labels = torch.randint(0, NUM_CLASSES, (request.batch,), generator=generator).to(self.device)

    def _build_optimizer(self, peer: Peer) -> torch.optim.Optimizer:
        assert self.model is not None
        if peer.kind == OURS:
            from eit_lab.training.optim import build_optimizer

            return build_optimizer(self.model, RecipeConfig(lr=_LR))
        fused = True if peer.compile != "false" else None  # who compiles, fuses
        return torch.optim.AdamW(self.model.parameters(), lr=_LR, weight_decay=0.05, fused=fused)

    def _set_up(self, peer: Peer) -> None:
        """Compilation and recomputed blocks, as the peer has them."""
        assert self.model is not None
        if peer.settings.get("checkpoint") == "true":
            assert isinstance(self.model, Backbone)
            self.model.set_grad_checkpointing(True)
        if peer.kind == OURS:
            from eit_lab.training.compiling import compile_model

            compilation = _compilation(peer, self.request.model, macs=self.macs, device=self.device)
            compile_model(self.model, compilation)
            self._compiled = compilation.describe()
        elif peer.compile != "false":
            self.model.compile(mode=peer.compile)
            self._compiled = f"torch.compile, mode {peer.compile}"

    def facts(self) -> dict[str, Any]:
        """What it is: multiply-accumulates of an image (of a product), parameters, side of its images, class of the model."""
        made = "product" if self.model is None else type(self.model).__name__
        return {
            "macs": self.macs,
            "params": self.params,
            "img_size": self.img_size,
            "made": made,
            "compiled": self._compiled or None,
        }

    # --------------------------------------------------------------------------------------------------------- what it does

    def warm_up(self, precision: str) -> dict[str, Any]:
        """The first steps: {"first_s", "first_loss", "steps", "memory_bytes"}.

        ``first_s`` holds compilation; ``first_loss`` is that of the first step (None of inference); ``steps`` is what a turn
        takes; ``memory_bytes`` is the most that a step had in use at once, model, gradients and optimizer included: on CPU
        beyond what the process had before (None where the system does not tell), on a GPU of torch's tensors.
        """
        kind = self.request.device
        body = self._body(precision)
        with self._paths():
            began = time.perf_counter()
            loss = body()
            self._wait()
            first_s = time.perf_counter() - began
            first_loss = None if loss is None or self.model is None else float(loss)
            for _ in range(_WARM_UP[kind] - 2):
                body()
            self._wait()
            told = self._forget_peak()
            began = time.perf_counter()
            body()
            self._wait()
            one = time.perf_counter() - began
        peak = self._peak() if told else None
        self._rest()
        steps = min(_MOST_STEPS, max(1, round(_TURN_S[kind] / one)))
        return {"first_s": first_s, "first_loss": first_loss, "steps": steps, "memory_bytes": peak}

    def turn(self, precision: str, *, steps: int) -> float:
        """Seconds of a step, the mean of ``steps`` in a row."""
        body = self._body(precision)
        with self._paths():
            for _ in range(_UNTIMED[self.request.device]):
                body()
            self._wait()
            began = time.perf_counter()
            for _ in range(steps):
                body()
            self._wait()
            seconds = (time.perf_counter() - began) / steps
        self._rest()
        return seconds

    def _body(self, precision: str) -> Callable[[], Tensor | None]:
        if self.model is None:
            if precision not in self._product:
                self._product[precision] = self._fastest_product(precision)
            return self._product[precision]
        enabled = precision == "bfloat16"
        return partial(self._step if self.request.verb == "step" else self._infer, enabled)

    def _fastest_product(self, precision: str) -> Callable[[], Tensor]:
        """Whichever is faster here of torch's own product and ours (models/linear.py): the roof is the hardware's."""
        a, b = self._factors.to({"float32": torch.float32, "bfloat16": torch.bfloat16}[precision])
        seconds: dict[Callable[[], Tensor], float] = {}
        for body in (partial(torch.mm, a, b), partial(linear, a, b, None)):
            body()  # first touches
            self._wait()
            began = time.perf_counter()
            for _ in range(_TRIES):
                body()
            self._wait()
            seconds[body] = time.perf_counter() - began
        return min(seconds, key=lambda body: seconds[body])

    def _step(self, enabled: bool) -> Tensor:
        assert self.model is not None
        assert self._optimizer is not None
        with torch.autocast(self.request.device, torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(self.model(self._images), self._labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.detach()

    def _infer(self, enabled: bool) -> None:
        assert self.model is not None
        with torch.inference_mode(), torch.autocast(self.request.device, torch.bfloat16, enabled=enabled):
            self.model(self._images)

    @contextlib.contextmanager
    def _paths(self) -> Iterator[None]:
        told = {} if self._peer is None else self._peer.settings
        multiple = told.get("head_multiple")
        with paths.use(
            attention=told.get("attention"),
            head_multiple=None if multiple is None else int(multiple),
            depthwise=told.get("depthwise"),
        ):
            yield

    # --------------------------------------------------------------------------------------------------------------- memory

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _rest(self) -> None:
        """On a GPU, which all peers share, what is free goes back; on CPU a process does what it does."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forget_peak(self) -> bool:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on, proc(5)
        except OSError:
            return False
        return True

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return _status("VmHWM") - self._before


def _count_macs(twin: nn.Module, img_size: int) -> int:
    """Multiply-accumulates of a forward pass of one image, attention products included, of a model on the meta device."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin.eval()(torch.empty(1, 3, img_size, img_size, device="meta"))
    return counter.get_total_flops() // 2


def _compilation(peer: Peer, size: str, *, macs: int, device: torch.device) -> Compilation:
    """What our training would do in a run of the published recipe on ImageNet-1K; or as the peer is told.

    Raises ValueError where it is told to compile and cannot.
    """
    from eit_lab.training.compiling import Compilation, choose_compilation, why_not

    if peer.compile == "auto":
        config, cut = _published_run(size)
        return choose_compilation(config, cut, macs=macs, device=device)
    on = peer.compile != "false"
    if on and (obstacle := why_not(device)):
        raise ValueError(obstacle)
    mode: Any = peer.compile if on else "default"
    return Compilation(on=on, why="as asked", mode=mode)


@cache
def _published_run(size: str) -> tuple[Config, Plan]:
    """What a run of the published recipe on ImageNet-1K is, on one device."""
    from eit_lab.compose import compose_one
    from eit_lab.data.catalog import published_facts
    from eit_lab.plan import plan

    config = compose_one([f"model={size}", "data=imagenet", "data.root=null"])
    facts = published_facts(config.data)
    assert facts is not None
    return config, plan(config, facts)


def _build(kind: str, size: str, img_size: int) -> tuple[nn.Module, int]:
    """A peer's model beside one of our sizes, and the side of its images."""
    match kind:
        case "vit_b_16":
            from torchvision.models import vit_b_16

            side = _up_to(img_size, 16)
            return vit_b_16(image_size=side, num_classes=NUM_CLASSES), side
        case "convit":
            return _convit(size, img_size)
    ours = create_model(size, num_classes=NUM_CLASSES, img_size=img_size)
    assert isinstance(ours, Backbone), f"models are backbones of ours, got {size}"
    if kind == LITERAL:
        from eit_lab.benchmark.speed.literal import Literal

        return Literal(ours), img_size
    return _timm_vit(ours.config, ours.grid, img_size) if kind == "timm_vit" else (ours, img_size)


def _timm_vit(config: ModelConfig, grid: tuple[int, int], img_size: int) -> tuple[nn.Module, int]:
    """As many tokens as ours: patches of our token pitch, on images that they fill: of 224 px become 19 x 12 = 228."""
    from timm.models.vision_transformer import VisionTransformer

    pitch = -(-img_size // grid[0])
    size = config.size
    model = VisionTransformer(
        img_size=grid[0] * pitch,
        patch_size=pitch,
        num_classes=NUM_CLASSES,
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=size.mlp_ratio,
    )
    return model, grid[0] * pitch


def _convit(size: str, img_size: int) -> tuple[nn.Module, int]:
    """The one of three whose MACs are nearest to ours, with positional self-attention that starts as a convolution."""
    import timm

    def made(name: str) -> nn.Module:
        return timm.create_model(name, pretrained=False, num_classes=NUM_CLASSES, img_size=side)

    side = _up_to(img_size, 16)
    with torch.device("meta"):
        ours = _count_macs(create_model(size, num_classes=NUM_CLASSES, img_size=img_size), img_size)
        off = {name: abs(_count_macs(made(name), side) - ours) for name in _CONVITS}
    return made(min(off, key=lambda name: off[name])), side


def _up_to(side: int, multiple: int) -> int:
    return -(-side // multiple) * multiple


def _status(key: str) -> int:
    """Bytes of a line of proc(5)'s status; 0 where there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    line = next((line for line in lines if line.startswith(f"{key}:")), None)
    return 0 if line is None else int(line.split()[1]) * 1024
