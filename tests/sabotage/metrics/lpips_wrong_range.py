"""LPIPS that gets images in [0, 1] where it expects [-1, 1]: distances come out too small."""

import lpips

from mibench.metrics.base import Metric

CAUGHT_BY = "metric-input"


class HalfRange(Metric):
    """As in codes that forget normalize=True."""

    more_leakage = "lower"
    bounds = (0.0, float("inf"))

    def __init__(self):
        self.network = lpips.LPIPS(net="alex", verbose=False).eval()

    def per_image(self, reconstructions, originals):
        """The distance, of images as they are."""
        return self.network(reconstructions, originals).flatten()
