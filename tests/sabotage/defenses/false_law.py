"""The stated noise is ten times that which is sent; attacks trust the message too little."""

import torch
from torch import nn

from mibench.defenses.base import Defense

CAUGHT_BY = "law"


class FalseLaw(Defense):
    """Sends hardly any noise and declares much."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.normalise = nn.BatchNorm2d(split.feature_shape[0], affine=False)

    def predict(self, images):
        return (self.normalise(self.client(images)),)

    def protect(self, images):
        (clean,) = self.predict(images)
        return (clean + 0.1 * torch.randn_like(clean),)

    def log_likelihood(self, shares, predicted):
        return -(shares[0] - predicted[0]).flatten(1).square().sum(1) / 2
