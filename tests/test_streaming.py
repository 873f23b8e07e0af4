"""Images from a folder, tar and parquet files, shards, a server: the same batches from each, and nothing damaged in them."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import TINY_MODEL, only_run, record_of
from eit_lab.command import RunError
from eit_lab.compose import compose_one
from eit_lab.config import Config, ConfigError, ImageNetData
from eit_lab.data.batch import Batch
from eit_lab.data.imagenet import StreamedImages, load_imagenet
from eit_lab.data.module import ImageData
from eit_lab.data.restart import jpegtran
from eit_lab.data.unread import Unread
from fault_server import FaultServer
from imagenet_lookalike import as_parquet, as_tars, as_tiny_imagenet, make_lookalike

Parts = Mapping[str, StreamedImages]

REWRITE = [] if jpegtran() else ["--no-rewrite"]
NUM_TRAIN, NUM_VAL = 48, 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 classes would take longer to train on: 12, with every odd kind of file among them."""
    root = tmp_path_factory.mktemp("streaming") / "imagenet"
    return make_lookalike(root, classes=12, per_class=4, val_per_class=2)


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    from eit_lab.shards import main

    target = folder.parent / "shards"
    assert main(["build", str(folder), str(target), "--shard-mb", "1", "--workers", "1", *REWRITE]) == 0
    return target


requests: list[str] = []


class _Quiet(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        requests.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    """What lies beside the folder, over HTTP; each path that is asked for is in ``requests``."""
    requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder.parent)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def config_of(root: object, *more: str) -> Config:
    return compose_one([f"data.root={root}", "data.val_size=6", "data.img_size=64", *more])


def parts_of(root: object, *more: str) -> Parts:
    config = config_of(root, *more)
    assert isinstance(config.data, ImageNetData)
    return load_imagenet(config.data, config.recipe, seed=0)  # type: ignore[return-value]


def all_of(part: StreamedImages, *, epoch: int = 0) -> Batch:
    return part[[(epoch, index, 0, index) for index in range(len(part))]]


def by_key(part: StreamedImages) -> dict[str, tuple[int, bytes]]:
    batch = all_of(part)
    keys = [Path(part.reader.index.key(int(sample))).name for sample in part.chosen]
    return {
        key: (int(label), bytes(image.numpy()))
        for key, label, image in zip(keys, batch.labels, batch.images, strict=True)
    }


# ------------------------------------------------------------------------------------------------------------ one content


@pytest.mark.parametrize("recipe", ["basic", "eit300"])
def test_shards_give_the_folders_batches_to_the_last_bit(recipe: str, folder: Path, shards: Path) -> None:
    ours, theirs = (parts_of(root, f"recipe={recipe}") for root in (folder, shards))
    for name in ("train", "val", "test"):
        for a, b in zip(all_of(ours[name], epoch=3)[:4], all_of(theirs[name], epoch=3)[:4], strict=True):
            assert torch.equal(a, b), name
    assert ours["train"].class_names == theirs["train"].class_names


def test_a_run_moves_from_the_folder_to_its_shards_and_stays_the_same_run(folder: Path, shards: Path) -> None:
    from eit_lab.data.catalog import describe

    assert describe(config_of(folder).data) == describe(config_of(shards).data)


@pytest.fixture
def bucket(shards: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The shards in a bucket of a server that speaks S3."""
    boto3 = pytest.importorskip("boto3")
    server_of = pytest.importorskip("moto.server")
    server = server_of.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    for path in shards.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "images", f"in/{path.relative_to(shards)}")
    client.close()
    yield "s3://images/in"
    server.stop()


@pytest.mark.slow
def test_shards_in_a_bucket_hold_the_same_images(folder: Path, bucket: str, tmp_path: Path) -> None:
    ours, theirs = by_key(parts_of(folder)["test"]), by_key(parts_of(bucket, f"data.cache_dir={tmp_path}")["test"])
    assert ours == theirs


@pytest.mark.parametrize("layout", ["tars", "parquet", "http shards"])
def test_every_layout_holds_the_same_images(
    layout: str, folder: Path, shards: Path, served: str, tmp_path: Path
) -> None:
    root: object = f"{served}/shards"
    if layout != "http shards":
        maker = partial(as_tars, per_tar=20) if layout == "tars" else partial(as_parquet, per_file=20)
        root = maker(folder, tmp_path / layout)
    more = (f"data.cache_dir={tmp_path / 'cache'}", "data.shuffle_window=20")
    ours, theirs = by_key(parts_of(folder)["test"]), by_key(parts_of(root, *more)["test"])
    stems = {Path(key).stem: value for key, value in ours.items()}
    assert {Path(key).stem: value for key, value in theirs.items()} == stems


def test_an_epoch_over_http_has_every_sample_once_and_fetches_each_shard_once(
    folder: Path, shards: Path, served: str, tmp_path: Path
) -> None:
    config = config_of(
        f"{served}/shards", f"data.cache_dir={tmp_path}", "data.shuffle_window=12", "recipe=basic", "recipe.batch_size=6",
        "data.num_workers=2", "trainer.eval_batch_size=5",
    )  # fmt: skip
    data = ImageData(config)
    data.setup("fit")
    train = list(data.train_dataloader())
    val = list(data.val_dataloader())
    data.teardown("fit")
    assert sorted(index for batch in train for index in batch.index.tolist()) == list(range(NUM_TRAIN - 6))
    assert sorted(index for batch in val for index in batch.index.tolist()) == list(range(6))
    samples = [set(data.part(name).chosen.tolist()) for name in ("train", "val")]  # type: ignore[union-attr]
    assert samples[0].isdisjoint(samples[1])
    assert len(samples[0] | samples[1]) == NUM_TRAIN
    asked = Counter(requests)
    assert {count for path, count in asked.items() if path.endswith(".shard")} == {1}


def test_tiny_imagenets_layout_trains_with_its_class_names(folder: Path, tmp_path: Path) -> None:
    root = as_tiny_imagenet(folder, tmp_path / "tiny")
    config = compose_one(["data=folder", f"data.root={root}", "data.val_size=6", "data.img_size=64"])
    data = ImageData(config)
    data.setup("fit")
    assert data.class_names == sorted(path.name for path in (folder / "train").iterdir())
    assert (len(data.part("train")), len(data.part("test"))) == (NUM_TRAIN - 6, NUM_VAL)


# ------------------------------------------------------------------------------------------------------------- fast and pil


def test_the_fast_path_differs_from_torchvisions_by_rounding_alone(folder: Path) -> None:
    fast, pil = (
        parts_of(folder, f"data.decode={decode}", "data.img_size=224", "recipe=basic") for decode in ("fast", "pil")
    )
    for name in ("train", "test"):
        a, b = all_of(fast[name]), all_of(pil[name])
        difference = (a.images.int() - b.images.int()).abs()
        assert torch.equal(a.labels, b.labels)
        if name == "test":
            assert difference.max() <= 2
            assert difference.float().mean() < 0.01
        else:  # a crop that grows in one direction and shrinks in the other: Pillow goes through them in another order
            assert difference.max() <= 16
            assert difference.float().mean() < 0.05


def test_the_pil_path_is_torchvisions_evaluation_pixel_for_pixel(folder: Path) -> None:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    pipeline = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224), v2.PILToTensor()])
    part = parts_of(folder, "data.decode=pil", "data.img_size=224")["test"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Pillow's, of broken EXIF
        theirs = [pipeline(image) for image, _ in ImageFolder(str(folder / "val"))]
    assert torch.equal(all_of(part).images, torch.stack(theirs))


def test_debug_batches_shows_what_a_folder_becomes(folder: Path, here: Path) -> None:
    from eit_lab.train import main

    assert main(["debug=batches", f"data.root={folder}", "data.img_size=64", "recipe.batch_size=16"]) == 0
    assert (here / "runs/show/batches-eit_base-imagenet-eit300.png").stat().st_size > 20_000


# ------------------------------------------------------------------------------------------------------------------ faults


def damage(root: Path, split: str, count: int) -> list[str]:
    """Cut ``count`` JPEGs of a split short; their names."""
    paths = [p for p in sorted((root / split).rglob("*.JPEG")) if p.read_bytes()[:2] == b"\xff\xd8"][:count]
    for path in paths:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return [path.name for path in paths]


def trained(root: object, *more: str) -> tuple[str, ...]:
    return (*TINY_MODEL, f"data.root={root}", "data.img_size=32", "data.val_size=6", "recipe.batch_size=8", *more)


@pytest.mark.slow
def test_images_that_cannot_be_read_are_left_out_up_to_the_budget_counted_and_named(
    folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    root = here / "copy"
    shutil.copytree(folder, root)
    names = damage(root, "train", 2) + damage(root, "val", 1)
    more = ("data.num_workers=1", "recipe.last_batch=keep")
    assert main([*trained(root, *more, "data.max_unread=2")]) == 1
    said = capsys.readouterr()
    assert said.out.count("left out (") == 2
    line = said.err.strip().splitlines()[-1]
    assert "data.max_unread lets images be left out, now 2" in line
    assert main([*trained(root, *more, "data.max_unread=3")]) == 0  # goes on: the same run
    record = record_of(only_run(here / "runs"))
    assert record["status"] == "finished"
    assert len(record["unread"]) == 3
    assert all(any(name in text for text in record["unread"]) for name in names)
    predicted = np.load(only_run(here / "runs") / "predictions.npz")
    assert len(predicted["index"]) == NUM_VAL - 1  # the damaged one is not counted


def test_a_damaged_image_is_replaced_by_a_neighbour_and_never_seen(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    (name,) = damage(root, "train", 1)
    part = parts_of(root, "recipe=basic")["train"]
    bad = next((n for n in range(len(part)) if part.name(n).endswith(name)), None)
    if bad is None:
        pytest.fail("the damaged image is in the held-out slice: choose another")
    batch = part[[(0, index, 0, index) for index in ((bad - 1) % 40, bad, (bad + 1) % 40)]]
    assert [index for index, _ in batch.unread] == [bad]
    assert "cannot be decoded" in batch.unread[0][1]
    assert batch.index.tolist()[1] == batch.index.tolist()[2]
    assert torch.equal(batch.images[1], batch.images[2])


def test_where_none_of_a_batch_can_be_read_the_next_image_stands_in(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(folder, root)
    part = parts_of(root, "recipe=basic")["train"]
    Path(part.name(7)).write_bytes(b"no image")
    batch = part[[(0, 7, 0, 0)]]
    assert [index for index, _ in batch.unread] == [7]
    assert batch.index.tolist() == [8]
    for one, other in zip(batch[:2], part[[(0, 8, 0, 0)]][:2], strict=True):
        assert torch.equal(one, other)
    for n in range(len(part)):
        Path(part.name(n)).write_bytes(b"no image")
    with pytest.raises(
        RunError, match=r"cannot be read, nor the 8 images after it; the last: .* cannot be decoded: no kind of image"
    ):
        part[[(0, 7, 0, 0)]]


@pytest.mark.slow
def test_a_process_that_still_holds_a_loader_ends_all_the_same(folder: Path) -> None:
    program = f"""
from eit_lab.compose import compose_one
from eit_lab.data.module import ImageData
config = compose_one(["data.root={folder}", "data.val_size=6", "data.img_size=32", "recipe=basic", "recipe.batch_size=8",
                      "data.num_workers=1"])
data = ImageData(config)
data.setup("fit")
batches = iter(data.train_dataloader())
next(batches)
kept = [batches]
kept.append(kept)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("fault", ["flipped byte", "cut short", "missing"])
def test_a_damaged_shard_ends_the_run_with_its_name(fault: str, folder: Path, shards: Path, here: Path) -> None:
    root = here / "shards"
    shutil.copytree(shards, root)
    part = parts_of(root)["train"]
    bad = sorted((root / "train").glob("*.shard"))[0]
    content = bytearray(bad.read_bytes())
    if fault == "flipped byte":
        content[1000] ^= 4
        bad.write_bytes(content)
    elif fault == "cut short":
        bad.write_bytes(content[:2000])
    else:
        bad.unlink()
    batch = all_of(part)
    assert batch.unread
    assert all(bad.name in text for _, text in batch.unread)
    expected = {"flipped byte": "its checksum differs", "cut short": "cut short", "missing": "missing"}[fault]
    assert expected in batch.unread[0][1]
    if fault != "flipped byte":  # it is seen before anything starts
        with pytest.raises(ConfigError, match=bad.name):
            parts_of(root)


def test_a_damaged_copy_in_the_cache_is_fetched_again(folder: Path, shards: Path, served: str, tmp_path: Path) -> None:
    root, more = f"{served}/shards", (f"data.cache_dir={tmp_path}",)
    first = all_of(parts_of(root, *more)["test"])
    copies = [path for path in tmp_path.rglob("*") if path.is_file() and path.name.endswith(".shard")]
    assert copies
    for path in copies:
        content = bytearray(path.read_bytes())
        content[1000] ^= 1
        path.write_bytes(content)
    again = all_of(parts_of(root, *more)["test"])
    assert not again.unread
    assert torch.equal(first.images, again.images)


@pytest.mark.slow
def test_a_killed_worker_is_one_line(folder: Path, here: Path) -> None:
    words = [*trained(folder, "data.num_workers=1", "recipe.epochs=500", "trainer.record_samples=true")]
    run = subprocess.Popen(
        [sys.executable, "-m", "eit_lab.train", *words], cwd=here, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    began = time.monotonic()
    while not list(here.glob("runs/*/checkpoints/last.ckpt")):
        assert run.poll() is None
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if "eit_lab.train" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1
    line = err.strip().splitlines()[-1]
    assert "DataLoader worker" in line
    assert "the same command goes on" in line
    assert "Traceback" not in err


# ---------------------------------------------------------------------------------------------------------------- counting


def steps_of(run: Path) -> dict[int, list[int]]:
    """Optimizer step -> sorted sample indices of all ranks."""
    steps: dict[int, list[int]] = {}
    for path in (run / "samples").iterdir():
        for line in path.read_text().splitlines():
            step, _, ids = line.partition(",")
            steps.setdefault(int(step), []).extend(map(int, ids.split()))
    return {step: sorted(ids) for step, ids in steps.items()}


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as handle:
        return [float(row["train/loss"]) for row in csv.DictReader(handle) if row["train/loss"]]


def test_the_shorter_last_step_is_the_same_on_one_process_and_with_accumulation(folder: Path, here: Path) -> None:
    from eit_lab.train import main

    words = trained(
        folder, "recipe.last_batch=keep", "recipe.batch_size=16", "trainer.record_samples=true", "data.num_workers=0",
        "trainer.log_every_n_steps=1", "recipe.mixup_alpha=0.8",
    )  # fmt: skip
    found = {}
    for name, more in (("one", ()), ("four", ("trainer.accumulate_grad_batches=4",))):
        assert main([*words, *more, f"run.root={name}"]) == 0
        run = only_run(here / name)
        found[name] = losses(run)
        steps = steps_of(run)
        assert [len(steps[step]) for step in sorted(steps)] == [16, 16, 10] * 2
        for epoch in (0, 1):
            ids = [i for step in range(1 + 3 * epoch, 4 + 3 * epoch) for i in steps[step]]
            assert sorted(ids) == list(range(NUM_TRAIN - 6))
    assert found["one"] == pytest.approx(found["four"], rel=2e-5)


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_with_three_and_loses_nothing(folder: Path, shards: Path, here: Path) -> None:
    words = [
        *trained(shards, "recipe.batch_size=12", "trainer.record_samples=true", "data.num_workers=1", "recipe.epochs=3"),
        "trainer.checkpoint_every_n_steps=1", "recipe.last_batch=keep",
    ]  # fmt: skip

    def train(*more: str, stop_at: int | None = None) -> int:
        run = subprocess.Popen(
            [sys.executable, "-m", "eit_lab.train", *words, *more], cwd=here, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        began = time.monotonic()
        while stop_at is not None and run.poll() is None:
            folders = list(here.glob("runs/*/samples"))
            if folders and len(steps_of(folders[0].parent)) >= stop_at:
                run.send_signal(signal.SIGTERM)
                break
            assert time.monotonic() - began < 120
            time.sleep(0.02)
        return run.wait(timeout=240)

    assert train("trainer.devices=2", stop_at=5) == 75
    assert train("trainer.devices=3") == 0
    steps = steps_of(only_run(here / "runs"))
    assert sorted(steps) == list(range(1, 13))
    for epoch in range(3):
        ids = [index for step in range(1 + 4 * epoch, 5 + 4 * epoch) for index in steps[step]]
        assert sorted(set(ids)) == list(range(NUM_TRAIN - 6))
        assert len(ids) <= NUM_TRAIN - 6 + 2


@pytest.mark.slow
def test_two_processes_train_from_a_server_as_one_does(folder: Path, shards: Path, served: str, here: Path) -> None:
    words = [
        *trained(f"{served}/shards", "recipe.batch_size=12", "trainer.record_samples=true", "data.num_workers=1"),
        f"data.cache_dir={here / 'cache'}", "data.shuffle_window=12", "trainer.log_every_n_steps=1",
    ]  # fmt: skip
    found = []
    for devices in (1, 2):
        more = [f"trainer.devices={devices}", f"run.root=runs{devices}"]
        done = subprocess.run(
            [sys.executable, "-m", "eit_lab.train", *words, *more], cwd=here, capture_output=True, text=True, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        run = only_run(here / f"runs{devices}")
        found.append((steps_of(run), record_of(run)["result"]["test/acc1"], losses(run)))
    assert found[0][0] == found[1][0]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-4)


# --------------------------------------------------------------------------------------------------------- files in windows


def test_a_cache_that_cannot_hold_two_windows_is_refused_with_what_would_do(
    shards: Path, served: str, tmp_path: Path
) -> None:
    words = (f"data.cache_dir={tmp_path}", "data.shuffle_window=24", "data.cache_gb=0.0001")
    with pytest.raises(ConfigError, match=r"data.cache_gb must hold two windows of .*, got 0.0001; nearest: 0.01"):
        parts_of(f"{served}/shards", *words)


def test_files_in_the_order_of_classes_are_told_of(folder: Path, tmp_path: Path) -> None:
    root = as_parquet(folder, tmp_path / "sorted", per_file=4, mixed=False)
    more = (f"data.cache_dir={tmp_path / 'cache'}", "data.shuffle_window=8")
    notes = parts_of(root, *more)["train"].notes
    assert any("shuffled 8 images at a time" in note for note in notes)
    assert any(re.search(r"8 images of neighbouring files have 2 classes instead of about 6", note) for note in notes)


def test_unreadable_images_are_counted_once_over_processes_and_restarts(tmp_path: Path) -> None:
    path = tmp_path / "unread.jsonl"
    first, second = Unread(3, path=path), Unread(3, path=path)
    first.note(["a.JPEG: cut short", "b.JPEG: cut short"])
    second.note(["b.JPEG: cut short", "c.JPEG: cut short"])
    first.note(["c.JPEG: cut short"])
    assert sorted(first.refresh()) == sorted(second.refresh()) == [f"{name}.JPEG: cut short" for name in "abc"]
    for _ in range(3):  # whoever starts again meets it again
        with pytest.raises(RunError, match=r"d.JPEG: cut short; data.max_unread lets images be left out, now 3"):
            Unread(3, path=path).note(["a.JPEG: cut short", "d.JPEG: cut short"])
    with pytest.raises(RunError, match=r"a.JPEG: cut short; data.max_unread lets images be left out, now 2"):
        Unread(2, path=path).note(["a.JPEG: cut short"])
    Unread(4, path=path).note(["d.JPEG: cut short"])
    assert len(path.read_text().splitlines()) == 4


def test_a_server_without_one_of_the_shards_is_refused_before_anything_starts(
    shards: Path, tmp_path: Path, folder: Path
) -> None:
    root = tmp_path / "half"
    shutil.copytree(shards, root)
    gone = next((root / "val").glob("*.shard"))
    content = gone.read_bytes()
    gone.write_bytes(content[:-1])
    with closing(FaultServer(root)) as server:
        words = f"data.cache_dir={tmp_path / 'cache'}"
        with pytest.raises(
            ConfigError, match=rf"val/{gone.name} has {len(content) - 1:,} bytes, must have {len(content):,}"
        ):
            parts_of(server.url, words)
        gone.unlink()
        with pytest.raises(ConfigError, match=rf"val/{gone.name} is missing"):
            parts_of(server.url, words)
        gone.write_bytes(content)
        assert len(parts_of(server.url, words)["test"]) == NUM_VAL


def test_each_tar_file_of_a_server_is_fetched_once(folder: Path, tmp_path: Path) -> None:
    root = as_tars(folder, tmp_path / "tars", per_tar=20)
    with closing(FaultServer(root)) as server:
        parts = parts_of(server.url, f"data.cache_dir={tmp_path / 'cache'}", "data.shuffle_window=8")
        assert not all_of(parts["train"]).unread
        assert not all_of(parts["test"]).unread
        asked = {path.name: server.gets(str(path.relative_to(root))) for path in root.rglob("*.tar")}
        assert set(asked.values()) == {1}, asked
