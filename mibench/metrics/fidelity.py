"""Pixel-wise fidelity: MSE, PSNR and SSIM, each per image."""

from math import exp
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mibench.metrics.base import Metric
from mibench.registry import metrics

_PSNR_CAP = 60.0
_WINDOW = 11
_SIGMA = 1.5
_C1 = 0.01**2
_C2 = 0.03**2


def _double(images: Tensor) -> Tensor:
    """Images in float64, on the CPU where their device has none."""
    return (images.cpu() if images.device.type == "mps" else images).double()


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return (_double(a) - _double(b)).square().flatten(1).mean(1)


@metrics.register("mse", version=1)
class MeanSquaredError(Metric):
    """Mean squared error of one image, over its C*H*W values.

    Formula: ``mean((x_hat - x)^2)``. Range [0, 1] for images in [0, 1]; 0 is a perfect copy, so a
    lower value means more leakage. Input (N, 3, H, W), output (N,).
    """

    unit: ClassVar[str] = ""
    more_leakage: ClassVar[Literal["higher", "lower"]] = "lower"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def per_image(self, reconstructions: Tensor, originals: Tensor) -> Tensor:
        """Mean squared error of each image, (n,)."""
        return _mse(reconstructions, originals)


@metrics.register("psnr", version=1)
class PeakSignalToNoiseRatio(Metric):
    """Peak signal-to-noise ratio of one image in dB, capped.

    Formula: ``min(60, 10 log10(1 / MSE))`` with the peak at 1 and the MSE of that one image. Range
    [0, 60] dB; the cap keeps a perfect copy finite, and 60 dB is below what 8 bits can show. A
    higher value means more leakage. Input (N, 3, H, W), output (N,).
    """

    unit: ClassVar[str] = "dB"
    more_leakage: ClassVar[Literal["higher", "lower"]] = "higher"
    bounds: ClassVar[tuple[float, float]] = (0.0, _PSNR_CAP)

    def per_image(self, reconstructions: Tensor, originals: Tensor) -> Tensor:
        """Capped PSNR of each image in dB, (n,)."""
        smallest = 10 ** (-_PSNR_CAP / 10)
        return -10 * _mse(reconstructions, originals).clamp(min=smallest).log10()


@metrics.register("ssim", version=1)
class StructuralSimilarity(Metric):
    """Structural similarity of one image, as its authors defined it.

    Source: Wang, Bovik, Sheikh and Simoncelli, "Image quality assessment: from error visibility to
    structural similarity", IEEE Transactions on Image Processing 13(4), 2004.

    Formula, with local Gaussian-weighted means m, variances v and covariance c:
    ``(2 m_x m_y + C1)(2 c + C2) / ((m_x^2 + m_y^2 + C1)(v_x + v_y + C2))``, where
    ``C1 = 0.01^2`` and ``C2 = 0.03^2`` (data range 1). The window is 11x11 with sigma 1.5, and only
    windows that lie wholly inside the image count: padding the border changes the value by as much
    as 0.1 on small images. The map is averaged over positions, then over the colour channels.

    Range [-1, 1]; 1 is a perfect copy, so a higher value means more leakage. Input (N, 3, H, W)
    with H and W of at least 11, output (N,).
    """

    unit: ClassVar[str] = ""
    more_leakage: ClassVar[Literal["higher", "lower"]] = "higher"
    bounds: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    chunk: ClassVar[int] = 16

    def per_image(self, reconstructions: Tensor, originals: Tensor) -> Tensor:
        """SSIM of each image, (n,).

        Raises:
            ValueError: If the images are smaller than the 11 px window.
        """
        height, width = originals.shape[-2:]
        if min(height, width) < _WINDOW:
            raise ValueError(
                f"ssim: images must be at least {_WINDOW} px high and wide, got {height}x{width}"
            )
        # float64, since E[x^2] - E[x]^2 cancels: float32 would show beside C2 in flat regions.
        x, y = _double(reconstructions), _double(originals)
        blurred = _blur(torch.stack([x, y, x * x, y * y, x * y]))
        mean_x, mean_y, square_x, square_y, product = blurred.unbind()
        variances = square_x - mean_x.square() + square_y - mean_y.square()
        covariance = product - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + _C1) / (mean_x.square() + mean_y.square() + _C1)
        structure = (2 * covariance + _C2) / (variances + _C2)
        # All channels have equally many windows: one mean equals the mean of the channels' means.
        # Rounding can lift a perfect copy above 1 by an ulp.
        return (luminance * structure).flatten(1).mean(1).clamp(-1, 1)


def _blur(maps: Tensor) -> Tensor:
    """Filter the last two axes with the Gaussian window, valid positions only.

    The window is separable, and each of its two passes is a product with a banded matrix: on a CPU
    that is several times faster than a convolution with one channel.
    """
    height, width = maps.shape[-2:]
    return _band(height, maps) @ (maps @ _band(width, maps).T)


def _band(size: int, like: Tensor) -> Tensor:
    """Matrix (size - 10, size) whose row i holds the normalised window from column i on."""
    weights = [exp(-((i - _WINDOW // 2) ** 2) / (2 * _SIGMA**2)) for i in range(_WINDOW)]
    band = torch.zeros(size - _WINDOW + 1, size, dtype=like.dtype, device=like.device)
    for offset, weight in enumerate(weights):
        band.diagonal(offset).fill_(weight / sum(weights))
    return band
