"""Each way to compute attention is the same function, with heads as wide as they are and with padded ones."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eit_lab.models.attention import attend, pad_projection, pad_qkv, padded_self_attention


def multi_head(x: Tensor, qkv: tuple[Tensor, Tensor], projection: tuple[Tensor, Tensor], *, num_heads: int) -> Tensor:
    """As written in the paper: head by head, the matrix of each in memory."""
    q, k, v = F.linear(x, *qkv).chunk(3, dim=-1)
    heads = []
    for one, two, three in zip(*(part.chunk(num_heads, dim=-1) for part in (q, k, v)), strict=True):
        maps = (one @ two.transpose(1, 2) / one.shape[-1] ** 0.5).softmax(dim=-1)
        heads.append(maps @ three)
    return F.linear(torch.cat(heads, dim=-1), *projection)


@pytest.mark.parametrize("path", ["sdpa", "flash", "math", "written_out"])
@pytest.mark.parametrize(("head_dim", "multiple"), [(2, 8), (13, 16), (29, 32), (8, 8), (5, 1)])
def test_padded_heads_give_the_same_output_and_gradients(path: str, head_dim: int, multiple: int) -> None:
    torch.manual_seed(0)
    num_heads, a = 3, 3 * head_dim
    shapes = (2, 10, a), (3 * a, a), (3 * a,), (a, a), (a,)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, qkv, projection = given[0], (given[1], given[2]), (given[3], given[4])
    expected = multi_head(x, qkv, projection, num_heads=num_heads)
    found = padded_self_attention(x, qkv, projection, num_heads=num_heads, multiple=multiple, path=path)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slope = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, given, slope), torch.autograd.grad(expected, given, slope), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


def test_the_padding_is_rows_and_columns_of_zeros_after_each_head() -> None:
    weight, bias = pad_qkv(torch.ones(12, 4), torch.ones(12), num_heads=2, width=3)
    assert weight.shape == (18, 4)
    assert bias.tolist() == [1, 1, 0] * 6
    assert weight.sum(dim=1).tolist() == [4, 4, 0] * 6
    assert pad_projection(torch.ones(4, 4), num_heads=2, width=3).tolist() == [[1, 1, 0, 1, 1, 0]] * 4


def test_a_kernel_that_torch_does_not_have_here_is_an_error_and_no_other_kernel() -> None:
    q = torch.randn(1, 2, 5, 4)
    with pytest.raises(RuntimeError, match="No viable backend"):
        attend(q, q, q, path="efficient")
