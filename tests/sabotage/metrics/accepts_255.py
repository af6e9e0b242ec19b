"""A metric that takes images from 0 to 255, and whatever else it is given."""

from mibench.metrics.base import Metric

CAUGHT_BY = "metric-range"


class Lenient(Metric):
    """Replaces the call that checks the input."""

    more_leakage = "lower"
    bounds = (0.0, 1.0)

    def __call__(self, reconstructions, originals):
        """Scales what looks like bytes, in silence."""
        if reconstructions.max() > 1.5:
            reconstructions = reconstructions / 255
        return self.per_image(reconstructions, originals)

    def per_image(self, reconstructions, originals):
        """Mean squared error."""
        error = (reconstructions - originals).double().square()
        return error.flatten(1).mean(1).clamp(0, 1)
