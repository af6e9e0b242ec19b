"""Activations are so steep that the few gradients left lead nowhere."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "grad-masked"


class NearlySaturated(Defense):
    """tanh of ten thousand times the features about their mean."""

    def protect(self, images):
        features = self.client(images)
        centred = features - features.mean((2, 3), keepdim=True)
        return (torch.tanh(1e4 * centred),)
