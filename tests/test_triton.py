"""The Triton kernel of the depthwise convolution, in Triton's interpreter on CPU, against torch's own convolution in float64.

`make test-gpu` runs the same comparison on a device (tests/test_gpu.py).
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from eit_lab.models import paths, triton_conv
from eit_lab.models.triton_conv import grid_conv
from grid_conv_cases import CASES, Case, compare, convolve

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton for this system")


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_is_the_convolution_forwards_and_back(case: Case, interpreter: None) -> None:
    compare(case, torch.device("cpu"))


@pytest.mark.slow
def test_programs_that_share_the_images_of_a_sum_have_each_once(
    interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        triton_conv, "_PROGRAMS", 4
    )  # 5 images, 2 tiles, 1 block of channels: 2 images each, the last has one
    compare(Case((5, 8), 3, 2, images=5), torch.device("cpu"))


def test_a_gradient_that_is_one_number_everywhere_is_taken_too(interpreter: None) -> None:
    x = torch.randn(1, 10, 3, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, requires_grad=True)
    found = torch.autograd.grad(grid_conv(x, weight, (3, 3)).sum(), [x, weight])
    expected = torch.autograd.grad(convolve(x, weight, None, (3, 3)).sum(), [x, weight])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_under_autocast_it_is_cast_as_a_convolution_is(interpreter: None) -> None:
    x, weight = torch.randn(1, 10, 4), torch.randn(3, 1, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = grid_conv(x[..., :3], weight, (3, 3), tail=x[..., 3:])
    assert out.dtype == torch.bfloat16
    (slope,) = torch.autograd.grad(out.float().sum(), [weight])
    assert slope.dtype == torch.float32


def test_what_it_cannot_do_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, 10, 3), torch.randn(3, 1, 3, 3)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="depthwise=triton needs Triton and a GPU, got tensors on cpu"):
        grid_conv(x, weight, (3, 3))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"takes float32, bfloat16 and float16, got torch\.float64"):
        grid_conv(x.double(), weight.double(), (3, 3))


@pytest.mark.slow
def test_torch_knows_the_operators_shapes_and_gradients(interpreter: None) -> None:
    x, weight = torch.randn(1, 10, 5, requires_grad=True), torch.randn(3, 1, 3, 3, requires_grad=True)
    arguments = (x[..., :3], weight, x[..., 3:], 3, 3)
    torch.library.opcheck(triton_conv._grid_conv, arguments, test_utils=("test_schema", "test_faketensor"))
    found = torch.compile(
        lambda: grid_conv(x[..., :3], weight, (3, 3), tail=x[..., 3:]), backend="aot_eager", fullgraph=True
    )
    expected = grid_conv(x[..., :3], weight, (3, 3), tail=x[..., 3:])
    out = found()
    assert torch.equal(out, expected)
    slopes = (torch.autograd.grad(one.square().sum(), [x, weight]) for one in (out, expected))
    assert all(torch.equal(one, other) for one, other in zip(*slopes, strict=True))


def test_a_path_is_forced_inside_its_block_only() -> None:
    here, dtype = torch.device("cpu"), torch.float32
    with paths.use(depthwise="triton", head_multiple=8):
        with paths.use(attention="math"):
            assert paths.attention_path(here, dtype, num_tokens=50, head_dim=4) == "math"
            assert paths.head_multiple(here, dtype, head_dim=4) == 8
        assert paths.attention_path(here, dtype, num_tokens=50, head_dim=4) != "math"
        assert paths.depthwise_path(here, dtype, kernel_size=3) == "triton"
    assert paths.depthwise_path(here, dtype, kernel_size=3) == "conv2d"
    with (
        pytest.raises(ValueError, match="depthwise must be one of conv2d, triton, got 'fft'"),
        paths.use(depthwise="fft"),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_triton_compiles_both_kernels_for_a_gpu_that_is_not_here(dtype: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    sizes = {"K": 3, "FLIPPED": True, "TAPS": 16, "TOKENS": 32, "CHANNELS": 64}
    pointers = {"x": dtype, "weight": dtype, "tail": dtype, "out": dtype, "grad": dtype, "sums": "fp32"}
    for kernel in (triton_conv._conv_kernel, triton_conv._weight_grad_kernel):
        function = triton.jit(kernel)
        names = function.arg_names
        signature = {
            name: "constexpr" if name in sizes else f"*{pointers[name]}" if name in pointers else "i32"
            for name in names
        }
        constants = {(place,): sizes[name] for place, name in enumerate(names) if name in sizes}
        compiled = triton.compile(ASTSource(function, signature, constants), target=GPUTarget("cuda", 90, 32))
        assert ".local" not in compiled.asm["ptx"], "registers do not suffice"
