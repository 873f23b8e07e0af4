"""RandAugment on pixels: timm's operations, timm's distribution, and draws from (seed, epoch, index, copy) alone."""

from __future__ import annotations

import random
import sys
from collections import Counter
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location

import cv2
import numpy as np
import pytest
import timm.data.auto_augment as timm_augment
import torch
from PIL import Image, ImageEnhance
from scipy import stats
from sklearn.datasets import load_sample_images

from eit_lab.compose import compose_one
from eit_lab.config import Config, ConfigError
from eit_lab.data import rand_augment, rand_ops
from eit_lab.data.order import hashed, uniform
from eit_lab.data.rand_augment import (
    FastAugment,
    PillowAugment,
    argument_of,
    build_image_augment,
    hashed_one,
    read_notation,
)
from eit_lab.data.rand_ops import Pixels

PUBLISHED = "rand-m9-mstd0.5-inc1"
FILL = (124, 116, 104)
NOTATIONS = (
    *("rand", PUBLISHED, "rand-m7-n3-p0.7", "rand-m9-inc0", "rand-m9-t3a", "rand-m5-t3aw-n4", "rand-m9-tweights-n3"),
    *("rand-m15-mstd1-mmax20-inc1", "rand-m8-mstd101", "rand-m9-mmax0", "rand-p0", "rand-p1.0-m0-n1"),
    *("rand-m3-m4-mstd1-mstd2-mmax5-mmax6-t3a-tweights-inc1-inc0-n1-n3-p0.1-p0.2",),
)


@cache
def photographs() -> tuple[Pixels, ...]:
    """Six crops (H, W, 3), square and not, of scikit-learn's two photographs."""
    sizes = ((160, 160), (160, 160), (97, 160))
    return tuple(
        np.ascontiguousarray(image[y : y + h, x : x + w])
        for image in load_sample_images().images
        for (h, w), (y, x) in zip(sizes, ((20, 30), (200, 300), (100, 450)), strict=True)
    )


def in_mode(pixels: Pixels, chans: int) -> Pixels:
    return pixels if chans == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def timms(op: str, pixels: Pixels, *arguments: float) -> Pixels:
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    named = {"fillcolor": FILL[: pixels.shape[2]], "resample": Image.Resampling.BICUBIC}
    return np.asarray(timm_augment.NAME_TO_OP[op](image, *arguments, **named)).reshape(pixels.shape)


def apart(a: Pixels, b: Pixels) -> np.ndarray:
    return np.abs(a.astype(int) - b)


@cache
def configured(*overrides: str, chans: int = 3) -> Config:
    one = () if chans == 3 else ("data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]")
    return compose_one(["data=synthetic", "recipe=debug", "data.img_size=15", *one, *overrides])


def built(notation: str, *, seed: int = 0, exact: bool = False, chans: int = 3) -> FastAugment | PillowAugment:
    config = configured(f"recipe.rand_augment={notation}", chans=chans)
    augment = build_image_augment(config.data, config.recipe, seed=seed, exact=exact)
    assert isinstance(augment, PillowAugment if exact else FastAugment)
    return augment


# ---------------------------------------------------------------------------------------------------------- operations


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        ("AutoContrast", ()),
        ("Equalize", ()),
        ("Invert", ()),
        ("Posterize", (1, 2, 3, 4, 5, 7, 8)),
        ("Solarize", (0, 1, 26, 128, 255, 256)),
        ("SolarizeAdd", (0, 1, 50, 99, 127, 128)),
        ("Brightness", (0.1, 0.37, 0.91, 1.0, 1.009, 1.5, 1.9, 2.71)),
        ("Contrast", (0.1, 0.37, 0.91, 1.0, 1.009, 1.5, 1.9, 2.71)),
    ],
)
def test_an_operation_on_single_values_is_pillows_to_the_last_bit(
    op: rand_ops.Op, arguments: tuple[float, ...], chans: int
) -> None:
    rng = np.random.default_rng(0)
    narrow = (rng.integers(90, 140, (50, 40, 3)) // (1, 2, 7)).astype(np.uint8)
    odd = [narrow, np.full((9, 9, 3), 77, np.uint8), rng.choice(np.array([3, 250], np.uint8), (20, 30, 3))]
    for photo in (*photographs(), *odd):
        pixels = in_mode(photo, chans)
        before = pixels.copy()
        for argument in arguments or (None,):
            expected = timms(op, pixels, *(() if argument is None else (argument,)))
            assert np.array_equal(rand_ops.apply(op, pixels, argument or 0.0, fill=FILL[:chans]), expected), argument
        assert np.array_equal(pixels, before)


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize(
    ("op", "arguments", "most", "mean"),
    [
        ("Color", (0.0, 0.1, 0.5, 0.95, 1.3, 1.9), 2, 0.01),
        ("Sharpness", (0.1, 0.5, 0.95, 1.3, 1.9), 1, 0.25),
        ("ShearX", (-0.3, -0.27, -0.1, 0.0, 0.013, 0.3, 0.6), 3, 0.06),
        ("ShearY", (-0.3, -0.27, -0.1, 0.0, 0.013, 0.3, 0.6), 3, 0.06),
        ("TranslateXRel", (-1.1, -0.45, -0.4, -0.003, 0.0, 0.07, 0.3, 0.45, 0.9), 1, 0.01),
        ("TranslateYRel", (-1.1, -0.45, -0.4, -0.003, 0.0, 0.07, 0.3, 0.45, 0.9), 1, 0.01),
        ("Rotate", (-30.0, -27.3, -10.0, -1.0, 0.0, 3.3, 30.0), 255, 1.3),
        ("GaussianBlur", (0.1, 0.5, 1.0, 1.5, 2.0), 255, 0.75),
    ],
)
def test_an_operation_with_neighbours_is_close_to_pillows(
    op: rand_ops.Op, arguments: tuple[float, ...], most: int, mean: float, chans: int
) -> None:
    for photo in photographs():
        pixels = in_mode(photo, chans)
        before = pixels.copy()
        errors = [
            apart(rand_ops.apply(op, pixels, argument, fill=FILL[:chans]), timms(op, pixels, argument))
            for argument in arguments
        ]
        assert max(error.max() for error in errors) <= most
        assert np.mean([error.mean() for error in errors]) < mean
        assert np.array_equal(pixels, before)


def test_a_whole_number_of_pixels_and_a_quarter_turn_are_exact() -> None:
    pixels = photographs()[0]
    for px in (-159, -31, -1, 0, 1, 40, 160):
        for axis in (0, 1):
            expected = np.empty_like(pixels)
            expected[:] = FILL
            there = np.arange(160)[max(0, -px) : 160 - max(0, px)]
            if axis == 0:
                expected[there] = pixels[there + px]
            else:
                expected[:, there] = pixels[:, there + px]
            assert np.array_equal(rand_ops.translate(pixels, px, axis=axis, fill=FILL), expected)
    for turns in (0, 1, 2, 3):
        assert np.array_equal(rand_ops.rotate(pixels, 90 * turns, fill=FILL), np.rot90(pixels, turns))


def test_posterizing_to_no_bits_and_to_fewer_is_black() -> None:
    assert argument_of("PosterizeIncreasing", 10, random.Random(0)) == 0
    assert argument_of("PosterizeIncreasing", 20, random.Random(0)) == -4
    assert not rand_ops.posterize(photographs()[0], 0).any()
    assert not rand_ops.posterize(photographs()[0], -4).any()


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize("notation", ["rand-m10-p1-n9", "rand-m0-p1-n9-inc1", "rand-m30-mmax30-p1-n9-inc1-t3aw"])
def test_images_of_any_size_and_lie_keep_their_shape(notation: str, chans: int) -> None:
    augment = built(notation, chans=chans)
    for shape in ((1, 1), (1, 7), (2, 3), (8, 8), (3, 200)):
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, chans), np.uint8)
        for index in range(30):
            result = augment.augment(pixels, index, epoch=0, copy=0)
            assert (result.shape, result.dtype) == (pixels.shape, np.uint8)
            mirrored = augment.augment(pixels[:, ::-1], index, epoch=0, copy=0)
            assert np.array_equal(mirrored, augment.augment(pixels[:, ::-1].copy(), index, epoch=0, copy=0))


# --------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("notation", NOTATIONS)
def test_a_notation_is_read_as_timm_reads_it(notation: str) -> None:
    policy = read_notation(notation)
    theirs = timm_augment.rand_augment_transform(notation, {"img_mean": FILL})
    assert policy.names == tuple(op.name for op in theirs.ops)
    assert policy.num_ops == theirs.num_layers
    for op in theirs.ops:
        assert (policy.prob, policy.magnitude, policy.magnitude_std) == (op.prob, op.magnitude, op.magnitude_std)
        assert policy.magnitude_max == (op.magnitude_max or 10)
    if theirs.choice_weights is None:
        assert policy.weights is None
    else:
        assert policy.weights is not None
        assert np.allclose(np.array(policy.weights) / sum(policy.weights), theirs.choice_weights, rtol=1e-12)


@pytest.mark.parametrize("notation", ["rand", "rand-inc1", "rand-t3aw"])
def test_an_argument_is_timms_at_every_magnitude(notation: str) -> None:
    for name in read_notation(notation).names:
        level_to_arg = timm_augment.LEVEL_TO_ARG[name]
        for magnitude in (*range(21), *np.linspace(0, 20, 401).tolist()):
            for seed in (0, 1):  # of which one gives each sign
                state = random.getstate()
                random.seed(seed)
                expected = () if level_to_arg is None else level_to_arg(magnitude, {})
                random.setstate(state)
                if name == "Desaturate":  # an argument of Color there too, but a step later
                    expected = (min(1.0, max(0.0, 1.0 - expected[0])),)
                assert argument_of(name, magnitude, random.Random(seed)) == (*expected, 0.0)[0]


@pytest.mark.parametrize("notation", NOTATIONS)
def test_what_is_applied_is_what_timm_applies_with_the_same_random_numbers(notation: str) -> None:
    policy = read_notation(notation)
    theirs = {op.name: op for op in timm_augment.rand_augment_transform(notation, {"img_mean": FILL}).ops}
    applied: list[tuple[float, ...]] = []
    for op in theirs.values():
        op.aug_fn = lambda image, *arguments, **_: applied.append(arguments)
    state = random.getstate()
    for seed in range(200):
        rng = random.Random(seed)
        names = policy.choose(rng)
        random.setstate(rng.getstate())
        applied.clear()
        for name in names:
            theirs[name](None)
        steps = policy.draw(random.Random(seed))
        assert len(steps) == len(applied)
        for (op, argument), expected in zip(steps, applied, strict=True):
            darker = op == "Color" and "Desaturate" in names and 1.0 - argument in expected
            assert darker or argument == (*expected, 0.0)[0]
    random.setstate(state)


@pytest.mark.parametrize("notation", ["rand-m9-p1-inc1", "rand-m9-p1-t3a", "rand-m9-p1-n3-tweights", "rand-p1-t3aw"])
def test_operations_are_chosen_as_often_as_timm_chooses_them(notation: str) -> None:
    policy, num_draws = read_notation(notation), 4000
    theirs = timm_augment.rand_augment_transform(notation, {"img_mean": FILL})
    rng = np.random.RandomState(0)
    weights, replace = theirs.choice_weights, theirs.choice_weights is None
    ours_by_place: list[Counter[str]] = [Counter() for _ in range(policy.num_ops)]
    theirs_by_place: list[Counter[str]] = [Counter() for _ in range(policy.num_ops)]
    twice = 0
    for draw in range(num_draws):
        chosen = policy.choose(random.Random(draw))
        twice += len(set(chosen)) < len(chosen)
        for place, name in enumerate(chosen):
            ours_by_place[place][name] += 1
        for place, name in enumerate(rng.choice(policy.names, policy.num_ops, replace=replace, p=weights)):
            theirs_by_place[place][str(name)] += 1
    assert (twice > 0) == replace
    for ours, other in zip(ours_by_place, theirs_by_place, strict=True):
        table = [(ours[name], other[name]) for name in policy.names if ours[name] + other[name] > 10]
        assert stats.chi2_contingency(np.array(table).T).pvalue > 1e-3


def test_signs_magnitudes_and_how_many_are_applied_have_timms_distribution() -> None:
    policy = read_notation("rand-m9-mstd0.5-n3-inc1")
    steps = [policy.draw(random.Random(seed)) for seed in range(6000)]
    counts = np.bincount([len(each) for each in steps], minlength=4)
    assert stats.chisquare(counts, stats.binom(3, 0.5).pmf(range(4)) * len(steps)).pvalue > 1e-3
    degrees = np.array([argument for each in steps for op, argument in each if op == "Rotate"])
    assert stats.binomtest(int((degrees > 0).sum()), len(degrees)).pvalue > 1e-3
    magnitude = np.abs(degrees) / 3
    assert magnitude.max() == 10.0  # the noise is cut there
    assert stats.kstest(magnitude[magnitude < 10], stats.truncnorm(-np.inf, 2, 9, 0.5).cdf).pvalue > 1e-3
    assert stats.binomtest(int((magnitude == 10).sum()), len(magnitude), stats.norm.sf(2)).pvalue > 1e-3
    three = read_notation("rand-m8-mstd101-t3a")
    steps = [three.draw(random.Random(seed)) for seed in range(3000)]
    even = [argument for each in steps for op, argument in each if op == "GaussianBlur"]
    assert stats.kstest(even, stats.uniform(0.1, 0.8 * 1.9).cdf).pvalue > 1e-3


def test_more_operations_than_a_weighted_set_has_are_one_line() -> None:
    assert len(built("rand-m9-tweights-n15-p1").policy.draw(random.Random(0))) == 15  # type: ignore[union-attr]
    for exact in (False, True):
        with pytest.raises(ConfigError, match=r"recipe.rand_augment: t3aw takes each of its 14 .* n15 .*nearest: n14"):
            built("rand-m9-t3aw-n15", exact=exact)


def test_a_draw_is_a_function_of_seed_epoch_index_and_copy_alone() -> None:
    pixels, changed = photographs()[0], Counter[str]()
    augment = built("rand-m9-p1-inc1", seed=4)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for index in range(20):
        result = augment.augment(pixels, index, epoch=1, copy=0)
        random.seed(index)
        np.random.seed(index)
        again = built("rand-m9-p1-inc1", seed=4).augment(pixels.copy(), index, epoch=1, copy=0)
        assert np.array_equal(result, again)
        others = {
            "seed": built("rand-m9-p1-inc1", seed=5).augment(pixels, index, epoch=1, copy=0),
            "epoch": augment.augment(pixels, index, epoch=2, copy=0),
            "index": augment.augment(pixels, index + 1, epoch=1, copy=0),
            "copy": augment.augment(pixels, index, epoch=1, copy=1),
        }
        changed.update(key for key, other in others.items() if not np.array_equal(other, result))
    assert all(changed[key] >= 18 for key in ("seed", "epoch", "index", "copy"))
    random.setstate(states[0])
    np.random.set_state(states[1])
    for exact in (False, True):
        other = built(PUBLISHED, exact=exact)
        for index in range(10):
            other.augment(pixels, index, epoch=0, copy=0)
    assert random.getstate() == states[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), states[1], strict=True))
    assert torch.equal(torch.get_rng_state(), states[2])


def test_one_hash_is_the_one_of_many() -> None:
    for seed, epoch, index, copy in ((0, 0, 0, 0), (1, 2, 3, 4), (2**31, 299, 1281166, 2), (5, 0, -1, 0)):
        expected = hashed(np.array([index]), seed=seed, epoch=epoch, copy=copy, stream=61)[0]
        assert hashed_one(index, seed=seed, epoch=epoch, copy=copy, stream=61) == expected


# ------------------------------------------------------------------------------------------------------ fast and exact


@pytest.mark.parametrize("chans", [1, 3])
def test_a_batch_is_its_images_one_by_one(chans: int) -> None:
    images = torch.from_numpy(np.stack([in_mode(photo[:97], chans) for photo in photographs()])).permute(0, 3, 1, 2)
    index, epoch, copy = np.arange(6), np.full(6, 3), np.array([0, 1, 0, 1, 0, 1])
    for exact in (False, True):
        augment, before = built("rand-m9-p1", exact=exact, chans=chans), images.clone()
        batch = augment.on_pixels(images, index, epoch=epoch, copy=copy)
        assert torch.equal(images, before)
        assert batch.is_contiguous()
        for place in range(6):
            pixels = images[place].permute(1, 2, 0).numpy()
            alone = augment.augment(pixels, place, epoch=3, copy=place % 2)
            assert np.array_equal(batch[place].permute(1, 2, 0).numpy(), alone)


@pytest.mark.parametrize("chans", [1, 3])
def test_colour_jitter_is_the_same_fast_and_exact(chans: int) -> None:
    config = configured("recipe.rand_augment=null", "recipe.color_jitter=0.4", chans=chans)
    fast, exact = (build_image_augment(config.data, config.recipe, seed=1, exact=exact) for exact in (False, True))
    assert fast is not None
    assert exact is not None
    errors = []
    for index in range(40):
        pixels = in_mode(photographs()[index % 6], chans)
        results = [augment.augment(pixels, index, epoch=2, copy=1) for augment in (fast, exact)]
        draws = [uniform(np.array([index]), seed=1, epoch=2, copy=1, stream=61 + k)[0] for k in range(6)]
        image = Image.fromarray(pixels[..., 0] if chans == 1 else pixels)
        for place in np.argsort(draws[3:]):
            enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[place]
            image = enhancer(image).enhance(0.6 + 0.8 * draws[place])
        assert apart(results[1], np.asarray(image).reshape(pixels.shape)).max() <= 1  # 0.6 + 0.8 is not quite 1.4
        errors.append(apart(*results))
        assert apart(results[0], pixels).mean() > 1
    assert max(error.max() for error in errors) <= 4
    assert np.mean([error.mean() for error in errors]) < 0.2


def test_opencv_runs_without_threads_once_there_is_something_to_augment() -> None:
    before = cv2.getNumThreads()
    cv2.setNumThreads(2)
    built(PUBLISHED)
    assert cv2.getNumThreads() == 1
    cv2.setNumThreads(before)


def test_timm_is_not_imported_for_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.setitem(sys.modules, name, None)  # from here on an ImportError
    spec = spec_from_file_location("fresh", rand_augment.__file__)
    assert spec is not None
    assert spec.loader is not None
    fresh = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "fresh", fresh)
    spec.loader.exec_module(fresh)
    config = configured(f"recipe.rand_augment={PUBLISHED}")
    augment = fresh.build_image_augment(config.data, config.recipe, seed=0)
    for index in range(30):
        augment.augment(photographs()[0], index, epoch=0, copy=0)
    with pytest.raises(ImportError):
        fresh.build_image_augment(config.data, config.recipe, seed=0, exact=True)
