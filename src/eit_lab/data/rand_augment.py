"""RandAugment (arXiv:1909.13719), or colour jitter without it, of one image at a time.

RandAugment is timm's: its notation (``rand-m9-mstd0.5-inc1``) and its operations are those of the published runs, and
torchvision's RandAugment has neither the noise of the magnitude (mstd) nor the operations that grow with it (inc).
There are two: ``FastAugment`` draws from timm's distribution and computes with rand_ops; ``PillowAugment`` is timm's own
transform, to the last bit, at many times the cost.
Where we differ from timm: the draws are a function of (seed, epoch, sample index, copy); posterizing to 0 bits gives a black
image on any Pillow; and colour jitter never comes on top of RandAugment, not even of its set 3a.
"""

from __future__ import annotations

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from eit_lab.config import ConfigError, DataConfig, RecipeConfig, as_hw
from eit_lab.data import rand_ops
from eit_lab.data.rand_ops import Op, Pixels

_RAND_STREAM, _JITTER_STREAM = 60, 61  # those of crop and flip are below
_JITTERS: tuple[Op, ...] = ("Brightness", "Contrast", "Color")

Step = tuple[Op, float]
"""An operation of rand_ops and its argument."""


class ImageAugment(ABC):
    """A uint8 image to an augmented one of the same shape, by (seed, epoch, sample index, copy) and nothing else."""

    def __init__(self, recipe: RecipeConfig, *, seed: int) -> None:
        self.seed, self.jitter = seed, recipe.color_jitter

    @abstractmethod
    def augment(self, pixels: Pixels, index: int, *, epoch: int, copy: int) -> Pixels:
        """Pixels (H, W, C), C 1 or 3, to as many: a new array, or the same one where nothing was drawn."""

    def on_pixels(
        self, images: Tensor, index: NDArray[np.int64], *, epoch: NDArray[np.int64], copy: NDArray[np.int64]
    ) -> Tensor:
        """The same for a batch of images (B, C, H, W); a new tensor."""
        pixels = np.array(images.permute(0, 2, 3, 1).numpy(), order="C")
        for place, key in enumerate(zip(index.tolist(), epoch.tolist(), copy.tolist(), strict=True)):
            pixels[place] = self.augment(pixels[place], key[0], epoch=key[1], copy=key[2])
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))

    def _color_jitter(self, index: int, *, epoch: int, copy: int) -> list[Step]:
        """Brightness, contrast and saturation in random order, as torchvision's ColorJitter."""
        draws = [
            (hashed_one(index, seed=self.seed, epoch=epoch, copy=copy, stream=_JITTER_STREAM + k) >> 11) * 2.0**-53
            for k in range(2 * len(_JITTERS))
        ]
        factors, places = draws[: len(_JITTERS)], draws[len(_JITTERS) :]
        low, high = max(0.0, 1 - self.jitter), 1 + self.jitter
        return [
            (_JITTERS[k], low + (high - low) * factors[k]) for k in sorted(range(len(_JITTERS)), key=places.__getitem__)
        ]


class FastAugment(ImageAugment):
    """RandAugment or colour jitter in numpy and OpenCV, which runs without threads of its own from here on."""

    def __init__(self, data: DataConfig, recipe: RecipeConfig, *, seed: int) -> None:
        super().__init__(recipe, seed=seed)
        self.policy = read_notation(recipe.rand_augment) if recipe.rand_augment else None
        self.fill = _fill(data)
        rand_ops.hold_one_thread()  # here for workers that are forked, below for those that are spawned

    def augment(self, pixels: Pixels, index: int, *, epoch: int, copy: int) -> Pixels:
        rand_ops.hold_one_thread()
        if self.policy is None:
            steps = self._color_jitter(index, epoch=epoch, copy=copy)
        else:
            bits = hashed_one(index, seed=self.seed, epoch=epoch, copy=copy, stream=_RAND_STREAM)
            steps = self.policy.draw(random.Random(bits))
        pixels = np.ascontiguousarray(pixels)
        for op, argument in steps:
            pixels = rand_ops.apply(op, pixels, argument, fill=self.fill)
        return pixels


class PillowAugment(ImageAugment):
    """timm's own RandAugment, or Pillow's colour jitter."""

    def __init__(self, data: DataConfig, recipe: RecipeConfig, *, seed: int) -> None:
        super().__init__(recipe, seed=seed)
        self.transform = _timm_transform(recipe.rand_augment, data) if recipe.rand_augment else None

    def __call__(self, image: Image.Image, index: int, *, epoch: int, copy: int) -> Image.Image:
        if self.transform is None:
            for op, factor in self._color_jitter(index, epoch=epoch, copy=copy):
                image = getattr(ImageEnhance, op)(image).enhance(factor)
            return image
        bits = hashed_one(index, seed=self.seed, epoch=epoch, copy=copy, stream=_RAND_STREAM)
        with global_states_kept():
            random.seed(bits)
            np.random.seed(bits & 0xFFFFFFFF)
            return self.transform(image)

    def augment(self, pixels: Pixels, index: int, *, epoch: int, copy: int) -> Pixels:
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return np.asarray(self(image, index, epoch=epoch, copy=copy)).reshape(pixels.shape)


def build_image_augment(
    data: DataConfig, recipe: RecipeConfig, *, seed: int, exact: bool = False
) -> ImageAugment | None:
    """What the recipe asks for beyond crop and flip, or None; ``exact``: timm's own, pixel for pixel.

    Raises ConfigError for images of other than 1 or 3 channels, and for a notation that timm can read but not run.
    """
    key = "rand_augment" if recipe.rand_augment else "color_jitter"
    if not getattr(recipe, key):
        return None
    if data.in_chans not in (1, 3):
        raise ConfigError(f"data.in_chans must be 1 or 3 with recipe.{key}, got {data.in_chans}; nearest: 3")
    if recipe.rand_augment:
        read_notation(recipe.rand_augment)
    return (PillowAugment if exact else FastAugment)(data, recipe, seed=seed)


def hashed_one(index: int, *, seed: int, epoch: int, copy: int, stream: int) -> int:
    """What order.hashed gives for one sample, in Python's integers: 2 us, where numpy's calls on one number take 25."""
    state = _mix(seed * 0x9E3779B97F4A7C15 + stream + 1000 * copy)
    state = _mix(state + epoch * 0xD1B54A32D192ED03)
    return _mix(state + index * 0x9E3779B97F4A7C15)


def _mix(z: int) -> int:
    z &= 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return z ^ (z >> 31)


# ------------------------------------------------------------------------------------------------- timm's notation, drawn

_PLAIN = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"),
)
_GROWING = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")  # these change with inc1
_INCREASING = tuple(f"{name}Increasing" if name in _GROWING else name for name in _PLAIN)
_THREE = ("SolarizeIncreasing", "Desaturate", "GaussianBlur")  # t3a, of DeiT III (arXiv:2204.07118)
_WEIGHTED: dict[str, dict[str, float]] = {
    "weights": {
        **dict.fromkeys(("Rotate",), 3),
        **dict.fromkeys(("ShearX", "ShearY"), 2),
        **dict.fromkeys(("TranslateXRel", "TranslateYRel"), 1),
        **dict.fromkeys(("ColorIncreasing", "SharpnessIncreasing", "AutoContrast"), 0.25),
        **dict.fromkeys(("SolarizeIncreasing", "SolarizeAdd", "ContrastIncreasing", "BrightnessIncreasing"), 0.05),
        **dict.fromkeys(("Equalize", "PosterizeIncreasing", "Invert"), 0.05),
    },
    "3aw": {
        **dict.fromkeys(_THREE, 6),
        **dict.fromkeys(("Rotate",), 3),
        **dict.fromkeys(("ShearX", "ShearY"), 2),
        **dict.fromkeys(("PosterizeIncreasing", "AutoContrast", "ColorIncreasing", "SharpnessIncreasing"), 1),
        **dict.fromkeys(("ContrastIncreasing", "BrightnessIncreasing", "Equalize", "Invert"), 1),
    },
}


@dataclass(frozen=True)
class RandPolicy:
    """What a notation says: ``names`` are timm's, ``weights`` None for any of them at the same rate, with replacement."""

    names: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    num_ops: int = 2
    prob: float = 0.5
    magnitude: int = 10
    magnitude_std: float = 0.0
    magnitude_max: int = 10

    def draw(self, rng: random.Random) -> list[Step]:
        """The operations for one image. Once their names are chosen, ``rng`` is asked for what timm asks of its own."""
        applied = (name for name in self.choose(rng) if self.prob >= 1 or rng.random() <= self.prob)
        return [self._step(name, rng) for name in applied]

    def choose(self, rng: random.Random) -> list[str]:
        """The operations that may be applied to one image, by timm's names and in their order."""
        if self.weights is None:
            return [self.names[int(rng.random() * len(self.names))] for _ in range(self.num_ops)]
        chosen: list[str] = []
        while len(chosen) < self.num_ops:  # each once at most: what was chosen before is drawn again
            name = rng.choices(self.names, cum_weights=self._cumulative)[0]
            if name not in chosen:
                chosen.append(name)
        return chosen

    @cached_property
    def _cumulative(self) -> tuple[float, ...]:
        return tuple(accumulate(self.weights or ()))

    def _step(self, name: str, rng: random.Random) -> Step:
        magnitude: float = self.magnitude
        if self.magnitude_std == math.inf:
            magnitude = rng.uniform(0, magnitude)
        elif self.magnitude_std:
            magnitude = rng.gauss(magnitude, self.magnitude_std)
        argument = argument_of(name, max(0.0, min(magnitude, self.magnitude_max)), rng)
        return cast(Op, "Color" if name == "Desaturate" else name.removesuffix("Increasing")), argument


def argument_of(name: str, magnitude: float, rng: random.Random) -> float:
    """Of the operation with timm's ``name``, in its own unit; ``rng`` draws the sign where there is one."""
    level = magnitude / 10

    def signed(value: float) -> float:
        return -value if rng.random() > 0.5 else value

    match name:
        case "Rotate":
            return signed(level * 30)
        case "ShearX" | "ShearY":
            return signed(level * 0.3)
        case "TranslateXRel" | "TranslateYRel":
            return signed(level * 0.45)
        case "Posterize":
            return int(level * 4)
        case "PosterizeIncreasing":
            return 4 - int(level * 4)
        case "Solarize":
            return min(256, int(level * 256))
        case "SolarizeIncreasing":
            return 256 - min(256, int(level * 256))
        case "SolarizeAdd":
            return min(128, int(level * 110))
        case "Color" | "Contrast" | "Brightness" | "Sharpness":
            return level * 1.8 + 0.1
        case "ColorIncreasing" | "ContrastIncreasing" | "BrightnessIncreasing" | "SharpnessIncreasing":
            return max(0.1, 1.0 + signed(level * 0.9))
        case "Desaturate":
            return min(1.0, max(0.0, 1.0 - min(1.0, 0.5 + (1.0 - 0.5) * level)))
        case "GaussianBlur":
            return min(2.0, 0.1 + (2.0 - 0.1) * level)
        case _:  # AutoContrast, Equalize, Invert
            return 0.0


def read_notation(notation: str) -> RandPolicy:
    """What timm makes of a notation that RecipeConfig takes. Raises ConfigError for more operations than a set has to give."""
    options: dict[str, str] = {}
    for section in notation.split("-")[1:]:
        found = re.fullmatch(r"(t)(.+)|([a-z]+)(.+)", section)
        assert found is not None, "RecipeConfig takes no such notation"
        key, value = found[1] or found[3], found[2] or found[4]
        if key not in options or key not in ("t", "mstd", "mmax"):  # timm takes the first of these, the last of others
            options[key] = value
    noise = float(options.get("mstd", 0))
    chosen_set, increasing = options.get("t"), int(options.get("inc", 0))
    weights = _WEIGHTED.get(chosen_set or "")
    names = weights or (_THREE if chosen_set == "3a" else _INCREASING if increasing else _PLAIN)
    num_ops = int(options.get("n", 2))
    if weights and num_ops > len(weights):
        raise ConfigError(
            f"recipe.rand_augment: t{chosen_set} takes each of its {len(weights)} operations once at most, "
            f"got n{num_ops} in {notation!r}; nearest: n{len(weights)}"
        )
    return RandPolicy(
        tuple(names),
        tuple(weights.values()) if weights else None,
        num_ops=num_ops,
        prob=float(options.get("p", 0.5)),
        magnitude=int(options.get("m", 10)),
        magnitude_std=math.inf if noise > 100 else noise,
        magnitude_max=int(options.get("mmax", 0)) or 10,
    )


# ------------------------------------------------------------------------------------------------------- timm's transform


def _timm_transform(notation: str, data: DataConfig) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform  # all of timm with it, so only where it is asked for

    hparams = {  # as timm's own ImageNet transform, with the published interpolation
        "translate_const": int(min(as_hw(data.img_size)) * 0.45),
        "img_mean": _fill(data),
        "interpolation": Image.Resampling.BICUBIC,
    }
    transform = rand_augment_transform(notation, hparams)
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """NOTE: Pillow 13 refuses 0 bits, to which timm's strongest magnitudes come; before, that was a black image."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def _fill(data: DataConfig) -> tuple[int, ...]:
    """The mean colour, as timm rounds it."""
    return tuple(min(255, round(255 * mean)) for mean in data.mean)


@contextmanager
def global_states_kept() -> Iterator[None]:
    """Python's and numpy's global generators, from which timm draws, end as they began."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
