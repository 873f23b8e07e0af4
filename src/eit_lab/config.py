"""The typed configuration: frozen dataclasses own types, ranges, units, defaults and one line of help for each field.

YAML under ``conf/`` picks values, Hydra composes them (compose.py), ``load`` turns the composed mapping into these
objects or says in one line what is wrong. Nothing here imports torch: a typo answers in well under a second.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from eit_lab.schedule import LayerSplit, layer_splits


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
    conv: Literal["depthwise"] = _opt("depthwise", "kind of convolution in the convolution branch")
    attn_dims: tuple[NonNegInt, ...] | None = _opt(None, "attention channels per layer, for rule=custom only")

    def __post_init__(self) -> None:
        if self.kernel_size % 2 == 0:
            raise ValueError(
                f"model.ib.kernel_size must be odd, so that the token grid keeps its size, got {self.kernel_size}; "
                f"nearest: {self.kernel_size + 1}"
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
    split_seed: NonNegInt = _opt(0, "seed of the held-out slice; the same for all training seeds")
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
    kind: Literal["imagenet"] = _req("folders train/ and val/, one folder a class in each")
    root: Text | None = _opt(None, "folder with train/ and val/; EIT_LAB_IMAGENET names it too")
    num_classes: PosInt | None = _opt(None, "number of classes; null: the number of class folders in train/")
    min_crop_share: Annotated[float, Field(gt=0, le=1, strict=True)] = _opt(
        0.08, "smallest area of a training crop as a share of the image"
    )
    eval_resize_share: Annotated[float, Field(gt=0, le=1, strict=True)] = _opt(
        0.875, "evaluation: centre crop over the resized shorter side (224 / 256)"
    )


DataConfig: TypeAlias = DigitsData | TorchvisionData | SyntheticData | ImageNetData

# ------------------------------------------------------------------------------------------ recipe, trainer, logger, run


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class RecipeConfig:
    name: Text = _opt("basic", "label of the recipe")
    epochs: PosInt = _opt(300, "passes over the training images")
    batch_size: PosInt = _opt(512, "GLOBAL batch: images per optimizer step over all devices and accumulation")
    lr: PosFloat = _opt(1e-3, "peak learning rate of AdamW, at the global batch")
    warmup_epochs: NonNegFloat = _opt(5.0, "epochs of linear warm-up from warmup_lr to lr")
    warmup_lr: NonNegFloat = _opt(1e-6, "learning rate of the first step")
    min_lr: NonNegFloat = _opt(1e-5, "learning rate at the end of the cosine")
    weight_decay: NonNegFloat = _opt(0.05, "decoupled decay of matrices and kernels; biases, norms, tokens have none")
    beta1: Annotated[float, Field(ge=0, lt=1, strict=True)] = _opt(0.9, "AdamW, first moment")
    beta2: Annotated[float, Field(ge=0, lt=1, strict=True)] = _opt(0.999, "AdamW, second moment")
    eps: PosFloat = _opt(1e-8, "AdamW, added to the root of the second moment")
    label_smoothing: Annotated[float, Field(ge=0, lt=1, strict=True)] = _opt(0.1, "cross-entropy label smoothing")
    select: Literal["best", "last"] = _opt(
        "best", "weights that give the final number: best on the held-out slice of train, or the last (small slices)"
    )


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class TrainerConfig:
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu"] = _opt("auto", "Lightning's accelerator")
    devices: StrictInt | Text | Annotated[tuple[NonNegInt, ...], Field(min_length=1)] = _opt(
        "auto", "devices per node, as Lightning takes them"
    )
    num_nodes: PosInt = _opt(1, "machines")
    strategy: Literal["auto", "ddp", "ddp_fork", "ddp_spawn", "fsdp", "deepspeed"] = _opt(
        "auto", "Lightning's strategy"
    )
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = _opt(
        "auto", "auto: bf16-mixed where the accelerator has it, 32-true on CPU"
    )
    compile: Flag = _opt(False, "torch.compile the backbone")
    accumulate_grad_batches: PosInt = _opt(1, "micro-batches per optimizer step; the global batch stays as it is")
    gradient_clip_val: NonNegFloat | None = _opt(None, "clip the gradient's norm at this value")
    max_epochs: PosInt | None = _opt(None, "null: recipe.epochs; the schedule spans what is trained")
    max_steps: PosInt | None = _opt(None, "stop after so many optimizer steps; the schedule spans them")
    check_val_every_n_epoch: PosInt = _opt(1, "epochs between two evaluations on the held-out slice")
    log_every_n_steps: PosInt = _opt(20, "optimizer steps between two logged training losses")
    limit_train_batches: Batches = _opt(1.0, "batches per epoch: a number, or a share")
    limit_val_batches: Batches = _opt(1.0, "validation batches: a number, or a share")
    limit_test_batches: Batches = _opt(1.0, "test batches: a number, or a share")
    overfit_batches: NonNegInt = _opt(0, "train on the same few batches again and again; 0: off")
    deterministic: Flag = _opt(False, "refuse operations that have no repeatable form (CPU runs repeat without it)")
    profiler: Literal["simple", "advanced", "pytorch"] | None = _opt(None, "Lightning's profiler")
    progress_bar: Flag = _opt(True, "show a bar with the time that is left")

    def __post_init__(self) -> None:
        if isinstance(self.devices, int) and self.devices != -1 and self.devices < 1:
            raise ValueError(f"trainer.devices must be 1 or more, or -1 for all, got {self.devices}; nearest: 1")


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


LoggerConfig: TypeAlias = NoLogger | WandbLogger


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class RunConfig:
    root: Text = _opt("runs", "folder that holds the run folders; relative to where the command is typed")
    overwrite: Flag = _opt(False, "start anew: the earlier run of the same identity is moved aside")
    sweep: Text | None = _opt(None, "the sweep this run belongs to; set by -m")


@dataclass(config=_CHECKED, frozen=True, kw_only=True)
class Config:
    """Everything one run depends on."""

    seed: Annotated[StrictInt, Field(ge=0, lt=2**32)] = _opt(0, "seed of the weights, the order and the augmentation")
    model: ModelConfig = _req("what is trained")
    data: Annotated[DataConfig, Field(discriminator="kind")] = _req("on which images")
    recipe: RecipeConfig = _opt(RecipeConfig(), "how")
    trainer: TrainerConfig = _opt(TrainerConfig(), "where, and for how long; passed on to Lightning")
    logger: Annotated[LoggerConfig, Field(discriminator="kind")] = _req("where metrics go")
    run: RunConfig = _opt(RunConfig(), "folders")

    def __post_init__(self) -> None:
        devices = self.trainer.devices
        count = len(devices) if isinstance(devices, tuple) else devices
        if isinstance(count, int) and count > 0:  # else it is known on the machine only
            per_device_batch(self, world_size=count * self.trainer.num_nodes)


def per_device_batch(config: Config, *, world_size: int) -> int:
    """Images of one device and micro-batch, from the GLOBAL batch. Refuses what does not divide, with the nearest that do."""
    batch, accumulate = config.recipe.batch_size, config.trainer.accumulate_grad_batches
    if batch % (world_size * accumulate) == 0:
        return batch // (world_size * accumulate)
    if batch % accumulate:
        near = _nearest_divisors(batch, accumulate)
        raise ConfigError(
            f"trainer.accumulate_grad_batches must divide recipe.batch_size ({batch}), got {accumulate}; nearest: {near}"
        )
    near = _nearest_divisors(batch // accumulate, world_size)
    raise ConfigError(
        f"trainer.devices times trainer.num_nodes must divide the global recipe.batch_size ({batch}"
        f"{f' in {accumulate} micro-batches' if accumulate > 1 else ''}), got {world_size}; nearest: {near}"
    )


def _nearest_divisors(number: int, wanted: int) -> str:
    below = next(n for n in range(min(wanted, number), 0, -1) if number % n == 0)
    above = next((n for n in range(wanted, number + 1) if number % n == 0), None)
    return f"{below}" if above is None else f"{below} and {above}"


# -------------------------------------------------------------------------------------------------------- load and dump

_UNION_KEYS = ("model.stem", "data", "logger")
_LOADERS = {cls: TypeAdapter(cls) for cls in (ModelConfig, Config)}


def load(plain: Mapping[str, Any]) -> Config:
    """The typed Config of a composed, resolved mapping. Raises ConfigError in one line for the first thing wrong.

    Nulls that follow from other keys are filled here (the stem's numbers from data.img_size), so that two commands that
    mean the same run are the same run.
    """
    config: Config = _validate(Config, plain, prefix="")
    return dataclasses.replace(config, model=config.model.for_images(config.data.img_size))


def load_model(plain: Mapping[str, Any]) -> ModelConfig:
    """The typed ModelConfig of a composed mapping of the model group alone."""
    model: ModelConfig = _validate(ModelConfig, plain, prefix="model.")
    return model


def _validate(cls: Any, plain: Mapping[str, Any], *, prefix: str) -> Any:
    try:
        return _LOADERS[cls].validate_python(dict(plain))
    except ValidationError as error:
        raise ConfigError(_one_line(error.errors(), cls, prefix)) from None


def _one_line(errors: Sequence[Any], cls: type, prefix: str) -> str:
    """The first mistake in words. A plain union fails once for each alternative, all at one key: name them all."""
    first = errors[0]
    key, owner = _dotted_key(first["loc"], cls, prefix)
    got, kind, ctx = first["input"], first["type"], first.get("ctx", {})
    if kind == "value_error":
        return str(ctx["error"])
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        return unknown_key(key, got, [f.name for f in dataclasses.fields(owner)] if owner else [])
    if kind in ("missing", "missing_argument", "missing_keyword_only_argument", "union_tag_not_found"):
        return f"{key} must be given, and is missing"
    if kind in ("literal_error", "union_tag_invalid"):
        expected = ctx.get("expected", ctx.get("expected_tags", ""))
        valid = [word.strip().strip("'") for word in expected.replace(" or ", ", ").split(",")]
        if kind == "union_tag_invalid":
            key, got = f"{key}.kind", ctx["tag"]
        return f"{key} must be one of {', '.join(valid)}, got {got!r}{nearest(str(got), valid)}"
    same_key = [error for error in errors if _dotted_key(error["loc"], cls, prefix)[0].startswith(key)]
    rules = list(dict.fromkeys(_rule(error) for error in same_key))
    hint = _nearest_bound(ctx) if len(rules) == 1 else ""
    return f"{key} must be {' or '.join(rules)}, got {got!r}{hint}"


def _rule(error: Mapping[str, Any]) -> str:
    text: str = error["msg"].removeprefix("Input should be ")
    for ours, theirs in {"an integer": "a valid integer", "a ": "a valid ", "text": "a string"}.items():
        text = text.replace(theirs, ours)
    return text.partition(",")[0].replace("a tuple", "a list").replace("an instance of", "a")


def _nearest_bound(ctx: Mapping[str, Any]) -> str:
    for name, before in (("ge", ""), ("le", ""), ("gt", "just above "), ("lt", "just below ")):
        if name in ctx:
            return f"; nearest: {before}{ctx[name]:g}"
    return ""


def _dotted_key(loc: Sequence[int | str], cls: type, prefix: str) -> tuple[str, type | None]:
    """The user's dotted key for a pydantic location, and the dataclass that owns its last part."""
    key, owner, current = prefix.rstrip("."), None, _members(cls)
    steps = iter(loc)
    for step in steps:
        by_tag = {tag: sub for sub in current for tag in _tags(sub)}
        if key in _UNION_KEYS and step in by_tag:  # a tagged union's tag is not a part of the key
            current = (by_tag[str(step)],)
            continue
        owner = next((sub for sub in current if step in {f.name for f in dataclasses.fields(sub)}), None)
        if owner is None and current:
            owner = current[0]
            current = ()
        elif owner is not None:
            current = _members(get_type_hints(owner, include_extras=True).get(str(step)))
        elif not isinstance(step, int):  # which alternative of a plain union failed: not a part of the key
            continue
        key = f"{key}[{step}]" if isinstance(step, int) else f"{key}.{step}".lstrip(".")
    return key, owner


def _members(hint: Any) -> tuple[type, ...]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return (hint,)
    return tuple(member for part in get_args(hint) for member in _members(part)) if get_origin(hint) else ()


def _tags(cls: type) -> tuple[str, ...]:
    hint = get_type_hints(cls).get("kind")
    return get_args(hint) if get_origin(hint) is Literal else ()


def unknown_key(key: str, value: Any, siblings: Sequence[str]) -> str:
    """One line for a key that does not exist, with the nearest of its siblings."""
    parent, _, last = key.rpartition(".")
    valid = [f"{parent}.{name}".lstrip(".") for name in siblings]
    close = difflib.get_close_matches(last, siblings, n=1, cutoff=0.5)
    if close:
        return f"{key} is not a key, got {value!r}; nearest: {f'{parent}.{close[0]}'.lstrip('.')}"
    return f"{key} is not a key, got {value!r}; there are: {', '.join(valid)}"


def nearest(word: str, valid: Sequence[str]) -> str:
    """``; nearest: NAME`` when one of the valid names is close to the word, else nothing."""
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.4)
    return f"; nearest: {close[0]}" if close else ""


def dump(config: Any) -> dict[str, Any]:
    """A config object as nested plain dicts and lists, ready for JSON, YAML and hashing."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def field_help(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(dotted key, help, default) of every field below a config class, depth first; MISSING where there is no default."""
    hints = get_type_hints(cls, include_extras=True)
    for item in dataclasses.fields(cls):
        key = f"{prefix}{item.name}"
        members = _members(hints[item.name])
        if not members:
            yield key, item.metadata["help"], item.default
        for member in members:
            yield from field_help(member, f"{key}.")


def defaults(cls: type) -> dict[str, Any]:
    """The fields of a flat config class that have defaults, as plain values."""
    return {f.name: _plain(f.default) for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}
