"""LSRA as in Lite Transformer: linear, a softmax-normalised convolution, linear. Against loops, closed forms and known answers."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eit_lab.compose import compose_model, compose_one
from eit_lab.config import ConfigError, IBConfig, ModelConfig
from eit_lab.models.backbone import Backbone
from eit_lab.models.convolutions import DynamicConv, LightweightConv, build_convolution
from eit_lab.models.cost import count_cost
from reference import attend

KINDS = ("lightweight", "dynamic")
H, C, GRID = 3, 6, (3, 4)


def small(name: str, **ib: Any) -> ModelConfig:
    config = compose_model(name)
    size = dataclasses.replace(config.size, embed_dim=24, depth=3, num_heads=4)
    return dataclasses.replace(config, size=size, ib=dataclasses.replace(config.ib, **ib))


def build(config: ModelConfig, seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(config, num_classes=7, img_size=32)


def branch_of(conv: str, *, kernel_size: int = 3, glu: bool = False, weight_dropout: float = 0.0) -> nn.Module:
    """A branch of C channels with weights far from their start, in float64."""
    torch.manual_seed(1)
    ib = IBConfig(name="x", rule="constant", conv=conv, kernel_size=kernel_size, glu=glu, weight_dropout=weight_dropout)
    branch = build_convolution(ib, dim=C, num_heads=H).double()
    for parameter in branch.parameters():
        nn.init.normal_(parameter)
    return branch


def slow_branch(x: Tensor, state: dict[str, Tensor], *, num_heads: int, grid: tuple[int, int], k: int) -> Tensor:
    """The branch by its definition: a loop over images, tokens, channels and taps."""
    x = x @ state["fc_in.weight"].T + state["fc_in.bias"]
    c = state["fc_out.weight"].shape[1]
    if x.shape[-1] == 2 * c:
        x = x[..., :c] / (1 + torch.exp(-x[..., c:]))
    (h, w), rows = grid, []
    for image in x:
        tokens = [image[0]]  # CLS: the kernel that is 1 in its middle
        for row, col in product(range(h), range(w)):
            here = image[1 + row * w + col]
            channels = []
            for channel in range(c):
                head = channel // (c // num_heads)
                if "conv.predict.weight" in state:
                    taps = (state["conv.predict.weight"] @ here)[head * k * k : (head + 1) * k * k]
                else:
                    taps = state["conv.weight"][head].flatten()
                taps = taps.exp() / taps.exp().sum()
                total = torch.zeros((), dtype=x.dtype)
                for tap, (dy, dx) in enumerate(product(range(-(k // 2), k // 2 + 1), repeat=2)):
                    if 0 <= row + dy < h and 0 <= col + dx < w:
                        total = total + taps[tap] * image[1 + (row + dy) * w + col + dx, channel]
                channels.append(total)
            tokens.append(torch.stack(channels))
        rows.append(torch.stack(tokens))
    return torch.stack(rows) @ state["fc_out.weight"].T + state["fc_out.bias"]


@pytest.mark.parametrize("conv", KINDS)
@pytest.mark.parametrize(("kernel_size", "glu"), [(3, False), (5, True)])
def test_a_branch_agrees_with_loops_forwards_and_backwards(conv: str, kernel_size: int, glu: bool) -> None:
    branch = branch_of(conv, kernel_size=kernel_size, glu=glu)
    x = torch.randn(2, 1 + GRID[0] * GRID[1], C, dtype=torch.float64)
    state = {key: value.detach().clone().requires_grad_() for key, value in branch.state_dict().items()}
    fast_in, slow_in = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast = branch(fast_in, GRID)
    slow = slow_branch(slow_in, state, num_heads=H, grid=GRID, k=kernel_size)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(fast)
    (fast * weights).sum().backward()
    (slow * weights).sum().backward()
    torch.testing.assert_close(fast_in.grad, slow_in.grad, rtol=1e-9, atol=1e-11)
    for key, parameter in branch.named_parameters():
        torch.testing.assert_close(parameter.grad, state[key].grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("conv", KINDS)
def test_the_mixer_sends_the_first_channels_through_the_branch_and_the_last_through_attention(conv: str) -> None:
    mixer = build(small("lsra_lite_nano", conv=conv)).double().blocks[1].mixer
    x = torch.randn(1, 1 + 6, 24, dtype=torch.float64)
    state = dict(mixer.state_dict())
    branch = {key.removeprefix("conv."): value for key, value in state.items() if key.startswith("conv.")}
    mixed = slow_branch(x[..., :12], branch, num_heads=4, grid=(2, 3), k=3)
    attended = attend(x[..., 12:], state, "attn", 4)
    torch.testing.assert_close(mixer(x, (2, 3)), torch.cat([mixed, attended], -1), rtol=1e-10, atol=1e-12)


def test_every_kernel_is_non_negative_and_sums_to_1_before_and_after_training() -> None:
    for name in ("lsra_lite_nano", "lsra_dynamic_nano"):
        model = build(small(name))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 7
        for step in range(3):
            for block in model.blocks:
                conv = block.mixer.conv.conv
                kernels = conv.kernels() if isinstance(conv, LightweightConv) else conv.kernels(torch.randn(2, 9, 12))
                flat = kernels.flatten(1) if isinstance(conv, LightweightConv) else kernels
                assert flat.shape[-1] == 9
                assert (flat >= 0).all()
                torch.testing.assert_close(flat.sum(-1), torch.ones(flat.shape[:-1]))
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                first = loss.item()
                still = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()}
                # What the last layer's convolution makes of the tokens, no classifier on CLS can see.
                assert still == {
                    key for key, _ in model.named_parameters() if key.startswith("blocks.2.mixer.conv.conv.")
                }
            optimizer.step()
        assert loss.item() < first


def test_a_lightweight_kernel_lets_no_frequency_through_stronger_than_the_mean() -> None:
    conv = branch_of("lightweight", kernel_size=5).conv
    assert isinstance(conv, LightweightConv)
    response = torch.fft.fft2(conv.kernels(), s=(16, 16)).abs()
    torch.testing.assert_close(response[:, 0, 0], torch.ones(H, dtype=torch.float64))
    assert response.max() <= 1 + 1e-12
    assert response.min() < 0.9


@pytest.mark.parametrize("conv", KINDS)
def test_a_constant_map_stays_constant_inside_and_fades_at_the_border(conv: str) -> None:
    inner = branch_of(conv).conv
    value = torch.rand(C, dtype=torch.float64) + 0.5
    out = inner(value.expand(1, 1 + 30, C), (5, 6))
    image = out[0, 1:].unflatten(0, (5, 6))
    torch.testing.assert_close(image[1:-1, 1:-1], value.expand(3, 4, C))
    border = torch.cat([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border < value - 1e-6).all()


@pytest.mark.parametrize("conv", KINDS)
def test_cls_sees_the_delta_kernel(conv: str) -> None:
    branch = branch_of(conv, glu=True)
    x = torch.randn(2, 1 + 12, C, dtype=torch.float64)
    assert torch.equal(branch.conv(x, GRID)[:, 0], x[:, 0])  # passes the convolution untouched
    other_tokens = torch.cat([x[:, :1], torch.randn_like(x[:, 1:])], 1)
    assert torch.equal(branch(other_tokens, GRID)[:, 0], branch(x, GRID)[:, 0])
    other_cls = torch.cat([torch.randn_like(x[:, :1]), x[:, 1:]], 1)
    assert torch.equal(branch(other_cls, GRID)[:, 1:], branch(x, GRID)[:, 1:])
    cls = nn.functional.glu(x[:, 0] @ branch.fc_in.weight.T + branch.fc_in.bias, -1)
    torch.testing.assert_close(branch(x, GRID)[:, 0], cls @ branch.fc_out.weight.T + branch.fc_out.bias)


@pytest.mark.parametrize("conv", ["depthwise", *KINDS])
def test_strength_zero_is_plain_vit_to_the_last_bit_with_every_kind_of_convolution(conv: str) -> None:
    images = torch.randn(2, 3, 32, 32)
    vit, none = build(small("vit_nano")), build(small("lsra_nano", conv=conv, strength=0.0))
    assert vit.state_dict().keys() == none.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(vit.parameters(), none.parameters(), strict=True))
    out_vit, out_none = vit(images), none(images)
    assert torch.equal(out_vit, out_none)
    out_vit.square().sum().backward()
    out_none.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(vit.parameters(), none.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "glu", "k"),
    [
        ("lsra_lite_mini", False, 3),
        ("lsra_lite_mini", True, 5),
        ("lsra_dynamic_mini", False, 3),
        ("lsra_dynamic_mini", True, 5),
    ],
)
def test_counts_agree_with_their_closed_form(name: str, glu: bool, k: int) -> None:
    config = compose_model(name)
    config = dataclasses.replace(config, ib=dataclasses.replace(config.ib, glu=glu, kernel_size=k))
    D, heads, K, tokens = config.size.embed_dim, config.size.num_heads, 1000, 19 * 19
    params = 769 * D + D + 2 * D + K * (D + 1)
    macs = 768 * D * 57 * 57 + K * D
    for c, a in config.layer_splits():
        assert a == heads * (D // (2 * heads))
        taps = c * heads * k * k if config.ib.conv == "dynamic" else heads * k * k
        gate = 2 if glu else 1
        params += 4 * D + 4 * a**2 + 4 * a + 8 * D**2 + 5 * D
        params += gate * (c * c + c) + taps + c * c + c
        macs += (tokens + 1) * (4 * a**2 + 8 * D**2 + gate * c * c + c * c) + 2 * (tokens + 1) ** 2 * a
        macs += tokens * k * k * c + (tokens * taps if config.ib.conv == "dynamic" else 0)
    cost = count_cost(config, num_classes=K, img_size=224)
    assert (cost.params, cost.macs) == (params, macs)
    norms = (tokens + 1) * D * (2 * config.size.depth + 1)
    attention = sum(2 * (tokens + 1) ** 2 * a for _, a in config.layer_splits())
    assert cost.macs_thop == macs - attention + 4 * norms


def test_the_start_is_xavier_for_kernels_and_the_published_one_for_linear_layers() -> None:
    model = build(compose_model("lsra_lite_mini"))
    heads, k = 10, 3
    bound = (6 / (k * k + heads * k * k)) ** 0.5
    for block in model.blocks:
        branch = block.mixer.conv
        assert bound * 0.8 < branch.conv.weight.abs().max() <= bound
        assert abs(branch.fc_in.weight.std() - 0.01) < 5e-4
        assert not branch.fc_in.bias.any()
        assert not branch.fc_out.bias.any()
    dynamic = build(compose_model("lsra_dynamic_mini")).blocks[0].mixer.conv.conv
    assert isinstance(dynamic, DynamicConv)
    assert dynamic.predict.bias is None
    assert abs(dynamic.predict.weight.std() - 0.01) < 5e-4


@pytest.mark.parametrize("conv", KINDS)
def test_weight_dropout_drops_taps_in_training_only_and_keeps_the_mean(conv: str) -> None:
    inner, whole = branch_of(conv, weight_dropout=0.25).conv, branch_of(conv).conv
    # A token of ones amid zeros reads the kernels off the output: each neighbour has the one tap that points to it.
    x = torch.zeros(1, 1 + 9, C, dtype=torch.float64)
    x[0, 1 + 4] = 1.0
    expected = whole(x, (3, 3))
    assert torch.equal(inner.eval()(x, (3, 3)), expected)
    inner.train()
    draws = torch.stack([inner(x, (3, 3)) for _ in range(400)])
    dropped = draws[:, 0, 1:] == 0
    assert abs(dropped.double().mean() - 0.25) < 0.02
    kept = (expected[0, 1:] / 0.75).expand_as(draws[:, 0, 1:])
    torch.testing.assert_close(draws[:, 0, 1:][~dropped], kept[~dropped])


def test_the_new_arms_are_lsra_with_another_branch() -> None:
    lsra = compose_model("lsra_tiny")
    for name, conv in (("lsra_lite", "lightweight"), ("lsra_dynamic", "dynamic")):
        assert compose_model(f"{name}_tiny") == dataclasses.replace(
            lsra, name=f"{name}_tiny", ib=dataclasses.replace(lsra.ib, name=name, conv=conv)
        )
    eit = compose_one(["model=eit_mini", "model.ib.conv=dynamic", "model.ib.glu=true"]).model  # any rule, any branch
    assert (eit.ib.rule, eit.ib.conv, eit.ib.glu) == ("decreasing", "dynamic", True)


@pytest.mark.parametrize("setting", ["model.ib.glu=true", "model.ib.weight_dropout=0.1"])
def test_what_a_depthwise_convolution_does_not_have_is_refused(setting: str) -> None:
    key, _, _ = setting.partition("=")
    with pytest.raises(ConfigError, match=f"{key} belongs to model.ib.conv=lightweight or dynamic, got"):
        compose_one(["model=lsra_mini", setting])


@pytest.mark.parametrize("name", ["lsra_lite_mini", "lsra_dynamic_mini"])
def test_a_branch_with_linear_layers_has_no_row_of_cls_to_zero(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.ib\.cls=zero belongs to model\.ib\.conv=depthwise, got it with conv '(light|dyn)"
    ):
        compose_one([f"model={name}", "model.ib.cls=zero"])
