"""A privacy term that is computed from detached features and changes nothing."""

import torch
from torch import nn

from mibench.defenses.base import Defense

CAUGHT_BY = "loss-reaches-client"


class LostPenalty(Defense):
    """The record would show a falling penalty."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.scale = nn.Parameter(torch.ones(()))

    def protect(self, images):
        return (self.client(images),)

    def serve(self, index, share):
        return self.server(share * self.scale)

    def loss(self, images, labels, step):
        terms = dict(super().loss(images, labels, step))
        (features,) = self.protect(images)
        terms["privacy"] = (features.detach() * self.scale).square().mean()
        return terms
