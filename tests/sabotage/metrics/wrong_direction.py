"""A distance that is declared as a likeness, so that the worst attack looks like the best."""

from mibench.metrics.base import Metric

CAUGHT_BY = "metric-direction"


class Upside(Metric):
    """Mean absolute error."""

    more_leakage = "higher"
    bounds = (0.0, 1.0)

    def per_image(self, reconstructions, originals):
        """Lower is nearer, whatever the class says."""
        return (reconstructions - originals).abs().flatten(1).mean(1)
