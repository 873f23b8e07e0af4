"""Weights from files: the authors' format, timm's names, ours; mismatches say what differs; no pickle is trusted."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch

from eit_lab import create_model
from eit_lab.models.checkpoints import CheckpointError


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
