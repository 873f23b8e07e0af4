"""The backbone: published counts, strength 0 is the plain ViT, agreement with a literal reference."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from eit_lab import create_model
from eit_lab.compose import compose_model
from eit_lab.config import ConfigError, ConvStem, ModelConfig
from eit_lab.models.backbone import Backbone, sincos_position
from eit_lab.models.cost import count_cost
from reference import eit

# arXiv:2203.07116 and the closed form; LSRA and ViT with EIT's stem derived from it; DeiT-Ti/S/B as published by timm.
PARAMETERS = {
    "eit_mini": 3_512_750, "eit_tiny": 8_927_230, "eit_base": 15_972_280, "eit_large": 25_305_592,
    "lsra_mini": 3_251_500, "lsra_tiny": 8_415_680, "lsra_base": 15_046_760, "lsra_large": 23_986_856,
    "vit_mini": 4_210_250, "vit_tiny": 11_074_480, "vit_base": 19_961_800, "vit_large": 31_898_216,
    "vit_ti16": 5_717_416, "vit_s16": 22_050_664, "vit_b16": 86_567_656,
}  # fmt: skip
# (with the attention products, as the authors count), in G and to the digits printed.
MACS = {
    "eit_mini": ("1.926", "1.73"),
    "eit_tiny": ("4.213", "3.84"),
    "eit_base": ("7.073", "6.52"),
    "eit_large": ("10.766", "10.0"),
}


def small(name: str = "eit_nano", **size: int) -> ModelConfig:
    config = compose_model(name)
    size = {"embed_dim": 24, "depth": 3, "num_heads": 4} | size
    return dataclasses.replace(config, size=dataclasses.replace(config.size, **size))


def with_ib(config: ModelConfig, **ib: object) -> ModelConfig:
    return dataclasses.replace(config, ib=dataclasses.replace(config.ib, **ib))


def build(config: ModelConfig, img_size: int | tuple[int, int] = 32, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(config, num_classes=7, img_size=img_size)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_equal_the_published_count(name: str) -> None:
    assert count_cost(compose_model(name), num_classes=1000, img_size=224).params == PARAMETERS[name]


@pytest.mark.parametrize("name", MACS)
def test_macs_equal_the_table_in_both_conventions(name: str) -> None:
    cost = count_cost(compose_model(name), num_classes=1000, img_size=224)
    with_products, authors = MACS[name]
    assert f"{cost.macs / 1e9:.3f}" == with_products
    assert f"{cost.macs_thop / 1e9:.{len(authors.split('.')[1])}f}" == authors


@pytest.mark.parametrize("name", ["eit_mini", "lsra_tiny", "vit_mini"])
def test_counts_agree_with_their_closed_form(name: str) -> None:
    config = compose_model(name)
    D, L, K = config.size.embed_dim, config.size.depth, 1000
    params = 769 * D + D + 2 * D + K * (D + 1)
    macs = 768 * D * 57 * 57 + K * D
    tokens = 19 * 19 + 1
    for conv, attn in config.layer_splits():
        params += 4 * D + 4 * attn**2 + 4 * attn + 9 * conv + 8 * D**2 + 5 * D
        macs += tokens * (4 * attn**2 + 8 * D**2) + (tokens - 1) * 9 * conv + 2 * tokens**2 * attn
    cost = count_cost(config, num_classes=K, img_size=224)
    assert len(config.layer_splits()) == L
    assert (cost.params, cost.macs) == (params, macs)


def test_counting_allocates_nothing_and_draws_nothing() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    count_cost(compose_model("eit_large"), num_classes=1000, img_size=224)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("rule", ["decreasing", "constant", "increasing"])
def test_strength_zero_is_plain_vit_to_the_last_bit(rule: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    vit = build(small("vit_nano"))
    eit_0 = build(with_ib(small(), rule=rule, strength=0.0))
    assert {k: v.shape for k, v in vit.state_dict().items()} == {k: v.shape for k, v in eit_0.state_dict().items()}
    assert all(torch.equal(a, b) for a, b in zip(vit.parameters(), eit_0.parameters(), strict=True))
    out_vit, out_eit = vit(images), eit_0(images)
    assert torch.equal(out_vit, out_eit)
    out_vit.square().sum().backward()
    out_eit.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(vit.parameters(), eit_0.parameters(), strict=True))


def test_a_plain_vit_is_timms_vit_to_the_last_bit(tmp_path: object) -> None:
    import timm

    theirs = timm.create_model("vit_small_patch16_224", num_classes=11).eval()
    torch.save(theirs.state_dict(), f"{tmp_path}/timm.pth")
    ours = create_model("vit_s16", num_classes=11, checkpoint=f"{tmp_path}/timm.pth").eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", ["decreasing", "constant", "increasing", "none"])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_fast_model_agrees_with_the_literal_reference_forwards_and_backwards(rule: str, kernel_size: int) -> None:
    config = with_ib(small(), rule=rule, kernel_size=kernel_size)
    model = build(config, img_size=(32, 40)).double()
    images = torch.randn(2, 3, 32, 40, dtype=torch.float64)
    attn_dims = [split.attn_dim for split in config.layer_splits()]
    state = {key: value.detach().clone().requires_grad_() for key, value in model.state_dict().items()}
    slow = eit(images, state, attn_dims=attn_dims, num_heads=4, stride=2, pool=2)
    fast = model(images)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(fast)
    (fast * weights).sum().backward()
    (slow * weights).sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, state[key].grad, rtol=1e-8, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.parametrize("stem", ["patchify", "eit", "conv1", "conv2", "conv3", "conv4", "conv5"])
@pytest.mark.parametrize(
    ("img_size", "grid"),
    [
        (224, (19, 19)),
        (28, (7, 7)),
        (32, (8, 8)),
        (64, (16, 16)),
        ((32, 64), (8, 16)),
        (8, (4, 4)),
        ((224, 192), (19, 16)),
    ],
)
def test_every_stem_makes_the_same_tokens(stem: str, img_size: int | tuple[int, int], grid: tuple[int, int]) -> None:
    from eit_lab.compose import compose_one

    hw = img_size if isinstance(img_size, int) else f"[{img_size[0]},{img_size[1]}]"
    config = compose_one(["model=vit_nano", f"model/stem={stem}", "data=synthetic", f"data.img_size={hw}"]).model
    model = Backbone(config, num_classes=3, img_size=img_size).eval()
    h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert model.grid == grid
    assert model.forward_features(torch.randn(1, 3, h, w)).shape == (1, 1 + grid[0] * grid[1], model.num_features)


@pytest.mark.parametrize(
    ("depth", "pitch", "kernels"),
    [(1, 16, [3, 8]), (4, 16, [3, 3, 3, 3, 1]), (5, 16, [3] * 5 + [1]), (3, 12, [3, 3, 3, 1])],
)
def test_a_conv_stem_has_its_convolutions_then_1x1_once_the_pitch_is_reached(
    depth: int, pitch: int, kernels: list[int]
) -> None:
    config = dataclasses.replace(small(), stem=ConvStem(kind="conv", depth=depth, pitch=pitch))
    convs = [m for m in build(config, img_size=96).stem.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.kernel_size[0] for conv in convs] == kernels
    assert torch.tensor([conv.stride[0] for conv in convs]).prod() == pitch


@pytest.mark.parametrize("pos_embed", ["learned", "sincos"])
def test_a_position_embedding_tells_positions_apart(pos_embed: str) -> None:
    config = dataclasses.replace(small("vit_nano", embed_dim=20), pos_embed=pos_embed)
    model = build(config, img_size=(32, 48)).eval()
    same_everywhere = torch.ones(1, 3, 32, 48)
    tokens = model.forward_features(same_everywhere)[0, 1:].view(8, 12, -1)
    inner = tokens[2:6, 2:10].flatten(0, 1)
    assert torch.pdist(inner.double()).min() > 1e-6
    plain = build(small("vit_nano", embed_dim=20), img_size=(32, 48)).eval()
    inner = plain.forward_features(same_everywhere)[0, 1:].view(8, 12, -1)[2:6, 2:10].flatten(0, 1)
    assert torch.pdist(inner.double()).max() < 1e-4


def test_sincos_holds_the_published_values() -> None:
    table = sincos_position((2, 3), 8)[0, 1:].view(2, 3, 8)
    row, col = torch.tensor(1.0), torch.tensor(2.0)
    expected = torch.stack(
        [
            row.sin(),
            (row / 100).sin(),
            row.cos(),
            (row / 100).cos(),
            col.sin(),
            (col / 100).sin(),
            col.cos(),
            (col / 100).cos(),
        ]
    )
    torch.testing.assert_close(table[1, 2], expected)


def test_a_learned_position_embedding_refuses_another_grid() -> None:
    model = build(dataclasses.replace(small("vit_nano"), pos_embed="learned"), img_size=32)
    with pytest.raises(
        ValueError, match=r"model.pos_embed=learned was made for 8x8 tokens \(32x32 px\), got 16x8 tokens"
    ):
        model(torch.randn(1, 3, 64, 32))


def test_without_position_embedding_any_size_goes_through() -> None:
    model = build(small(), img_size=32)
    assert model(torch.randn(2, 3, 48, 36)).shape == (2, 7)


def test_timms_manners() -> None:
    model = create_model("eit_nano", num_classes=5, img_size=32)
    images = torch.randn(2, 3, 32, 32)
    features = model.forward_features(images)
    D = model.num_features
    assert compose_model("eit_nano").size.embed_dim == D
    assert features.shape == (2, 65, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert torch.equal(model.forward_head(features), model(images))
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)
    assert model.get_classifier().out_features == 3
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)


def test_initialisation_is_the_published_one() -> None:
    model = build(compose_model("eit_base").for_images(224), img_size=224)
    linear = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert abs(linear.std().item() - 0.01) < 1e-4
    assert abs(model.cls_token.std().item() - 0.02) < 3e-3
    kernel = model.blocks[0].mixer.conv.conv.weight
    assert abs(kernel.std().item() / (2 / (9 * kernel.shape[0])) ** 0.5 - 1) < 0.05
    assert all(not m.bias.any() for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm))


def with_cls(name: str, cls: str) -> ModelConfig:
    config = compose_model(name)
    return dataclasses.replace(config, ib=dataclasses.replace(config.ib, cls=cls))


def test_cls_adds_its_normalised_self_in_the_channels_of_the_published_convolution() -> None:
    """docs/models.md: norm of CLS, and how much of it differs between images, before any training."""
    images = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("vit_nano", "lsra_lite_nano", "lsra_nano", "eit_nano", "lsra_nano zero"):
        model_name, *zero = name.split()
        model = build(with_cls(model_name, "zero" if zero else "pass")).eval()
        last: list[torch.Tensor] = []
        model.blocks[-1].register_forward_hook(lambda _, __, x, last=last: last.append(x))
        with torch.no_grad():
            model(images)
        cls = last[0][:, 0].double()
        share = (cls - cls.mean(0)).square().sum() / cls.square().sum()
        found[name] = cls.norm(dim=1).mean().item(), share.item()
    for name in ("lsra_nano", "eit_nano"):
        assert found[name][0] > 10 * found["vit_nano"][0]
        assert found[name][1] < found["vit_nano"][1] / 100
    assert found["lsra_lite_nano"][0] < 2 * found["vit_nano"][0]
    assert found["lsra_nano zero"][0] < 2 * found["vit_nano"][0]
    assert found["lsra_nano zero"][1] > 100 * found["lsra_nano"][1]


@pytest.mark.parametrize("ib", ["lsra", "eit"])
def test_cls_zero_takes_from_cls_what_the_convolution_gave_it_and_nothing_else(ib: str) -> None:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    published, zero = (build(with_cls(f"{ib}_nano", cls)).eval() for cls in ("pass", "zero"))
    assert published.state_dict().keys() == zero.state_dict().keys()
    zero.load_state_dict(published.state_dict())
    mixers = published.blocks[0].mixer, zero.blocks[0].mixer
    conv_dim, grid = mixers[0].split.conv_dim, (3, 5)
    assert conv_dim > 0
    x = torch.randn(2, 1 + 15, published.config.size.embed_dim)
    with torch.no_grad():
        before, after = (mixer(x, grid) for mixer in mixers)
        assert not torch.equal(published(images), zero(images))
    assert torch.equal(before[:, 0, :conv_dim], x[:, 0, :conv_dim])
    assert torch.equal(after[:, 0, :conv_dim], torch.zeros(2, conv_dim))
    torch.testing.assert_close(after[:, 1:], before[:, 1:], rtol=0, atol=0)
    torch.testing.assert_close(after[:, 0, conv_dim:], before[:, 0, conv_dim:], rtol=0, atol=0)


def test_stochastic_depth_drops_whole_rows_in_training_only() -> None:
    config = dataclasses.replace(small(), drop_path_rate=0.99)
    model = build(config)
    images = torch.randn(1, 3, 32, 32).expand(16, -1, -1, -1)
    assert len(model(images).unique(dim=0)) > 1
    # One image sixteen times: equal but for the blocking of the matrix products.
    assert model.eval()(images).std(dim=0).max() < 1e-6


def test_weight_decay_spares_biases_norms_and_tokens() -> None:
    from eit_lab.config import RecipeConfig
    from eit_lab.training.optim import group_parameters, parameter_groups

    model = build(dataclasses.replace(small(), pos_embed="learned"))
    decay, spared = parameter_groups(model, group_parameters(model), RecipeConfig(weight_decay=0.05))
    names = {id(p): name for name, p in model.named_parameters()}
    assert (decay["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert {names[id(p)] for p in decay["params"]} == {
        n for n, p in model.named_parameters() if p.ndim > 1 and n not in ("cls_token", "pos_embed")
    }
    assert len(decay["params"]) + len(spared["params"]) == len(names)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match="got 'eit_bse'; nearest: eit_base"):
        create_model("eit_bse")
