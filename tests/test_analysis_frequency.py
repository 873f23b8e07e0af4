"""Frequencies: known answers, a slow reference written out here, filters, and metrics that do not know of batches or ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from eit_lab.analysis.frequency import (
    CUTOFFS,
    FeatureVariance,
    HFDCRatio,
    HFDShare,
    LogAmplitude,
    Spectrum,
    band_noise,
    diagonal_frequencies,
    feature_variance,
    hf_dc_ratio,
    hfd_share,
    high_pass,
    log_amplitude,
    low_pass,
    power_spectrum,
    radius,
)
from eit_lab.analysis.heads import HeadStatistics
from eit_lab.analysis.means import ImageMean

GRIDS = [(1, 1), (1, 4), (3, 2), (4, 4), (5, 5), (3, 6), (6, 5)]


def slow_transform(x: Tensor) -> Tensor:
    """F(u, v) of maps (B, C, h, w), one frequency after the other, complex128."""
    h, w = x.shape[-2:]
    y, z = torch.arange(h, dtype=torch.float64)[:, None], torch.arange(w, dtype=torch.float64)
    F = torch.zeros(x.shape, dtype=torch.complex128)
    for u in range(h):
        for v in range(w):
            wave = torch.exp(-2j * math.pi * (u * y / h + v * z / w))
            F[..., u, v] = (x.to(torch.complex128) * wave).sum(dim=(-2, -1))
    return F


def signed(u: int, n: int) -> float:
    """Index of a frequency -> cycles a sample in [-1/2, 1/2)."""
    return (u if u < (n + 1) // 2 else u - n) / n


def slow_share(spectrum: Tensor, cutoff: float, *, dc: bool) -> Tensor:
    B, _, h, w = spectrum.shape
    high, total = torch.zeros(B, dtype=torch.float64), torch.zeros(B, dtype=torch.float64)
    for u in range(h):
        for v in range(w):
            energy = spectrum[:, :, u, v].abs().square().sum(dim=1)
            if 2 * math.hypot(signed(u, h), signed(v, w)) > cutoff + 1e-9:
                high += energy
            if dc or (u, v) != (0, 0):
                total += energy
    return torch.where(total > 0, high / total, 0)


@pytest.mark.parametrize("grid", GRIDS)
def test_all_figures_are_those_of_the_slow_reference(grid: tuple[int, int]) -> None:
    h, w = grid
    x = torch.randn(3, 5, h, w, dtype=torch.float64, generator=torch.Generator().manual_seed(h + 8 * w)) + 0.7
    F = slow_transform(x)
    torch.testing.assert_close(power_spectrum(x), F.abs().square().sum(dim=1))
    for dc in (True, False):
        slow = torch.stack([slow_share(F, rc, dc=dc) for rc in CUTOFFS], dim=1)
        torch.testing.assert_close(hfd_share(x, dc=dc), slow)
    shifted = torch.fft.fftshift(F, dim=(2, 3))
    steps = range((min(grid) + 1) // 2)
    diagonal = torch.stack([shifted[:, :, h // 2 + i, w // 2 + i].abs() for i in steps], dim=-1)
    torch.testing.assert_close(log_amplitude(x), (diagonal + 1e-6).log().mean(dim=1))
    mean = x.mean(dim=(2, 3), keepdim=True)
    norms = [part.flatten(1).norm(dim=1) for part in (x - mean, mean.expand_as(x))]
    torch.testing.assert_close(hf_dc_ratio(x), norms[0] / norms[1])
    variance = x.var(dim=(2, 3)).mean(dim=1) if h * w > 1 else torch.zeros(3, dtype=torch.float64)
    torch.testing.assert_close(feature_variance(x), variance)


def test_tokens_and_maps_give_one_spectrum_in_any_precision() -> None:
    maps = torch.randn(2, 6, 5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = maps.flatten(2).transpose(1, 2).contiguous()
    exact = torch.fft.fft2(maps.double()).abs().square().sum(dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        spectra = [Spectrum(tokens, (5, 4)), Spectrum.of_maps(maps), Spectrum.of_maps(maps.float())]
    for spectrum in spectra:
        assert spectrum.energy.dtype == torch.float32
        torch.testing.assert_close(spectrum.energy.double(), exact, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hfd_share(spectrum), hfd_share(maps.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [(19, 19), (14, 14), (8, 5), (3, 7)])
@pytest.mark.parametrize("value", [3.7, -1e-3, 1e4])
def test_constant_map_has_no_high_frequencies(grid: tuple[int, int], value: float) -> None:
    x = torch.full((2, 3, *grid), value)
    for dc in (True, False):
        assert hfd_share(x, dc=dc).eq(0).all()
    assert hf_dc_ratio(x).eq(0).all()
    assert feature_variance(x).eq(0).all()


def test_faint_pattern_on_a_constant_is_not_taken_for_rounding() -> None:
    x = 1 + 1e-4 * checkerboard(8, 8)
    assert hfd_share(x, dc=False)[0].tolist() == pytest.approx([1] * 4, abs=1e-4)
    assert hf_dc_ratio(x).item() == pytest.approx(1e-4, rel=1e-3)


def test_map_of_zeros_has_share_0() -> None:
    x = torch.zeros(1, 2, 4, 4)
    for dc in (True, False):
        assert hfd_share(x, dc=dc).tolist() == [[0] * 4]
    assert hf_dc_ratio(x).tolist() == [0]
    assert log_amplitude(x).tolist() == [pytest.approx([math.log(1e-6)] * 2)]


def checkerboard(h: int, w: int) -> Tensor:
    return (1 - 2 * ((torch.arange(h)[:, None] + torch.arange(w)) % 2)).float()[None, None]


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (14, 14), (16, 16), (8, 6)])
def test_nyquist_checkerboard_is_all_high_frequency(grid: tuple[int, int]) -> None:
    board = checkerboard(*grid).expand(2, 3, -1, -1)
    for dc in (True, False):
        torch.testing.assert_close(hfd_share(board, dc=dc), torch.ones(2, 4, dtype=torch.float64))
    energy = power_spectrum(board)
    assert energy[0, grid[0] // 2, grid[1] // 2] == 3 * (grid[0] * grid[1]) ** 2
    torch.testing.assert_close(power_spectrum(board + 1)[:, 0, 0], energy[:, grid[0] // 2, grid[1] // 2])
    assert hfd_share(board + 1)[0].tolist() == pytest.approx([0.5] * 4)  # as much in DC as in the board
    assert hf_dc_ratio(board + 1)[0].item() == pytest.approx(1)


@pytest.mark.parametrize(("side", "share"), [(19, 0.809), (14, 0.811), (16, 0.809)])
def test_white_noise_has_the_published_share(side: int, share: float) -> None:
    assert round((radius((side, side)) > 0.5 + 1e-9).double().mean().item(), 3) == share
    noise = torch.randn(16, 128, side, side, generator=torch.Generator().manual_seed(side))
    assert hfd_share(noise, (1 / 2,)).mean().item() == pytest.approx(share, abs=2e-3)


def test_one_plane_wave_is_at_its_own_frequency_and_not_at_its_mirror_image() -> None:
    h, w, u, v = 7, 10, 2, 3
    phase = 2 * math.pi * (u * torch.arange(h)[:, None] / h + v * torch.arange(w) / w) + 0.4
    energy = power_spectrum(phase.cos()[None, None])[0]
    expected = torch.zeros(h, w)
    expected[u, v] = expected[-u, -v] = (h * w / 2) ** 2
    torch.testing.assert_close(energy, expected, rtol=1e-5, atol=1e-2)


def test_frequencies_on_a_cutoff_are_low_whatever_their_last_digit() -> None:
    wave = torch.cos(2 * math.pi * 2 * torch.arange(12) / 12).expand(1, 1, 12, 12)  # r = 1/3
    assert hfd_share(wave, (1 / 4, 1 / 3)).tolist() == [pytest.approx([1, 0])]
    torch.testing.assert_close(low_pass(wave, 1 / 3), wave)
    assert low_pass(wave, 0.3).abs().max() < 1e-6


def test_radius_is_1_at_nyquist_and_sqrt_2_in_the_corner() -> None:
    assert radius((4, 6)).tolist()[2][0] == 1
    assert radius((4, 6)).tolist()[0][3] == 1
    assert radius((4, 6)).max().item() == pytest.approx(2**0.5)
    assert radius((5, 5)).max().item() == pytest.approx(0.8 * 2**0.5)


def test_half_diagonal_has_its_true_frequencies() -> None:
    for side, last in ((14, 0.857), (16, 0.875), (19, 0.947)):
        frequencies = diagonal_frequencies((side, side))
        assert frequencies[0] == 0
        assert round(frequencies[-1].item(), 3) == last
        torch.testing.assert_close(frequencies, 2 * torch.arange(len(frequencies), dtype=torch.float64) / side)
    assert diagonal_frequencies((4, 16)).tolist() == pytest.approx([0, math.hypot(1 / 2, 1 / 8) / 2**0.5])
    assert [len(diagonal_frequencies(grid)) for grid in GRIDS] == [1, 1, 1, 2, 3, 2, 3]


def test_log_amplitude_is_relative_to_dc_after_the_mean_over_images() -> None:
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    metric = LogAmplitude(grid=(6, 6))
    metric.update(x)
    per_image = log_amplitude(x)
    torch.testing.assert_close(metric.compute(), (per_image - per_image[:, :1]).mean(dim=0))
    assert metric.compute()[0] == 0


# ------------------------------------------------------------------------------------------------------ filters and band noise


@pytest.mark.parametrize("grid", [(4, 4), (5, 8), (19, 19)])
def test_low_and_high_pass_add_up_to_the_whole(grid: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(2))
    for rho in (0, 0.25, 0.5, 0.9, 1.2):
        low, high = low_pass(x, rho), high_pass(x, rho)
        torch.testing.assert_close(low + high, x)
        torch.testing.assert_close(low_pass(low, rho), low, rtol=1e-5, atol=1e-6)
        outside = power_spectrum(low)[:, radius(grid) > rho + 1e-6]
        inside = power_spectrum(high)[:, radius(grid) < rho]
        assert outside.sum() + inside.sum() < 1e-6 * power_spectrum(x).sum()
    torch.testing.assert_close(low_pass(x, 0), x.mean(dim=(2, 3), keepdim=True).expand_as(x))


def test_filter_that_passes_everything_changes_no_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 3, 7, 6, generator=torch.Generator().manual_seed(3)).to(dtype)
        assert torch.equal(low_pass(x, 2**0.5), x)
        assert high_pass(x, 2**0.5).eq(0).all()
        assert low_pass(x, 0.5).dtype == high_pass(x, 0.5).dtype == dtype


@pytest.mark.parametrize(("centre", "width"), [(0.2, 0.2), (0.6, 0.1), (1.1, 0.3)])
def test_band_noise_stays_in_its_ring_and_has_one_strength_in_all(centre: float, width: float) -> None:
    shape = (30, 3, 24, 20)
    noise = band_noise(shape, centre, width, 0.5, torch.Generator().manual_seed(4), "cpu")
    assert noise.shape == shape
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    outside = (radius((24, 20)) - centre).abs() > width / 2 + 1e-6
    energy = power_spectrum(noise)
    assert energy[:, outside].sum() < 1e-6 * energy.sum()
    assert torch.equal(noise, band_noise(shape, centre, width, 0.5, torch.Generator().manual_seed(4), "cpu"))


def test_band_without_a_frequency_is_refused() -> None:
    with pytest.raises(ValueError, match=r"4x4 has no frequency within 0\.05 of 0\.25"):
        band_noise((1, 4, 4), 0.25, 0.1, 1.0, torch.Generator(), "cpu")


# ---------------------------------------------------------------------------------------------------- batches, ranks, precision

METRICS: list[Callable[[], ImageMean]] = [
    HFDShare,
    lambda: HFDShare(dc=False),
    lambda: LogAmplitude(grid=(5, 7)),
    HFDCRatio,
    FeatureVariance,
]


def images() -> Tensor:
    """Maps (7, 4, 5, 7) of very different size."""
    x = torch.randn(7, 4, 5, 7, generator=torch.Generator().manual_seed(5)) + 0.5
    return x * torch.logspace(-2, 2, 7)[:, None, None, None]


@pytest.mark.parametrize("make", METRICS)
def test_metric_is_the_same_for_any_batches_and_ranks(make: Callable[[], ImageMean]) -> None:
    x = images()
    whole = make()
    whole.update(x)
    for size in (1, 3):
        metric = make()
        for batch in x.split(size):
            metric.update(Spectrum.of_maps(batch))
        torch.testing.assert_close(metric.compute(), whole.compute(), rtol=1e-6, atol=1e-7)
    ranks = [make(), make()]
    ranks[0].update(x[:2])
    ranks[1].update(x[2:])
    ranks[0].merge_state(ranks[1])
    torch.testing.assert_close(ranks[0].compute(), whole.compute(), rtol=1e-6, atol=1e-7)
    assert whole.compute().dtype == torch.float64


def test_metric_goes_on_after_inference_mode() -> None:
    metric = HFDShare()
    with torch.inference_mode():
        metric.update(images())
        metric.reset()
        metric.update(images())
    metric.update(images())
    torch.testing.assert_close(metric.compute(), hfd_share(images()).mean(dim=0))


def attention() -> Tensor:
    return torch.randn(7, 3, 36, 36, generator=torch.Generator().manual_seed(6)).softmax(dim=-1)


def figures(index: Tensor) -> dict[str, Tensor]:
    """All figures of the images with these indices, over all ranks."""
    share, heads = HFDShare(), HeadStatistics(3, (5, 7), (2.0, 3.0))
    share.update(images()[index])
    heads.update(attention()[index])
    return {"share": share.compute(), **heads.compute()}


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(figures(torch.arange(7)[rank::2]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_figures_of_one(tmp_path: Path) -> None:
    mp.spawn(one_rank, args=(str(tmp_path),), nprocs=2)
    expected = figures(torch.arange(7))
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
def test_gpu_gives_the_figures_of_the_cpu() -> None:
    share, amplitude, heads = HFDShare(), LogAmplitude(grid=(5, 7)), HeadStatistics(3, (5, 7), (2.0, 3.0))
    on_gpu = [metric.clone().cuda() for metric in (share, amplitude, heads)]
    for device, metrics in (("cpu", (share, amplitude, heads)), ("cuda", on_gpu)):
        spectrum = Spectrum.of_maps(images().to(device))
        metrics[0].update(spectrum)
        metrics[1].update(spectrum)
        metrics[2].update(attention().to(device))
    for here, there in zip((share, amplitude, heads), on_gpu, strict=True):
        torch.testing.assert_close(there.compute(), here.compute(), rtol=1e-4, atol=1e-5, check_device=False)
    noise = [
        band_noise((3, 8, 8), 0.5, 0.3, 1.0, torch.Generator().manual_seed(0), device) for device in ("cpu", "cuda")
    ]
    assert torch.equal(noise[1].cpu(), noise[0])


def test_map_that_is_not_finite_has_no_figures_rather_than_those_of_a_constant() -> None:
    x = torch.randn(2, 3, 4, 4)
    x[1, 0, 2, 2] = torch.nan
    for figure in (hfd_share(x), hfd_share(x, dc=False), log_amplitude(x), hf_dc_ratio(x), feature_variance(x)):
        assert figure[0].isfinite().all()
        assert figure[1].isnan().all()
