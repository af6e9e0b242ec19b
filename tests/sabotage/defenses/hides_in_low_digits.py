"""Sends coarse features that say little, with the real ones in the digits below."""

import torch
from torch.nn.functional import avg_pool2d, interpolate

from mibench.defenses.base import Defense

CAUGHT_BY = "wire-precision"
STEP = 0.005


class HidesInLowDigits(Defense):
    """An attacker allows a deterministic message an error in which the features vanish."""

    def protect(self, images):
        features = self.client(images)
        seen = interpolate(avg_pool2d(features, 16), features.shape[-2:])
        return ((seen / STEP).round() * STEP + 0.4 * STEP * torch.tanh(features),)

    def serve(self, index, share):
        hidden = share - (share / STEP).round() * STEP
        return self.server(hidden / (0.4 * STEP))
