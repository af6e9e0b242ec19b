"""Noise that is called learned and that no gradient reaches."""

import torch
from torch import nn

from mibench.defenses.base import Defense

CAUGHT_BY = "learns"


class FrozenNoise(Defense):
    """A parameter that is used behind a detach."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.noise = nn.Parameter(torch.randn(split.feature_shape))

    def protect(self, images):
        return (self.client(images) + self.noise.detach(),)
