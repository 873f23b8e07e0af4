"""What the backbone hands to a tap: everything by name and in order, exact, and at no cost when nobody asks."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eit_lab import create_model
from eit_lab.models.backbone import Backbone
from eit_lab.models.intermediates import AttentionMaps, ConvolutionTaps, Tap

HW = (24, 36)
GRID = (6, 9)
ARMS = ("eit", "lsra", "vit", "lsra_lite", "lsra_dynamic")
# Nano: 96 channels, 3 layers, 3 heads; the first layer of each arm's own branches.
CONV_WIDTHS = {
    "eit": (66, 33, 0),
    "vit": (0, 0, 0),
    "lsra": (48,) * 3,
    "lsra_lite": (48,) * 3,
    "lsra_dynamic": (48,) * 3,
}


def build(arm: str) -> tuple[Backbone, Tensor]:
    """An arm in evaluation whose weights are no longer small, and two images of a rectangular grid."""
    torch.manual_seed(0)
    model = cast(Backbone, create_model(f"{arm}_nano", num_classes=5, img_size=HW).eval())
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randn(2, 3, *HW)


class Keep(Tap):
    """Keeps all that it gets, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.kept: dict[str, Tensor] = {}
        self.maps_of: dict[int, AttentionMaps] = {}
        self.taps_of: dict[int, ConvolutionTaps] = {}

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        assert grid == GRID
        assert x.shape == (2, 1 + 6 * 9, 96)
        self.calls.append(name)
        self.kept[name] = x
        return x

    def branch(self, name: str, x: Tensor) -> None:
        self.calls.append(name)
        self.kept[name] = x

    def attention(self, layer: int, maps: AttentionMaps) -> None:
        self.calls.append(f"attention {layer}")
        self.maps_of[layer] = maps

    def convolution(self, layer: int, taps: ConvolutionTaps) -> None:
        self.calls.append(f"convolution {layer}")
        self.taps_of[layer] = taps


@torch.no_grad()
def kept(model: Backbone, images: Tensor) -> Keep:
    tap = Keep()
    model(images, tap=tap)
    return tap


# ------------------------------------------------------------------------------------------------------------- what is handed out


@pytest.mark.parametrize("arm", ARMS)
@torch.no_grad()
def test_a_tap_gets_every_layer_in_order_and_changes_no_bit_of_the_logits(arm: str) -> None:
    model, images = build(arm)
    tap = Keep()
    assert torch.equal(model(images, tap=tap), model(images))
    expected = ["stem"]
    for layer, conv_width in enumerate(CONV_WIDTHS[arm]):
        # An arm's mixer is done when its branches are: attention while it goes on, then both outputs, then the sum.
        expected.append(f"attention {layer}")
        expected += [f"blocks.{layer}.conv"] if conv_width else []
        expected += [f"blocks.{layer}.attn"]
        expected += [f"convolution {layer}"] if conv_width else []
        expected += [f"blocks.{layer}.mixer", f"blocks.{layer}.mlp"]
        assert tap.kept[f"blocks.{layer}.attn"].shape[-1] == 96 - conv_width
        assert f"blocks.{layer}.conv" not in tap.kept or tap.kept[f"blocks.{layer}.conv"].shape[-1] == conv_width
    assert tap.calls == expected


@pytest.mark.parametrize("arm", ARMS)
@torch.no_grad()
def test_tokens_and_branches_add_up_to_the_pass_written_out(arm: str) -> None:
    model, images = build(arm)
    tap = kept(model, images)
    x = tap.kept["stem"]
    assert torch.equal(x[:, 1:], model.stem(images).flatten(1, 2))
    assert torch.equal(x[:, 0], model.cls_token[:, 0].expand(2, -1))
    for layer, block in enumerate(model.blocks):
        branches = [
            tap.kept[f"blocks.{layer}.{name}"] for name in ("conv", "attn") if f"blocks.{layer}.{name}" in tap.kept
        ]
        mixed = torch.cat(branches, dim=-1)
        assert torch.equal(mixed, block.mixer(block.norm1(x), GRID))
        assert torch.equal(x + mixed, tap.kept[f"blocks.{layer}.mixer"])
        x = x + mixed
        x = x + block.mlp(block.norm2(x))
        assert torch.equal(x, tap.kept[f"blocks.{layer}.mlp"])
        assert mixed.abs().mean() > 0.01


@pytest.mark.parametrize("arm", ARMS)
@torch.no_grad()
def test_the_blocks_go_on_from_any_kept_tokens_to_the_same_logits(arm: str) -> None:
    model, images = build(arm)
    tap = kept(model, images)
    logits = model(images)
    for first, name in enumerate(["stem", *(f"blocks.{layer}.mlp" for layer in range(3))]):
        later = Keep()
        x = model.forward_blocks(tap.kept[name], GRID, first=first, tap=later)
        assert torch.equal(model.forward_head(x), logits)
        assert later.calls == tap.calls[tap.calls.index(name) + 1 :]


@pytest.mark.parametrize("point", ["stem", "blocks.1.mixer", "blocks.2.mlp"])
@torch.no_grad()
def test_a_pass_goes_on_with_the_tokens_that_a_tap_gives_back(point: str) -> None:
    class Roll(Keep):
        def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
            x = super().tokens(name, x, grid)
            return x.roll(1, dims=1) if name == point else x

    model, images = build("eit")
    plain, tap = kept(model, images), Roll()
    logits = model(images, tap=tap)
    place = tap.calls.index(point)
    for name in tap.calls[: place + 1]:
        assert name not in tap.kept or torch.equal(tap.kept[name], plain.kept[name])
    if point == "blocks.2.mlp":
        expected = model.norm(plain.kept[point].roll(1, dims=1))
    elif point == "stem":
        expected = model.forward_blocks(plain.kept[point].roll(1, dims=1), GRID)
    else:
        x = plain.kept[point].roll(1, dims=1)
        block = model.blocks[1]
        expected = model.forward_blocks(x + block.mlp(block.norm2(x)), GRID, first=2)
    assert torch.equal(logits, model.forward_head(expected))
    assert not torch.allclose(logits, model(images), atol=1e-3)


@torch.no_grad()
def test_a_tap_sees_a_pass_of_training_as_it_is() -> None:
    model, images = build("eit")
    model.train()
    for block in model.blocks:
        block.drop_path = 0.5
    tap = Keep()
    torch.manual_seed(3)
    logits = model(images, tap=tap)
    torch.manual_seed(3)
    assert torch.equal(model(images), logits)
    dropped = []
    before = tap.kept["stem"]
    for layer in range(3):
        names = [f"blocks.{layer}.{name}" for name in ("conv", "attn")]
        mixed = torch.cat([tap.kept[name] for name in names if name in tap.kept], dim=-1)
        for image in range(2):
            added = tap.kept[f"blocks.{layer}.mixer"][image] - before[image]
            dropped.append(not added.any())
            assert dropped[-1] or torch.allclose(added, 2 * mixed[image], atol=1e-4)
        before = tap.kept[f"blocks.{layer}.mlp"]
    assert {True, False} == set(dropped)


# --------------------------------------------------------------------------------------------------------------- attention maps


@pytest.mark.parametrize("arm", ARMS)
@torch.no_grad()
def test_the_maps_times_the_values_are_the_output_of_the_layers_attention(arm: str) -> None:
    model, images = build(arm)
    tap = kept(model, images)
    assert sorted(tap.maps_of) == [0, 1, 2]
    before = "stem"
    for layer, block in enumerate(model.blocks):
        maps, attn = tap.maps_of[layer], block.mixer.attn
        width = 96 - CONV_WIDTHS[arm][layer]
        x = block.norm1(tap.kept[before])[..., -width:]
        v = (x @ attn.qkv.weight[2 * width :].T + attn.qkv.bias[2 * width :]).unflatten(-1, (3, -1)).transpose(1, 2)
        A = maps.maps()
        assert A.shape == maps.shape == (2, 3, 55, 55)
        assert maps.head_dim * 3 == width
        assert (A.sum(dim=-1) - 1).abs().max() < 1e-5
        assert A.amax() > 2 / 55  # not all alike
        y = attn.proj((A @ v).transpose(1, 2).flatten(2))
        assert (y - tap.kept[f"blocks.{layer}.attn"]).abs().max() < 1e-5
        before = f"blocks.{layer}.mlp"


@pytest.mark.parametrize("chunk", [1, 55**2, 2 * 55**2, 5 * 55**2, 2**20])
@torch.no_grad()
def test_parts_of_the_maps_are_the_maps_and_none_is_larger_than_asked_for(chunk: int) -> None:
    torch.manual_seed(0)
    maps = AttentionMaps(torch.randn(5, 3, 55, 8), torch.randn(5, 3, 55, 8))
    whole = (maps.q @ maps.k.transpose(-2, -1) / 8**0.5).softmax(dim=-1)
    joined = torch.full(maps.shape, -1.0)
    times = torch.zeros(5, 3)
    for images, heads in maps.parts(chunk=chunk):
        part = maps.maps(images, heads)
        assert part.numel() <= max(chunk, 55**2)
        joined[images, heads] = part
        times[images, heads] += 1
    assert (times == 1).all()
    assert (joined - whole).abs().max() < 1e-6
    some = maps.maps(slice(1, 3), slice(2, 3), torch.tensor([0, 7, 54]))
    assert (some - whole[1:3, 2:3, [0, 7, 54]]).abs().max() < 1e-6


@torch.no_grad()
def test_maps_are_float32_whatever_the_pass_is_computed_in() -> None:
    model, images = build("eit")
    exact = kept(model, images).maps_of[1].maps()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = kept(model, images).maps_of[1]
        assert maps.q.dtype == torch.bfloat16
        A = maps.maps()
    assert A.dtype == torch.float32
    assert (A.sum(dim=-1) - 1).abs().max() < 1e-5
    assert (A - exact).abs().max() < 0.02


# -------------------------------------------------------------------------------------------------------------------- convolution


def slow_matrix(kernels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Kernels of each token (h w, k, k), tap by tap: what token (row, col) takes of each other, rows summing to 1."""
    h, w = grid
    k = kernels.shape[-1]
    matrix = torch.zeros(1 + h * w, 1 + h * w)
    matrix[0, 0] = 1
    for row in range(h):
        for col in range(w):
            for dy in range(k):
                for dx in range(k):
                    to_row, to_col = row + dy - k // 2, col + dx - k // 2
                    if 0 <= to_row < h and 0 <= to_col < w:
                        matrix[1 + row * w + col, 1 + to_row * w + to_col] += kernels[row * w + col, dy, dx]
    return matrix / matrix.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("arm", ["eit", "lsra_lite", "lsra_dynamic"])
@torch.no_grad()
def test_the_matrix_of_a_convolution_is_its_kernels_written_out(arm: str) -> None:
    model, images = build(arm)
    tap = kept(model, images)
    assert sorted(tap.taps_of) == [layer for layer in range(3) if CONV_WIDTHS[arm][layer]]
    branch: Any = model.blocks[0].mixer.conv
    matrix = tap.taps_of[0].matrix()
    if arm == "eit":
        kernels = branch.conv.weight.abs().mean(dim=(0, 1)).expand(1, 54, 3, 3)
    elif arm == "lsra_lite":
        weight = branch.conv.weight  # (H, 1, k, k)
        normed = weight.flatten(1).exp() / weight.flatten(1).exp().sum(dim=1, keepdim=True)
        kernels = normed.mean(dim=0).view(1, 1, 3, 3).expand(1, 54, 3, 3)
    else:
        x = branch.fc_in(model.blocks[0].norm1(tap.kept["stem"])[:, 1:, :48])
        predicted = (x @ branch.conv.predict.weight.T).view(2, 54, 3, 9)
        kernels = (predicted.exp() / predicted.exp().sum(dim=-1, keepdim=True)).mean(dim=2).view(2, 54, 3, 3)
    expected = torch.stack([slow_matrix(one, GRID) for one in kernels])
    assert matrix.shape == expected.shape
    assert (matrix - expected).abs().max() < 1e-6
    assert (matrix.sum(dim=-1) - 1).abs().max() < 1e-6
    assert (matrix >= 0).all()
    assert torch.equal(matrix[:, 0], torch.eye(55)[:1].expand(len(matrix), -1))
    assert kernels.flatten(2).std(dim=-1).min() > 1e-3  # no kernel is flat, so that a transposed one shows
    assert (kernels - kernels.transpose(-2, -1)).abs().max() > 1e-3


@torch.no_grad()
def test_the_matrix_moves_tokens_as_the_convolution_does() -> None:
    model, images = build("lsra_lite")
    tap = kept(model, images)
    conv: Any = model.blocks[0].mixer.conv.conv
    conv.weight.data[1:] = conv.weight.data[:1]  # one kernel for all heads: their mean is it
    matrix = tap.taps_of[0].matrix()
    x = torch.randn(2, 55, 48)
    x[:, 1:].unflatten(1, GRID)[:, [0, -1]] = 0  # the border, where rows are divided by less than 1
    x[:, 1:].unflatten(1, GRID)[:, :, [0, -1]] = 0
    inner = torch.zeros(GRID, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    inside = torch.cat([torch.tensor([True]), inner.flatten()])
    assert torch.allclose((matrix @ x)[:, inside], conv(x, GRID)[:, inside], atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------- the price


class Operations(TorchDispatchMode):
    """Counts the operations that torch carries out."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counted[str(func)] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def operations(model: Backbone, images: Tensor, **tap: Tap | None) -> Counter[str]:
    """How often a pass calls each operation of aten."""
    with Operations() as mode:
        model(images, **tap)
    return mode.counted


@pytest.mark.parametrize("arm", ["eit", "lsra_dynamic"])
def test_a_tap_that_takes_nothing_adds_no_operation(arm: str) -> None:
    model, images = build(arm)
    plain = operations(model, images)
    assert operations(model, images, tap=None) == plain
    assert operations(model, images, tap=Tap()) == plain
    assert sum(plain.values()) > 60

    class Writes(Tap):
        def attention(self, layer: int, maps: AttentionMaps) -> None:
            maps.maps()

    assert operations(model, images, tap=Writes()) != plain  # what is asked for is counted


@pytest.mark.slow
def test_the_exported_and_the_compiled_graph_have_one_output_and_no_trace_of_a_tap() -> None:
    model, images = build("eit")
    graph = torch.export.export(model, (images,)).graph
    (output,) = (node for node in graph.nodes if node.op == "output")
    assert len(output.args[0]) == 1
    counts = Counter(str(node.target) for node in graph.nodes if node.op == "call_function")
    # Of each layer qkv, proj and two of the MLP; the classifier. Three attentions, two convolutions and the stem's.
    assert counts["aten.linear.default"] == 3 * 4 + 1
    assert counts["aten.conv2d.default"] == 2 + 1
    assert not any("tap" in str(node.name) for node in graph.nodes)

    graphs: list[Any] = []

    def eager(module: Any, _: object) -> Any:
        graphs.append(module)
        return module.forward

    with torch.no_grad():
        expected = model(images)
        compiled = torch.compile(model, backend=eager, fullgraph=True)
        torch.testing.assert_close(compiled(images), expected, rtol=1e-5, atol=1e-6)  # by torch's kernels, not ours
        tap = Keep()
        assert torch.equal(model(images, tap=tap), expected)
    (module,) = graphs
    linear = [node for node in module.graph.nodes if node.target in (F.linear, torch._C._nn.linear)]
    assert len(linear) == 3 * 4 + 1
    assert len(tap.calls) == 1 + 3 * 3 + 3 + 2 * 2


def test_gradients_reach_the_tokens_that_a_tap_keeps() -> None:
    model, images = build("lsra")
    tap = Keep()
    logits = model(images, tap=tap)
    (gradient,) = torch.autograd.grad(logits.sum(), tap.kept["blocks.0.mixer"])
    assert gradient.abs().sum() > 0
    assert isinstance(model.head, nn.Linear)
    matrix = tap.taps_of[0].matrix()
    assert not matrix.requires_grad
