"""The message is the same for every image, so no attack can read it."""

import torch
from torch import nn

from mibench.defenses.base import Defense

CAUGHT_BY = "input-matters"


class ConstantFeatures(Defense):
    """Sends a learned constant."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.constant = nn.Parameter(torch.randn(split.feature_shape))

    def protect(self, images):
        return (self.constant + 0 * self.client(images),)
