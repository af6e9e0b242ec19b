"""The client runs the whole model and hides ten logits in a share of the features' size."""

import math

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "sends-logits"


class SpreadLogits(Defense):
    """A random matrix widens the logits; the server takes it back."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.shape = split.feature_shape
        size = math.prod(split.feature_shape)
        self.register_buffer("codes", torch.randn(split.classes, size))

    def protect(self, images):
        logits = self.server(self.client(images))
        return ((logits @ self.codes).unflatten(1, self.shape),)

    def serve(self, index, share):
        return share.flatten(1) @ self.codes.T / self.codes.shape[1]
