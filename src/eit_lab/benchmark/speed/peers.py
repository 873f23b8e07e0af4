"""Who takes part in ``bench model`` and ``bench step``: names, what each is, and the choices of ours that can be undone. No torch.

A peer runs as its own people run it: the literal one eagerly under autocast with torch's default AdamW and allocator, timm's ViT
so too and compiled with max-autotune beside it, ours as ``eit_lab.train`` does it. Two rows tell our gains apart: ours in a plain
process, and the literal one with our setting of the allocator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from eit_lab.benchmark.peer_words import read_words

OURS, LITERAL, COMPILED_VIT = "eit_lab", "literal", "timm_vit:compile=max-autotune"
MATRIX_PRODUCT = "matrix_product"
"""No peer, but the worker that measures the machine's rate of a large product in the same rounds."""
_KEYS = {
    "eit_lab": ("memory", "compile", "checkpoint", "attention", "head_multiple", "depthwise"),
    "literal": ("memory",),
    "timm_vit": ("memory", "compile"),
    "vit_b_16": ("memory", "compile"),
    "convit": ("memory", "compile"),
}
_WHAT = {
    "eit_lab": "as eit_lab.train runs it: attention, optimizer, allocator, compilation as it chooses them",
    "literal": "EIT as its authors wrote it: explicit attention matrix, contiguous NCHW depthwise convolution, eager",
    "timm_vit": "timm's VisionTransformer of the same width, depth and heads, with as many tokens (224 px: 228 in patches of 12), eager",
    "vit_b_16": "torchvision's vit_b_16, eager",
    "convit": "timm's convit_tiny, _small or _base, whichever is nearest in MACs, eager",
}
_LABELS = {"timm_vit": "timm ViT", "vit_b_16": "torchvision vit_b_16", "convit": "timm ConViT"}


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One row for each size and precision."""

    name: str
    """As typed: ``eit_lab``, ``eit_lab:memory=plain``."""
    kind: str
    """What comes before the settings."""
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """As tables have it."""
        words = [f"{key.replace('_', ' ')} {value}" for key, value in self.settings.items()]
        return ", ".join([_LABELS.get(self.kind, self.kind), *words])

    @property
    def what(self) -> str:
        """One line of how it is run."""
        changed = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return f"{_WHAT[self.kind]}; but {changed}" if changed else _WHAT[self.kind]

    @property
    def keeps_memory(self) -> bool:
        """Whether its process keeps freed memory (eit_lab.memory): ours does, the others do where they are told to."""
        return self.settings.get("memory", "kept" if self.kind == OURS else "plain") == "kept"

    @property
    def compile(self) -> str:
        """One of: auto (as our training decides), false, a mode of torch.compile."""
        return self.settings.get("compile", "auto" if self.kind == OURS else "false")


def read_peer(text: str) -> Peer:
    """Of a word of the command. ConfigError in one line for a name, a key or a value that there is not."""
    kind, told = read_words(text, _KEYS)
    return Peer(name=text, kind=kind, settings=told)


# What is measured where nobody says otherwise: beside every size, and beside one of them only, for time. What is compiled takes
# longest by far, and the goals of inference do not need timm's.
_CPU = (("eit_lab", "eit_lab:memory=plain", "literal", "literal:memory=kept", "timm_vit"), ("vit_b_16", "convit"))
_GPU_ONCE = ("eit_lab:compile=false", "eit_lab:compile=false:checkpoint=true", "vit_b_16", "convit")
_DEFAULT = {
    ("step", "cpu"): _CPU,
    ("model", "cpu"): _CPU,
    ("step", "cuda"): (
        ("eit_lab", "literal", "timm_vit", COMPILED_VIT),
        ("eit_lab:compile=max-autotune", *_GPU_ONCE),
    ),
    ("model", "cuda"): (
        ("eit_lab", "literal", "timm_vit"),
        (COMPILED_VIT, "eit_lab:compile=false", "vit_b_16", "convit"),
    ),
}


def default_peers(model: str, *, verb: str, device: str, models: Sequence[str]) -> tuple[Peer, ...]:
    """Those beside one of the sizes on "cpu" or "cuda"; some stand beside eit_base only, or the first size."""
    always, once = _DEFAULT[verb, device]
    main = "eit_base" if "eit_base" in models else models[0]
    return tuple(read_peer(name) for name in (*always, *(once if model == main else ())))
