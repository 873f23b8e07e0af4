"""RandAugment (arXiv:1909.13719), or colour jitter without it, of one image at a time, in PIL.

RandAugment is timm's: its notation (``rand-m9-mstd0.5-inc1``) and its operations are those of the published runs, and
torchvision's RandAugment has neither the noise of the magnitude (mstd) nor the operations that grow with it (inc).
Where we differ from timm: the draws are a function of (seed, epoch, sample index, copy); posterizing to 0 bits gives a black
image on any Pillow; and colour jitter never comes on top of RandAugment, not even of its set 3a.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from eit_lab.config import ConfigError, DataConfig, RecipeConfig, as_hw
from eit_lab.data.order import hashed, uniform

_RAND_STREAM, _JITTER_STREAM = 60, 61  # those of crop and flip are below
_JITTERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class ImageAugment:
    """An image to an augmented one of the same size and mode, by (seed, epoch, sample index, copy)."""

    def __init__(self, data: DataConfig, recipe: RecipeConfig, *, seed: int) -> None:
        self.seed, self.jitter = seed, recipe.color_jitter
        self.transform = _rand_augment(recipe.rand_augment, data) if recipe.rand_augment else None

    def __call__(self, image: Image.Image, index: int, *, epoch: int, copy: int) -> Image.Image:
        """NOTE: leaves Python's and numpy's global generators in another state; see ``global_states_kept``."""
        if self.transform is None:
            return self._color_jitter(image, index, epoch=epoch, copy=copy)
        bits = int(hashed(np.array([index]), seed=self.seed, epoch=epoch, copy=copy, stream=_RAND_STREAM)[0])
        random.seed(bits)
        np.random.seed(bits & 0xFFFFFFFF)
        return self.transform(image)

    def on_pixels(
        self, images: Tensor, index: NDArray[np.int64], *, epoch: NDArray[np.int64], copy: NDArray[np.int64]
    ) -> Tensor:
        """The same for a batch of uint8 images (B, C, H, W), C 1 or 3; a new tensor."""
        augmented = []
        with global_states_kept():
            for pixels, *key in zip(images.numpy(), index.tolist(), epoch.tolist(), copy.tolist(), strict=True):
                image = Image.fromarray(
                    pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
                )
                result = np.asarray(self(image, key[0], epoch=key[1], copy=key[2]))
                augmented.append(result[None] if result.ndim == 2 else result.transpose(2, 0, 1))
        return torch.from_numpy(np.stack(augmented))

    def _color_jitter(self, image: Image.Image, index: int, *, epoch: int, copy: int) -> Image.Image:
        """Brightness, contrast and saturation in random order, as torchvision's ColorJitter."""
        draws = [
            float(uniform(np.array([index]), seed=self.seed, epoch=epoch, copy=copy, stream=_JITTER_STREAM + k)[0])
            for k in range(2 * len(_JITTERS))
        ]
        factors, order = draws[: len(_JITTERS)], np.argsort(draws[len(_JITTERS) :])
        low, high = max(0.0, 1 - self.jitter), 1 + self.jitter
        for place in order:
            image = _JITTERS[place](image).enhance(low + (high - low) * factors[place])
        return image


def build_image_augment(data: DataConfig, recipe: RecipeConfig, *, seed: int) -> ImageAugment | None:
    """What the recipe asks for beyond crop and flip, or None. Raises ConfigError for images that PIL has no mode for."""
    key = "rand_augment" if recipe.rand_augment else "color_jitter"
    if not getattr(recipe, key):
        return None
    if data.in_chans not in (1, 3):
        raise ConfigError(f"data.in_chans must be 1 or 3 with recipe.{key}, got {data.in_chans}; nearest: 3")
    return ImageAugment(data, recipe, seed=seed)


@contextmanager
def global_states_kept() -> Iterator[None]:
    """Python's and numpy's global generators, from which timm draws, end as they began."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _rand_augment(notation: str, data: DataConfig) -> Callable[[Image.Image], Image.Image]:
    from timm.data.auto_augment import rand_augment_transform  # all of timm with it, so only where it is asked for

    hparams = {  # as timm's own ImageNet transform, with the published interpolation
        "translate_const": int(min(as_hw(data.img_size)) * 0.45),
        "img_mean": tuple(min(255, round(255 * mean)) for mean in data.mean),
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
