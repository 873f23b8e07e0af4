"""What one training step of a model asks for, counted on the meta device: operations, products, and the gradients' buckets.

DistributedDataParallel all-reduces gradients in buckets, filled in the order in which the first backward pass completed them: the
first one up to 1 MiB, all others up to 25 MiB, each closed by the gradient that reaches the limit (torch, reducer.cpp). How far
the backward pass is when a bucket is full says how much of its all-reduce can hide behind the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

from eit_lab.config import Config, ConfigError, ModelConfig, micro_batches
from eit_lab.plan import plan
from eit_lab.runs import DataFacts

SIZES = ("mini", "tiny", "base", "large")
IMAGENET_TRAIN = 1_281_167
GRADIENT_BYTES = 4
"""Of a parameter: the weights of bf16-mixed training are fp32, and so are their gradients."""
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20
"""torch's limits where nobody says otherwise, as we do not."""
CHECKPOINT_BYTES = 16
"""Of a parameter: the weights, their average, and AdamW's two moments, fp32."""
OPTIMIZER_BYTES = 44
"""Of a parameter, moved in the device's memory: norm (4), AdamW reads 4 and writes 3 numbers (28), average (12)."""


@dataclass(frozen=True)
class Bucket:
    """Gradients that are all-reduced together."""

    num_bytes: int
    ready_share: float
    """Of the backward pass's products, done when the last of its gradients is there."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model at 224 px with 1000 classes under its recipe."""

    model: str
    params: int
    macs: int
    """Of an image's forward pass, attention products included."""
    forward_ops: int
    """Operations that make or change a tensor, as torch dispatches them; views are none."""
    backward_ops: int
    backward_ratio: float
    """Products of the backward pass over those of the forward pass."""
    buckets: tuple[Bucket, ...]
    """In the order of their all-reduce."""
    batch_size: int
    """GLOBAL, the recipe's."""
    steps_per_epoch: int
    epochs: int
    num_val: int
    eval_batch_size: int
    images_per_gpu: dict[int, int | None]
    """By number of GPUs; None: the recipe refuses that number."""

    @property
    def gradient_bytes(self) -> int:
        """All-reduced in a step."""
        return GRADIENT_BYTES * self.params

    @property
    def checkpoint_bytes(self) -> int:
        """Of a state, without what does not grow with the model."""
        return CHECKPOINT_BYTES * self.params

    def as_dict(self) -> dict[str, Any]:
        """For the record."""
        return {**asdict(self), "gradient_bytes": self.gradient_bytes, "checkpoint_bytes": self.checkpoint_bytes}


def fill_buckets(
    sizes: Iterable[int], *, first: int = FIRST_BUCKET_BYTES, others: int = BUCKET_BYTES
) -> list[list[int]]:
    """Gradients of ``sizes`` bytes, in their order of arrival, as lists of their places: a bucket each."""
    buckets: list[list[int]] = [[]]
    filled, limit = 0, first
    for place, size in enumerate(sizes):
        buckets[-1].append(place)
        filled += size
        if filled >= limit:
            buckets.append([])
            filled, limit = 0, others
    return buckets if buckets[-1] else buckets[:-1]


def count_workload(size: str, gpus: Sequence[int]) -> Workload:
    """Of ``eit_SIZE`` with recipe=eit300 on each of the numbers of GPUs."""
    from eit_lab.compose import compose_one
    from eit_lab.models.cost import count_cost

    config = compose_one([f"model=eit_{size}", "recipe=eit300", "data=imagenet"])
    num_val = ceil(config.data.val_size * IMAGENET_TRAIN)
    facts = DataFacts(
        num_classes=1000, num_train=IMAGENET_TRAIN - num_val, num_val=num_val, num_test=50_000, fingerprint=""
    )
    whole = plan(config, facts)
    cost = count_cost(config.model, num_classes=1000, img_size=config.data.img_size)
    return Workload(
        model=config.model.name,
        params=cost.params,
        macs=cost.macs,
        **_count_passes(config),
        batch_size=config.recipe.batch_size,
        steps_per_epoch=whole.steps_per_epoch,
        epochs=whole.epochs,
        num_val=num_val,
        eval_batch_size=config.trainer.eval_batch_size,
        images_per_gpu={num: _share(config, num) for num in gpus},
    )


def _share(config: Config, gpus: int) -> int | None:
    try:
        return micro_batches(config, world_size=gpus)[0]
    except ConfigError:
        return None


def _count_passes(config: Config) -> dict[str, Any]:
    """One forward and backward pass of the model on the meta device."""
    import torch
    import torch.nn.functional as F
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    from eit_lab.models.backbone import Backbone

    assert isinstance(config.model, ModelConfig)

    class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Counts what is dispatched."""

        num = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            aliases = [result.alias_info for result in func._schema.returns]
            is_view = any(alias is not None and not alias.is_write for alias in aliases)
            self.num += not is_view and "_unsafe_view" not in str(func)
            return func(*args, **(kwargs or {}))

    def convolution_backward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        # NOTE: torch's own formula forgets the groups of a depthwise convolution in this direction.
        grad, weight, wanted = args[0], args[2], args[-1]
        return int(2 * prod(grad.shape[:1] + grad.shape[2:]) * weight.numel() * sum(wanted[:2]))

    convolution_backward._get_raw = True  # type: ignore[attr-defined]
    products = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}
    )
    operations = Operations()  # type: ignore[no-untyped-call]
    arrived: list[tuple[int, int]] = []
    with torch.device("meta"):
        model = Backbone(config.model, num_classes=1000, img_size=config.data.img_size)
        images, targets = torch.empty(2, 3, *model.img_size), torch.empty(2, 1000)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda p: arrived.append((GRADIENT_BYTES * p.numel(), products.get_total_flops()))
        )
    with products, operations:
        loss = F.cross_entropy(model(images), targets)
        forward, forward_ops = products.get_total_flops(), operations.num
        loss.backward()  # type: ignore[no-untyped-call]
        whole = products.get_total_flops()
    sizes = [num_bytes for num_bytes, _ in arrived]
    buckets = tuple(
        Bucket(sum(sizes[place] for place in places), (arrived[places[-1]][1] - forward) / (whole - forward))
        for places in fill_buckets(sizes)
    )
    return {
        "forward_ops": forward_ops,
        "backward_ops": operations.num - forward_ops,
        "backward_ratio": (whole - forward) / forward,
        "buckets": buckets,
    }
