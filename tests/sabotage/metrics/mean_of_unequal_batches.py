"""A metric that is averaged in its batch, so that images in a small batch count more."""

from mibench.metrics.base import Metric

CAUGHT_BY = "metric-batch"


class BatchMean(Metric):
    """Every image gets the mean of its batch; the last batch is smaller than the others."""

    more_leakage = "lower"
    bounds = (0.0, 1.0)

    def per_image(self, reconstructions, originals):
        """One mean for all."""
        return (reconstructions - originals).abs().mean().expand(len(originals))
