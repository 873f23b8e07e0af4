"""Figures of the inside of networks: rendered, legible at a column's width, labelled with what was measured, whatever is missing."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

from eit_lab.config import ConfigError
from eit_lab.report.figure import COLOURS, MUTED, save_figure, style
from eit_lab.report.inside.arms import SHOWN, arms_page, arms_panels
from eit_lab.report.inside.model import model_page, model_panels
from eit_lab.report.inside.numbers import ArmInside, Inside, group, load_inside, read_between, read_inside
from made_inside import made_inside

ALL_PANELS = [
    "hfd_share", "log_amplitude", "attention_distance", "head_shares", "head_diversity", "head_pairs", "hf_dc_ratio", "feature_variance",
    "cka", "rollout", "receptive_field", "filters_input", "filters_tokens_low", "filters_tokens_high", "filters_tokens_band",
]  # fmt: skip
FOUR = ("vit", "lsra", "lsra_lite", "eit")


def made(arm: str = "eit", seed: int | None = 0, **more: Any) -> Inside:
    return read_inside(made_inside(arm, seed, **more), source=f"{arm} seed {seed}")


def arms_of(labels: Sequence[str], *, seeds: int = 2, **more: Any) -> list[ArmInside]:
    return group(made(label, seed, **more) for label in labels for seed in range(seeds))


@cache
def five_layers() -> tuple[Inside, dict[str, Figure]]:
    """A model and its panels, for the tests that only look at them."""
    inside = made("eit")
    return inside, model_panels(inside)


def pixels(figure: Figure) -> np.ndarray:
    file = io.BytesIO()
    with style():
        figure.savefig(file, dpi=60)
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def is_ticklabel_seen(axis: Axis, place: float) -> bool:
    low, high = sorted(axis.get_view_interval())
    return bool(low - 1e-9 <= place <= high + 1e-9)


def texts_of(figure: Figure) -> list[tuple[str, Bbox, float]]:
    """What is written in a figure: the words, where (px), how large (points)."""
    with style():
        figure.draw_without_rendering()
    hidden = set()
    bars = [child for axes in figure.axes for child in axes.child_axes]
    for axes in [*figure.axes, *bars]:
        for axis in (axes.xaxis, axes.yaxis):
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not is_ticklabel_seen(axis, tick.get_loc()) or not tick.label1.get_visible():
                    hidden |= {id(tick.label1), id(tick.label2)}
    found = [
        one for one in figure.findobj(Text) if isinstance(one, Text) and one.get_text().strip() and one.get_visible()
    ]
    return [(one.get_text(), one.get_window_extent(), one.get_fontsize()) for one in found if id(one) not in hidden]


def check_legible(figure: Figure, *, width: float) -> str:
    """The words of a figure that has its width, is not cut, has no letters below 7 points and no words over each other."""
    assert figure.get_figwidth() == width
    assert figure.get_figheight() <= 9.5
    texts = texts_of(figure)
    edge = figure.bbox
    for text, box, points in texts:
        assert points >= 7, text
        assert box.x0 > -1, text
        assert box.x1 < edge.x1 + 1, text
        assert box.y0 > -1, text
        assert box.y1 < edge.y1 + 1, text
    boxes = [(text, Bbox.from_extents(box.x0 + 1, box.y0 + 2, box.x1 - 1, box.y1 - 2)) for text, box, _ in texts]
    over = [(a, b) for n, (a, one) in enumerate(boxes) for b, other in boxes[:n] if one.overlaps(other)]
    assert not over, over
    return "\n".join(text for text, _, _ in texts)


def is_drawn(image: np.ndarray) -> bool:
    """It has marks in the colours of data, and paper between them."""
    marks = [np.sum(abs(image - np.array(of)).max(axis=2) < 40) for of in ([0, 114, 178], [68, 1, 84], [230, 159, 0])]
    return bool(image.std() > 10 and max(marks) > 25 and np.mean(image.min(axis=2) > 250) > 0.2)


# ------------------------------------------------------------------------------------------------------------ of one model


def test_a_models_page_is_rendered_in_both_formats_with_all_its_labels(tmp_path: Path) -> None:
    page = model_page(made("eit", layers=5))
    with style():
        save_figure(page, tmp_path / "page")
    image = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).astype(int)
    assert image.shape[1] == 7 * 160
    assert is_drawn(image)
    svg = (tmp_path / "page.svg").read_text()
    words = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert {
        "eit", "HFD share", "r &gt; 1/2", "Relative log amplitude", "0.75π", "Mean attention distance (px)", "uniform, 16.5 px", "3", "16",
        "Head Diversity", "Pairs of heads", "Attention: mean and range over heads", "HF / DC norm ratio", "Feature variance", "CKA",
        "Rollout of CLS (1: mean)", "8 × 8 tokens", "Effective receptive field", "4, 6, 10, 30 px of 32 × 32", "Images, filtered (%)",
        "Tokens, low-pass (%)", "layer 1",
    } <= set(words)  # fmt: skip
    facts = " ".join(words[-12:] + words[:12])
    assert "cifar10 test" in svg
    assert "10,000 images of 32 × 32 px" in svg
    assert "ema weights of best" in svg
    assert "top-1 90.58%" in svg, facts
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: [^;\"]*?([\d.]+)px", svg)]
    assert sizes
    assert min(sizes) >= 7
    assert svg.count("<image") >= 3  # the maps, unscaled: a pixel of them is a token


def test_24_layers_with_16_narrow_heads_have_their_widths_and_true_frequencies() -> None:
    panels = model_panels(made("eit", layers=24, heads=16, grid=(19, 19), pitch=12))
    words = check_legible(panels["attention_distance"], width=3.3)
    assert "uniform, 118.7 px" in words
    assert "2\n2\n2\n2\n3\n4\n4\n5\n6\n6\n" in words  # of the first layers' heads
    words = check_legible(panels["log_amplitude"], width=3.3)
    assert "0.947π" in words
    assert "untrained, layer 24" in words


def test_every_panel_is_there_alone_at_a_columns_width() -> None:
    _, panels = five_layers()
    assert list(panels) == ALL_PANELS
    assert all(figure.get_figwidth() == 3.3 for figure in panels.values())
    words = check_legible(panels["attention_distance"], width=3.3)
    assert {"a head", "mean", "uniform, 16.5 px", "untrained mean", "d", "3", "6", "9", "12", "16"} <= set(
        words.split("\n")
    )
    words = check_legible(panels["filters_input"], width=3.3)
    assert {"low-pass", "high-pass", "band noise", "unfiltered", "chance"} <= set(words.split("\n"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        {"layers": 1, "heads": 4, "grid": (4, 4), "pitch": 2.0},
        {"layers": 12, "arm": "vit", "heads": 12, "grid": (14, 14), "pitch": 16.0},
        {"layers": 24, "heads": 16, "grid": (19, 19), "pitch": 12.0},
        {"layers": 10, "heads": 16, "grid": (8, 14), "pitch": 16.0},
        {"layers": 6, "no_attention": (0, 1), "untrained": False, "grid": (16, 16), "pitch": 2.0},
    ],
)
def test_every_panel_is_legible_and_not_blank(case: dict[str, Any]) -> None:
    inside = made(**case)
    check_legible(model_page(inside), width=7.0)
    panels = model_panels(inside)
    assert list(panels) == ALL_PANELS
    for name, figure in panels.items():
        check_legible(figure, width=3.3)
        assert pixels(figure).std() > 10, name


def test_what_was_not_measured_leaves_no_hole() -> None:
    trained = made("eit", without=("similarity", "rollout", "receptive_field", "filters", "identity"), untrained=False)
    page = model_page(trained)
    assert page.get_figheight() < 0.65 * model_page(made("eit")).get_figheight()
    assert list(model_panels(trained)) == ALL_PANELS[:8]
    words = check_legible(page, width=7.0)
    assert "untrained" not in words
    assert "CKA" not in words
    boxes = [axes.get_position() for axes in page.axes]
    rows = {round(box.y0, 2) for box in boxes}
    for row in rows:  # every row reaches from one side to the other
        across = [box for box in boxes if round(box.y0, 2) == row]
        assert min(box.x0 for box in across) < 0.08
        assert max(box.x1 for box in across) > 0.92


def test_a_model_without_attention_or_with_names_of_its_own_is_drawn() -> None:
    inside = made("resnet", without=("heads", "rollout", "grid", "pitch_px", "widths", "heads_per_layer", "seed"))
    assert "attention_distance" not in model_panels(inside)
    found = made_inside("swin", layers=2)
    found["points"] = ["patch_embed", "layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "norm"]
    panels = model_panels(read_inside(found | dict.fromkeys(("heads", "filters"))))
    assert "point, in the model's order" in check_legible(panels["hfd_share"], width=3.3)
    nothing = {"schema": 1, "model": "a-model", "means": {"hfd_share": None}}
    assert "This analysis has nothing to draw." in check_legible(model_page(read_inside(nothing)), width=7.0)


def test_untrained_is_the_dashed_line_and_the_numbers_are_the_analysis() -> None:
    inside, panels = five_layers()
    (axes,) = panels["hfd_share"].axes
    assert inside.frequency is not None
    assert inside.frequency.hfd_share is not None
    solid = [line for line in axes.get_lines() if line.get_linestyle() == "-"]
    assert [line.get_color() for line in solid] == list(COLOURS[:4])
    for line, share in zip(solid, inside.frequency.hfd_share, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), share)
        np.testing.assert_array_equal(line.get_xdata(), [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5])
    assert len([line for line in axes.get_lines() if line.get_linestyle() == "--"]) == 4
    (axes,) = panels["log_amplitude"].axes
    assert axes.get_xticks()[-1] == 0.75
    assert max(line.get_xdata()[-1] for line in axes.get_lines()) == 0.75  # type: ignore[index]


def test_the_squares_lie_around_the_centre_token() -> None:
    found = made_inside("eit", layers=1, without=("frequency", "heads", "filters", "similarity", "rollout"))
    found["receptive_field"]["centre_px"] = [10.0, 14.0]
    (axes,) = model_panels(read_inside(found))["receptive_field"].axes[:1]
    assert [patch.get_bbox().width for patch in axes.patches] == pytest.approx(found["receptive_field"]["side_px"])  # type: ignore[attr-defined]
    assert all((patch.get_bbox().y0 + patch.get_bbox().y1) / 2 == pytest.approx(10.5) for patch in axes.patches)  # type: ignore[attr-defined]
    assert all((patch.get_bbox().x0 + patch.get_bbox().x1) / 2 == pytest.approx(14.5) for patch in axes.patches)  # type: ignore[attr-defined]


def test_what_a_small_grid_cannot_tell_apart_is_one_line_and_what_it_does_not_have_is_no_gap() -> None:
    found = made_inside("eit", layers=1, without=("heads", "similarity", "rollout", "receptive_field"), untrained=False)
    found["frequency"]["hfd_share"][1] = found["frequency"]["hfd_share"][0]
    found["filters"]["tokens"]["stem"] = found["filters"]["input"] | {"band": [0.5, None, *[0.6] * 6]}
    del found["data"]["num_classes"]
    found["frequency"]["feature_variance"] = [
        0.0140,
        0.0144,
        0.0152,
    ]  # a logarithmic axis with readable numbers all the same
    panels = model_panels(read_inside(found))
    assert "\nr > 1/4, 1/3\nr > 1/2\n" in check_legible(panels["hfd_share"], width=3.3)
    stem = panels["filters_tokens_band"].axes[0].get_lines()[0]
    np.testing.assert_array_equal(stem.get_ydata(), [50.0, *[60.0] * 6])
    assert "chance" not in check_legible(panels["filters_input"], width=3.3)
    assert {"0.01", "0.02"} <= set(check_legible(panels["feature_variance"], width=3.3).split("\n"))


# ----------------------------------------------------------------------------------------------------------------- of arms


def test_the_arms_page_is_rendered_with_its_labels(tmp_path: Path) -> None:
    arms = arms_of(FOUR, layers=4, heads=4)
    with style():
        save_figure(arms_page(arms), tmp_path / "arms")
    image = np.asarray(Image.open(tmp_path / "arms.png").convert("RGB")).astype(int)
    assert is_drawn(image)
    words = set(re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "arms.svg").read_text()))
    assert {
        *FOUR, "untrained", "HFD share, r &gt; 1/2", "Head Diversity", "Δ log amplitude", "attention distance (px)",
        "head width 4 to 16", "head width 16", "Images: low-pass (%)", "Images: band noise (%)", "Tokens, layer 1: high-pass (%)",
        "Lines are means over seeds, bands reach from the smallest to the largest seed (2 seeds an arm)",
    } <= words  # fmt: skip


def test_a_band_reaches_over_the_seeds_and_the_line_is_their_mean() -> None:
    arms = arms_of(("vit", "eit"), seeds=3, without=("filters",))
    figure, caption = arms_panels(arms)["hfd_share"]
    (axes,) = figure.axes
    seeds = np.stack([inside.frequency.hfd_share[2, ::2] for inside in arms[1].insides])  # type: ignore[union-attr, index]
    line = next(one for one in axes.get_lines() if one.get_color() == COLOURS[1] and one.get_linestyle() == "-")
    np.testing.assert_allclose(line.get_ydata(), seeds.mean(axis=0))
    np.testing.assert_array_equal(line.get_xdata(), range(6))
    edge = axes.collections[1].get_paths()[0].vertices
    for x, low, high in zip(range(6), seeds.min(axis=0), seeds.max(axis=0), strict=True):
        assert sorted({edge[:, 1][edge[:, 0] == x].min(), edge[:, 1][edge[:, 0] == x].max()}) == pytest.approx(
            [low, high]
        )
    assert "bands reach from the smallest to the largest seed (3 seeds an arm)" in caption
    assert "Dashed: the same models untrained." in caption
    assert "r > 1/2" in caption


def test_one_seed_has_no_band_and_says_so() -> None:
    figure, caption = arms_panels(arms_of(("vit", "eit"), seeds=1, without=("filters",)))["head_diversity"]
    assert not figure.axes[0].collections
    assert "One seed an arm, so no bands." in caption


def test_arms_of_different_depth_and_heads_share_an_axis_and_say_it() -> None:
    arms = arms_of(("vit",), layers=6, heads=4) + arms_of(("eit",), seeds=1, layers=3, heads=8)
    panels = arms_panels(arms)
    figure, caption = panels["head_diversity"]
    assert "Numbers of layers differ: depth is a share of them." in caption
    assert "Numbers of heads differ (vit 4, eit 8): Head Diversity cannot be compared." in caption
    assert "(seeds: vit 2, eit 1)" in caption
    assert figure.axes[0].get_xlabel() == "share of the depth"
    assert [line.get_xdata()[-1] for line in figure.axes[0].get_lines()] == [1] * 4  # type: ignore[index]
    distances, caption = panels["attention_distance"]
    assert "Width of a head from the first layer to the last: vit 16; eit 5 to 16." in caption
    left, right = distances.axes
    assert left.get_ylim() == right.get_ylim()
    assert sum(len(line.get_xdata()) for line in left.get_lines() if line.get_marker() == "o") == 2 * 6 * 4  # type: ignore[arg-type]


def test_the_first_arms_are_shown_and_the_others_named() -> None:
    arms = arms_of([f"arm {n}" for n in range(SHOWN + 2)], seeds=1, layers=2, without=("filters",))
    panels = arms_panels(arms)
    assert list(panels) == ["hfd_share", "head_diversity", "log_amplitude", "attention_distance"]
    figure, caption = panels["attention_distance"]
    assert len(figure.axes) == SHOWN
    assert caption.endswith("The first 7 of 9 arms; not shown: arm 7, arm 8.")
    assert "The first 7 of 9 arms; not shown: arm 7, arm 8" in check_legible(arms_page(arms), width=7.0)


def test_more_arms_than_one_plot_can_hold_get_a_plot_each_beside_the_mean_of_the_first() -> None:
    names = [f"arm {n}" for n in range(5)]
    four, five = (arms_panels(arms_of(names[:n], seeds=2, layers=3, without=("filters",))) for n in (4, 5))
    for name in ("hfd_share", "head_diversity", "log_amplitude"):
        assert len(four[name][0].axes) == 1
        figure, caption = five[name]
        assert [axes.get_title(loc="left") for axes in figure.axes] == names
        assert caption.endswith("Grey: the mean of arm 0.")
        assert len({axes.get_ylim() for axes in figure.axes}) == 1
        (first, *others) = [[one for one in axes.get_lines() if one.get_linestyle() == "-"] for axes in figure.axes]
        (mean,) = first
        for lines in others:
            (grey,) = [one for one in lines if one.get_color() == MUTED]
            assert list(grey.get_ydata()) == list(mean.get_ydata())  # type: ignore[arg-type]
            assert len(lines) == 2
        check_legible(figure, width=3.3)


def test_an_arm_keeps_the_colour_of_its_place() -> None:
    arms = [
        ArmInside(arm.label, arm.insides, place=3 + n)
        for n, arm in enumerate(arms_of(("vit", "eit"), seeds=1, without=("filters",)))
    ]
    lines = arms_panels(arms)["log_amplitude"][0].axes[0].get_lines()
    assert {line.get_color() for line in lines} == {COLOURS[3], COLOURS[4]}


def test_cka_between_arms_has_its_own_axes() -> None:
    arms = arms_of(("vit", "eit"), seeds=1, layers=2, without=("filters",))
    points = arms[0].first.points
    pair = {"a": "vit", "b": "eit/x y", "points_a": points, "points_b": points[:3], "cka": [[0.1, 0.5, 0.9]] * 5}
    figure, caption = arms_panels(arms, between=[read_between(pair)])["cka_vit_eit-x-y"]
    assert figure.axes[0].get_images()[0].get_array().shape == (5, 3)  # type: ignore[union-attr]
    assert caption == "CKA between the points of vit (upwards) and those of eit/x y (across)."
    assert "layer of eit/x y" in check_legible(arms_page(arms, between=[read_between(pair)]), width=7.0)
    many = arms_page(arms, between=[read_between(pair)] * 4)
    assert len([axes for axes in many.axes if axes.get_images()]) == 3
    assert any("3 of 4 matrices of CKA" in text.get_text() for text in many.texts)
    with pytest.raises(ConfigError, match=r"^x: cka\[0\] must have 3 entries, got 2$"):
        read_between(pair | {"cka": [[0.1, 0.5]] * 5}, source="x")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arms",
    [
        pytest.param(lambda: arms_of(FOUR, seeds=3, layers=10, heads=16, grid=(19, 19), pitch=12.0), id="four"),
        pytest.param(lambda: arms_of([f"eit strength {n}" for n in range(9)]), id="nine"),
        pytest.param(lambda: arms_of(("vit", "an_arm_with_" + "a_very_" * 12 + "long_name"), layers=24, heads=12), id="long names"),
        pytest.param(lambda: arms_of(("vit", "eit"), layers=1), id="one layer"),
        pytest.param(lambda: arms_of(("eit",), seeds=1, grid=(2, 7)), id="one arm"),
    ],
)  # fmt: skip
def test_every_comparison_is_legible_and_not_blank(arms: Any) -> None:
    made_arms = arms()
    check_legible(arms_page(made_arms), width=7.0)
    for name, (figure, caption) in arms_panels(made_arms).items():
        check_legible(figure, width=3.3)
        assert pixels(figure).std() > 10, name
        assert caption.endswith((".", ")"))


# ------------------------------------------------------------------------------------------------------------- the numbers


def test_results_are_grouped_by_arm_in_order_with_seeds_upwards() -> None:
    arms = group([made("vit", 2), made("eit", 1), made("vit", 0), made("eit", 0)])
    assert [(arm.label, [inside.seed for inside in arm.insides]) for arm in arms] == [("vit", [0, 2]), ("eit", [0, 1])]
    with pytest.raises(
        ConfigError,
        match=r"^analysis of arm vit: a seed counts once, got two results of seed 0: vit seed 0, vit seed 0$",
    ):
        group([made("vit", 0), made("vit", 0)])
    with pytest.raises(
        ConfigError,
        match=r"^analysis of arm vit: layers must be the same in all seeds, 5 in vit seed 0, got 6 in vit seed 1$",
    ):
        group([made("vit", 0), made("vit", 1, layers=6)])
    other = made_inside("vit", 1)
    other["frequency"]["cutoffs"] = [0.2, 0.3, 0.5, 0.75]
    with pytest.raises(ConfigError, match=r"frequency.cutoffs must be the same in all seeds"):
        group([made("vit", 0), read_inside(other)])


def change(path: str, value: object) -> dict[str, Any]:
    found = made_inside("eit", layers=2)
    place: Any = found
    *keys, last = path.split(".")
    for key in keys:
        place = place[int(key)] if key.isdigit() else place[key]
    place[int(last) if last.isdigit() else last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("schema", 2, "schema must be 1, got 2"),
        ("frequency", [1], "frequency must be a mapping, got [1]"),
        ("frequency.hfd_share", [[0.5] * 5], "frequency.hfd_share must have 4 entries, got 1"),
        ("frequency.hfd_share.1", [0.5] * 4, "frequency.hfd_share[1] must have 5 entries, got 4"),
        ("frequency.hfd_share.1.3", "high", "frequency.hfd_share[1][3] must be a number, got 'high'"),
        ("frequency.log_amplitude.0", [0.0], "frequency.log_amplitude[0] must have 4 entries, got 1"),
        ("frequency.frequencies", None, "frequency.frequencies must be there with log_amplitude, got None"),
        ("heads.attention_distance", [[1.0]], "heads.attention_distance must have 2 entries, got 1"),
        ("heads.attention_distance.0", 3, "heads.attention_distance[0] must be a list, got 3"),
        ("heads.head_diversity", [0.1], "heads.head_diversity must have 2 entries, got 1"),
        ("similarity.cka", [[1.0]], "similarity.cka must have 5 entries, got 1"),
        ("rollout.cls.1", [1.0], "rollout.cls[1] must have 8 entries, got 1"),
        ("filters.input.low", [0.5], "filters.input.low must have 10 entries, got 1"),
        ("receptive_field.side_px", [3], "receptive_field.side_px must have 4 entries, got 1"),
        ("untrained.heads.cls_mass", {}, "untrained.heads.cls_mass must be a list, got {}"),
        ("layers", True, "layers must be an integer, 0 or more, got True"),
        ("grid", [8, None], "grid must be two finite numbers, got [8, None]"),
        ("data.img_size", [0, 32], "data.img_size must be two integers, 1 or more, got [0, 32]"),
        ("points", "stem", "points must be a list of names, got 'stem'"),
        ("model", 3, "model must be text, got 3"),
    ],
)
def test_a_damaged_result_is_one_line_with_its_key(path: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_inside(change(path, value), source="runs/x/analysis.json")
    assert str(error.value) == f"runs/x/analysis.json: {said}"


def test_a_file_is_read_and_a_damaged_one_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "analysis.json"
    file.write_text(json.dumps(made_inside("eit", 3)))
    inside = load_inside(file)
    assert (inside.arm, inside.seed, inside.source) == ("eit", 3, str(file))
    assert inside.axis.outputs == [0, 2, 4, 6, 8, 10]
    file.write_text('{"schema": 1, "mod')
    with pytest.raises(ConfigError) as error:
        load_inside(file)
    assert str(error.value) == f"{file} is damaged: it is no JSON; analyse its run anew"
    file.write_text("[]")
    with pytest.raises(ConfigError, match=r"the result must be a mapping, got \[\]$"):
        load_inside(file)


def test_nan_and_null_in_a_result_are_gaps_not_errors() -> None:
    found = change("frequency.hf_dc_ratio.2", "inf")
    found["frequency"]["feature_variance"][1] = None
    found["heads"]["attention_distance"][0] = None
    found["heads"]["head_diversity"][0] = None
    inside = read_inside(found)
    assert inside.heads is not None
    assert inside.heads.attention_distance[0] is None
    panels = model_panels(inside)
    (line,) = [
        one
        for one in panels["hf_dc_ratio"].axes[0].get_lines()
        if len(one.get_xdata()) == 5 and one.get_linestyle() == "-"
    ]  # type: ignore[arg-type]
    assert np.isnan(line.get_ydata()[2])  # type: ignore[index]
    assert np.isfinite(line.get_ydata()[[0, 1, 3, 4]]).all()  # type: ignore[index, call-overload]
    check_legible(panels["attention_distance"], width=3.3)
