"""SSIM whose windows reach over the batch axis: each image is compared with its neighbours too."""

import torch
from torch.nn.functional import avg_pool3d

from mibench.metrics.base import Metric

CAUGHT_BY = "metric-batch"


class BatchWindow(Metric):
    """As in codes that hand a batch to a function for volumes."""

    more_leakage = "higher"
    bounds = (-1.0, 1.0)

    def per_image(self, reconstructions, originals):
        """Windows of 3 images and 7 x 7 pixels."""
        x, y = (one.double().transpose(0, 1) for one in (reconstructions, originals))

        depth = min(3, len(originals))

        def mean(maps):
            return avg_pool3d(maps, (depth, 7, 7), stride=1)

        mx, my = mean(x), mean(y)
        vx, vy, both = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        value = (2 * mx * my + 1e-4) * (2 * both + 9e-4)
        value = value / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
        value = value.transpose(0, 1).flatten(1).mean(1).clamp(-1, 1)
        return torch.cat([value, value[-1:].expand(len(originals) - len(value))])
