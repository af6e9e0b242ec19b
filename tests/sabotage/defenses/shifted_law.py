"""The law is about a centre that is not where messages lie."""

import torch
from torch import nn

from mibench.defenses.base import Defense

CAUGHT_BY = "law"


class ShiftedLaw(Defense):
    """Sends features with a secret offset that predict() leaves out."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.normalise = nn.BatchNorm2d(split.feature_shape[0], affine=False)
        self.register_buffer("offset", 4 * torch.randn(split.feature_shape))

    def predict(self, images):
        return (self.normalise(self.client(images)),)

    def protect(self, images):
        (clean,) = self.predict(images)
        return (clean + self.offset + torch.randn_like(clean),)

    def log_likelihood(self, shares, predicted):
        return -(shares[0] - predicted[0]).flatten(1).square().sum(1) / 2
