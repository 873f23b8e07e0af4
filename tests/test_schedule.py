"""Layer -> channels: the published integers, and what strength does to them."""

from __future__ import annotations

import pytest

from eit_lab.schedule import layer_splits

PUBLISHED = {
    (250, 5, 10): [50, 100, 150, 200, 250],
    (330, 8, 10): [40, 80, 120, 160, 200, 240, 280, 330],
    (400, 10, 16): [32, 80, 112, 160, 192, 240, 272, 320, 352, 400],
    (464, 12, 16): [32, 64, 112, 144, 192, 224, 256, 304, 336, 384, 416, 464],
}


def attn_dims(rule: str, shape: tuple[int, int, int], **more: object) -> list[int]:
    embed_dim, depth, num_heads = shape
    return [s.attn_dim for s in layer_splits(rule, embed_dim=embed_dim, depth=depth, num_heads=num_heads, **more)]


@pytest.mark.parametrize("shape", PUBLISHED)
def test_decreasing_is_the_published_schedule_of_all_four_sizes(shape: tuple[int, int, int]) -> None:
    assert attn_dims("decreasing", shape) == PUBLISHED[shape]


@pytest.mark.parametrize("shape", PUBLISHED)
def test_increasing_is_decreasing_read_backwards(shape: tuple[int, int, int]) -> None:
    assert attn_dims("increasing", shape) == PUBLISHED[shape][::-1]


@pytest.mark.parametrize(
    ("shape", "half"), [((250, 5, 10), 120), ((330, 8, 10), 160), ((400, 10, 16), 192), ((464, 12, 16), 224)]
)
def test_constant_is_heads_times_half_the_head_rounded_down(shape: tuple[int, int, int], half: int) -> None:
    assert attn_dims("constant", shape) == [half] * shape[1]


@pytest.mark.parametrize("rule", ["none", "constant", "decreasing", "increasing"])
def test_strength_zero_leaves_no_convolution_and_strength_one_the_whole_rule(rule: str) -> None:
    shape = (400, 10, 16)
    assert attn_dims(rule, shape, strength=0.0) == [400] * 10
    assert attn_dims(rule, shape, strength=1.0) == attn_dims(rule, shape)


def test_strength_never_takes_attention_away_as_it_falls() -> None:
    by_strength = [attn_dims("decreasing", (464, 12, 16), strength=s / 20) for s in range(21)]
    for stronger, weaker in zip(by_strength[1:], by_strength, strict=False):
        assert all(a <= b for a, b in zip(stronger, weaker, strict=True))


def test_a_custom_list_is_taken_as_it_is() -> None:
    assert attn_dims("custom", (24, 3, 4), attn_dims=[0, 8, 24]) == [0, 8, 24]


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ([8, 24], r"model.ib.attn_dims must have model.size.depth \(3\) entries, got 2"),
        (
            [8, 9, 24],
            r"attn_dims\[1\] must be a multiple of model.size.num_heads \(4\) in \[0, 24\], got 9; nearest: 8",
        ),
        ([8, 16, 28], r"attn_dims\[2\] must .* got 28; nearest: 24"),
        (None, r"model.ib.attn_dims must list 3 attention widths"),
    ],
)
def test_a_custom_list_that_does_not_fit_says_where(dims: list[int] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attn_dims("custom", (24, 3, 4), attn_dims=dims)
