"""Evaluation on any folder: which data set it is, which classes it has, what counts as right; predictions on single files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import TINY, TINY_MODEL, Done
from eit_lab.config import ConfigError
from eit_lab.data.variants import NO_CLASS, Variant, lemmas, map_classes, recognise, synsets

Command = Callable[..., Done]


def make(root: Path, names: Iterable[str], *, per_class: int = 1, stem: str = "image") -> Path:
    """Class folders of empty files: to recognise a folder no image is read."""
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            (root / name / f"{stem}_{number}.JPEG").touch()
    return root


# ------------------------------------------------------------------------------------------------------------ recognition


def test_the_thousand_classes_are_in_label_order_and_the_two_hundreds_among_them() -> None:
    classes = synsets()
    assert len(classes) == 1000
    assert list(classes) == sorted(classes)  # so the sorted folders of a train/ give the same labels
    known = {0: "n01440764", 1: "n01443537", 207: "n02099601", 281: "n02123045", 817: "n04285008", 999: "n15075141"}
    assert {label: classes[label] for label in known} == known
    assert lemmas()["n01440764"] == "tench, Tinca tinca"
    for subset in ("a", "r"):
        some = synsets(subset)
        assert len(set(some)) == 200
        assert set(some) < set(classes)
        indices = Path(metadata.distribution("timm").locate_file(f"timm/data/_info/imagenet_{subset}_indices.txt"))  # type: ignore[arg-type]
        assert [classes.index(wnid) for wnid in some] == [int(line) for line in indices.read_text().split()]


@pytest.mark.parametrize(("subset", "title"), [("a", "the classes of ImageNet-A"), ("r", "the classes of ImageNet-R")])
def test_two_hundred_classes_restrict_the_answers(subset: str, title: str, tmp_path: Path) -> None:
    folder = make(tmp_path / f"imagenet-{subset}", synsets(subset))
    (folder / "README.txt").touch()
    for root in (folder, tmp_path):  # the folder itself, or the one it was unpacked into
        variant = recognise(root, num_classes=1000)
        labels = [synsets().index(wnid) for wnid in synsets(subset)]
        assert (variant.title, variant.mapped) == (title, "WordNet id")
        assert variant.classes is not None
        assert variant.classes.tolist() == labels
        assert variant.targets[:, 0].tolist() == labels
        assert "here are 200" in variant.notes[0]


def test_imagenet_v2_is_told_by_its_numbers_not_by_their_order_as_text(tmp_path: Path) -> None:
    variant = recognise(make(tmp_path, map(str, range(1000))), num_classes=1000, class_names=synsets())
    assert variant.mapped == "number"
    assert variant.classes is None
    assert [int(variant.files[i].parent.name) for i in range(1000)] == variant.targets[:, 0].tolist()
    assert sorted(variant.targets[:, 0].tolist()) == list(range(1000))


def test_published_numbers_of_images_name_the_data_set() -> None:
    from eit_lab.data.variants import _title

    every = {wnid: label for label, wnid in enumerate(synsets())}
    numbers = {str(label): label for label in range(1000)}
    for told, how, num_images, title in (
        (every, "WordNet id", 50_000, "ImageNet's validation set"),
        (every, "WordNet id", 50_889, "ImageNet-Sketch"),
        (every, "WordNet id", 12_345, "ImageNet's 1000 classes"),
        (numbers, "number", 10_000, "ImageNet-V2"),
        ({wnid: every[wnid] for wnid in synsets("a")}, "WordNet id", 7_500, "ImageNet-A"),
        ({wnid: every[wnid] for wnid in synsets("r")}, "WordNet id", 30_000, "ImageNet-R"),
        ({"cat": 0, "dog": 1}, "class name", 50_000, "folder of images"),
    ):
        assert _title(told, how, num_images=num_images) == (title, [])


def test_the_runs_own_class_names_come_before_numbers_and_wordnet() -> None:
    assert map_classes(["b", "a"], num_classes=3, class_names=("a", "b", "c")) == ({"b": 1, "a": 0}, "class name")
    assert map_classes(["0", "1"], num_classes=2, class_names=("1", "0")) == ({"0": 1, "1": 0}, "class name")
    assert map_classes(["0", "1", "7"], num_classes=2, class_names=None) == ({"0": 0, "1": 1}, "number")
    assert map_classes(["n01440764"], num_classes=2, class_names=("n01440764", "x"))[1] == "class name"


def test_numbers_are_imagenets_also_for_a_run_on_some_of_its_classes() -> None:
    some = synsets()[::10]
    told, how = map_classes([str(number) for number in range(1000)], num_classes=100, class_names=some)
    assert how == "number"
    assert told == {str(10 * label): label for label in range(100)}


def test_folders_that_are_no_classes_are_counted_and_named(tmp_path: Path) -> None:
    make(tmp_path, ["cat", "dog", "thumbs", "old", "misc", "tmp"], per_class=2)
    (tmp_path / "bird").mkdir()
    variant = recognise(tmp_path, num_classes=4, class_names=("bird", "cat", "dog", "fish"))
    assert len(variant.files) == 4
    assert variant.classes is not None
    assert variant.classes.tolist() == [1, 2]
    assert variant.notes == (
        "4 folders are not the model's classes and are left out: misc, old, thumbs ...",
        "1 class folders are empty: bird",
    )


def test_the_layout_with_val_inside_is_its_val(tmp_path: Path) -> None:
    make(tmp_path / "train", ["a", "b"], per_class=3)
    make(tmp_path / "val", ["a", "b"])
    variant = recognise(tmp_path, num_classes=2, class_names=("a", "b"))
    assert {variant.files[i].parts[-3] for i in range(len(variant.files))} == {"val"}


@pytest.mark.parametrize("groups", [("",), ("noise", "blur", "extra")])
def test_corruptions_are_told_with_or_without_their_groups(groups: tuple[str, ...], tmp_path: Path) -> None:
    root = tmp_path / "imagenet-c"
    for place, corruption in enumerate(("snow", "fog", "frost")):
        for severity in ("1", "3", "5"):
            make(root / groups[place % len(groups)] / corruption / severity, ["0", "2"], per_class=2)
    variant = recognise(root, num_classes=3)
    assert set(variant.groups) == {(c, s) for c in ("snow", "fog", "frost") for s in "135"}
    assert len(variant.files) == 9 * 4
    for index in range(len(variant.files)):
        *_, corruption, severity, label, _ = variant.files[index].parts
        assert variant.groups[variant.group[index]] == (corruption, severity)
        assert variant.targets[index].tolist() == [int(label)]
    assert variant.classes is not None
    assert variant.classes.tolist() == [0, 2]
    one = recognise(root / groups[0] / "snow", num_classes=3)
    assert set(one.groups) == {("snow", s) for s in "135"}


def test_severities_are_not_taken_for_classes_nor_classes_for_severities(tmp_path: Path) -> None:
    variant = recognise(make(tmp_path, ["1", "2", "3", "4", "5"]), num_classes=10)
    assert variant.groups == (("", ""),)
    assert variant.targets[:, 0].tolist() == [1, 2, 3, 4, 5]


REAL = [[3], [], [1, 2], [0]]  # of the images 1 to 4 of a validation set


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_label_lists_leave_out_what_has_no_label(by_name: bool, flat: bool, tmp_path: Path) -> None:
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 5)]
    images = tmp_path / "images"
    for number, name in enumerate(names):
        folder = images if flat else images / f"n{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (images / "other.jpg").touch()
    labels = tmp_path / "real.json"
    labels.write_text(json.dumps(dict(zip(names, REAL, strict=True)) if by_name else REAL))
    variant = recognise(images, num_classes=4, labels=str(labels))
    found = {variant.files[i].name: variant.targets[i].tolist() for i in range(len(variant.files))}
    assert found == {names[0]: [3, NO_CLASS], names[2]: [1, 2], names[3]: [0, NO_CLASS]}
    assert variant.classes is None
    assert variant.notes == (
        "1 images whose list of labels is empty are left out",
        "1 images that the labels do not name are left out",
    )


def test_real_labels_are_timms_fifty_thousand(tmp_path: Path) -> None:
    for number in (1, 2, 3, 50_000):
        (tmp_path / f"ILSVRC2012_val_{number:08d}.JPEG").touch()
    variant = recognise(tmp_path, num_classes=1000, labels="real")
    assert len(variant.files) == 3  # the first image has no label
    assert variant.targets[:2].tolist() == [[970, 795], [230, 231]]
    with pytest.raises(ConfigError, match="labels=real are of ImageNet's 1000 classes, and the model has 10 others"):
        recognise(tmp_path, num_classes=10, labels="real")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "data must hold one folder a class with images in it"),
        (
            ["x", "y"],
            r"data must have class folders that are the model's \(3 classes: 0, 1, 2 ...\), got 2 others .*: x, y",
        ),
        (["sets/a/0", "sets/b/0"], "data must be one data set, got .* with 2: "),
    ],
)
def test_a_folder_that_cannot_be_told_is_one_line(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        recognise(make(tmp_path, names), num_classes=3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[[0], [9]]", r"lists of classes 0 to 2, .* got \[9\]"), ("[0", "Expecting"), ("3", "lists of classes")],
)
def test_labels_that_are_no_lists_are_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        recognise(tmp_path, num_classes=3, labels=str(tmp_path / "labels.json"))


# ---------------------------------------------------------------------------------------------------------------- counting


def test_hits_are_those_of_a_slow_count_over_the_allowed_classes() -> None:
    from eit_lab.compose import compose_one
    from eit_lab.config import DigitsData
    from eit_lab.data.augment import BatchAugment
    from eit_lab.data.batch import FILLER, Batch
    from eit_lab.models.backbone import Backbone
    from eit_lab.training.evaluate import VariantTest

    config = compose_one([*TINY_MODEL, "data=digits"])
    assert isinstance(config.data, DigitsData)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 1, 8, 8), generator=generator).byte()
    allowed = [1, 2, 4, 5, 7, 8, 9]
    targets = torch.tensor([[allowed[n % 7], allowed[(3 * n) % 7] if n % 2 else NO_CLASS] for n in range(40)])
    variant = Variant(
        title="",
        files=None,  # type: ignore[arg-type]  # nothing is read here
        groups=(("snow", "1"), ("snow", "2")),
        group=np.arange(40) % 2,
        targets=targets.numpy(),
        classes=np.array(allowed),
        mapped="number",
        notes=(),
    )
    model = Backbone(config.model, num_classes=10, img_size=8, in_chans=1).eval()
    test = VariantTest(model, variant, BatchAugment(config.data, config.recipe, num_classes=10, seed=0))
    draw = torch.zeros((5, 3), dtype=torch.int64)
    with torch.no_grad():
        for first in range(0, 40, 4):  # each batch with a filler in it
            index = torch.tensor([*range(first, first + 4), FILLER])
            blank = torch.zeros_like(images[:1])
            test.test_step(Batch(torch.cat([images[first : first + 4], blank]), index, index, draw), 0)
        logits = model(test.augment.normalise(images))
    slow = [[0, 0, 0], [0, 0, 0]]
    for n in range(40):
        ranked = sorted(allowed, key=lambda label: -float(logits[n, label]))
        right = [label for label in targets[n].tolist() if label != NO_CLASS]
        slow[n % 2][0] += 1
        slow[n % 2][1] += ranked[0] in right
        slow[n % 2][2] += any(label in right for label in ranked[:5])
    assert test.tally.compute().tolist() == slow


# ------------------------------------------------------------------------------------------------------- the real commands


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with averaged weights and its last two epochs kept."""
    from eit_lab.train import main

    root = tmp_path_factory.mktemp("runs")
    args = ["recipe.ema_decay=0.5", "trainer.keep_epochs=2", "recipe.lr=0.01", "trainer.progress_bar=false"]
    assert main([*TINY, *args, f"run.root={root}"]) == 0
    (folder,) = (path.parent for path in root.glob("*/record.json"))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of each of the classes 0 to 3, coloured, of odd sizes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for label in range(4):
        (root / str(label)).mkdir()
        for number in range(3):
            h, w = generator.integers(9, 30, 2)
            pixels = generator.integers(0, 256, (h, w, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{number}.png")
    return root


def evaluate(*args: str) -> int:
    from eit_lab.evaluate import main

    return main(list(args))


def test_the_number_on_record_comes_back_raw_and_averaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((run / "record.json").read_text())["result"]
    for args, names in (
        ([], ["test/acc1", "test/acc1_ema"]),
        (["weights=raw"], ["test/acc1"]),
        (["weights=ema"], ["test/acc1_ema"]),
    ):
        assert evaluate(f"run={run}", *args) == 0
        out = capsys.readouterr().out
        assert "the same as on record, to the last digit" in out
        assert [name for name in ("test/acc1", "test/acc1_ema") if f"{name} {result[name]:.6g}" in out] == names


def test_the_mean_of_epochs_is_evaluated_and_compared_with_no_record(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.models.checkpoints import average, read_state_dict

    kept = sorted((run / "checkpoints").glob("epoch-*.ckpt"))
    assert len(kept) == 2
    torch.save({"state_dict": average([read_state_dict(path) for path in kept])}, tmp_path / "mean.ckpt")
    answers = set()
    for checkpoint in ("epochs", ",".join(path.stem for path in kept), str(tmp_path / "mean.ckpt")):
        assert evaluate(f"run={run}", f"checkpoint={checkpoint}") == 0
        answers.add(capsys.readouterr().out)
    (answer,) = answers
    assert "record" not in answer


def test_a_folder_of_images_is_tested_with_what_it_is_and_the_binomial_error(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(f"run={run}", f"data={pictures}") == 0
    out = capsys.readouterr().out
    assert "data   folder of images: 12 images in 4 classes, by number; answers restricted to these 4 of 10" in out
    found = re.search(r"top-1 ([\d.]+)% \(\+-([\d.]+) binomial\), top-5 100\.00% \(\+-0\.00 binomial\), 12 images", out)
    assert found is not None
    share = float(found[1]) / 100
    assert float(found[2]) == pytest.approx(100 * (share * (1 - share) / 12) ** 0.5, abs=0.01)
    file = next((run / "checkpoints").glob("best.ckpt"))
    assert evaluate(f"checkpoint={file}", f"data={pictures}", "data.img_size=16") == 0  # another resolution
    assert "12 images in 4 classes" in capsys.readouterr().out


def test_a_test_set_as_files_gives_the_number_of_the_test_set_in_memory(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.data.small import load_small
    from eit_lab.trained import load_run

    config = load_run(run)
    test = load_small(config.data, config.recipe, seed=0)["test"]  # type: ignore[arg-type]
    for index, (image, label) in enumerate(zip(test.images, test.labels.tolist(), strict=True)):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / str(label) / f"{index:03}.png")
    assert evaluate(f"run={run}", f"data={tmp_path}") == 0
    accuracy = json.loads((run / "record.json").read_text())["result"]["test/acc1"]
    assert f"top-1 {100 * accuracy:.2f}%" in capsys.readouterr().out


def test_corruptions_are_a_table_and_its_mean(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for corruption, severities in (("fog", "12345"), ("snow", "13")):
        for severity in severities:
            (tmp_path / corruption).mkdir(exist_ok=True)
            (tmp_path / corruption / severity).symlink_to(pictures)
    assert evaluate(f"run={run}", f"data={pictures}") == 0
    share = re.search(r"top-1 ([\d.]+)%", capsys.readouterr().out)[1]  # type: ignore[index]
    assert evaluate(f"run={run}", f"data={tmp_path}") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "corruptions: 84 images, 2 corruptions in 4 classes" in lines[1]
    table = [line.split() for line in lines[-5:]]
    assert table[0] == ["corruption", "1", "2", "3", "4", "5", "mean"]
    assert table[1] == ["fog", *[share] * 6]
    assert table[2] == ["snow", share, "-", share, "-", "-", share]
    assert lines[-2] == f"mean over 2 corruptions: top-1 {share}%"


def test_label_lists_count_any_of_their_labels(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"0.png": list(range(10)), "1.png": list(range(10)), "2.png": []}))
    assert evaluate(f"run={run}", f"data={pictures}", f"labels={labels}") == 0
    out = capsys.readouterr().out
    assert "8 images" in out
    assert "4 images whose list of labels is empty are left out" in out
    assert "top-1 100.00%" in out


def test_a_file_that_is_no_image_is_one_line(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "cut.png").write_bytes(next(pictures.glob("0/*")).read_bytes()[:60])
    for workers in (0, 1):
        assert evaluate(f"run={run}", f"data={tmp_path}", f"data.num_workers={workers}") == 2
        err = capsys.readouterr().err
        assert f"eit_lab: {tmp_path / '0' / 'cut.png'} cannot be read as an image" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["checkpoint=epoch-0009"], "checkpoint must be one of best, epoch-0000, epoch-0001, last"),
        (["weights=mean"], "weights must be one of raw, ema, got 'mean'"),
        (["part=val", "data=."], "part is of the run's own data"),
        (["model=eit_base"], "model is the run's own"),
        (["data=nowhere"], "data must be a folder of images, got 'nowhere': no such folder"),
        (["labels=real"], "data must name the folder of the images with labels=real"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(f"run={run}", *args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_weights_without_a_run_need_a_model_and_images(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab import create_model
    from test_checkpoints import to_authors

    file = tmp_path / "theirs.pth"
    torch.save({"model": to_authors(create_model("eit_nano", num_classes=4, img_size=32).state_dict())}, file)
    assert evaluate(f"checkpoint={file}") == 2
    assert "model must be given with a file that does not tell it" in capsys.readouterr().err
    assert evaluate(f"checkpoint={file}", "model=eit_nano") == 2
    assert "data must be given with a file of weights" in capsys.readouterr().err
    small = ["model=eit_nano", "data.img_size=32", "data.num_workers=0", "trainer.accelerator=cpu"]
    assert evaluate(f"checkpoint={file}", f"data={pictures}", *small) == 0
    assert "12 images in all 4 classes, by number" in capsys.readouterr().out


def test_imagenets_layout_is_the_runs_own_test_by_either_name(
    lookalike: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    args = ["data=imagenet", f"data.root={lookalike}", "data.img_size=32", "data.val_size=4", "data.num_workers=0"]
    assert main([*TINY_MODEL, *args, "recipe.epochs=1", f"run.root={tmp_path}"]) == 0
    (folder,) = (path.parent for path in tmp_path.glob("*/record.json"))
    capsys.readouterr()
    assert evaluate(f"run={folder}", f"data={lookalike}") == 0
    assert "the same as on record, to the last digit" in capsys.readouterr().out
    assert evaluate(f"run={folder}", f"data={lookalike / 'val'}") == 0
    accuracy = json.loads((folder / "record.json").read_text())["result"]["test/acc1"]
    out = capsys.readouterr().out
    assert "12 images in all 4 classes, by class name" in out
    assert f"top-1 {100 * accuracy:.2f}%" in out


@pytest.mark.slow
@pytest.mark.parametrize("data", ["folder", "own"])
def test_two_processes_give_the_same_digits(
    data: str, run: Path, pictures: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [f"run={run}", "trainer.eval_batch_size=5", "weights=raw"]  # three batches: one process has a filler
    args += [f"data={pictures}"] if data == "folder" else []
    assert evaluate(*args) == 0
    two = command("evaluate", *args, "trainer.devices=2")
    assert two.status == 0, two.err
    assert two.out == capsys.readouterr().out


def test_where_it_was_trained_does_not_say_where_it_is_tested(run: Path, tmp_path: Path) -> None:
    from eit_lab.processes import count_ranks
    from eit_lab.trained import find, take_apart

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["trainer"] |= {"devices": 8, "num_nodes": 2, "strategy": "ddp"}
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    for given, ranks in (([], 1), (["trainer.devices=3"], 3)):  # 3 does not divide the batch of training, 16
        trained = find(take_apart([f"run={copy}", *given], command="evaluate", options={}), command="evaluate")
        assert count_ranks(trained.config) == ranks
        assert trained.config.trainer.num_nodes == 1
        assert trained.as_recorded


def test_on_a_terminal_a_bar_tells_the_time_left_on_stderr(
    run: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.console import Console

    from eit_lab.training import evaluate as room

    assert evaluate(f"run={run}", f"data={pictures}") == 0
    plain = capsys.readouterr()
    assert plain.err == ""
    monkeypatch.setattr(room, "Console", lambda **given: Console(**given, force_terminal=True, width=120))
    assert evaluate(f"run={run}", f"data={pictures}", "trainer.progress_bar=true", "trainer.eval_batch_size=4") == 0
    shown = capsys.readouterr()
    assert shown.out == plain.out
    assert "3/3" in shown.err
    assert "left" in shown.err


# ----------------------------------------------------------------------------------------------------------------- predict


def predict(*args: str) -> int:
    from eit_lab.predict import main

    return main(list(args))


def test_predict_prints_the_five_likeliest_classes_of_each_image(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = pictures / "grey.png"
    Image.open(pictures / "0" / "0.png").convert("L").save(grey)
    assert predict(f"run={run}", str(pictures / "0" / "0.png"), str(grey), "weights=ema") == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12
    for block, path in ((lines[:6], pictures / "0" / "0.png"), (lines[6:], grey)):
        assert block[0] == str(path)
        shares = [float(re.match(r"\s+([\d.]+)%  class \d$", line)[1]) for line in block[1:]]  # type: ignore[index]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 100.01
    grey.unlink()


def test_predict_names_classes_in_words_where_they_are_synsets(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "named"
    shutil.copytree(run, copy)
    (copy / "classes.json").write_text(json.dumps([*synsets()[:9], "something else"]))
    assert predict(f"run={copy}", str(pictures / "1" / "0.png")) == 0
    named = {line.split("%  ")[1] for line in capsys.readouterr().out.splitlines()[2:]}
    assert named <= {*(f"{wnid}  {lemmas()[wnid]}" for wnid in synsets()[:9]), "something else"}
    assert len(named) == 5


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nothing.jpg", "nothing.jpg: no such file"),
        (__file__, "cannot be read as an image"),
        ("size=3", "size must be one of run, checkpoint, model, model.timm_name, weights, data.*, trainer.*"),
        (None, "predict needs an image file"),
    ],
)
def test_predict_answers_a_mistake_in_one_line(
    word: str | None, message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(f"run={run}", *([word] if word else [])) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
