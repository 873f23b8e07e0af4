"""Our own kernels on CPU, and matrix products by oneDNN, against plain arithmetic in float64; and what happens without them."""

from __future__ import annotations

import ctypes
import platform
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eit_lab import create_model
from eit_lab.benchmark.speed.literal import Literal
from eit_lab.memory import keep_memory
from eit_lab.models import paths
from eit_lab.models.attention import attention, attention_kernel
from eit_lab.models.linear import Linear, _OneDNN
from eit_lab.models.mlp import Mlp
from eit_lab.models.native import library as native
from eit_lab.models.native.attention import can_run
from eit_lab.models.native.gelu import gelu, gelu_and_gradient
from eit_lab.models.stem import EITPatch, Patchify, convolve_image

CPU = torch.device("cpu")
needs_kernel = pytest.mark.skipif(isinstance(native.library(), str), reason=f"no kernel here: {native.library()}")


def written_out(qkv: Tensor) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1).matmul(v).transpose(1, 2)


def both(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient by our kernel."""
    qkv = qkv.clone().requires_grad_()
    with paths.use(attention="native"):
        assert can_run(qkv.view(qkv.shape))
        out = attention(qkv.view(qkv.shape))
    out.backward(grad)
    assert qkv.grad is not None
    return out.detach(), qkv.grad


def error(found: Tensor, expected: Tensor) -> float:
    """Relative to the expected norm; 0 where both are 0, such as the gradient of a convolution whose output nobody reads."""
    return float((found.double() - expected).detach().norm() / expected.detach().norm().clamp_min(1e-30))


@needs_kernel
@pytest.mark.parametrize("dim", [1, 2, 5, 8, 9, 16, 17, 25, 29, 33, 48, 64])
@pytest.mark.parametrize("tokens", [1, 2, 16, 50])
def test_attention_of_any_width_is_that_of_plain_arithmetic(dim: int, tokens: int) -> None:
    torch.manual_seed(dim + tokens)
    qkv, grad = torch.randn(2, tokens, 3, 3, dim), torch.randn(2, tokens, 3, dim)
    exact = qkv.double().requires_grad_()
    expected = written_out(exact)
    expected.backward(grad.double())
    out, found = both(qkv, grad)
    assert error(out, expected.detach()) < 1e-6
    assert exact.grad is not None
    assert error(found, exact.grad) < 2e-6


@needs_kernel
@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86-64")
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_attention_on_processors_with_fewer_lanes(march: str, tmp_path: Path) -> None:
    """4 and 8 lanes instead of 16: other tiles, and rows of up to 16 vectors."""
    sources = sorted(Path(native.__file__).parent.glob("*.c"))
    words = ["cc", "-O2", f"-march={march}", "-fopenmp", "-shared", "-fPIC", *map(str, sources)]
    subprocess.run([*words, "-o", str(tmp_path / "kernels.so")], check=True)
    kernels = native._declare(ctypes.CDLL(str(tmp_path / "kernels.so")))
    for dim in (1, 2, 5, 9, 16, 25, 33, 48, 64):
        for tokens in (1, 2, 17, 50):
            qkv, grad = torch.randn(2, tokens, 3, 2, dim), torch.randn(2, tokens, 2, dim)
            exact = qkv.double().requires_grad_()
            expected = written_out(exact)
            expected.backward(grad.double())
            out, lse, found = torch.empty_like(grad), torch.empty(2, 2, tokens), torch.empty_like(qkv)
            shape = (2, tokens, 2, dim, dim**-0.5, 0, 2)
            assert kernels.eit_attention_forward(qkv.data_ptr(), out.data_ptr(), lse.data_ptr(), *shape) == 0
            pointers = [tensor.data_ptr() for tensor in (qkv, out, lse, grad, found)]
            assert kernels.eit_attention_backward(*pointers, *shape) == 0
            assert error(out, expected) < 1e-6
            assert exact.grad is not None
            assert error(found, exact.grad) < 2e-6


@needs_kernel
def test_attention_of_eit_at_224_px_and_in_bfloat16() -> None:
    torch.manual_seed(0)
    for dtype, allowed in ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)):
        qkv, grad = torch.randn(1, 362, 3, 2, 7).to(dtype), torch.randn(1, 362, 2, 7).to(dtype)
        exact = qkv.double().requires_grad_()
        expected = written_out(exact)
        expected.backward(grad.double())
        out, found = both(qkv, grad)
        assert out.dtype == found.dtype == dtype
        assert error(out, expected.detach()) < allowed
        assert error(found, exact.grad) < allowed


@needs_kernel
def test_large_scores_and_what_is_not_finite() -> None:
    qkv = 30 * torch.randn(1, 40, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    out, _ = both(qkv, torch.zeros(1, 40, 2, 8))
    assert error(out, written_out(qkv.double())) < 1e-5  # scores of several hundred: no sum overflows
    qkv[0, 3, 1, 1] = torch.nan
    out, _ = both(qkv, torch.zeros(1, 40, 2, 8))
    assert out[:, :, 1].isnan().all()  # every query of that head sees the key
    assert not out[:, :, 0].isnan().any()
    with torch.no_grad():
        qkv[0, 3, 1, 1] = torch.inf
    out, grad = both(qkv, torch.ones(1, 40, 2, 8))
    assert out[:, :, 1].isnan().all()
    assert grad[0, :, 0, 1].isnan().all()
    assert grad[0, :, 2, 1].isnan().all()


@needs_kernel
def test_true_half_precision_makes_it_the_type_of_every_new_tensor() -> None:
    """As Lightning does for bf16-true: what the kernel writes in float32 stays float32."""
    qkv, grad = torch.randn(2, 300, 3, 4, 3).bfloat16(), torch.randn(2, 300, 4, 3).bfloat16()
    expected = both(qkv, grad)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = both(qkv, grad)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_kernel
def test_the_digits_do_not_depend_on_the_number_of_threads() -> None:
    qkv, grad = torch.randn(3, 33, 3, 2, 6), torch.randn(3, 33, 2, 6)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(both(qkv, grad))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@needs_kernel
def test_our_kernel_has_torchs_threads_and_no_pool_of_its_own() -> None:
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert any("/torch/" in path for path in loaded)
    assert not any(
        path.startswith(("/usr/", "/lib")) for path in loaded
    )  # other packages bring theirs, the system's is nobody's


def test_narrow_heads_take_our_kernel_and_others_torchs() -> None:
    def path(width: int, dtype: torch.dtype, **more: bool) -> str:
        return paths.attention_path(CPU, dtype, num_tokens=362, head_dim=width, **more)

    assert path(25, torch.float32) == path(25, torch.bfloat16) == "native"
    assert path(96, torch.float32) == path(25, torch.float64) == "sdpa"
    assert path(25, torch.bfloat16, native=False) == "written_out"


def test_without_a_compiler_torch_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = create_model("eit_nano", num_classes=5, img_size=32).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = model(images)
        monkeypatch.setenv("PATH", "")
        native.library.cache_clear()
        try:
            assert native.library() == "no C compiler (cc, gcc, clang)"
            assert attention_kernel(CPU) == "torch (no C compiler (cc, gcc, clang))"
            torch.testing.assert_close(model(images), ours, rtol=1e-5, atol=1e-6)
        finally:
            monkeypatch.undo()
            native.library.cache_clear()


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EIT_LAB_NATIVE", "0")
    native.library.cache_clear()
    try:
        assert not can_run(torch.randn(1, 4, 3, 1, 2))
        assert attention_kernel(CPU) == "torch (EIT_LAB_NATIVE=0)"
    finally:
        native.library.cache_clear()


@needs_kernel
def test_a_compiler_that_fails_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "cc"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho "attention.c:1: no such processor" >&2\nexit 1\n'
    )
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("EIT_LAB_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    try:
        assert native.library() == f"{broken}: attention.c:1: no such processor"
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


@needs_kernel
def test_half_a_library_is_compiled_anew_and_a_folder_of_others_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "empty.c"
    names = ("attention_forward", "attention_backward", "gelu", "gelu_backward")
    source.write_text("".join(f"int eit_{name}() {{ return 0; }}\n" for name in names))
    monkeypatch.setattr(native, "_SOURCES", [source])
    monkeypatch.setenv("EIT_LAB_CACHE", str(tmp_path / "cache"))
    try:
        kept = native._built(str(shutil.which("cc")))
        assert kept.parent == tmp_path / "cache" / "native"
        kept.write_bytes(b"half")
        native.library.cache_clear()
        assert isinstance(native.library(), ctypes.CDLL)
        assert kept.stat().st_size > 4
        kept.parent.chmod(0o777)
        kept.write_bytes(b"of somebody else")
        native.library.cache_clear()
        assert isinstance(native.library(), ctypes.CDLL)
        assert kept.read_bytes() == b"of somebody else"
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


@needs_kernel
def test_the_kernel_is_compiled_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a compiler that counts its calls and makes an empty library of the right names at once."""
    source = tmp_path / "empty.c"
    names = ("attention_forward", "attention_backward", "gelu", "gelu_backward")
    source.write_text("".join(f"int eit_{name}() {{ return 0; }}\n" for name in names))
    real = next(c for c in ("/usr/bin/cc", "/usr/bin/gcc", "/usr/bin/clang") if Path(c).exists())
    fake = tmp_path / "cc"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" = --version ] && exec {real} --version\n'
        f'while [ "$1" != -o ]; do shift; done\nexec {real} -shared -fPIC {source} -o "$2"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("EIT_LAB_CACHE", str(tmp_path / "cache"))
    try:
        for _ in range(2):
            native.library.cache_clear()
            assert isinstance(native.library(), ctypes.CDLL)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len([call for call in calls if "-shared" in call]) == 1
    assert len(list((tmp_path / "cache" / "native").iterdir())) == 1


# ------------------------------------------------------------------------------------------------------------------ linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 48), (48, 5), (16, 16)])
@pytest.mark.parametrize("bias", [True, False])
def test_onednns_product_is_that_of_plain_arithmetic(dtype: torch.dtype, sizes: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(*sizes, bias=bias)
    x, grad = torch.randn(3, 4, 2 * sizes[0]), torch.randn(3, 4, sizes[1])
    tensors = [t.detach().to(dtype).requires_grad_() for t in (x, *layer.parameters())]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    out = _OneDNN.apply(tensors[0][..., : sizes[0]], tensors[1], tensors[2] if bias else None)  # columns of a wider row
    expected = F.linear(exact[0][..., : sizes[0]], exact[1], exact[2] if bias else None)
    out.backward(grad.to(dtype))
    expected.backward(grad.to(dtype).double())
    allowed = 1e-6 if dtype == torch.float32 else 1e-2
    assert error(out, expected) < allowed
    for ours, theirs in zip(tensors, exact, strict=True):
        assert ours.grad is not None
        assert ours.grad.dtype == dtype
        assert error(ours.grad, theirs.grad) < allowed


def test_a_linear_layer_of_ours_is_torchs_in_names_and_values() -> None:
    torch.manual_seed(0)
    theirs = nn.Linear(7, 9)
    ours = Linear(7, 9)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 7)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-2, atol=1e-2)
    assert ours(x.new_empty(0, 7)).shape == (0, 9)
    torch.testing.assert_close(ours.double()(x.double()), theirs.double()(x.double()), rtol=0, atol=0)


@pytest.mark.parametrize("size", [32, 45])
@pytest.mark.parametrize(
    "stem", [EITPatch(8, in_chans=3, kernel_size=16, stride=4, pool=3), Patchify(8, in_chans=3, pitch=5)]
)
def test_the_stem_as_one_product_is_the_convolution(stem: nn.Module, size: int) -> None:
    conv = stem.conv if isinstance(stem, EITPatch) else stem.proj
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding)
    assert error(convolve_image(conv, x), exact) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        found = convolve_image(conv, x)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error(found, exact) < 1e-2
    found.float().pow(2).sum().backward()
    ours = conv.weight.grad.clone()
    conv.zero_grad()
    conv(x).pow(2).sum().backward()
    assert error(ours, conv.weight.grad.double()) < 2e-2
    conv.zero_grad()


# --------------------------------------------------------------------------------------------------------------------- mlp


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 15, 16, 33, 5000])
def test_our_gelu_and_its_gradient_are_those_of_plain_arithmetic(dtype: torch.dtype, size: int) -> None:
    x = torch.linspace(-9, 9, size).to(dtype) if size > 1 else torch.tensor([0.7], dtype=dtype)
    grad = torch.randn(size).to(dtype)
    exact = x.double().requires_grad_()
    expected = F.gelu(exact)
    expected.backward(grad.double())
    value, slope = gelu_and_gradient(x, grad)
    allowed = 2e-7 if dtype == torch.float32 else 4e-3
    assert exact.grad is not None
    assert error(value, expected.detach()) < allowed
    assert error(slope, exact.grad) < allowed
    assert error(gelu(x), expected.detach()) < allowed
    if dtype == torch.float32:
        assert torch.equal(gelu(x), value)
    assert gelu_and_gradient(torch.full_like(x, torch.nan), grad)[0].isnan().all()


@needs_kernel
def test_the_activation_is_not_kept_for_the_backward() -> None:
    mlp, kept = Mlp(8, hidden_dim=32), list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        mlp(torch.randn(4, 100, 8, requires_grad=True))
    assert kept.count(4 * 100 * 32) == 1  # what the activation is made from


@needs_kernel
def test_an_mlp_that_somebody_changed_or_listens_to_is_computed_layer_by_layer() -> None:
    mlp, x = Mlp(6, hidden_dim=24), torch.randn(3, 6)
    seen = list[torch.Size]()
    handle = mlp.fc2.register_forward_hook(lambda layer, args, out: seen.append(out.shape))
    expected = mlp(x)
    handle.remove()
    assert seen == [torch.Size([3, 6])]
    torch.testing.assert_close(mlp(x), expected)
    mlp.act = nn.ReLU()
    torch.testing.assert_close(mlp(x), mlp.fc2(mlp.fc1(x).relu()))


@needs_kernel
def test_transforms_of_torch_func_take_torchs_own_way() -> None:
    model = create_model("eit_nano", num_classes=3, img_size=32).eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    images = torch.randn(2, 3, 32, 32)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (images,)).square().sum()

    found = torch.func.grad(loss)(weights)
    model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert error(found[name], parameter.grad.double()) < 1e-4, name


# ------------------------------------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("name", ["eit_nano", "vit_nano", "lsra_nano"])
@pytest.mark.parametrize("path", ["native", "sdpa", "written_out"])
def test_each_path_is_exact_against_the_literal_implementation(name: str, path: str) -> None:
    """Outputs to 1e-5, gradients to 1e-4 (relative)."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, img_size=48)
    literal = Literal(model)
    images, labels = torch.randn(3, 3, 48, 48), torch.arange(3)
    with paths.use(attention=path):
        ours = model(images)
    theirs = literal(images)
    assert error(ours, theirs.double()) < 1e-5
    F.cross_entropy(ours, labels).backward()
    F.cross_entropy(theirs, labels).backward()
    gradients = dict(literal.named_parameters())
    for key, parameter in model.named_parameters():
        assert error(parameter.grad, gradients[key].grad.double()) < 1e-4, key


@pytest.mark.slow
def test_a_traced_model_has_no_kernel_of_ours() -> None:
    """An exported program must run where there is none."""
    model = create_model("eit_nano", num_classes=5, img_size=32).eval()
    program = torch.export.export(model, (torch.randn(1, 3, 32, 32),))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("scaled_dot_product" in name or "softmax" in name for name in names)
    assert not any("mkldnn" in name or "NativeAttention" in name for name in names)


# ------------------------------------------------------------------------------------------------------------------- memory


_FAULTS = """
import resource, sys, torch
from eit_lab.memory import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory()
def faults():
    for _ in range(40):  # the heap grows until an aligned block fits into one that was freed
        torch.ones(20_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(20_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
"""


@pytest.mark.slow
def test_memory_that_is_kept_is_not_faulted_in_again() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    if not keep_memory():
        pytest.skip("not glibc")
    assert faults("plain") > 10 * 80_000_000 / resource.getpagesize() / 600  # huge pages at the most
    assert faults("keep") < 100
