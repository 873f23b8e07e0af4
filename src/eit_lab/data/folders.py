"""Images from any folder, read as a model's own evaluation reads them: of a variant's classes, or single files."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from eit_lab.config import ConfigError, DataConfig, ImageNetData, as_hw
from eit_lab.data.batch import FILLER, Batch
from eit_lab.data.crops import eval_crop
from eit_lab.data.order import Item
from eit_lab.data.variants import Variant

_MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


def read_image(path: Path, config: DataConfig) -> Tensor:
    """One file as uint8 (C, h, w) of the configured size: resized and cropped as ImageNet's, else resized as small images.

    Raises ConfigError, in one line, for what is not an image.
    """
    if config.in_chans not in _MODES:
        raise ConfigError(f"data.in_chans must be 1 or 3 to read image files, got {config.in_chans}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of metadata, such as broken EXIF, that nobody looks at
            with Image.open(path) as file:
                image = file.convert(_MODES[config.in_chans])
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = str(error).replace(str(path), "it").splitlines()[0]
        raise ConfigError(f"{path} cannot be read as an image: {reason}") from None
    hw = as_hw(config.img_size)
    if isinstance(config, ImageNetData):
        return pil_to_tensor(eval_crop(image, hw, resize_share=config.eval_resize_share))
    pixels = pil_to_tensor(image)
    if tuple(pixels.shape[-2:]) == hw:
        return pixels
    resized = F.interpolate(pixels[None].float(), hw, mode="bicubic", antialias=True)[0]
    return resized.round_().clamp_(0, 255).to(torch.uint8)


class VariantImages(Dataset[Batch]):
    """The images of a variant, decoded one by one; a batch's label is the first class that counts as right."""

    def __init__(self, variant: Variant, config: DataConfig) -> None:
        self.variant, self.config = variant, config

    def __len__(self) -> int:
        return len(self.variant.files)

    def __getitem__(self, items: Sequence[Item]) -> Batch:
        """The batch of these samples. Raises ConfigError, in one line, for a file that is not an image."""
        index = [item[1] for item in items]
        blank = torch.zeros((self.config.in_chans, *as_hw(self.config.img_size)), dtype=torch.uint8)
        images = [blank if i == FILLER else read_image(self.variant.files[i], self.config) for i in index]
        labels = [0 if i == FILLER else int(self.variant.targets[i, 0]) for i in index]
        return Batch(
            torch.stack(images),
            torch.tensor(labels),
            torch.tensor(index),
            torch.zeros((len(index), 3), dtype=torch.int64),
        )
