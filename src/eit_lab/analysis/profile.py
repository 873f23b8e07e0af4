"""All figures that one forward pass shows, of every layer, gathered while the pass goes on.

``Profile`` is the Tap that feeds the metrics of this package: one of each kind for every point of the residual stream and every
layer with attention. Nothing of a layer is kept once the pass has left it, but for the Gram matrices of similarity (GROUP by GROUP
numbers a point) and what rollout multiplies up.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric

from eit_lab.analysis.frequency import (
    CUTOFFS,
    FeatureVariance,
    HFDCRatio,
    HFDShare,
    LogAmplitude,
    Spectrum,
    diagonal_frequencies,
)
from eit_lab.analysis.heads import HeadStatistics, uniform_distance
from eit_lab.analysis.layout import forward, layout_of
from eit_lab.analysis.means import full_precision
from eit_lab.analysis.rollout import Rollout, RolloutMap
from eit_lab.analysis.similarity import SMALLEST_GROUP, MinibatchCKA, centred, gram
from eit_lab.config import ImageSize, as_hw
from eit_lab.models.image_model import ImageModel
from eit_lab.models.intermediates import AttentionMaps, ConvolutionTaps, Tap

GROUP = 32
"""Images of a minibatch of CKA: a part of its definition, since the figure depends on it."""
GRAM_IMAGES = 1024
"""Images of which Gram matrices are kept, to compare models by."""
FREQUENCY = ("hfd_share", "hfd_share_no_dc", "log_amplitude", "hf_dc_ratio", "feature_variance")
HEADS = ("attention_distance", "attention_entropy", "attention_nmi", "cls_mass", "head_cosine", "head_js")
PER_HEAD = ("attention_distance", "attention_entropy", "attention_nmi", "cls_mass")
"""Those of HEADS that each head has for itself; the others are of a layer."""
_CUTOFF = CUTOFFS.index(1 / 2)  # of the one number that stands for all cutoffs


class Profile(nn.Module):
    """The figures of a model over any number of images.

    ``frequency``, ``heads``: which figures, by name; ``similarity``: CKA between all points; ``rollout``: the mean map of CLS.
    The model is not a part of this module, and stays as it is.
    """

    def __init__(
        self,
        model: ImageModel,
        img_size: ImageSize,
        *,
        frequency: Collection[str] = FREQUENCY,
        heads: Collection[str] = HEADS,
        similarity: bool = False,
        rollout: bool = False,
    ) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple it is no submodule
        self.img_hw = as_hw(img_size)
        self.layout = layout_of(model, img_hw=self.img_hw)
        self.wanted_frequency = tuple(name for name in FREQUENCY if name in frequency)
        self.wanted_heads = tuple(name for name in HEADS if name in heads) if self.layout.has_heads else ()
        self.wants_similarity, self.wants_rollout = similarity, rollout and self.layout.has_heads
        self.points: list[str] = []
        self.grids: list[tuple[int, int]] = []
        self.frequency = nn.ModuleList()
        self.heads = nn.ModuleDict()
        self.cka: MinibatchCKA | None = None
        self.rollout: RolloutMap | None = None
        self._grams: dict[int, Tensor] = {}

    def update(self, images: Tensor, *, first: int = 0, kept: Tensor | None = None) -> Tensor:
        """Normalised images (B, C, H, W) of a batch that begins with number ``first`` of the order -> logits (B, num_classes).

        With similarity, ``first`` is a multiple of GROUP, and so is the batch but for the last images of all. ``kept`` (B,): their
        places in the batch, upwards, where some of it are left out: their groups are smaller.
        """
        assert not self.wants_similarity or first % GROUP == 0, "groups of similarity begin at whole multiples"
        if not len(images):
            raise ValueError("images must be one or more, got none")
        places = torch.arange(len(images)) if kept is None else kept
        sizes = torch.bincount(places // GROUP).tolist() if self.wants_similarity else []
        tap = _Listener(self, group_sizes=sizes)
        with torch.no_grad():
            logits = forward(self._model[0], images, tap=tap)
            if self.wants_similarity:
                self._compare(tap.grams, first=first // GROUP)
            if tap.rollout is not None:
                if self.rollout is None:
                    assert self.layout.grid is not None
                    self.rollout = RolloutMap(self.layout.grid).to(images.device)
                with full_precision(images):
                    self.rollout.update(tap.rollout.finish(len(images)))
        return logits

    def reset(self) -> None:
        """Forget all images."""
        for module in self.modules():
            if isinstance(module, Metric):
                module.reset()
        self._grams.clear()

    # ------------------------------------------------------------------------------------------------------- while it goes on

    def see(self, place: int, name: str, x: Tensor, grid: tuple[int, int], *, as_maps: bool) -> None:
        """Tokens (B, h w, C), or maps (B, C, h, w), of the point that is number ``place`` in a pass."""
        if place == len(self.points):
            self.points.append(name)
            self.grids.append(grid)
            self.frequency.append(nn.ModuleDict(_frequency_metrics(self.wanted_frequency, grid)).to(x.device))
        if self.wanted_frequency:
            spectrum = Spectrum.of_maps(x) if as_maps else Spectrum(x, grid)
            metrics: Any = self.frequency[place]
            for metric in metrics.values():
                metric.update(spectrum)

    def attend(self, layer: int, maps: AttentionMaps) -> None:
        """The attention maps of a layer."""
        key = str(layer)
        if key not in self.heads:
            assert self.layout.grid is not None
            assert self.layout.pitch is not None
            self.heads[key] = HeadStatistics(
                maps.shape[1], grid=self.layout.grid, pitch=self.layout.pitch, quantities=self.wanted_heads
            ).to(maps.q.device)
        metric: Any = self.heads[key]
        metric.update(maps)

    def _compare(self, grams: list[list[Tensor]], *, first: int) -> None:
        for number, group in enumerate(grams, start=first):
            stacked = torch.stack(group)  # (P, n, n)
            if self.cka is None:  # also where no group counts: all ranks must have the sums
                self.cka = MinibatchCKA(len(stacked)).to(stacked.device)
            if len(group[0]) < SMALLEST_GROUP:
                continue
            self.cka.update(stacked)
            if (number + 1) * GROUP <= GRAM_IMAGES and stacked.shape[-1] == GROUP:
                # Centred in float64: as float32 they would lose what a large mean feature hides.
                self._grams[number] = centred(stacked).float().cpu()

    # ---------------------------------------------------------------------------------------------------------------- results

    def result(self) -> dict[str, Any]:
        """The parts of an analysis that a pass shows, over all ranks, as plain numbers. All ranks must call."""
        layout = self.layout
        frequency = self._frequency() if self.wanted_frequency and self.points else None
        heads = self._heads() if self.heads else None
        return {
            "grid": None if layout.grid is None else list(layout.grid),
            "pitch_px": None if layout.pitch is None else list(layout.pitch),
            "layers": layout.depth,
            "heads_per_layer": layout.num_heads or None,
            "widths": {
                "conv": list(layout.conv_width),
                "attn": list(layout.attn_width),
                "head": list(layout.head_width),
            }
            if layout.has_heads
            else None,
            "missing": layout.missing or None,
            "points": list(self.points),
            "frequency": frequency,
            "heads": heads,
            "similarity": None
            if self.cka is None
            else {"group": GROUP, "cka": _listed(self.cka, (len(self.points), -1))},
            "rollout": None if self.rollout is None else {"cls": _listed(self.rollout, layout.grid or ())},
            "means": self._means(frequency, heads),
        }

    def grams(self) -> NDArray[np.float32] | None:
        """Centred Gram matrices (groups, P, GROUP, GROUP) of the first images, over all ranks. All ranks must call."""
        found = [self._grams]
        if dist.is_available() and dist.is_initialized():
            found = [{}] * dist.get_world_size()
            dist.all_gather_object(found, self._grams)
        joined = {number: stacked for part in found for number, stacked in part.items()}
        return torch.stack([joined[number] for number in sorted(joined)]).numpy() if joined else None

    def _frequency(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "grids": [list(grid) for grid in self.grids],
            "frequencies": [diagonal_frequencies(grid).tolist() for grid in self.grids],
        }
        shapes = {"hfd_share": (-1,), "hfd_share_no_dc": (-1,), "log_amplitude": (-1,)}
        computed: dict[str, Any] = {
            name: [_listed(metrics[name], shapes.get(name, ())) for metrics in self.frequency]  # type: ignore[index]
            for name in self.wanted_frequency
        }
        for name in ("hfd_share", "hfd_share_no_dc"):
            if name in computed:
                found["cutoffs"] = list(CUTOFFS)
                computed[name] = [list(column) for column in zip(*computed[name], strict=True)]  # by cutoff
        return found | computed

    def _heads(self) -> dict[str, Any]:
        assert self.layout.grid is not None
        assert self.layout.pitch is not None
        by_layer = [
            {
                name: value.reshape(-1 if name in PER_HEAD else ()).tolist()
                for name, value in self.heads[str(layer)].compute().items()  # type: ignore[operator]
            }
            if str(layer) in self.heads
            else None
            for layer in range(self.layout.depth)
        ]
        names = next(found for found in by_layer if found is not None)
        return {
            "uniform_distance": float(uniform_distance(self.layout.grid, self.layout.pitch)),
            **{name: [None if found is None else found[name] for found in by_layer] for name in names},
        }

    def _means(self, frequency: dict[str, Any] | None, heads: dict[str, Any] | None) -> dict[str, float | None]:
        """One number a figure: the mean over the outputs of the blocks, or over layers and heads."""
        outputs = [place for place, name in enumerate(self.points) if name.endswith(".mlp")] or list(
            range(len(self.points))
        )
        found: dict[str, float | None] = {}
        for name in ("hfd_share", "log_amplitude", "hf_dc_ratio", "feature_variance"):
            values = (frequency or {}).get(name)
            if name == "hfd_share" and values is not None:
                values = values[_CUTOFF]
            elif name == "log_amplitude" and values is not None:
                values = [curve[-1] if len(curve) > 1 else None for curve in values]  # a grid of 2x2 has DC only
            kept = [values[place] for place in outputs if values[place] is not None] if values is not None else []
            found[name] = float(np.mean(kept)) if kept else None
        for name in ("attention_distance", "head_diversity", "attention_entropy", "attention_nmi", "cls_mass"):
            layers = [layer for layer in (heads or {}).get(name, ()) if layer is not None]
            found[name] = float(np.mean([np.mean(layer) for layer in layers])) if layers else None
        return found


def _listed(metric: Metric, shape: tuple[int, ...]) -> Any:
    """What a metric computes as plain numbers. NOTE: torchmetrics makes a scalar of any tensor with one element."""
    return metric.compute().reshape(shape).tolist()


def _frequency_metrics(names: Collection[str], grid: tuple[int, int]) -> dict[str, Metric]:
    makers: dict[str, Metric] = {
        "hfd_share": HFDShare(CUTOFFS, dc=True),
        "hfd_share_no_dc": HFDShare(CUTOFFS, dc=False),
        "log_amplitude": LogAmplitude(grid=grid),
        "hf_dc_ratio": HFDCRatio(),
        "feature_variance": FeatureVariance(),
    }
    return {name: makers[name] for name in names}


class _Listener(Tap):
    """Hands what one pass makes to a profile."""

    def __init__(self, profile: Profile, *, group_sizes: Sequence[int]) -> None:
        self.profile, self._sizes = profile, list(group_sizes)
        self.grams: list[list[Tensor]] = [[] for _ in group_sizes]
        self.rollout = Rollout(profile.layout.splits) if profile.wants_rollout else None
        self._place = 0

    def tokens(self, name: str, x: Tensor, grid: tuple[int, int]) -> Tensor:
        self.profile.see(self._place, name, x[:, 1:], grid, as_maps=False)
        self._compare(x)
        return x

    def maps(self, name: str, x: Tensor) -> None:
        self.profile.see(self._place, name, x, (x.shape[-2], x.shape[-1]), as_maps=True)
        self._compare(x)

    def _compare(self, x: Tensor) -> None:
        if self.grams:
            with full_precision(x):
                for grams, group in zip(self.grams, x.split(self._sizes), strict=True):
                    grams.append(gram(group))
        self._place += 1

    def attention(self, layer: int, maps: AttentionMaps) -> None:
        if self.profile.wanted_heads:
            self.profile.attend(layer, maps)
        if self.rollout is not None:
            with full_precision(maps.q):
                self.rollout.attention(layer, maps)

    def convolution(self, layer: int, taps: ConvolutionTaps) -> None:
        if self.rollout is not None:
            self.rollout.convolution(layer, taps)
