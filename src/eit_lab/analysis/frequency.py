"""Frequencies of token maps and images: high-frequency share, log amplitude, DC against the rest, filters, band noise.

Sources: relative log amplitude, feature-map variance and band noise: Park & Kim 2022 (arXiv:2202.06709, how-do-vits-work); DC and HF:
Wang et al. 2022 (arXiv:2203.05962). The HFD share is our own definition: arXiv:2203.07116 names the quantity, its formula was not
at hand.

Maps are real, (B, C, h, w), on grids of any shape. F = FFT2 over (h, w), not normalised. The radius of a frequency is
r(u, v) = 2 sqrt(fu^2 + fv^2), f = fftfreq: 1 is the Nyquist frequency on an axis, sqrt 2 the corner. All figures of a map come
from one ``Spectrum``; every function also takes one in place of the maps. Inputs in half precision are computed in float32.

Where we differ: figures of a constant map are exactly 0, also where rounding leaves something (``Spectrum``); of a map that is not
finite they are no numbers. Band noise has the same power whatever its band; the published one is white noise of which the band is
left, so that a wider ring is a stronger attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from eit_lab.analysis.means import ImageMean, as_float, chunk_size, full_precision

Grid = tuple[int, int]

CUTOFFS = (1 / 4, 1 / 3, 1 / 2, 3 / 4)
"""Radii above which a frequency counts as high."""

_AMPLITUDE = 1e-6
"""Added to an amplitude before its logarithm, as published."""

_CONSTANT = (8 * torch.finfo(torch.float32).eps) ** 2
"""Share of a map's energy outside DC up to which it is rounding, the map constant."""


def radius(grid: Grid) -> Tensor:
    """r(u, v) of every frequency of a grid (h, w), float64: 0 at DC, which is at [0, 0]; 1 at an axis' Nyquist frequency."""
    fu, fv = (torch.fft.fftfreq(n, dtype=torch.float64, device="cpu") for n in grid)
    return 2 * (fu[:, None].square() + fv.square()).sqrt()


def diagonal_frequencies(grid: Grid) -> Tensor:
    """The frequencies (F,) of the half diagonal in units of pi, F = ceil(min(h, w) / 2), the first 0.

    The half diagonal has index i along both axes, up to the last one below the Nyquist frequency of the shorter axis. On a
    square grid its frequency is 2 i / h along either; on another grid the two differ, and the root of their mean square is
    given: the radius / sqrt 2 in both cases.
    """
    return radius(grid).diagonal()[: -(-min(grid) // 2)] / 2**0.5


@lru_cache(maxsize=256)
def _within(grid: Grid, rho: float, device: torch.device) -> Tensor:
    """Which frequencies have r <= rho: (h, w), bool. One on the cutoff is within it, whatever its last digit."""
    with torch.inference_mode(mode=False):  # the cached one serves whoever comes next, with gradients too
        return (radius(grid) <= rho + 1e-9).to(device)


@lru_cache(maxsize=64)
def _above(grid: Grid, cutoffs: tuple[float, ...], device: torch.device) -> Tensor:
    """1 where r > cutoff, else 0: (h w, K), float64."""
    with torch.inference_mode(mode=False):
        return torch.stack([~_within(grid, rc, device).flatten() for rc in cutoffs], dim=1).double()


@lru_cache(maxsize=64)
def _waves(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The real Fourier transform of n samples as a matrix (n, n): n // 2 + 1 rows of cosines, then the sines of 1 ... (n - 1) // 2."""
    with torch.inference_mode(mode=False):
        at = torch.arange(n, dtype=torch.float64, device="cpu")
        turns = torch.outer(at, at) % n * (2 * torch.pi / n)
        return torch.cat([turns[: n // 2 + 1].cos(), turns[1 : (n + 1) // 2].sin()]).to(device, dtype)


@lru_cache(maxsize=64)
def _unfolding(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every frequency (u, v): where (|u|, |v|) lies in a flat quarter of the spectrum, and sign(u v): (h w,) both."""
    with torch.inference_mode(mode=False):
        u, v = ((torch.fft.fftfreq(n, device="cpu") * n).round().long() for n in grid)
        place = u.abs()[:, None] * (grid[1] // 2 + 1) + v.abs()
        return place.flatten().to(device), (u.sign()[:, None] * v.sign()).flatten().to(device)


class Spectrum:
    """What all figures of the token maps of B images need of their spectrum, made once.

    ``energy`` (B, h, w): sum over channels of |F|^2, DC at [0, 0]. A map that is constant up to rounding (less than 1e-12 of
    its energy outside DC) has exactly 0 outside DC.
    ``log_amplitude`` (B, F): mean over channels of log(|F| + 1e-6) on the half diagonal (``diagonal_frequencies``).
    ``grid`` (h, w) and ``num_channels`` C.

    The transform is two products with small matrices, on the tokens as they lie in memory, channels last: on CPU a small part
    of the time of rfft2, which has to lay each channel out as an image of its own.
    """

    def __init__(self, x: Tensor, grid: Grid) -> None:
        """Tokens (B, h w, C) without CLS, as the network has them, row by row of the grid."""
        self.grid, self.num_channels = grid, x.shape[-1]
        images = max(1, chunk_size(x.device) // (x.shape[1] * x.shape[2]))
        with full_precision(x):
            parts = [self._transform(part) for part in x.split(images)]
        energy, self.log_amplitude = (torch.cat(part) for part in zip(*parts, strict=True))  # energy (B, h w)
        outside = energy[:, 1:]
        outside.masked_fill_(outside.sum(dim=1, keepdim=True) <= _CONSTANT * energy[:, :1], 0)
        self.energy = energy.unflatten(1, grid)

    @classmethod
    def of_maps(cls, x: Tensor) -> Spectrum:
        """The same from maps (B, C, h, w)."""
        return cls(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]))

    def _transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and log amplitude of a few images.

        With cc the product with cosines along both axes, cs that with cosines along h and sines along w, and so on,
        F(u, v) = cc - ss - i (cs + sc), and F(u, -v) = cc + ss + i (cs - sc).
        """
        h, w = self.grid
        x = as_float(x).unflatten(1, self.grid)  # (b, h, w, C)
        rows, cols = (_waves(n, x.device, x.dtype) for n in self.grid)
        x = (rows @ (cols @ x).flatten(2)).unflatten(2, (w, -1))
        hc, wc, hs, ws = h // 2 + 1, w // 2 + 1, (h - 1) // 2, (w - 1) // 2  # rows of cosines, of sines
        cc, cs, sc, ss = x[:, 1 : hs + 1, 1 : ws + 1], x[:, 1 : hs + 1, wc:], x[:, hc:, 1 : ws + 1], x[:, hc:, wc:]

        squares = x.square().sum(dim=-1)
        squares[:, 1 : hs + 1] += squares[:, hc:]
        squares[:, :, 1 : ws + 1] += squares[:, :, wc:]
        crossed = torch.zeros_like(squares[:, :hc, :wc])
        crossed[:, 1 : hs + 1, 1 : ws + 1] = (cs * sc).sub_(cc * ss).sum(dim=-1)
        place, sign = _unfolding(self.grid, x.device)
        energy = squares[:, :hc, :wc].flatten(1)[:, place] + 2 * sign * crossed.flatten(1)[:, place]

        cc, cs, sc, ss = (part.diagonal(dim1=1, dim2=2).transpose(1, 2) for part in (cc, cs, sc, ss))  # (b, F - 1, C)
        amplitude = torch.cat([x[:, 0, :1].abs(), ((cc - ss).square() + (cs + sc).square()).sqrt()], dim=1)
        return energy.clamp_min(0), (amplitude + _AMPLITUDE).log().mean(dim=2)


def _spectrum(x: Tensor | Spectrum) -> Spectrum:
    return x if isinstance(x, Spectrum) else Spectrum.of_maps(x)


def power_spectrum(x: Tensor | Spectrum) -> Tensor:
    """E(u, v) = sum_c |F|^2 of maps (B, C, h, w): (B, h, w), DC at [0, 0]."""
    return _spectrum(x).energy


def hfd_share(x: Tensor | Spectrum, cutoffs: Sequence[float] = CUTOFFS, dc: bool = True) -> Tensor:
    """Share of the energy of maps (B, C, h, w) at r > cutoff: (B, K), float64 in [0, 1]. Our definition.

    ``dc``: whether the denominator holds the DC term. A map without energy (all zero; with ``dc`` false: constant) has share 0.
    """
    spectrum = _spectrum(x)
    energy = spectrum.energy.double().flatten(1)
    total = (energy if dc else energy[:, 1:]).sum(dim=1, keepdim=True)
    return torch.where(total == 0, 0, energy @ _above(spectrum.grid, tuple(cutoffs), energy.device) / total)


def log_amplitude(x: Tensor | Spectrum) -> Tensor:
    """Mean over channels of log(|F| + 1e-6) on the half diagonal, of maps (B, C, h, w): (B, F). Park & Kim 2022.

    As it is: ``LogAmplitude`` subtracts the first entry after the mean over images, which gives the same as before it.
    """
    return _spectrum(x).log_amplitude


def hf_dc_ratio(x: Tensor | Spectrum) -> Tensor:
    """||x - DC|| / ||DC|| of maps (B, C, h, w), DC the mean over the grid: (B,), float64. Wang et al. 2022.

    0 for a map of zeros, inf for another without DC.
    """
    energy = _spectrum(x).energy.double().flatten(1)
    dc, rest = energy[:, 0], energy[:, 1:].sum(dim=1)
    return torch.where(rest == 0, 0, (rest / dc).sqrt())


def feature_variance(x: Tensor | Spectrum) -> Tensor:
    """Variance over (h, w), with h w - 1 below as published, then the mean over channels, of maps (B, C, h, w): (B,), float64."""
    spectrum = _spectrum(x)
    n = spectrum.grid[0] * spectrum.grid[1]
    return spectrum.energy.double().flatten(1)[:, 1:].sum(dim=1) / (n * max(1, n - 1) * spectrum.num_channels)


def low_pass(x: Tensor, rho: float) -> Tensor:
    """What of x (..., h, w) has r <= rho; float32 inside, x's own dtype outside. From rho = sqrt 2 on x itself."""
    grid = (x.shape[-2], x.shape[-1])
    if bool(_within(grid, rho, torch.device("cpu")).all()):
        return x
    half = _within(grid, rho, x.device)[:, : grid[1] // 2 + 1]
    return torch.fft.irfft2(torch.fft.rfft2(as_float(x)) * half, s=grid).to(x.dtype)


def high_pass(x: Tensor, rho: float) -> Tensor:
    """What of x (..., h, w) has r > rho: x - low_pass(x, rho), in float32 inside."""
    return (as_float(x) - low_pass(as_float(x), rho)).to(x.dtype)


def band_noise(
    shape: Sequence[int],
    centre: float,
    width: float,
    std: float,
    generator: torch.Generator,
    device: torch.device | str,
) -> Tensor:
    """Gaussian noise (..., h, w) whose frequencies lie in the ring |r - centre| <= width / 2, float32.

    Its standard deviation per pixel is ``std`` whatever the ring: a wide ring has no more noise than a narrow one. It is drawn
    on the generator's device: the same noise on any ``device``. ValueError where a grid has no frequency in the ring.
    """
    grid = (shape[-2], shape[-1])
    ring = ((radius(grid) - centre).abs() <= width / 2 + 1e-9).to(generator.device)
    num_frequencies = int(ring.sum())
    if not num_frequencies:
        raise ValueError(f"a grid of {grid[0]}x{grid[1]} has no frequency within {width / 2:g} of {centre:g}")
    white = torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device=generator.device)
    noise = torch.fft.irfft2(torch.fft.rfft2(white) * ring[:, : grid[1] // 2 + 1], s=grid)
    return (noise * (std * (ring.numel() / num_frequencies) ** 0.5)).to(device)


class HFDShare(ImageMean):
    """Mean over images of ``hfd_share``: (K,), in [0, 1]."""

    def __init__(self, cutoffs: Sequence[float] = CUTOFFS, dc: bool = True) -> None:
        super().__init__((len(cutoffs),))
        self.cutoffs, self.dc = tuple(cutoffs), dc

    def update(self, x: Tensor | Spectrum) -> None:
        """Add maps (B, C, h, w)."""
        self.add(hfd_share(x, self.cutoffs, dc=self.dc))


class LogAmplitude(ImageMean):
    """Mean over images of ``log_amplitude`` minus its first entry: (F,), the first 0."""

    def __init__(self, *, grid: Grid) -> None:
        super().__init__((len(diagonal_frequencies(grid)),))

    def update(self, x: Tensor | Spectrum) -> None:
        """Add maps (B, C, h, w)."""
        self.add(log_amplitude(x))

    def compute(self) -> Tensor:
        """(F,), float64."""
        mean = self.mean()
        return mean - mean[0]


class HFDCRatio(ImageMean):
    """Mean over images of ``hf_dc_ratio``: ()."""

    def update(self, x: Tensor | Spectrum) -> None:
        """Add maps (B, C, h, w)."""
        self.add(hf_dc_ratio(x))


class FeatureVariance(ImageMean):
    """Mean over images of ``feature_variance``: ()."""

    def update(self, x: Tensor | Spectrum) -> None:
        """Add maps (B, C, h, w)."""
        self.add(feature_variance(x))
