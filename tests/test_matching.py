"""Arms of equal budget: exact counts, the nearest width by brute force, known pairs of published models."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from eit_lab.compose import compose_model
from eit_lab.config import ConfigError, ModelConfig
from eit_lab.models.cost import count_cost
from eit_lab.models.matching import match_width


def parameters_by_formula(model: ModelConfig, *, num_classes: int) -> int:
    """Parameters of a model with EIT's stem at 224 px and depthwise 3x3 kernels, in closed form."""
    d = model.size.embed_dim
    blocks = sum(4 * d + 4 * a * a + (4 * a if a else 0) + 9 * c + 8 * d * d + 5 * d for c, a in model.layer_splits())
    return 769 * d + d + blocks + 2 * d + num_classes * (d + 1)


def at_width(model: ModelConfig, embed_dim: int) -> ModelConfig:
    return dataclasses.replace(model, size=dataclasses.replace(model.size, embed_dim=embed_dim))


@pytest.mark.parametrize(
    ("name", "reference", "width"), [("lsra_base", "eit_base", 416), ("vit_mini", "eit_mini", 230)]
)
def test_the_width_is_the_nearest_of_all_in_parameters(name: str, reference: str, width: int) -> None:
    model = compose_model(name)
    target = count_cost(compose_model(reference), num_classes=1000, img_size=224).params
    heads = model.size.num_heads
    every = {w: parameters_by_formula(at_width(model, w), num_classes=1000) for w in range(heads, 1000, heads)}
    nearest = min(every, key=lambda w: abs(every[w] - target))
    matched, cost = match_width(model, budget="params", target=target, num_classes=1000, img_size=224)
    assert matched.size.embed_dim == nearest == width
    assert cost.params == every[nearest]
    assert matched == at_width(model, nearest)  # nothing else of it changes: heads, depth, bias, stem


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("name", ["lsra_nano", "lsra_dynamic_nano"])
def test_no_neighbour_of_the_width_is_nearer_and_budgets_grow_with_it(
    name: str, budget: Literal["params", "macs"]
) -> None:
    images = {"num_classes": 10, "img_size": 8, "in_chans": 1}
    target = getattr(count_cost(compose_model("eit_nano"), **images), budget)
    model = compose_model(name)
    matched, cost = match_width(model, budget=budget, target=target, **images)
    width = matched.size.embed_dim
    around = {w: getattr(count_cost(at_width(model, w), **images), budget) for w in range(width - 6, width + 7, 3)}
    assert list(around.values()) == sorted(around.values())
    assert min(around, key=lambda w: abs(around[w] - target)) == width
    assert around[width] == getattr(cost, budget)
    assert min(around.values()) < target < max(around.values())


def test_a_model_is_matched_to_itself_by_leaving_it_alone() -> None:
    model = compose_model("eit_base")
    cost = count_cost(model, num_classes=1000, img_size=224)
    assert cost.params == 15_972_280
    assert match_width(model, budget="params", target=cost.params, num_classes=1000, img_size=224) == (model, cost)
    assert match_width(model, budget="macs", target=cost.macs, num_classes=1000, img_size=224) == (model, cost)


def test_deit_ti_at_the_parameters_of_deit_s_is_as_wide_as_deit_s() -> None:
    images = {"num_classes": 1000, "img_size": 224}
    small = count_cost(compose_model("vit_s16"), **images)
    matched, cost = match_width(compose_model("vit_ti16"), budget="params", target=small.params, **images)
    assert matched.size.embed_dim == 384
    assert (cost.params, cost.macs) == (small.params, small.macs)


def test_of_two_widths_as_near_the_smaller_is_taken_and_the_ends_hold() -> None:
    model = compose_model("eit_nano")
    images = {"num_classes": 10, "img_size": 8, "in_chans": 1}
    two = [count_cost(at_width(model, width), **images).macs for width in (96, 99)]
    assert sum(two) % 2 == 0
    halfway = sum(two) // 2
    assert match_width(model, budget="macs", target=halfway, **images)[1].macs == two[0]
    assert match_width(model, budget="macs", target=halfway + 1, **images)[1].macs == two[1]
    assert match_width(model, budget="macs", target=1, **images)[0].size.embed_dim == 3  # one channel a head
    with pytest.raises(ConfigError, match="eit_nano has no width of up to"):
        match_width(model, budget="macs", target=10**16, **images)


def test_a_list_of_attention_widths_sets_the_smallest_width() -> None:
    base = compose_model("eit_nano")
    ib = dataclasses.replace(base.ib, rule="custom", attn_dims=(30, 60, 90))
    model = dataclasses.replace(base, ib=ib)
    images = {"num_classes": 10, "img_size": 8, "in_chans": 1}
    assert match_width(model, budget="params", target=1, **images)[0].size.embed_dim == 90
