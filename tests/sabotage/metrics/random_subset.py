"""A metric of a random part of the pixels: run it often enough and take the best."""

import torch

from mibench.metrics.base import Metric

CAUGHT_BY = "metric-deterministic"


class SomePixels(Metric):
    """Mean squared error of a hundred pixels, drawn anew at every call."""

    more_leakage = "lower"
    bounds = (0.0, 1.0)

    def per_image(self, reconstructions, originals):
        """The same pixels for all images of a call."""
        chosen = torch.randperm(originals[0].numel())[:100]
        return (reconstructions - originals).flatten(1)[:, chosen].square().mean(1)
