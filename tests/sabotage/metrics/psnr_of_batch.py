"""The PSNR of the mean error of a batch, which is not the mean of the images' PSNR."""

from mibench.metrics.base import Metric

CAUGHT_BY = "metric-batch"


class BatchPsnr(Metric):
    """As in codes that call a library with the whole batch."""

    unit = "dB"
    more_leakage = "higher"
    bounds = (0.0, 60.0)

    def per_image(self, reconstructions, originals):
        """10 log10(1 / MSE) with the MSE of all images."""
        error = (reconstructions - originals).double().square().mean().clamp_min(1e-6)
        return -10 * error.log10().expand(len(originals))
