"""Baselines by timm's names: what they are, what they cost, what they refuse, and that all that works for our models works."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import only_run, record_of
from eit_lab import create_model
from eit_lab.compose import compose_model, compose_one, compose_points
from eit_lab.config import ConfigError, ModelConfig, RecipeConfig, TimmConfig
from eit_lab.loading import dump, load, load_model
from eit_lab.models.baselines import build_timm
from eit_lab.models.cost import count_cost
from eit_lab.timm_names import timm_names
from eit_lab.training.optim import group_parameters, parameter_groups

WORDS = (
    "model=timm", "data=synthetic", "data.num_samples=64", "recipe=small", "recipe.batch_size=16", "recipe.epochs=2",
    "recipe.warmup_epochs=0.0", "logger=none", "trainer.accelerator=cpu", "trainer.progress_bar=false",
)  # fmt: skip
VIT, RESNET = "model.timm_name=test_vit", "model.timm_name=test_resnet"  # timm's own small ones, for tests


def train(*words: str) -> int:
    from eit_lab.train import main

    return main([*WORDS, *words])


def timm_config(name: str, **settings: Any) -> TimmConfig:
    return TimmConfig(kind="timm", name=name, timm_name=name, **settings)


# ------------------------------------------------------------------------------------------------------- names, without torch


def test_the_names_are_timms_own() -> None:
    import timm

    assert timm_names() == set(timm.list_models())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.timm_name=deit_smal_patch16_224"],
         "model.timm_name must be an architecture of timm, got 'deit_smal_patch16_224'; nearest: deit_small_patch16_224"),
        (["model.timm_name=resnet50.a1_in1k"], "without the tag of trained weights, since none are loaded, got 'resnet50.a1_in1k'; nearest: resnet50"),
        (["model.timm_name='hf-hub:timm/x'"], "got 'hf-hub:timm/x'; timm.list_models() lists them"),
        (["model.timm_nam=resnet50"], "model.timm_nam is not a key, got 'resnet50'; nearest: model.timm_name"),
        (["model.ib.strength=0.5"], "model.ib is not a key, got 0.5"),
        (["model/ib=lsra"], "model/ib is no part of a model of model.kind=timm, got 'lsra'; nearest: model=eit_base"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line_with_the_nearest_name(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_one(["model=timm", *words])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_misspelt_name_is_answered_before_torch_is_imported() -> None:
    probe = (
        "import sys; from eit_lab.train import main; "
        "status = main(['model=timm', 'model.timm_name=resnt50']); sys.exit(10 * status + ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 20


def test_both_kinds_of_model_keep_their_own_keys() -> None:
    baseline = compose_one(["model=timm", "model.timm_name=pvt_v2_b1"])
    assert baseline.model == timm_config("pvt_v2_b1")
    assert dump(baseline)["model"] == {
        "kind": "timm",
        "timm_name": "pvt_v2_b1",
        "name": "pvt_v2_b1",
        "drop_path_rate": 0.0,
    }
    assert load(dump(baseline)) == baseline
    assert (baseline.recipe.batch_size, baseline.recipe.lr, baseline.recipe.reference) == (512, 1e-3, None)
    points, _ = compose_points(["data=digits", "model=eit_nano,resnet50", "seed=0,1"])
    assert [(p.config.model.kind, p.config.model.name) for p in points[::2]] == [
        ("backbone", "eit_nano"), ("timm", "resnet50"),
    ]  # fmt: skip
    points, _ = compose_points(["data=digits", "model=timm", "model.timm_name=test_vit,test_resnet"])
    assert [p.config.model.name for p in points] == ["test_vit", "test_resnet"]


def test_the_config_of_a_run_from_before_there_were_kinds_still_loads() -> None:
    plain = dump(compose_one(["data=digits"]))
    assert plain["model"].pop("kind") == "backbone"
    assert load(plain) == compose_one(["data=digits"])
    assert isinstance(load_model(plain["model"]), ModelConfig)
    plain["model"]["sizes"] = 1
    with pytest.raises(ConfigError, match=r"^model\.sizes is not a key, got 1; nearest: model\.size$"):
        load(plain)


# ------------------------------------------------------------------------------------------------------------ the models


@pytest.mark.parametrize(
    ("name", "params", "gmacs"),
    [
        ("resnet50", 25_557_032, "4.09"),  # published: 25.6 M, 4.1 G
        ("swin_tiny", 28_288_354, "4.49"),  # 28.3 M, 4.5 G
        pytest.param("deit_small", 22_050_664, "4.60", marks=pytest.mark.slow),  # 22.1 M, 4.6 G
        pytest.param("pvt_v2_b1", 14_009_000, "2.11", marks=pytest.mark.slow),  # 14.0 M, 2.1 G
    ],
)
def test_counts_are_the_published_ones_and_draw_nothing(name: str, params: int, gmacs: str) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    cost = count_cost(compose_model(name), num_classes=1000, img_size=224)
    assert (cost.params, f"{cost.macs / 1e9:.2f}", cost.grid) == (params, gmacs, ())
    assert torch.equal(before, torch.get_rng_state())


def test_timms_deit_costs_what_our_vit_of_its_shape_costs() -> None:
    theirs = count_cost(timm_config("deit_tiny_patch16_224"), num_classes=10, img_size=64, in_chans=1)
    ours = count_cost(compose_model("vit_ti16"), num_classes=10, img_size=64, in_chans=1)
    assert (theirs.params, theirs.macs, theirs.macs_thop) == (ours.params, ours.macs, ours.macs_thop)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_the_weights_are_timms_own_start(name: str) -> None:
    import timm

    size = {"img_size": 48} if name == "test_vit" else {}
    torch.manual_seed(5)
    theirs = timm.create_model(name, num_classes=7, in_chans=1, drop_path_rate=0.2, **size)
    torch.manual_seed(5)
    ours = build_timm(timm_config(name, drop_path_rate=0.2), num_classes=7, img_size=48, in_chans=1)
    assert type(ours) is type(theirs)
    assert ours.training
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("name", "img_size", "settings", "message"),
    [
        ("test_vit", 40, {}, "must take images of data.img_size, 40x40 px with 3 channels, and cannot (Input height (40) should be divisible "
         "by patch size (16)); it was made for 160x160 px"),
        ("inception_v3", (32, 48), {}, "must take images of data.img_size, 32x48 px with 3 channels, and cannot ("),
        ("densenet121", 32, {"drop_path_rate": 0.1},
         "model.drop_path_rate must be 0 for model.timm_name=densenet121, which has no stochastic depth, got 0.1; nearest: 0"),
    ],
    ids=["patches", "too small", "no stochastic depth"],
)  # fmt: skip
def test_what_an_architecture_cannot_take_is_one_line(
    name: str, img_size: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        count_cost(timm_config(name, **settings), num_classes=10, img_size=img_size)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_create_model_takes_a_name_of_timm() -> None:
    model = create_model("timm/test_vit", num_classes=5, img_size=32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    with pytest.raises(
        ConfigError, match=r"^create_model: 'timm' must name an architecture, got none; nearest: timm/resnet50$"
    ):
        create_model("timm")
    with pytest.raises(
        ConfigError,
        match=r"^create_model: model.timm_name must be an architecture of timm, got 'resnt50'; nearest: resnet50$",
    ):
        create_model("timm/resnt50")


# ------------------------------------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_decay_and_layer_decay_are_timms_own(name: str, layer_decay: float) -> None:
    from timm.optim import param_groups_layer_decay

    model = build_timm(timm_config(name), num_classes=7, img_size=32)
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    recipe = RecipeConfig(lr=1e-3, weight_decay=0.05, layer_decay=layer_decay)
    ours = parameter_groups(model, group_parameters(model, layer_decay=layer_decay), recipe)
    theirs = param_groups_layer_decay(model, 0.05, no_weight_decay_list=spared, layer_decay=layer_decay)
    names = {id(p): name for name, p in model.named_parameters()}
    wanted = {names[id(p)]: (g["weight_decay"], 1e-3 * g["lr_scale"]) for g in theirs for p in g["params"]}
    found = {names[id(p)]: (g["weight_decay"], g["lr"]) for g in ours for p in g["params"]}
    assert found.keys() == wanted.keys() == set(names.values())
    for name, settings in found.items():
        assert settings == pytest.approx(wanted[name], rel=1e-12), name
    if layer_decay == 1:
        assert len(ours) == 2


def test_swins_tables_do_not_decay() -> None:
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4)
    decays = {name: decay for name, (_, decay) in group_parameters(model).items()}
    tables = [name for name in decays if name.endswith("relative_position_bias_table")]
    assert len(tables) == 2
    assert not any(decays[name] for name in tables)
    assert decays["layers.0.blocks.0.attn.qkv.weight"]


def test_layer_decay_without_an_order_of_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recipe.layer_decay must be 1 for Linear of timm, .* got 0.7; nearest: 1"):
        group_parameters(nn.Linear(2, 2), layer_decay=0.7)


def test_batch_norms_that_hold_an_activation_keep_it_when_they_are_synchronised() -> None:
    from lightning.pytorch.plugins import TorchSyncBatchNorm

    from eit_lab.training.trainer import TimmSyncBatchNorm

    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(0)
    model = build_timm(timm_config("test_efficientnet"), num_classes=7, img_size=32).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    before = model(images)
    ours = TimmSyncBatchNorm()
    synchronised = ours.apply(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    assert torch.equal(synchronised(images), before)
    assert torch.equal(ours.revert(synchronised)(images), before)
    torchs = TorchSyncBatchNorm().revert(synchronised)  # what would happen otherwise
    assert not torch.allclose(torchs(images), before)


# ------------------------------------------------------------------------------------------------------- through the doors


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each of two architectures: one with a position embedding and averaged weights, one with batch norm."""
    root = tmp_path_factory.mktemp("runs")
    vit = [VIT, "data.img_size=[32,48]", "recipe.ema_decay=0.5", "model.drop_path_rate=0.1", "recipe.layer_decay=0.8"]
    assert train(*vit, f"run.root={root}/vit") == 0
    assert train(RESNET, "data.img_size=16", "data.in_chans=1", "data.mean=[0.5]", "data.std=[0.2]", f"run.root={root}/resnet") == 0  # fmt: skip
    return {name: only_run(root / name) for name in ("vit", "resnet")}


def test_a_run_says_and_records_what_it_is(runs: dict[str, Path]) -> None:
    vit, resnet = (record_of(runs[name]) for name in ("vit", "resnet"))
    assert vit["config"]["model"] == {
        "kind": "timm",
        "timm_name": "test_vit",
        "name": "test_vit",
        "drop_path_rate": 0.1,
    }
    assert vit["name"] == "test_vit"
    assert vit["cost"]["grid"] == []
    assert {"test/acc1", "test/acc1_ema"} <= vit["result"].keys()
    assert resnet["status"] == "finished"
    assert resnet["cost"]["params"] == sum(
        p.numel() for p in create_model("timm/test_resnet", num_classes=10, in_chans=1).parameters()
    )


def test_evaluating_gives_the_record_again(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from eit_lab.evaluate import main

    for run in runs.values():
        assert main([f"run={run}", "trainer.progress_bar=false"]) == 0
        assert "the same as on record, to the last digit" in capsys.readouterr().out
    assert main([f"run={runs['vit']}", "data.img_size=40", "trainer.progress_bar=false"]) == 2
    assert "model.timm_name=test_vit must take images of data.img_size, 40x40 px" in capsys.readouterr().err


def test_an_exported_file_is_timms_own_and_predicts(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import timm
    from PIL import Image
    from safetensors.torch import load_file

    from eit_lab.export import main as export
    from eit_lab.predict import main as predict

    path = tmp_path / "resnet.safetensors"
    assert export([f"run={runs['resnet']}", "format=safetensors", f"out={path}"]) == 0
    theirs = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    theirs.load_state_dict(load_file(path))  # strict
    ours = create_model("timm/test_resnet", num_classes=10, in_chans=1, img_size=16, checkpoint=path)
    images = torch.randn(2, 1, 16, 16)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))
    Image.new("L", (16, 16), 90).save(tmp_path / "grey.png")
    capsys.readouterr()
    assert predict([f"checkpoint={path}", f"{tmp_path}/grey.png"]) == 0
    from_file = capsys.readouterr().out.splitlines()[2:]
    assert predict([f"run={runs['resnet']}", f"{tmp_path}/grey.png"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == from_file
    assert predict([f"run={runs['resnet']}", "model.timm_name=test_vit", f"{tmp_path}/grey.png"]) == 2
    assert "model.timm_name is the run's own with run=..." in capsys.readouterr().err


def test_an_architecture_that_cannot_be_traced_is_one_line(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.export import main as export

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("data-dependent\nand more lines")

    monkeypatch.setattr(torch.export, "export", refuse)
    assert export([f"run={runs['resnet']}", "format=torch", f"out={tmp_path}/x.pt2"]) == 2
    assert capsys.readouterr().err == (
        "eit_lab: format=torch cannot hold model.timm_name=test_resnet, which torch cannot trace for any batch size "
        "(data-dependent); nearest: format=safetensors\n"
    )
    assert not list(tmp_path.iterdir())


def test_fine_tuning_takes_the_architecture_and_fits_positions_and_classifier(
    runs: dict[str, Path], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from eit_lab.train import main

    words = [word for word in WORDS if word != "model=timm"]
    more = ["data.num_classes=4", "data.img_size=[48,32]", "recipe.epochs=1", "trainer.max_steps=1"]
    assert main([*words, f"checkpoint={runs['vit']}", *more]) == 0
    out = capsys.readouterr().out
    assert "test_vit of timm" in out
    assert "classifier anew: 10 -> 4 classes (head.weight, head.bias)" in out
    assert "position embedding 2x3 -> 3x2" in out
    assert record_of(only_run(here / "runs"))["config"]["model"]["timm_name"] == "test_vit"


def test_what_cannot_be_is_one_line_from_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(RESNET, "data.img_size=16", "trainer.strategy=fsdp") == 2
    err = capsys.readouterr().err
    assert err == "eit_lab: trainer.strategy must be ddp or auto with a baseline of timm, got 'fsdp'; nearest: ddp\n"
    assert train(VIT, "data.img_size=24") == 2
    err = capsys.readouterr().err
    assert err.startswith("eit_lab: model.timm_name=test_vit must take images of data.img_size, 24x24 px")
    assert err.count("\n") == 1


def test_positions_of_another_image_size_are_made_to_fit() -> None:
    from timm.layers import resample_abs_pos_embed
    from timm.models.swin_transformer import SwinTransformer

    from eit_lab.models.positions import fit_timm

    small, large = (build_timm(timm_config("test_vit"), num_classes=3, img_size=side) for side in (32, 64))
    fitted, notes = fit_timm(small.state_dict(), large, img_hw=None)
    wanted = resample_abs_pos_embed(small.state_dict()["pos_embed"], new_size=[4, 4], num_prefix_tokens=1)
    torch.testing.assert_close(fitted["pos_embed"], wanted)
    assert notes == ["position embedding 2x2 -> 4x4"]
    same, notes = fit_timm(small.state_dict(), small, img_hw=(32, 32))
    assert notes == []
    assert torch.equal(same["pos_embed"], small.state_dict()["pos_embed"])

    def swin(window: int) -> SwinTransformer:
        return SwinTransformer(
            img_size=32, patch_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=window
        )

    source, target = swin(4), swin(8)
    key = "layers.0.blocks.0.attn.relative_position_bias_table"  # the second stage has 4x4 patches anyway
    state = source.state_dict()
    rows, cols = torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-3.0, 4), indexing="ij")
    state[key] = torch.stack([rows + 2 * cols], -1).flatten(0, 1)  # a plane over the offsets, one head
    fitted, notes = fit_timm(state, target, img_hw=None)
    assert notes == ["tables of relative positions resized: 1"]
    assert {k: v.shape for k, v in fitted.items()} == {k: v.shape for k, v in target.state_dict().items()}
    plane = fitted[key].view(15, 15)
    torch.testing.assert_close(plane, -plane.flip(0, 1))
    inner = plane[4:-4, 4:-4]  # away from the edge, cubic interpolation keeps a plane a plane
    torch.testing.assert_close(inner.diff(dim=0), torch.full((6, 7), 7 / 15), rtol=0.1, atol=0)
    torch.testing.assert_close(inner.diff(dim=1), torch.full((7, 6), 14 / 15), rtol=0.1, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[RESNET], [VIT, "data.img_size=32", "processes=2"]], ids=["resnet", "vit in two processes"]
)
def test_a_killed_baseline_resumes_to_the_last_bit(words: list[str], command: Callable[..., Any]) -> None:
    done = command("selftest", "resume", "model=timm", "model.drop_path_rate=0.1", "kills=2", *words)
    assert done.status == 0, done.out + done.err
    assert "identical to the last bit" in done.out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "swin_tiny"])
def test_a_shipped_baseline_trains_and_exports(name: str, here: Path) -> None:
    from eit_lab.export import main as export
    from eit_lab.train import main

    words = [word for word in WORDS if word != "model=timm"]
    assert main([*words, f"model={name}", "data.img_size=32", "trainer.max_steps=1"]) == 0
    run = only_run(here / "runs")
    assert record_of(run)["status"] == "finished"
    for kind in ("torch", "onnx"):
        assert export([f"run={run}", f"format={kind}"]) == 0
