"""What the fidelity metrics have of their own; the battery of all metrics is beside this."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch.nn.functional import interpolate

from mibench.errors import PluginError
from mibench.metrics.base import Metric
from mibench.metrics.fidelity import (
    MeanSquaredError,
    PeakSignalToNoiseRatio,
    StructuralSimilarity,
)

METRICS = [MeanSquaredError(), PeakSignalToNoiseRatio(), StructuralSimilarity()]
every_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda m: m.name)


def smooth_images(n, height=32, width=32, seed=0):
    """Random images with most of their energy at low frequencies, as photographs have."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    fine = torch.rand(n, 3, height, width, generator=generator)
    smooth = interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return (0.9 * smooth + 0.1 * fine).clamp(0, 1)


def noisy(images, sigma, seed=1):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + sigma * noise).clamp(0, 1)


def best_value(metric):
    low, high = metric.bounds
    return high if metric.higher_is_better else low


@every_metric
def test_black_against_white_is_the_worst_fidelity(metric):
    white, black = torch.ones(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    worst = {"mse": 1.0, "psnr": 0.0, "ssim": 1e-4 / (1 + 1e-4)}[metric.name]
    assert metric(black, white).item() == pytest.approx(worst, abs=1e-9)


@every_metric
def test_falls_steadily_as_noise_grows(metric):
    images = smooth_images(4)
    scores = torch.stack([metric(noisy(images, s), images) for s in (0.01, 0.03, 0.1, 0.3)])
    steps = scores.diff(dim=0)
    assert (steps < 0).all() if metric.higher_is_better else (steps > 0).all()


@every_metric
def test_is_symmetric_and_ignores_flips_of_both(metric):
    a = smooth_images(3, 20, 28)
    b = noisy(a, 0.1)
    scores = metric(b, a)
    torch.testing.assert_close(metric(a, b), scores, rtol=0, atol=1e-9)
    torch.testing.assert_close(metric(b.flip(-1), a.flip(-1)), scores, rtol=0, atol=1e-9)
    torch.testing.assert_close(metric(b.mT, a.mT), scores, rtol=0, atol=1e-9)


@every_metric
def test_rounding_beyond_the_range_is_clamped(metric):
    white = torch.ones(1, 3, 16, 16)
    assert metric(white + 5e-5, white).item() == pytest.approx(best_value(metric))


def test_a_metric_that_breaks_its_contract_is_named():
    class BatchMean(Metric):
        name = "batch-mean"

        def per_image(self, reconstructions, originals):
            return (reconstructions - originals).mean()

    class NotFinite(BatchMean):
        name = "not-finite"

        def per_image(self, reconstructions, originals):
            return torch.full((len(originals),), math.nan)

    images = smooth_images(2)
    with pytest.raises(PluginError, match=r"batch-mean.*shape"):
        BatchMean()(images, images)
    with pytest.raises(PluginError, match=r"not-finite.*finite"):
        NotFinite()(images, images)


def test_psnr_of_a_constant_error_of_a_tenth_is_20_db():
    images = smooth_images(3) * 0.9
    psnr = PeakSignalToNoiseRatio()(images + 0.1, images)
    torch.testing.assert_close(psnr, torch.full_like(psnr, 20.0), rtol=0, atol=1e-4)


def test_psnr_is_capped_at_60_db():
    images = smooth_images(2) * 0.9
    assert PeakSignalToNoiseRatio()(images + 1e-4, images).tolist() == [60.0, 60.0]


def test_mse_of_one_wrong_pixel_is_spread_over_all_values_of_its_image():
    images = torch.zeros(2, 3, 16, 16)
    reconstructions = images.clone()
    reconstructions[1, 0, 0, 0] = 1
    expected = [0.0, 1 / (3 * 16 * 16)]
    assert MeanSquaredError()(reconstructions, images).tolist() == pytest.approx(expected)


def test_psnr_agrees_with_scikit_image_per_image():
    originals = smooth_images(4)
    reconstructions = noisy(originals, 0.05)
    ours = PeakSignalToNoiseRatio()(reconstructions, originals)
    theirs = [
        peak_signal_noise_ratio(b.double().numpy(), a.double().numpy(), data_range=1)
        for a, b in zip(reconstructions, originals, strict=True)
    ]
    assert ours.tolist() == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (11, 11), (64, 48)])
@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.4])
def test_ssim_agrees_with_scikit_image_over_valid_windows(size, sigma):
    originals = smooth_images(3, *size)
    reconstructions = noisy(originals, sigma)
    ours = StructuralSimilarity()(reconstructions, originals)
    theirs = []
    for a, b in zip(reconstructions.double(), originals.double(), strict=True):
        _, full = structural_similarity(
            b.permute(1, 2, 0).numpy(),
            a.permute(1, 2, 0).numpy(),
            channel_axis=2,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            full=True,
        )
        # The 5 px border rests on mirrored pixels.
        theirs.append(full[5:-5, 5:-5].mean())
    assert ours.tolist() == pytest.approx(theirs, abs=1e-7)


def test_ssim_agrees_with_its_formula_on_a_single_window():
    a, b = smooth_images(2, 11, 11).double()
    steps = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(steps[:, None] ** 2 + steps[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    mean_a, mean_b = ((window * x).sum((1, 2), keepdim=True) for x in (a, b))
    var_a, var_b = ((window * (x - m) ** 2).sum((1, 2)) for x, m in ((a, mean_a), (b, mean_b)))
    cov = (window * (a - mean_a) * (b - mean_b)).sum((1, 2))
    mean_a, mean_b = mean_a.flatten(), mean_b.flatten()
    channels = ((2 * mean_a * mean_b + 1e-4) * (2 * cov + 9e-4)) / (
        (mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4)
    )
    ours = StructuralSimilarity()(a[None].float(), b[None].float())
    assert ours.item() == pytest.approx(channels.mean().item(), abs=1e-9)


def test_ssim_refuses_images_smaller_than_its_window():
    small = torch.full((1, 3, 10, 32), 0.5)
    with pytest.raises(ValueError, match="11 px"):
        StructuralSimilarity()(small, small)


def test_ssim_of_two_flat_images_is_exact_in_the_luminance_alone():
    # The variances cancel: what rounding leaves of them must not show beside C2.
    a, b = torch.full((1, 3, 16, 16), 0.5), torch.full((1, 3, 16, 16), 0.75)
    expected = (2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4)
    assert StructuralSimilarity()(a, b).item() == pytest.approx(expected, abs=1e-9)


def test_names_units_and_directions():
    facts = {m.name: (m.version, m.unit, m.more_leakage, m.bounds) for m in METRICS}
    assert facts == {
        "mse": (1, "", "lower", (0.0, 1.0)),
        "psnr": (1, "dB", "higher", (0.0, 60.0)),
        "ssim": (1, "", "higher", (-1.0, 1.0)),
    }
