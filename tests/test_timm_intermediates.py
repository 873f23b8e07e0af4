"""What models of timm hand to a tap: the same logits, timm's own tokens and maps, the softmax that its fused kernel hides."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from eit_lab.models.intermediates import AttentionMaps, Tap
from eit_lab.models.timm_intermediates import Support, forward_with_tap, supports, timm_layout

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2}
# Plain transformers: arguments, (H, W) px, tokens before the grid, whether CLS is one of them.
PLAIN: dict[str, tuple[dict[str, Any], tuple[int, int], int, bool]] = {
    "deit_tiny_patch16_224": (SMALL, (32, 64), 1, True),
    "deit3_small_patch16_224": (SMALL, (32, 48), 1, True),  # layer scale, no position for CLS
    "deit_tiny_distilled_patch16_224": (SMALL, (48, 32), 2, True),
    "vit_small_patch14_reg4_dinov2": (SMALL | {"qk_norm": True}, (42, 28), 5, True),
    "vit_tiny_r_s16_p8_224": (SMALL | {"embed_dim": 48}, (64, 64), 1, True),  # a small ResNet before it
    "vit_small_patch16_18x2_224": (SMALL, (32, 32), 1, True),  # two branches of each kind side by side
    "vit_medium_patch16_reg4_gap_256": (SMALL, (32, 48), 4, False),
    "vit_base_patch16_siglip_gap_224": (SMALL, (32, 48), 0, False),
    "vit_relpos_small_patch16_224": (SMALL, (48, 32), 0, False),
    "vit_relpos_medium_patch16_rpn_224": (
        SMALL | {"class_token": True},
        (48, 32),
        1,
        True,
    ),  # norms what a branch gives
    "eva02_tiny_patch14_224": (SMALL, (28, 42), 1, True),
    "beit_base_patch16_224": (SMALL, (48, 32), 1, True),
}
WITH_MAPS = [name for name, (_, _, _, has_cls) in PLAIN.items() if has_cls and "18x2" not in name][:5]
# All others: arguments, (H, W) px, the grids of what they hand out.
FEATURES: dict[str, tuple[dict[str, Any], tuple[int, int], list[tuple[int, int]]]] = {
    "test_resnet": ({}, (32, 64), [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]),
    "test_convnext": ({}, (32, 64), [(8, 16), (4, 8), (2, 4), (1, 2)]),
    "test_efficientnet": ({}, (32, 64), [(16, 32), (8, 16), (4, 8), (2, 4), (1, 2)]),
    "test_coatnet": ({}, (32, 32), [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]),
    "test_mambaout": ({}, (32, 64), [(8, 16), (4, 8), (2, 4), (1, 2)]),
    "pvt_v2_b0": ({}, (32, 64), [(8, 16), (4, 8), (2, 4), (1, 2)]),
    "swin_tiny_patch4_window7_224": (
        {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 2), "window_size": 2}, (32, 32), [(8, 8), (4, 4)]
    ),
    "convit_tiny": ({"depth": 2, "local_up_to_layer": 1}, (48, 48), [(3, 3)] * 2),
    "cait_xxs24_224": (SMALL, (32, 32), [(2, 2)] * 2),
    "xcit_nano_12_p16_224": ({}, (32, 64), [(2, 4)] * 12),
}  # fmt: skip
TAKES_NO_IMG_SIZE = ("test_resnet", "test_convnext", "test_efficientnet", "test_mambaout", "pvt_v2_b0")


def build(name: str) -> tuple[nn.Module, Tensor]:
    """A small model in evaluation, its attention far from uniform, and two images."""
    arguments, hw = (PLAIN.get(name) or FEATURES[name])[:2]
    torch.manual_seed(0)
    size = {} if name in TAKES_NO_IMG_SIZE else {"img_size": hw}
    model = timm.create_model(name, num_classes=5, **arguments, **size).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model, torch.randn(2, 3, *hw)


class Keep(Tap):
    """Keeps all that it gets, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.kept: dict[str, Tensor] = {}
        self.grids: list[tuple[int, int]] = []
        self.attentions: list[AttentionMaps] = []
        self.branches: dict[str, Tensor] = {}

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        self.names.append(name)
        self.kept[name] = x.clone()
        self.grids.append(grid)
        return x

    def maps(self, name: str, x: Tensor) -> None:
        self.tokens(name, x, (x.shape[-2], x.shape[-1]))

    def branch(self, name: str, x: Tensor) -> None:
        self.branches[name] = x

    def attention(self, layer: int, maps: AttentionMaps) -> None:
        assert layer == len(self.attentions)
        self.attentions.append(maps)


@torch.no_grad()
def kept(model: nn.Module, images: Tensor) -> Keep:
    tap = Keep()
    forward_with_tap(model, images, tap)
    return tap


# ------------------------------------------------------------------------------------------------------------------- the pass


@pytest.mark.parametrize("name", [*PLAIN, *FEATURES])
@torch.no_grad()
def test_the_logits_are_the_models_own_to_the_last_bit_and_no_hook_stays(name: str) -> None:
    model, images = build(name)
    alone = model(images)
    tap = Keep()
    assert alone.std() > 0
    assert torch.equal(forward_with_tap(model, images, tap), alone)
    assert torch.equal(model(images), alone)
    assert tap.names
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_hooks_go_when_a_tap_fails() -> None:
    class Fails(Tap):
        def branch(self, name: str, x: Tensor) -> None:
            raise RuntimeError(name)

    model, images = build("deit_tiny_patch16_224")
    with pytest.raises(RuntimeError, match=r"blocks\.0\.attn"):
        forward_with_tap(model, images, Fails())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_compiled_model_is_tapped_in_its_own_pass() -> None:
    def refuses(*_: object) -> None:
        raise AssertionError("the compiled pass knows of no tap")

    model, images = build("deit_tiny_patch16_224")
    model.compile(backend=refuses)
    assert len(kept(model, images).names) == 5


def test_two_features_of_one_name_are_told_apart() -> None:
    class TwoBranches(nn.Module):
        feature_info = ({"module": "blocks.0"}, {"module": "blocks.1"}, {"module": "blocks.0"}, {"module": ""})

        def forward_intermediates(self, x: Tensor, output_fmt: str) -> tuple[Tensor, list[Tensor]]:
            return x, [x, x + 1, x + 2, x + 3]

        def forward_head(self, x: Tensor) -> Tensor:
            return x.mean(dim=(-2, -1))

    tap = kept(TwoBranches(), torch.zeros(2, 5, 3, 3))
    assert tap.names == ["blocks.0", "blocks.1", "blocks.0 (2)", "features.3"]
    assert [float(tap.kept[name].mean()) for name in tap.names] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", FEATURES)
def test_features_are_those_of_forward_intermediates_under_timms_names(name: str) -> None:
    model, images = build(name)
    tap = kept(model, images)
    with torch.no_grad():
        expected = model.forward_intermediates(images, intermediates_only=True)
    assert tap.names == [info["module"] for info in model.feature_info]
    assert tap.grids == FEATURES[name][2]
    for info, point, feature in zip(model.feature_info, tap.names, expected, strict=True):
        assert torch.equal(tap.kept[point], feature)
        assert feature.shape[:2] == (2, info["num_chs"])
    assert tap.attentions == []
    layout = timm_layout(model, img_hw=FEATURES[name][1])
    assert (layout.grid, layout.pitch, layout.depth, layout.num_heads) == (None, None, len(expected), 0)


@pytest.mark.parametrize("name", PLAIN)
def test_tokens_are_those_of_forward_intermediates_under_our_names(name: str) -> None:
    _, (H, W), num_prefix, has_cls = PLAIN[name]
    model, images = build(name)
    tap = kept(model, images)
    patch = 14 if "14" in name else 32 if "r_s16" in name else 16
    grid = (H // patch, W // patch)
    both = ("mlp",) if "18x2" in name else ("mixer", "mlp")
    assert tap.names == ["stem", *(f"blocks.{layer}.{point}" for layer in range(2) for point in both)]
    assert set(tap.grids) == {grid}
    layout = timm_layout(model, img_hw=(H, W))
    assert (layout.grid, layout.pitch, layout.depth) == (grid, (patch, patch), 2)

    with torch.no_grad():
        expected = model.forward_intermediates(
            images, return_prefix_tokens=num_prefix > 0, intermediates_only=True, output_fmt="NLC"
        )
    for layer, tokens in enumerate(expected):
        patches, prefix = tokens if num_prefix else (tokens, None)
        found = tap.kept[f"blocks.{layer}.mlp"]
        if has_cls:
            assert prefix.shape[1] == num_prefix
            assert torch.equal(found, torch.cat([prefix[:, :1], patches], dim=1))
        else:
            assert torch.equal(found, patches.transpose(1, 2).unflatten(2, grid))


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
@torch.no_grad()
def test_a_mixer_adds_the_branch_to_the_stream(name: str) -> None:
    model, images = build(name)
    tap = kept(model, images)
    before, mixed = tap.kept["blocks.0.mlp"], tap.kept["blocks.1.mixer"]
    added = model.blocks[1].ls1(tap.branches["blocks.1.attn"])
    assert torch.allclose(before + added, mixed, atol=1e-5)
    assert added.abs().mean() > 0.01


@pytest.mark.parametrize("name", [name for name, (_, _, _, has_cls) in PLAIN.items() if has_cls and "18x2" not in name])
@torch.no_grad()
def test_after_the_mixer_the_mlp_is_all_that_a_block_adds(name: str) -> None:
    model, images = build(name)
    tap = kept(model, images)
    block = model.blocks[1]
    before, mixed, after = (tap.kept[point] for point in ("blocks.0.mlp", "blocks.1.mixer", "blocks.1.mlp"))
    if "rpn" in name:
        added = block.norm2(block.mlp(mixed))
    elif hasattr(block, "ls2"):
        added = block.ls2(block.mlp(block.norm2(mixed)))
    else:
        added = block.mlp(block.norm2(mixed)) * (1 if block.gamma_2 is None else block.gamma_2)
    assert torch.allclose(mixed + added, after, atol=1e-5)
    assert min(added.abs().mean(), (mixed - before).abs().mean()) > 0.01


# -------------------------------------------------------------------------------------------------------------- attention maps


@torch.no_grad()
def written_out(model: nn.Module, images: Tensor) -> list[Tensor]:
    """(B, H, P + h w, P + h w) of each layer, as timm's own product gives it where it is not fused."""
    seen: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, maps: seen.append(maps))
    model(images)
    return seen


@pytest.mark.parametrize("name", WITH_MAPS)
def test_attention_maps_are_timms_own_with_all_tokens_before_the_grid_in_one_column(name: str) -> None:
    _, hw, num_prefix, _ = PLAIN[name]
    model, images = build(name)
    assert supports(model) == Support(True, True, "")
    layout = timm_layout(model, img_hw=hw)
    assert (layout.num_heads, layout.attn_width, layout.reason) == (2, (48 if "r_s16" in name else 32,) * 2, "")
    tap = kept(model, images)
    expected = written_out(model, images)
    assert len(tap.attentions) == len(expected) == 2
    for maps, A in zip(tap.attentions, expected, strict=True):
        A = A[:, :, [0, *range(num_prefix, A.shape[2])]]
        A = torch.cat([A[..., :num_prefix].sum(-1, keepdim=True), A[..., num_prefix:]], dim=-1)
        assert maps.shape == A.shape
        assert maps.head_dim * 2 == layout.attn_width[0]
        assert A.amax() > 2 * A.mean()  # far from uniform, so that a wrong scale shows
        assert (maps.maps() - A).abs().max() < 1e-6
        assert (maps.maps(slice(1, 2), slice(0, 1), torch.tensor([0, 2])) - A[1:2, :1, [0, 2]]).abs().max() < 1e-6
        parts = torch.full_like(A, -1)
        for images_part, heads in maps.parts(chunk=1):
            parts[images_part, heads] = maps.maps(images_part, heads)
        assert (parts - A).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("eva02_tiny_patch14_224", "the attention maps of EvaAttention are not written out"),
        ("vit_small_patch16_18x2_224", "the attention maps of ParallelThingsBlock are not written out"),
        ("vit_medium_patch16_reg4_gap_256", "this VisionTransformer has no CLS token"),
        ("test_resnet", "ResNet hands out features, not attention maps"),
    ],
)
def test_what_has_no_attention_maps_says_why_and_gives_none(name: str, reason: str) -> None:
    model, images = build(name)
    assert supports(model) == Support(True, False, reason)
    layout = timm_layout(model, img_hw=(images.shape[-2], images.shape[-1]))
    assert (layout.num_heads, sum(layout.attn_width), layout.reason) == (0, 0, reason)
    assert len(layout.attn_width) == layout.depth
    tap = kept(model, images)
    assert tap.attentions == []
    assert tap.names


def test_a_model_that_hands_out_nothing_runs_all_the_same() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    images = torch.randn(2, 3, 2, 2)
    tap = Keep()
    assert torch.equal(forward_with_tap(model, images, tap), model(images))
    assert tap.names == []
    assert supports(model)[:2] == (False, False)
    assert supports(model).reason == f"Sequential of timm {timm.__version__} hands out nothing of its layers"
    assert timm_layout(model, img_hw=(2, 2)).depth == 0


# ------------------------------------------------------------------------------------------------------------- changed tokens


class Shift(Tap):
    """Other tokens at one point."""

    def __init__(self, name: str) -> None:
        self.name = name

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return x.roll(1, dims=1) * 0.5 if name == self.name else x


@pytest.mark.parametrize("point", ["stem", "blocks.0.mixer", "blocks.1.mlp"])
@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_a_pass_goes_on_with_the_tokens_that_a_tap_gives_back(name: str, point: str) -> None:
    num_prefix = PLAIN[name][2]
    model, images = build(name)
    logits = forward_with_tap(model, images, Shift(point))
    (gradient,) = torch.autograd.grad(logits.sum(), model.patch_embed.proj.weight)

    def shifted(x: Tensor) -> Tensor:
        rows = [0, *range(num_prefix, x.shape[1])]
        y = x.clone()
        y[:, rows] = x[:, rows].roll(1, dims=1) * 0.5
        return y

    # The pass again, by timm's parts, the change put in where it belongs.
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    x = shifted(x) if point == "stem" else x
    for layer, block in enumerate(model.blocks):
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = shifted(x) if point == f"blocks.{layer}.mixer" else x
        x = x + block.ls2(block.mlp(block.norm2(x)))
        x = shifted(x) if point == f"blocks.{layer}.mlp" else x
    expected = model.forward_head(model.norm(x))
    assert torch.allclose(logits, expected, atol=1e-5)
    assert not torch.allclose(logits, model(images), atol=1e-2)
    (slow,) = torch.autograd.grad(expected.sum(), model.patch_embed.proj.weight)
    assert torch.allclose(gradient, slow, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------- families

FAMILIES = (
    "botnet26t_256", "coat_tiny", "convmixer_768_32", "cpubone_nano", "crossvit_tiny_240", "cspresnet50", "cs3darknet_s", "davit_tiny",
    "deit_tiny_patch16_224", "densenet121", "dla34", "dpn48b", "edgenext_xx_small", "efficientformer_l1", "efficientformerv2_s0",
    "efficientnet_b0", "efficientvim_m1", "efficientvit_b0", "efficientvit_m0", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf",
    "gcvit_xxtiny", "ghostnet_050", "hgnet_tiny", "hiera_tiny_224", "hrnet_w18_small", "inception_next_atto", "lcnet_035",
    "legacy_seresnet18", "levit_128s", "mixnet_s", "mobilenetv3_small_050", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "nextvit_small",
    "nf_regnet_b0", "pit_ti_224", "poolformer_s12", "rdnet_tiny", "regnetx_002", "repghostnet_050", "repvgg_a0", "repvit_m0_9",
    "res2net50_26w_4s", "resnest14d", "resnet18", "resnetv2_18", "rexnet_100", "selecsls42", "sequencer2d_s", "shvit_s1", "skresnet18",
    "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tiny_vit_5m_224", "tnt_s_patch16_224",
    "tresnet_m", "twins_svt_small", "visformer_tiny", "vit_tiny_patch16_224", "vit_pe_core_tiny_patch16_384", "volo_d1_224",
    "xception41", "xcit_nano_12_p16_224",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_of_timm_hands_out_its_layers_at_the_same_logits(name: str) -> None:
    torch.manual_seed(0)
    made_for = timm.models.get_pretrained_cfg(name).input_size[-1]
    for side in (64, made_for):  # some take no other size
        try:
            with torch.device("meta"):
                timm.create_model(name, num_classes=5, img_size=side).eval()(torch.empty(1, 3, side, side))
            arguments = {"img_size": side}
            break
        except TypeError:
            arguments = {}
            break
        except Exception:  # noqa: BLE001 - an architecture may refuse an image in any way
            continue
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    images = torch.randn(2, 3, side, side)
    tap = Keep()
    logits = model(images)
    assert torch.equal(forward_with_tap(model, images, tap), logits)
    assert supports(model).frequency
    assert len(tap.names) == len(set(tap.names)) >= 3
    assert all(min(grid) >= 1 for grid in tap.grids)
    assert tap.grids[0][0] >= tap.grids[-1][0]
    assert len(tap.attentions) == (timm_layout(model, img_hw=(side, side)).depth if supports(model).heads else 0)
