"""Exports: read back, any batch size, the module's own logits; each file tells what it is; a wrong one is removed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TINY
from eit_lab.finetune import read_metadata
from eit_lab.models.checkpoints import load_backbone
from eit_lab.trained import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with averaged weights, on oblong images, with a stem that has batch norm."""
    from eit_lab.train import main

    root = tmp_path_factory.mktemp("runs")
    args = ["model/stem=conv1", "data.img_size=[8,12]", "recipe.ema_decay=0.5", "recipe.lr=0.01", "recipe.epochs=1"]
    assert main([*TINY, *args, f"run.root={root}", "trainer.progress_bar=false"]) == 0
    (folder,) = (path.parent for path in root.glob("*/record.json"))
    return folder


def export(*args: str) -> int:
    from eit_lab.export import main

    return main(list(args))


def module_of(run: Path, weights: Any = "raw") -> torch.nn.Module:
    config = load_run(run)
    return load_backbone(
        config.model, run / "checkpoints" / "best.ckpt", img_size=config.data.img_size, weights=weights
    )


IMAGES = torch.randn(4, 3, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch 2.11, as it reads its own file
@pytest.mark.slow
def test_torch_export_gives_the_modules_logits_at_any_batch_size(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.pt2"
    assert export(f"run={run}", "format=torch", "weights=ema", f"out={path}") == 0
    found = re.search(r"largest difference of a logit (\S+) at batch 1, (\S+) at batch 3", capsys.readouterr().out)
    assert found is not None
    # The module has kernels of its own on CPU, a program has torch's.
    assert max(map(float, found.groups())) < 1e-6
    extra = {"eit_lab.json": ""}
    program = torch.export.load(path, extra_files=extra).module()
    model = module_of(run, "ema")
    with torch.no_grad():
        torch.testing.assert_close(program(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(program(IMAGES), module_of(run)(IMAGES), rtol=1e-5, atol=1e-6)
    assert json.loads(extra["eit_lab.json"])["num_classes"] == 10
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_onnx_gives_the_modules_logits_at_any_batch_size(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx
    import onnxruntime

    assert export(f"run={run}", "format=onnx") == 0
    out = capsys.readouterr().out
    path = run / f"{load_run(run).model.name}.onnx"
    assert f"wrote  {path}" in out
    assert "opset 20" in out
    proto = onnx.load(path)
    assert [entry.version for entry in proto.opset_import if entry.domain == ""] == [20]
    (told,) = (json.loads(entry.value) for entry in proto.metadata_props if entry.key == "eit_lab")
    assert (told["img_size"], told["mean"]) == ([8, 12], [0.5, 0.5, 0.5])
    (logits,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {"images": IMAGES.numpy()}
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), module_of(run)(IMAGES), atol=1e-5, rtol=0)


def test_safetensors_holds_the_weights_and_what_they_are(run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "model.safetensors"
    assert export(f"run={run}", "format=safetensors", f"out={path}") == 0
    model = module_of(run)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in load_file(path).items())
    told = read_metadata(path)
    assert told is not None
    record = json.loads((run / "record.json").read_text())
    assert told["identity"] == record["identity"]
    assert told["model"] == record["config"]["model"]
    assert (told["num_classes"], told["img_size"], told["in_chans"]) == (10, [8, 12], 3)


def test_an_exported_file_is_a_checkpoint_that_needs_no_model_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    from eit_lab.compose import compose_one
    from eit_lab.predict import main as predict

    path = tmp_path / "model.safetensors"
    assert export(f"run={run}", "format=safetensors", f"out={path}") == 0
    config = compose_one([f"checkpoint={path}", "data=cifar10"])
    assert (config.model, config.data.img_size) == (load_run(run).model, (8, 12))
    Image.new("RGB", (12, 8), (200, 30, 90)).save(tmp_path / "image.png")
    answers = []
    for named in (f"checkpoint={path}", f"run={run}"):
        capsys.readouterr()
        assert predict([named, str(tmp_path / "image.png")]) == 0
        answers.append(capsys.readouterr().out.splitlines()[1:])
    assert answers[0] == answers[1]


def test_a_file_with_other_logits_is_removed_and_an_earlier_one_stays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab import export as module

    path = tmp_path / "model.safetensors"
    assert export(f"run={run}", "format=safetensors", f"out={path}") == 0
    earlier = path.read_bytes()
    read = module._read_safetensors

    def nudged(file: Path) -> Any:
        logits = read(file)
        return lambda images: logits(images) + 1e-3

    monkeypatch.setattr(module, "_read_safetensors", nudged)
    assert export(f"run={run}", "format=safetensors", f"out={path}") == 1
    assert "gives other logits than the model, largest difference 0.001" in capsys.readouterr().err
    assert path.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(module, "_read_safetensors", lambda _: lambda images: torch.full((len(images), 10), torch.nan))
    assert export(f"run={run}", "format=safetensors", f"out={path}") == 1


def test_onnx_without_its_packages_names_the_extra(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab import export as module

    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxruntime" else object())
    assert export(f"run={run}", "format=onnx") == 2
    assert capsys.readouterr().err == "eit_lab: format=onnx needs onnxruntime: pip install 'eit_lab[export]'\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "format must be given, one of torch, onnx, safetensors"),
        (["format=onx"], "format must be one of torch, onnx, safetensors, got 'onx'; nearest: onnx"),
        (["format=torch", "out=model.onnx"], "out must end in .pt2 with format=torch"),
        (["format=torch", "out=nowhere/model.pt2"], "out must lie in a folder that exists"),
    ],
)
def test_a_mistake_is_one_line(args: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(f"run={run}", *args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
