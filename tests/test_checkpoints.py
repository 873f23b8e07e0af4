"""Weights from files: the authors' format, timm's names, ours; raw, averaged, resized; mismatches say what differs."""

from __future__ import annotations

import argparse
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eit_lab import create_model
from eit_lab.models.checkpoints import CheckpointError, adapt, average, load_weights, resize_position


def to_authors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names -> the authors', as their files have them."""
    renamed = {}
    for key, value in state.items():
        key = key.replace("stem.conv.", "patch_embed.eit_p.conv.").replace("mixer.attn.", "attn.")
        renamed[key.replace("mixer.conv.conv.", "eit_t.conv1.")] = value
    return renamed


def test_the_authors_format_loads_with_its_namespace(tmp_path: Path) -> None:
    source = create_model("eit_mini", num_classes=10)
    state = to_authors(source.state_dict())
    assert "blocks.0.eit_t.conv1.weight" in state
    assert "blocks.4.eit_t.conv1.weight" not in state  # the last layer has no convolution
    path = tmp_path / "checkpoint.pth"
    args = argparse.Namespace(lr=1e-3, model="eit_mini", eit_p=[16, 4, 3])
    torch.save(
        {
            "model": state,
            "optimizer": {"state": {}},
            "lr_scheduler": {},
            "epoch": 299,
            "model_ema": state,
            "scaler": {},
            "args": args,
        },
        path,
    )
    loaded = create_model("eit_mini", num_classes=10, checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = tmp_path / "trap.pth"
    torch.save({"model": Trap()}, path, pickle_module=pickle)
    with pytest.raises(CheckpointError, match="cannot be read as a file of tensors"):
        create_model("eit_nano", checkpoint=path)
    assert not (tmp_path / "trapped").exists()


def test_a_mismatch_lists_keys_and_shapes_and_leaves_the_model_alone(tmp_path: Path) -> None:
    path = tmp_path / "vit.pth"
    torch.save(create_model("vit_nano", num_classes=10, img_size=32).state_dict(), path)
    with pytest.raises(CheckpointError) as error:
        create_model("eit_nano", num_classes=12, img_size=32, checkpoint=path)
    text = str(error.value)
    assert "shape differs: head.weight is (10, 96) in the file, (12, 96) in the model" in text
    assert "missing in the file: blocks.0.mixer.conv.conv.weight (66, 1, 3, 3)" in text
    assert "shape differs: blocks.0.mixer.attn.qkv.weight is (288, 96) in the file, (90, 30) in the model" in text


@pytest.mark.parametrize(("content", "message"), [(b"", "cannot be read"), (b"not a checkpoint", "cannot be read")])
def test_a_damaged_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        create_model("eit_nano", checkpoint=path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no file at"):
        create_model("eit_nano", checkpoint=tmp_path / "nothing.ckpt")


def test_safetensors_load(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = create_model("eit_nano", num_classes=3, img_size=32)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    loaded = create_model("eit_nano", num_classes=3, img_size=32, checkpoint=tmp_path / "weights.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))


# ----------------------------------------------------------------------------------------------- averages, other shapes


def test_averaged_weights_are_read_from_all_three_formats_and_their_absence_is_one_line(tmp_path: Path) -> None:
    raw, averaged = (create_model("eit_nano", num_classes=3, img_size=32).state_dict() for _ in range(2))
    ours = {f"model.{key}": value for key, value in raw.items()}
    torch_style = {"n_averaged": torch.tensor(7), **{f"module.{key}": value for key, value in averaged.items()}}
    for number, content in enumerate(
        (
            {"state_dict": ours, "ema": {"decay": 0.9, "updates": 3, "state_dict": averaged}},
            {"model": to_authors(raw), "model_ema": to_authors(averaged)},
            {"model": to_authors(raw), "model_ema": torch_style},
            {"state_dict": raw, "state_dict_ema": averaged},
        )
    ):
        torch.save(content, tmp_path / f"{number}.pth")
        model = create_model("eit_nano", num_classes=3, img_size=32)
        for weights, wanted in (("raw", raw), ("ema", averaged)):
            load_weights(model, tmp_path / f"{number}.pth", weights=weights)
            assert all(torch.equal(value, wanted[key]) for key, value in model.state_dict().items())
    torch.save({"state_dict": ours}, tmp_path / "raw.pth")
    with pytest.raises(CheckpointError, match=r"raw\.pth holds no averaged weights \(EMA\)") as error:
        load_weights(model, tmp_path / "raw.pth", weights="ema")
    assert "\n" not in str(error.value)


def test_the_average_is_the_float64_mean_in_the_weights_own_type() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [
        {
            "weight": torch.randn(5, 3, generator=generator),
            "half": torch.randn(4, generator=generator).bfloat16(),
            "steps": torch.tensor(number),
        }
        for number in range(7)
    ]
    mean = average(states)
    for key in ("weight", "half"):
        columns = zip(*(state[key].flatten().tolist() for state in states), strict=True)
        slow = torch.tensor([math.fsum(column) / len(states) for column in columns], dtype=torch.float64)
        assert mean[key].dtype == states[0][key].dtype
        assert torch.equal(mean[key].flatten(), slow.to(states[0][key].dtype))
    assert mean["steps"] == 6  # a count: of the last one
    lost_in_float32 = [{"w": torch.tensor([value])} for value in (1e8, 1.0, -1e8)]
    assert average(lost_in_float32)["w"] == torch.tensor(1.0) / 3
    assert all(torch.equal(average(states[:1])[key], value) for key, value in states[0].items())


@pytest.mark.parametrize(
    ("other", "named"), [({"a": torch.zeros(3), "b": torch.zeros(1)}, "b"), ({"a": torch.zeros(4)}, "a")]
)
def test_weights_of_different_models_have_no_mean(other: dict[str, torch.Tensor], named: str) -> None:
    with pytest.raises(CheckpointError, match=rf"differ in 1 keys or shapes: {named}") as error:
        average([{"a": torch.zeros(3)}, {"a": torch.zeros(3)}, other])
    assert "\n" not in str(error.value)


def test_several_files_are_loaded_as_their_mean(tmp_path: Path) -> None:
    models = [create_model("eit_nano", num_classes=3, img_size=32) for _ in range(3)]
    paths = [tmp_path / f"{number}.pth" for number in range(3)]
    for model, path in zip(models, paths, strict=True):
        torch.save({"model": to_authors(model.state_dict())}, path)
    loaded = create_model("eit_nano", num_classes=3, img_size=32)
    assert load_weights(loaded, paths) == "authors"
    mean = average([model.state_dict() for model in models])
    assert all(torch.equal(value, mean[key]) for key, value in loaded.state_dict().items())


def test_a_position_embedding_keeps_its_bits_on_its_own_grid_and_its_cls_row_on_any() -> None:
    table = torch.randn(1, 1 + 4 * 6, 8, generator=torch.Generator().manual_seed(0))
    assert resize_position(table, grid=(4, 6), to=(4, 6)) is table
    for to in ((8, 12), (3, 3), (5, 6)):
        resized = resize_position(table, grid=(4, 6), to=to)
        assert resized.shape == (1, 1 + to[0] * to[1], 8)
        assert torch.equal(resized[:, 0], table[:, 0])
        constant = resize_position(torch.full_like(table, 0.7), grid=(4, 6), to=to)
        torch.testing.assert_close(constant, torch.full_like(constant, 0.7))


@pytest.mark.parametrize("to", [(16, 16), (7, 7), (10, 3)])
def test_a_position_embedding_is_resized_as_pillow_resizes_an_image(to: tuple[int, int]) -> None:
    table = torch.randn(1, 1 + 14 * 14, 3, generator=torch.Generator().manual_seed(0))
    resized = resize_position(table, grid=(14, 14), to=to)
    for channel in range(3):
        image = Image.fromarray(table[0, 1:, channel].view(14, 14).numpy())
        wanted = np.array(image.resize((to[1], to[0]), Image.Resampling.BICUBIC))
        torch.testing.assert_close(resized[0, 1:, channel].view(to), torch.from_numpy(wanted), atol=1e-5, rtol=1e-5)


def test_fine_tuning_takes_all_but_the_classifier_and_resizes_the_position_embedding() -> None:
    source = create_model("vit", num_classes=10, img_size=96)
    model = create_model("vit", num_classes=4, img_size=144)
    fresh = model.head.weight.clone()
    adapted, notes = adapt(source.state_dict(), model)
    model.load_state_dict(adapted)
    assert notes == [
        "classifier anew: 10 -> 4 classes (head.weight, head.bias)",
        f"position embedding 8x8 -> {model.grid[0]}x{model.grid[1]}",
    ]
    assert torch.equal(model.head.weight, fresh)
    wanted = source.state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith(("head.", "pos_embed")):
            assert torch.equal(value, wanted[key]), key
    same, notes = adapt(source.state_dict(), source)
    assert notes == ["classifier kept: 10 classes"]
    assert all(torch.equal(value, wanted[key]) for key, value in same.items())


def test_fine_tuning_refuses_what_does_not_fit_with_keys_and_shapes() -> None:
    state = create_model("eit_nano", num_classes=10, img_size=32).state_dict()
    with pytest.raises(CheckpointError) as error:
        adapt(state, create_model("vit_nano", num_classes=4, img_size=32))
    assert "does not fit the model" in str(error.value)
    assert "not in the model: blocks.0.mixer.conv.conv.weight (66, 1, 3, 3)" in str(error.value)
    assert "head.weight" not in str(error.value)
    grey = create_model("eit_nano", num_classes=10, img_size=32, in_chans=1)
    with pytest.raises(CheckpointError, match=r"stem\.conv\.weight is \(96, 3, 8, 8\) in the file, \(96, 1, 8, 8\)"):
        adapt(state, grey)
