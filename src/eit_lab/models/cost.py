"""What a model costs, known before anything is allocated: parameters and multiply-accumulates (MACs) of one image.

The model is built and run on the meta device under torch's FLOP counter, so the count is of the operations that really run.
Products that are no matrix product and no convolution are not seen there; a dynamic convolution says how many it has.
Two conventions, because published tables differ:

- ``macs``: every product, those of the attention (QK^T, AV) included. One MAC is two FLOPs; norms, activations, softmax,
  pooling and biases count as zero.
- ``macs_thop``: without the attention products and with 4 for each element of a norm, as the module-hook counter thop does.
  This reproduces the four published numbers of arXiv:2203.07116 to their last digit (1.73, 3.84, 6.52, 10.0 G); that the
  authors used thop is our inference from those digits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eit_lab.config import AnyModelConfig, ImageSize, as_hw
from eit_lab.models.backbone import Backbone
from eit_lab.models.build import build_model
from eit_lab.models.convolutions import DynamicConv


@dataclass(frozen=True)
class Cost:
    """Parameters, MACs of a forward pass of one image in both conventions, and the (h, w) tokens; () of a baseline of timm."""

    params: int
    macs: int
    macs_thop: int
    grid: tuple[int, ...]

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {**asdict(self), "grid": list(self.grid)}


def count_cost(config: AnyModelConfig, *, num_classes: int, img_size: ImageSize, in_chans: int = 3) -> Cost:
    """Parameters and MACs of a configured model, on the meta device. Raises ConfigError where it cannot take the images."""
    norm_elements = products = 0

    def count_norm(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal norm_elements
        norm_elements += args[0].numel()

    def count_products(module: nn.Module, args: tuple[Tensor, tuple[int, int]]) -> None:
        nonlocal products
        assert isinstance(module, DynamicConv)
        products += module.count_products(*args)

    with torch.device("meta"):
        model = build_model(config, num_classes=num_classes, img_size=img_size, in_chans=in_chans).eval()
        image = torch.empty(1, in_chans, *as_hw(img_size))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            module.register_forward_pre_hook(count_norm)
        elif isinstance(module, DynamicConv):
            module.register_forward_pre_hook(count_products)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    counts = counter.get_flop_counts()["Global"]
    # The batched products of a backbone are QK^T and AV; every other product is a Linear or a convolution.
    attention = sum(flops for op, flops in counts.items() if "bmm" in str(op) or "attention" in str(op))
    total = sum(counts.values()) + 2 * products
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        macs=total // 2,
        macs_thop=(total - attention) // 2 + 4 * norm_elements,
        grid=model.grid if isinstance(model, Backbone) else (),
    )
