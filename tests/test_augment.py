"""Augmentation: timm's operations and geometry, drawn from (seed, epoch, index, copy, place) and from nothing else."""

from __future__ import annotations

import itertools
import random
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import create_transform
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from eit_lab.compose import compose_one
from eit_lab.config import Config, ConfigError
from eit_lab.data.augment import BatchAugment
from eit_lab.data.batch import Batch
from eit_lab.data.module import ImageData
from eit_lab.data.order import hashed
from eit_lab.data.rand_augment import build_image_augment, global_states_kept
from eit_lab.data.small import load_small

PUBLISHED = "rand-m9-mstd0.5-inc1"
ALL_ON = ("data=synthetic", "recipe=debug", "data.img_size=15", "data.num_samples=103", "data.val_size=7")


@cache
def configured(*overrides: str) -> Config:
    return compose_one([*ALL_ON, *overrides])


def batch_augment(config: Config, *, seed: int = 0, num_classes: int = 10) -> BatchAugment:
    return BatchAugment(config.data, config.recipe, num_classes=num_classes, seed=seed)


def micro_batches(
    config: Config, *, rank: int = 0, world_size: int = 1, start: tuple[int, int] = (0, 0)
) -> list[Batch]:
    data = ImageData(config, start=start)
    data._place = lambda: (rank, world_size)  # type: ignore[method-assign]
    data.setup("fit")
    return list(data.train_dataloader())


def made_batch(num_images: int, *, epoch: int = 0, px: int = 16, chans: int = 3) -> Batch:
    """Images that are white at even places and black at odd ones, each of its own class."""
    place = torch.arange(num_images)
    images = torch.zeros(num_images, chans, px, px, dtype=torch.uint8)
    images[::2] = 255
    draw = torch.stack([torch.full_like(place, epoch), torch.zeros_like(place), place], dim=1)
    return Batch(images, place % 10, place, draw)


def photograph(px: int, *, mode: str = "RGB") -> Image.Image:
    from sklearn.datasets import load_sample_images

    return Image.fromarray(load_sample_images().images[0][100 : 100 + px, 200 : 200 + px]).convert(mode)


# ------------------------------------------------------------------------------------------------------ image by image


@pytest.mark.parametrize("notation", [PUBLISHED, "rand-m7-n3-p0.8", "rand-m9-tweights-mmax12"])
def test_rand_augment_is_timms_own_transform_seeded_equally(notation: str) -> None:
    config = configured(f"recipe.rand_augment={notation}", "data.img_size=64")
    ours = build_image_augment(config.data, config.recipe, seed=3, exact=True)
    assert ours is not None
    _, theirs, _ = create_transform(
        64, is_training=True, auto_augment=notation, interpolation="bicubic", mean=config.data.mean, separate=True
    )
    image, changed, refused = photograph(64), 0, 0
    with global_states_kept():
        for index in range(150):
            bits = int(hashed(np.array([index]), seed=3, epoch=2, copy=1, stream=60)[0])
            result = ours(image, index, epoch=2, copy=1)
            random.seed(bits)
            np.random.seed(bits % 2**32)
            try:
                expected = theirs(image)
            except ValueError:  # posterize with 0 bits, in newer versions of Pillow
                refused += 1
                continue
            assert np.array_equal(np.asarray(result), np.asarray(expected))
            changed += result != image
    assert changed > 60
    assert refused < 5


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_operation_takes_images_of_one_and_three_channels_at_any_magnitude(mode: str) -> None:
    one = () if mode == "RGB" else ("data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]")
    image = photograph(32, mode=mode)
    for magnitude, kind in itertools.product((0, 10), ("inc0", "inc1", "t3aw", "tweights")):
        config = configured(f"recipe.rand_augment=rand-m{magnitude}-p1-{kind}", *one)
        augment = build_image_augment(config.data, config.recipe, seed=0, exact=True)
        assert augment is not None
        for op in augment.transform.ops:
            result = op(image)
            assert (result.size, result.mode) == (image.size, mode)
            if op.name == "PosterizeIncreasing" and magnitude == 10:
                assert not np.asarray(result).any()  # no bits are kept


def test_rand_augment_leaves_the_global_generators_as_they_were() -> None:
    config = configured()
    train = load_small(config.data, config.recipe, seed=0)["train"]
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    train[[(0, index, 0, index) for index in range(8)]]
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])


def test_colour_jitter_is_uniform_in_its_range_and_gives_way_to_rand_augment() -> None:
    config = configured("recipe.rand_augment=null", "recipe.color_jitter=0.4")
    jitter = build_image_augment(config.data, config.recipe, seed=0, exact=True)
    assert jitter is not None
    # One grey has no contrast and no saturation, so brightness alone changes it.
    grey = Image.new("RGB", (2, 2), (100, 100, 100))
    factors = [np.asarray(jitter(grey, i, epoch=0, copy=0)).max() / 100 for i in range(400)]
    assert stats.kstest(factors, stats.uniform(0.6, 0.8).cdf).pvalue > 0.01
    photo = photograph(32)
    saturation = np.ptp(np.asarray(jitter(photo, 0, epoch=0, copy=0)).astype(int), axis=-1).mean()
    assert saturation != np.ptp(np.asarray(photo).astype(int), axis=-1).mean()
    both = configured("recipe.color_jitter=0.4")
    augment = build_image_augment(both.data, both.recipe, seed=0, exact=True)
    assert augment is not None
    assert augment.transform is not None
    none = configured("recipe.rand_augment=null")
    assert build_image_augment(none.data, none.recipe, seed=0) is None


@pytest.mark.parametrize("recipe", ["recipe.rand_augment=rand-m9", "recipe.color_jitter=0.3"])
def test_images_that_pil_has_no_mode_for_are_one_line(recipe: str) -> None:
    config = configured(
        "data.in_chans=2", "data.mean=[0.5,0.5]", "data.std=[0.5,0.5]", "recipe.rand_augment=null", recipe
    )
    key = recipe.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"data.in_chans must be 1 or 3 with {key}, got 2; nearest: 3"):
        load_small(config.data, config.recipe, seed=0)


@pytest.mark.parametrize("notation", ["rand", PUBLISHED, "rand-m9-n3-p0.5-mmax10-t3a", "rand-mstd101-inc0"])
def test_a_notation_that_is_taken_is_taken_by_timm_too(notation: str) -> None:
    config = configured(f"recipe.rand_augment={notation}")
    assert build_image_augment(config.data, config.recipe, seed=0) is not None


@pytest.mark.parametrize("notation", ["", "randaugment", "rand-m", "rand-x9", "rand-m9.5", "augmix-m3", "rand-p1.5"])
def test_another_notation_is_one_line(notation: str) -> None:
    message = rf"recipe.rand_augment must be RandAugment in timm's notation, got '{notation}'; nearest: {PUBLISHED}"
    with pytest.raises(ConfigError, match=message):
        configured(f"recipe.rand_augment='{notation}'")


# -------------------------------------------------------------------------------- whole batches: what they depend on


@pytest.mark.parametrize(
    ("world_size", "accumulate", "more"),
    [(1, 1, ["data.num_workers=2"]), (2, 1, []), (1, 4, []), (2, 2, ["data.num_workers=1"]), (8, 1, [])],
)
def test_a_step_is_the_same_to_the_last_bit_however_it_is_cut(
    world_size: int, accumulate: int, more: list[str]
) -> None:
    config = configured()
    augment = batch_augment(config)
    cut = configured(f"trainer.accumulate_grad_batches={accumulate}", *more)
    by_rank = [micro_batches(cut, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(micro_batches(config)):
        whole = *augment(batch), batch.index, batch.draw
        micro = range(step * accumulate, (step + 1) * accumulate)
        parts = [(*augment(b), b.index, b.draw) for m in micro for b in (ranks[m] for ranks in by_rank)]
        for name, one, many in zip(
            ("images", "targets", "index", "draw"), whole, zip(*parts, strict=True), strict=True
        ):
            assert torch.equal(one, torch.cat(many)), name


def test_a_resumed_epoch_goes_on_with_the_same_images() -> None:
    config = configured("trainer.accumulate_grad_batches=2")
    augment = batch_augment(config)
    whole, resumed = micro_batches(config, start=(5, 0)), micro_batches(config, start=(5, 7))
    assert len(resumed) == len(whole) - 7 == 5
    for a, b in zip(whole[7:], resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(augment(a), augment(b), strict=True))


def test_copies_of_a_sample_are_augmented_each_in_its_own_way() -> None:
    config = configured("recipe.mixup_prob=0.0", "data.img_size=32")
    augment, seen = batch_augment(config), {}
    for batch in micro_batches(config):
        for image, index, draw in zip(augment(batch)[0], batch.index.tolist(), batch.draw.tolist(), strict=True):
            seen.setdefault(index, {})[draw[1]] = image
    assert len(seen) == 32
    pairs = [pair for copies in seen.values() for pair in itertools.combinations(copies.values(), 2)]
    assert len(pairs) == 96
    # No crop and no flip here: copies are alike only where none of the operations was applied to either.
    assert sum(torch.equal(*pair) for pair in pairs) < 20


@pytest.mark.parametrize("seed_or_epoch", ["seed", "epoch"])
def test_another_seed_or_epoch_is_another_augmentation(seed_or_epoch: str) -> None:
    config = configured("recipe.random_erasing_prob=1.0")
    batch, other = made_batch(8), made_batch(8, epoch=int(seed_or_epoch == "epoch"))
    images, targets = batch_augment(config)(batch)
    other_images, other_targets = batch_augment(config, seed=int(seed_or_epoch == "seed"))(other)
    assert not torch.isclose(images, other_images).all()
    assert not torch.isclose(targets, other_targets).all()


def test_without_erasing_and_mixing_there_is_normalising_alone() -> None:
    config = configured("recipe=small")
    batch, augment = made_batch(5), batch_augment(config)
    images, labels = augment(batch)
    assert torch.equal(labels, batch.labels)
    assert labels.dtype == torch.int64
    assert images.dtype == torch.float32
    assert torch.equal(images, augment.normalise(batch.images))
    mean, std = (np.array(values).reshape(-1, 1, 1) for values in (config.data.mean, config.data.std))
    np.testing.assert_allclose(images.numpy(), (batch.images.numpy() / 255 - mean) / std, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------- erasing


def test_erased_boxes_are_timms() -> None:
    config = configured("recipe.random_erasing_prob=0.25")
    index, hw = np.arange(40_000), (32, 48)
    zero = np.zeros_like(index)
    boxes = batch_augment(config).erased_boxes(index, epoch=zero, copy=zero, hw=hw)
    height, width = boxes.bottom - boxes.top, boxes.right - boxes.left
    erased = height > 0
    assert erased.mean() == pytest.approx(0.25, abs=0.01)
    assert ((height > 0) == (width > 0)).all()
    assert boxes.top.min() == boxes.left.min() == 0
    assert (boxes.bottom.max(), boxes.right.max()) == hw
    height, width = height[erased], width[erased]
    # Sides are rounded to pixels, so the bounds hold for some box within half a pixel.
    assert ((height + 0.5) * (width + 0.5) >= 0.02 * 32 * 48).all()
    assert ((height - 0.5) * (width - 0.5) <= 32 * 48 / 3).all()
    assert ((height + 0.5) / (width - 0.5) >= 0.3).all()
    assert ((height - 0.5) / (width + 0.5) <= 1 / 0.3).all()
    theirs, sides = RandomErasing(probability=1.0, device="cpu"), []
    state = random.getstate()
    random.seed(0)
    for _ in range(4000):
        kept = theirs(torch.ones(1, *hw))[0]
        sides.append((int((kept == 0).any(1).sum()), int((kept == 0).any(0).sum())))
    random.setstate(state)
    for ours, side in zip((height, width), np.array(sides).T, strict=True):
        assert stats.ks_2samp(ours, side).pvalue > 0.01


def test_an_erased_box_is_standard_normal_noise_and_all_else_is_kept() -> None:
    config = configured("recipe.random_erasing_prob=1.0", "recipe.mixup_prob=0.0", "data.img_size=64")
    augment, batch = batch_augment(config), made_batch(64, px=64)
    images, _ = augment(batch)
    plain = augment.normalise(batch.images)
    index = batch.index.numpy()
    boxes = augment.erased_boxes(index, epoch=index * 0, copy=index * 0, hw=(64, 64))
    inside = boxes.mask((64, 64), images.device).expand_as(images)
    assert torch.equal(images[~inside], plain[~inside])
    noise = images[inside]
    assert len(noise.unique()) > 0.99 * len(noise)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 0.01
    patches = [images[i][:, boxes.top[i] :, boxes.left[i] :][:, :8, :8].flatten() for i in range(64)]
    whole = torch.stack([patch for patch in patches if len(patch) == 192])
    correlation = torch.corrcoef(whole) - torch.eye(len(whole))
    assert correlation.abs().max() < 0.35  # 192 numbers each: 4.5 standard deviations and more
    assert abs(torch.corrcoef(torch.stack([noise[:-1], noise[1:]]))[0, 1]) < 0.02


# -------------------------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize("switch", [0.0, 1.0])
def test_a_target_holds_the_shares_of_the_two_images_exactly(switch: float) -> None:
    config = configured(
        "recipe.random_erasing_prob=0.0", "recipe.label_smoothing=0.0", "recipe.mixup_group=2",
        f"recipe.mixup_switch_prob={switch}", "data.mean=[0.0,0.0,0.0]", "data.std=[1.0,1.0,1.0]",
    )  # fmt: skip
    batch = made_batch(400)
    images, targets = batch_augment(config)(batch)
    assert targets.dtype == images.dtype == torch.float32
    torch.testing.assert_close(targets.sum(1), torch.ones(400))
    white = images.mean((1, 2, 3))  # a white image with a black one: the mean is the share of the white one
    own = targets.gather(1, batch.labels[:, None])[:, 0]
    torch.testing.assert_close(own[::2], white[::2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(1 - own[1::2], white[1::2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(white[::2] + white[1::2], torch.ones(200), atol=1e-6, rtol=1e-5)
    values = images.flatten(1)
    if switch:  # CutMix: each pixel is of one of the two
        assert len(values.unique()) == 2
    else:  # mixup: every pixel the same mean
        assert torch.equal(values.amin(1), values.amax(1))
    assert len(own.unique()) > 40


def test_mixup_is_linear_in_the_two_images() -> None:
    config = configured("recipe.random_erasing_prob=0.0", "recipe.cutmix_alpha=0.0", "recipe.mixup_group=2")
    augment, batch = batch_augment(config), made_batch(20)
    batch = batch._replace(images=torch.randint(0, 256, batch.images.shape, generator=seeded(), dtype=torch.uint8))
    images, _ = augment(batch)
    plain = augment.normalise(batch.images)
    share = augment.mixing(batch.draw[:, 0].numpy(), batch.draw[:, 2].numpy(), images.shape[-2:]).share
    for place in range(20):
        expected = share[place] * plain[place].double() + (1 - share[place]) * plain[place ^ 1].double()
        torch.testing.assert_close(images[place], expected.float())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_targets_and_boxes_are_timms_for_the_same_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured("recipe.mixup_group=2", "recipe.batch_size=2", "recipe.mixup_alpha=0.0")
    augment = batch_augment(config)
    place = np.arange(400)
    mixing = augment.mixing(place * 0, place, (17, 24))
    assert mixing.cut.all()
    from eit_lab.data.order import uniform

    draws = [uniform(place // 2, seed=0, epoch=0, stream=200 + k) for k in (2, 3, 4)]
    for i in range(400):
        centres = iter([int(draws[1][i] * 17), int(draws[2][i] * 24)])
        monkeypatch.setattr(np.random, "randint", lambda low, high, size=None, centres=centres: next(centres))
        # CutMix's Beta(1, 1) is the uniform itself.
        box, share = cutmix_bbox_and_lam((3, 17, 24), draws[0][i], correct_lam=True)
        assert box == tuple(edge[i] for edge in mixing.boxes)
        assert share == mixing.share[i]
    batch = made_batch(2)
    _, targets = augment(batch)
    expected = mixup_target(
        batch.labels, 10, augment.mixing(place[:2] * 0, place[:2], (16, 16)).share[0], smoothing=0.1
    )
    torch.testing.assert_close(targets, expected, atol=1e-7, rtol=1e-6)


def test_shares_follow_their_beta_distributions_and_groups_share_one_draw() -> None:
    config = configured("recipe.mixup_prob=0.7", "recipe.mixup_switch_prob=0.4")
    augment = batch_augment(config)
    place = np.arange(0, 8 * 20_000)
    mixing = augment.mixing(place * 0, place, (224, 224))
    groups = mixing.share.reshape(-1, 8)  # recipe=debug: groups of 8, two in a batch of 16
    assert (groups == groups[:, :1]).all()
    share, cut, mixed = groups[:, 0], mixing.cut[::8], groups[:, 0] < 1
    assert cut.mean() == pytest.approx(0.4, abs=0.01)
    assert mixed.mean() == pytest.approx(0.7, abs=0.01)
    mixup = share[mixed & ~cut]
    assert mixup.mean() == pytest.approx(0.5, abs=0.01)
    assert mixup.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.002)
    assert stats.kstest(mixup, stats.beta(0.8, 0.8).cdf).pvalue > 0.01
    assert np.corrcoef(share[:-1], share[1:])[0, 1] == pytest.approx(0, abs=0.02)
    with global_states_kept():
        np.random.seed(0)
        theirs = [cutmix_bbox_and_lam((3, 224, 224), np.random.beta(1, 1))[1] for _ in range(5000)]
    assert stats.ks_2samp(share[mixed & cut], theirs).pvalue > 0.01


def test_unmixed_images_keep_every_bit_and_their_own_smoothed_label() -> None:
    config = configured("recipe.mixup_prob=0.5", "recipe.random_erasing_prob=0.0", "recipe.mixup_group=2")
    augment, batch = batch_augment(config), made_batch(64)
    images, targets = augment(batch)
    plain = augment.normalise(batch.images)
    kept = augment.mixing(batch.draw[:, 0].numpy(), batch.draw[:, 2].numpy(), images.shape[-2:]).share == 1
    assert 16 < kept.sum() < 48
    assert torch.equal(images[kept], plain[kept])
    smoothed = torch.nn.functional.one_hot(batch.labels, 10) * 0.9 + 0.01
    torch.testing.assert_close(targets[kept], smoothed[kept])


def test_the_loss_on_unmixed_soft_targets_is_the_loss_with_label_smoothing() -> None:
    config = configured("recipe.mixup_prob=1.0", "recipe.mixup_alpha=1.0")
    augment, batch = batch_augment(config), made_batch(6)
    never = augment.mixing(np.zeros(6, int), np.arange(6), (16, 16))._replace(share=np.ones(6))
    logits = torch.randn(6, 10, generator=seeded())
    soft: Tensor = torch.nn.functional.cross_entropy(logits, augment._mix_targets(batch.labels, never))
    torch.testing.assert_close(soft, torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=0.1))


@pytest.mark.gpu
def test_a_gpu_makes_the_same_batches_but_for_rounding() -> None:
    config = configured("recipe.random_erasing_prob=1.0", "data.img_size=64")
    batch = made_batch(64, px=64)
    on_gpu = batch._replace(images=batch.images.cuda(), labels=batch.labels.cuda())
    (images, targets), (gpu_images, gpu_targets) = batch_augment(config)(batch), batch_augment(config)(on_gpu)
    torch.testing.assert_close(gpu_images.cpu(), images, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gpu_targets.cpu(), targets, atol=1e-6, rtol=1e-6)
