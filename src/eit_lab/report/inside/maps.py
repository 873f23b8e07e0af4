"""What is drawn as a map: similarity of points, rollout on the grid, the effective receptive field on the image.

Sources: squares that hold a share of the receptive field, Ding et al. 2022 (arXiv:2203.06717), there as a table; CKA of layers as a
matrix, Nguyen et al. 2021 (arXiv:2010.15327).
"""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle

from eit_lab.report.inside.checked import FloatArray
from eit_lab.report.inside.numbers import Axis, Inside
from eit_lab.report.inside.paper import WHITE, colour_bar, dress


def draw_cka(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Similarity of every two points of the residual stream."""
    assert inside.cka is not None, "asked for where it is"
    draw_matrix(axes, inside.cka, across=inside.axis, up=inside.axis)
    dress(axes, "CKA")
    axes.grid(visible=False)


def draw_matrix(axes: Axes, cka: FloatArray, *, across: Axis, up: Axis) -> None:
    """CKA (points up, points across) in [0, 1], with layer numbers on both axes."""
    shown = axes.imshow(np.clip(cka, 0, 1), origin="lower", interpolation="none", cmap="viridis", vmin=0, vmax=1)
    axes.spines[:].set_visible(False)
    axes.set_anchor("N")
    for axis, put in ((across, axes.set_xticks), (up, axes.set_yticks)):
        outputs = axis.outputs
        step = next(step for step in (1, 2, 3, 4, 6, 8, 12, 24, len(outputs)) if (len(outputs) - 1) / step <= 6)
        kept = outputs[::-1][::step]
        put(kept, [f"{axis.depth[place]:g}" for place in kept])
    axes.set_xlabel(across.word)
    axes.set_ylabel(up.word)
    colour_bar(axes, shown, ticks=(0, 0.5, 1), labels=("0", "0.5", "1"))


def draw_rollout(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Where CLS takes its information from, over all layers; 1 is the mean over the grid."""
    assert inside.rollout is not None, "asked for where it is"
    mean = float(np.mean(inside.rollout)) or 1.0
    ratio = inside.rollout / mean
    shown = axes.imshow(ratio, interpolation="none", cmap="viridis")
    low, high = float(np.nanmin(ratio)), float(np.nanmax(ratio))
    axes.spines[:].set_visible(False)
    h, w = ratio.shape
    axes.set_xlabel(f"{h} × {w} tokens")
    axes.set_anchor("N")
    dress(axes, "Rollout of CLS (1: mean)")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    apart = 0.1 * (high - low)  # two labels have room
    ticks = [low, *([1.0] if low + apart < 1 < high - apart else []), *([high] if high > low else [])]
    colour_bar(axes, shown, ticks=ticks, labels=[f"{tick:.2f}" for tick in ticks])


def draw_receptive_field(axes: Axes, inside: Inside, *, alone: bool = True) -> None:
    """Gradient of the centre token with respect to the input, and the squares that hold shares of it."""
    field = inside.receptive_field
    assert field is not None, "asked for where it is"
    rows, columns = field.map.shape
    size = inside.img_size or (rows, columns)
    top = float(np.nanmax(field.map))
    norm: Normalize = LogNorm(1e-3, 1, clip=True)
    axes.imshow(
        np.maximum(field.map / top, 1e-3) if top > 0 else field.map + 1e-3, interpolation="none", cmap="viridis", norm=norm,
        extent=(0, size[1], size[0], 0),
    )  # fmt: skip
    # NOTE: a centre of whole numbers is the middle of a pixel; in the picture a pixel reaches from its number to the next.
    y, x = (at + 0.5 for at in field.centre_px) if field.centre_px else (size[0] / 2, size[1] / 2)
    for place, side in enumerate(field.side_px):
        square = Rectangle((x - side / 2, y - side / 2), side, side, fill=False, edgecolor=WHITE, linewidth=0.9, linestyle=("-", "--", "-.", ":")[place % 4], clip_on=True)  # fmt: skip
        axes.add_patch(square)
    axes.set_xlim(0, size[1])
    axes.set_ylim(size[0], 0)
    axes.spines[:].set_visible(False)
    axes.set_anchor("N")
    shares = ", ".join(f"{100 * share:g}" for share in field.shares)
    sides = ", ".join(f"{side:.0f}" for side in field.side_px)
    axes.set_xlabel(
        f"{shares}% of it: squares of\n{sides} px of {size[0]} × {size[1]}" if shares else f"{size[0]} × {size[1]} px"
    )
    dress(axes, "Effective receptive field")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    colour_bar(axes, ScalarMappable(norm, "viridis"), ticks=(1e-3, 1e-2, 1e-1, 1), labels=("≤ 0.001", "0.01", "0.1", "1"))  # fmt: skip
