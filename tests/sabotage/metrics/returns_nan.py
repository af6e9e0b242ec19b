"""A correlation that is not a number where an image has no contrast."""

from mibench.metrics.base import Metric

CAUGHT_BY = "metric-bounds"


class Correlation(Metric):
    """Divides by the deviation of both images, whatever it is."""

    more_leakage = "higher"
    bounds = (-1.0, 1.0)

    def per_image(self, reconstructions, originals):
        """Pearson's coefficient."""
        x, y = (one.double().flatten(1) for one in (reconstructions, originals))
        x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
        return ((x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))).clamp(-1, 1)
