"""Figures of attention heads: known answers, a slow reference written out here, and metrics that do not know of batches or ranks."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from eit_lab.analysis.heads import (
    QUANTITIES,
    AttentionDistance,
    AttentionEntropy,
    AttentionNMI,
    CLSMass,
    HeadCosine,
    HeadDiversity,
    HeadJS,
    HeadStatistics,
    attention_distance,
    attention_entropy,
    attention_nmi,
    cls_mass,
    head_cosine,
    head_diversity,
    head_js,
    token_distances,
    uniform_distance,
)
from eit_lab.models.intermediates import AttentionMaps

GRID, PITCH = (3, 4), (2.0, 5.0)
NUM_TOKENS = 12


def random_maps(images: int = 3, heads: int = 4, *, seed: int = 0) -> Tensor:
    logits = 2 * torch.randn(
        images, heads, 1 + NUM_TOKENS, 1 + NUM_TOKENS, generator=torch.Generator().manual_seed(seed)
    )
    return logits.softmax(dim=-1)


def with_cls(tokens: Tensor, *, mass: float = 0.25) -> Tensor:
    """Maps of the tokens (..., n, n) inside maps (..., 1 + n, 1 + n) whose rows look at CLS too, each by ``mass``."""
    maps = torch.nn.functional.pad(tokens * (1 - mass), (1, 0, 1, 0))
    maps[..., 0] = mass
    maps[..., 0, 1:] = (1 - mass) / tokens.shape[-1]
    return maps


def slow_figures(maps: Tensor) -> dict[str, Tensor]:
    """Everything, per image, entry by entry in Python's own floats."""
    B, H, N, _ = maps.shape
    n = N - 1
    at = [(PITCH[0] * row, PITCH[1] * col) for row in range(GRID[0]) for col in range(GRID[1])]
    per_head = {name: torch.zeros(B, H, dtype=torch.float64) for name in QUANTITIES[:4]}
    pairs = {name: torch.zeros(B, dtype=torch.float64) for name in QUANTITIES[4:]}

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p if x > 0)

    for b in range(B):
        tokens = []
        for head in range(H):
            rows = maps[b, head].double().tolist()
            p = [[x / sum(row[1:]) for x in row[1:]] for row in rows[1:]]
            tokens.append(p)
            distance = sum(p[i][j] * math.dist(at[i], at[j]) for i in range(n) for j in range(n)) / n
            conditional = sum(entropy(row) for row in p) / n
            keys = entropy([sum(row[j] for row in p) / n for j in range(n)])
            per_head["attention_distance"][b, head] = distance
            per_head["attention_entropy"][b, head] = conditional / math.log(n)
            per_head["attention_nmi"][b, head] = (keys - conditional) / math.sqrt(keys * math.log(n))
            per_head["cls_mass"][b, head] = sum(row[0] for row in rows[1:]) / n
        for p, q in combinations(tokens, 2):
            x, y = torch.tensor(p).flatten(), torch.tensor(q).flatten()
            pairs["head_cosine"][b] += 1 - float(x @ y / (x.norm() * y.norm()))
            for r, s in zip(p, q, strict=True):
                middle = entropy([(i + j) / 2 for i, j in zip(r, s, strict=True)])
                pairs["head_js"][b] += (middle - (entropy(r) + entropy(s)) / 2) / math.log(2) / n
    return per_head | {name: total / math.comb(H, 2) for name, total in pairs.items()}


def fast_figures(maps: Tensor) -> dict[str, Tensor]:
    return {
        "attention_distance": attention_distance(maps, GRID, PITCH),
        "attention_entropy": attention_entropy(maps),
        "attention_nmi": attention_nmi(maps),
        "cls_mass": cls_mass(maps),
        "head_cosine": head_cosine(maps),
        "head_js": head_js(maps),
    }


def test_all_figures_are_those_of_the_slow_reference() -> None:
    maps = random_maps()
    slow = slow_figures(maps)
    for dtype in (torch.float32, torch.float64):
        fast = fast_figures(maps.to(dtype))
        for name in QUANTITIES:
            torch.testing.assert_close(fast[name].double(), slow[name], rtol=1e-5, atol=1e-6, msg=name)


def test_distances_are_those_between_token_centres_in_px() -> None:
    D = token_distances((2, 3), (10, 4))
    assert D[0].tolist() == pytest.approx([0, 4, 8, 10, math.hypot(10, 4), math.hypot(10, 8)])
    assert torch.equal(D, D.T)


@pytest.mark.parametrize(("side", "pitch", "px"), [(19, 12, 118.72), (14, 16, 116.49), (16, 2, 16.65), (8, 4, 16.55)])
def test_uniform_attention_has_the_published_distance(side: int, pitch: int, px: float) -> None:
    grid, n = (side, side), side * side
    assert round(uniform_distance(grid, (pitch, pitch)), 2) == px
    maps = torch.full((1, 1, 1 + n, 1 + n), 1 / (1 + n))
    assert attention_distance(maps, grid, (pitch, pitch)).item() == pytest.approx(px, abs=0.005)


def test_uniform_attention_has_entropy_1_and_no_information() -> None:
    maps = with_cls(torch.full((2, 3, NUM_TOKENS, NUM_TOKENS), 1 / NUM_TOKENS))
    assert attention_entropy(maps).flatten().tolist() == pytest.approx([1] * 6)
    assert attention_nmi(maps).flatten().tolist() == pytest.approx([0] * 6, abs=1e-6)
    assert cls_mass(maps).flatten().tolist() == pytest.approx([0.25] * 6)


def test_attention_to_oneself_has_distance_0_entropy_0_and_information_1() -> None:
    maps = with_cls(torch.eye(NUM_TOKENS).expand(1, 1, -1, -1))
    assert attention_distance(maps, GRID, PITCH).item() == 0
    assert attention_entropy(maps).item() == pytest.approx(0, abs=1e-6)
    assert attention_nmi(maps).item() == pytest.approx(1)


def test_attention_to_one_key_has_its_mean_distance_and_no_information() -> None:
    tokens = torch.zeros(1, 1, NUM_TOKENS, NUM_TOKENS)
    tokens[..., 5] = 1
    maps = with_cls(tokens)
    expected = token_distances(GRID, PITCH)[:, 5].mean().item()
    assert attention_distance(maps, GRID, PITCH).item() == pytest.approx(expected)
    assert attention_entropy(maps).item() == pytest.approx(0, abs=1e-6)
    assert attention_nmi(maps).item() == 0


def test_mass_on_cls_changes_nothing_but_cls_mass() -> None:
    tokens = random_maps()[..., 1:, 1:]
    tokens = tokens / tokens.sum(dim=-1, keepdim=True)
    little, much = fast_figures(with_cls(tokens, mass=0.01)), fast_figures(with_cls(tokens, mass=0.95))
    assert little.pop("cls_mass").flatten().tolist() == pytest.approx([0.01] * 12)
    assert much.pop("cls_mass").flatten().tolist() == pytest.approx([0.95] * 12)
    for name in little:
        torch.testing.assert_close(little[name], much[name], rtol=1e-5, atol=1e-6, msg=name)


def test_head_all_on_cls_is_finite_and_at_distance_0() -> None:
    maps = torch.zeros(1, 2, 1 + NUM_TOKENS, 1 + NUM_TOKENS)
    maps[..., 0] = 1
    figures = fast_figures(maps)
    assert all(values.isfinite().all() for values in figures.values())
    assert figures["cls_mass"].tolist() == [[1, 1]]
    for name in ("attention_distance", "attention_entropy", "attention_nmi"):
        assert figures[name].tolist() == [[0, 0]]


def test_heads_that_look_at_the_same_do_not_differ() -> None:
    maps = random_maps(heads=1).expand(-1, 5, -1, -1)
    assert head_cosine(maps).tolist() == pytest.approx([0] * 3, abs=1e-6)
    assert head_js(maps).tolist() == pytest.approx([0] * 3, abs=1e-6)
    assert head_cosine(maps[:, :1]).tolist() == head_js(maps[:, :1]).tolist() == [0] * 3


def test_heads_that_look_at_different_tokens_differ_by_1() -> None:
    tokens = torch.stack([torch.eye(NUM_TOKENS).roll(shift, dims=1) for shift in range(4)])[None]
    assert head_cosine(with_cls(tokens)).item() == pytest.approx(1)
    assert head_js(with_cls(tokens)).item() == pytest.approx(1)
    two_of_four = tokens[:, [0, 0, 1, 1]]  # four of the six pairs differ
    assert head_cosine(with_cls(two_of_four)).item() == pytest.approx(4 / 6)
    assert head_js(with_cls(two_of_four)).item() == pytest.approx(4 / 6)


def test_head_diversity_is_the_spread_of_distances_in_units_of_the_baseline() -> None:
    diversity = head_diversity(torch.tensor([10.0, 20.0, 30.0, 20.0]), 40.0)
    assert [float(x) for x in diversity] == pytest.approx([math.sqrt(50) / 40, 0.5, math.sqrt(50) / 20])
    assert [float(x) for x in head_diversity(torch.zeros(4), 40.0)] == [0, 0, 0]


def test_head_diversity_over_a_data_set_is_that_of_the_mean_distances() -> None:
    """Two heads that change places from image to image are equally far on average."""
    near, far = torch.eye(NUM_TOKENS), torch.full((NUM_TOKENS, NUM_TOKENS), 1 / NUM_TOKENS)
    maps = with_cls(torch.stack([torch.stack([near, far]), torch.stack([far, near])]))
    metric = HeadDiversity(2, GRID, PITCH)
    metric.update(maps[:1])
    assert metric.compute().item() == pytest.approx(0.5)
    metric.update(maps[1:])
    assert metric.compute().item() == pytest.approx(0, abs=1e-6)


# ----------------------------------------------------------------------------------------------- metrics: parts, batches, ranks


def query_and_key(images: int, heads: int, d: int = 5) -> tuple[Tensor, Tensor]:
    """As a layer makes them: views of one tensor, (B, H, N, d)."""
    both = torch.randn(images, 1 + NUM_TOKENS, 2, heads, d, generator=torch.Generator().manual_seed(7))
    q, k = 2 * both.permute(2, 0, 3, 1, 4)
    return q, k


@pytest.mark.parametrize("chunk", [1, 500, 2**18])
@pytest.mark.parametrize("quantities", [QUANTITIES, QUANTITIES[:4]])
def test_parts_of_any_size_give_the_figures_of_whole_maps(
    chunk: int, quantities: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eit_lab.analysis.heads.chunk_size", lambda device: chunk)
    q, k = query_and_key(4, 3)
    maps = AttentionMaps(q, k)
    expected = fast_figures(((q @ k.transpose(-2, -1)) / 5**0.5).softmax(dim=-1))
    metric = HeadStatistics(3, GRID, PITCH, quantities)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        metric.update(maps)
    found = metric.compute()
    for name in quantities:
        torch.testing.assert_close(found[name], expected[name].double().mean(dim=0), rtol=1e-5, atol=1e-6)


def test_only_what_is_asked_for_is_there() -> None:
    metric = HeadStatistics(4, GRID, PITCH, ("attention_distance",))
    metric.update(random_maps())
    assert set(metric.compute()) == {"attention_distance", "head_diversity", "head_range", "head_cv"}
    with pytest.raises(AssertionError, match="not among"):
        HeadStatistics(4, GRID, PITCH, ("distance",))


def test_memory_is_bounded_by_the_part_and_not_by_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eit_lab.analysis.heads.chunk_size", lambda device: 2 * 13**2)
    sizes: list[int] = []
    written_out = AttentionMaps.maps

    def counted(maps: AttentionMaps, images: slice, heads: slice) -> Tensor:
        part = written_out(maps, images, heads)
        sizes.append(part.shape[0] * part.shape[1])
        return part

    monkeypatch.setattr(AttentionMaps, "maps", counted)
    HeadStatistics(3, GRID, PITCH, ("attention_distance",)).update(AttentionMaps(*query_and_key(4, 3)))
    assert sizes == [2, 1] * 4
    sizes.clear()
    HeadStatistics(3, GRID, PITCH).update(AttentionMaps(*query_and_key(4, 3)))
    assert sizes == [3] * 4  # all heads of one image: pairs need them


def test_metric_is_the_same_for_any_batches_and_ranks() -> None:
    maps = random_maps(7, 3, seed=1)
    whole = HeadStatistics(3, GRID, PITCH)
    whole.update(maps)
    for size in (1, 3):
        metric = HeadStatistics(3, GRID, PITCH)
        for batch in maps.split(size):
            metric.update(batch)
        torch.testing.assert_close(metric.compute(), whole.compute(), rtol=1e-6, atol=1e-7)
    ranks = [HeadStatistics(3, GRID, PITCH), HeadStatistics(3, GRID, PITCH)]
    ranks[0].update(maps[:2])
    ranks[1].update(maps[2:])
    ranks[0].merge_state(ranks[1])
    torch.testing.assert_close(ranks[0].compute(), whole.compute(), rtol=1e-6, atol=1e-7)


def test_each_figure_has_a_metric_of_its_own() -> None:
    maps = random_maps()
    whole = HeadStatistics(4, GRID, PITCH)
    whole.update(maps)
    expected = whole.compute()
    of_their_own = {
        "attention_distance": AttentionDistance(4, GRID, PITCH),
        "attention_entropy": AttentionEntropy(4, GRID),
        "attention_nmi": AttentionNMI(4, GRID),
        "cls_mass": CLSMass(4, GRID),
        "head_cosine": HeadCosine(4, GRID),
        "head_js": HeadJS(4, GRID),
        "head_diversity": HeadDiversity(4, GRID, PITCH),
    }
    for name, metric in of_their_own.items():
        metric.update(maps)
        assert torch.equal(metric.compute(), expected[name]), name


def test_maps_that_are_no_numbers_have_no_figures_rather_than_those_of_one_key() -> None:
    maps = torch.full((1, 2, 17, 17), torch.nan)
    for figure in (attention_entropy(maps), attention_nmi(maps), cls_mass(maps), head_cosine(maps), head_js(maps)):
        assert figure.isnan().all()
