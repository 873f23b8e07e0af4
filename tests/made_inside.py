"""Results of analyses that nobody measured: plausible numbers of arms and seeds, for the tests of what draws them."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

CUTOFFS = [0.25, 1 / 3, 0.5, 0.75]
FILTER_CUTOFFS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9, 1.1, 1.3]
CENTRES = [0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.2]
# What an arm is like: how much its blocks raise the high frequencies, how local its heads are, how its heads differ.
ARMS = {
    "vit": (0.0, 0.05, 0.10),
    "lsra": (0.10, 0.25, 0.16),
    "lsra_lite": (-0.05, 0.20, 0.14),
    "eit": (0.18, 0.45, 0.24),
}


def made_inside(
    arm: str = "eit",
    seed: int | None = 0,
    *,
    layers: int = 5,
    heads: int = 8,
    grid: tuple[int, int] = (8, 8),
    pitch: float = 4.0,
    untrained: bool = True,
    without: tuple[str, ...] = (),
    no_attention: tuple[int, ...] = (),
    **more: Any,
) -> dict[str, Any]:
    """A result as an analysis writes it; ``without``: parts that are null; ``more`` replaces keys of its first level."""
    rng = np.random.default_rng([sum(map(ord, arm)), seed or 0, layers])
    rise, local, spread = ARMS.get(arm, (0.05, 0.2, 0.15))
    points = ["stem", *(f"blocks.{layer}.{part}" for layer in range(layers) for part in ("mixer", "mlp"))]
    size = [int(pitch * side) for side in grid]
    attention = [None if layer in no_attention else layer for layer in range(layers)]
    found: dict[str, Any] = {
        "schema": 1, "model": f"{arm}_nano", "arm": arm, "seed": seed, "weights": "ema", "checkpoint": "best",
        "identity": f"{zlib.crc32(f'{arm} {seed}'.encode()):010x}" if seed is not None else None,
        "data": {"name": "cifar10", "part": "test", "images": 10000, "img_size": size, "acc1": 0.9 + 0.02 * local + 0.002 * rng.standard_normal(), "num_classes": 10},
        "grid": list(grid), "pitch_px": [pitch, pitch], "layers": layers, "heads_per_layer": heads,
        "widths": {
            "conv": [16 * heads - 16 * (layer + 1) // layers * heads for layer in range(layers)] if arm == "eit" else [0] * layers,
            "attn": [max(2, 16 * (layer + 1) // layers) * heads for layer in range(layers)] if arm == "eit" else [16 * heads] * layers,
            "head": [max(2, 16 * (layer + 1) // layers) for layer in range(layers)] if arm == "eit" else [16] * layers,
        },
        "points": points,
        "frequency": _frequency(rng, points, grid, rise),
        "heads": _heads(rng, attention, heads, grid, pitch, local, spread),
        "similarity": {"group": 32, "cka": _cka(rng, len(points)).tolist()},
        "rollout": {"cls": _bump(grid, 0.4, 0.3).tolist()},
        "receptive_field": {
            "images": 256, "map": (peak := _bump((min(size[0], 64), min(size[1], 64)), 0.12, 0.002) ** 1.5 / 1.0).__truediv__(peak.sum()).tolist(),
            "shares": [0.2, 0.3, 0.5, 0.99], "side_px": [size[0] * share for share in (0.14, 0.2, 0.31, 0.94)],
        },
        "filters": _filters(rng, points, layers, local),
        "untrained": None,
        "device": "cpu", "precision": "32-true", "seconds": 12.3, "settings": {},
    }  # fmt: skip
    if untrained:
        found["untrained"] = {
            "frequency": _frequency(rng, points, grid, 0.0, trained=False),
            "heads": _heads(rng, attention, heads, grid, pitch, 0.0, 0.01),
        }
    found["means"] = {
        "hfd_share": float(np.mean(found["frequency"]["hfd_share"][2][2::2])),
        "log_amplitude": float(np.mean([one[-1] for one in found["frequency"]["log_amplitude"][2::2]])),
        "attention_distance": 12.3, "head_diversity": spread, "attention_entropy": 0.9, "attention_nmi": 0.08, "cls_mass": 0.06,
    }  # fmt: skip
    return found | dict.fromkeys(without) | more


def _frequency(rng: np.random.Generator, points: list[str], grid: tuple[int, int], rise: float, *, trained: bool = True) -> dict[str, Any]:  # fmt: skip
    x = np.linspace(0, 1, len(points))
    at_half = 0.42 + rise * np.exp(-2 * x) - (0.3 - 0.5 * rise) * x * trained + 0.012 * rng.standard_normal()
    at_half = at_half + 0.015 * np.where(np.arange(len(points)) % 2, -1, 1) * (x > 0) + 0.004 * rng.standard_normal(len(points))  # fmt: skip
    shares = [np.clip(at_half * k, 0.01, 0.99) for k in (1.45, 1.28, 1.0, 0.55)]
    side = min(grid)
    frequencies = 2 * np.arange((side + 1) // 2) / side
    steepness = 3.2 - 4 * rise + (1.8 if trained else 0.3) * x
    return {
        "grids": [list(grid)] * len(points), "cutoffs": CUTOFFS,
        "hfd_share": [share.tolist() for share in shares], "hfd_share_no_dc": [(share**0.5).tolist() for share in shares],
        "frequencies": [frequencies.tolist()] * len(points),
        "log_amplitude": [(-s * frequencies**0.6 + 0.05 * rng.standard_normal(len(frequencies)) * (frequencies > 0)).tolist() for s in steepness],
        "hf_dc_ratio": (2.2 * np.exp(-1.2 * x) + 0.4 + 2 * rise).tolist(),
        "feature_variance": (0.02 * np.exp(5 * x * (1 if trained else 0.2)) * np.exp(0.1 * rng.standard_normal())).tolist(),
    }  # fmt: skip


def _heads(rng: np.random.Generator, attention: list[int | None], heads: int, grid: tuple[int, int], pitch: float, local: float, spread: float) -> dict[str, Any]:  # fmt: skip
    y, x = (axis.ravel() * pitch for axis in np.indices(grid))
    uniform = float(np.hypot(y[:, None] - y, x[:, None] - x).mean())
    layers = len(attention)
    distance = [
        None if layer is None else uniform * np.clip(
            1 - local * np.exp(-2.5 * layer / layers) - 0.05 + (spread * np.exp(-layer / layers) + 0.01) * rng.standard_normal(heads), 0.05, 1.25
        ) for layer in attention
    ]  # fmt: skip

    def per_head(mean: float, slope: float, width: float) -> list[list[float] | None]:
        return [None if n is None else np.clip(mean + slope * n / layers + width * rng.standard_normal(heads), 0.001, 0.999).tolist() for n in attention]  # fmt: skip

    def per_layer(values: list[float]) -> list[float | None]:
        return [None if n is None else value for n, value in zip(attention, values, strict=True)]

    hd = [0.0 if one is None else float(np.std(one / uniform)) for one in distance]
    return {
        "uniform_distance": uniform, "attention_distance": [None if one is None else one.tolist() for one in distance],
        "attention_entropy": per_head(0.92 - 0.4 * local, 0.05, 0.1 * local + 0.01), "attention_nmi": per_head(0.04 + 0.4 * local, -0.05, 0.1 * spread),
        "cls_mass": per_head(0.05, 0.25, 0.03), "head_diversity": per_layer(hd), "head_range": per_layer([3 * h for h in hd]), "head_cv": per_layer(hd),
        "head_cosine": per_layer([min(1, 2.1 * h + 0.03) for h in hd]), "head_js": per_layer([min(1, 1.3 * h + 0.01) for h in hd]),
    }  # fmt: skip


def _cka(rng: np.random.Generator, points: int) -> np.ndarray:
    place = np.arange(points)
    near = np.exp(-abs(place[:, None] - place) / (0.5 * points)) - 0.1 * (abs(place[:, None] - place) % 2)
    noise = 0.01 * rng.standard_normal((points, points))
    return np.clip(near + noise + noise.T, 0, 1) * (1 - np.eye(points)) + np.eye(points)


def _bump(shape: tuple[int, int], width: float, floor: float) -> np.ndarray:
    y, x = (2 * (axis + 0.5) / side - 1 for axis, side in zip(np.indices(shape), shape, strict=True))
    bump = np.exp(-np.hypot(y, x) / width) + floor
    return bump / bump.sum()


def _filters(rng: np.random.Generator, points: list[str], layers: int, local: float) -> dict[str, Any]:
    def curves(hard: float) -> dict[str, list[float]]:
        rho, centre = np.array(FILTER_CUTOFFS), np.array(CENTRES)
        noise = 0.008 * rng.standard_normal((3, len(rho)))
        low = 0.1 + 0.82 / (1 + np.exp(-(rho - hard) * 9))
        high = 0.1 + 0.82 / (1 + np.exp((rho - 0.25 - 0.5 * local) * 10))
        band = 0.92 - (0.55 - local) * np.exp(-(((centre - 0.3) / 0.3) ** 2))
        return {
            "low": np.clip(low + noise[0], 0, 1).tolist(), "high": np.clip(high + noise[1], 0, 1).tolist(),
            "band": np.clip(band + noise[2, : len(centre)], 0, 1).tolist(),
        }  # fmt: skip

    places = [point for point in points[2::2] if int(point.split(".")[1]) in {0, layers // 2, layers - 1}]
    return {
        "images": 2000, "acc1": 0.92, "cutoffs": FILTER_CUTOFFS, "centres": CENTRES, "band_width": 0.15, "noise_std": 0.5,
        "input": curves(0.35), "tokens": {point: curves(0.3 + 0.3 * n / max(1, len(places))) for n, point in enumerate(places)},
    }  # fmt: skip
