"""A PSNR whose peak is 255, on images in [0, 1]: 48 dB too much for every image."""

from mibench.metrics.base import Metric

CAUGHT_BY = "metric-reference"


class Peak255(Metric):
    """As in codes that copy 255 from somewhere."""

    unit = "dB"
    more_leakage = "higher"
    bounds = (0.0, 120.0)

    def per_image(self, reconstructions, originals):
        """10 log10(255^2 / MSE), capped."""
        error = (reconstructions - originals).double().square().flatten(1).mean(1)
        return 10 * (255**2 / error.clamp_min(1e-7)).log10().clamp(max=12)
