"""Hands out values beyond [0, 1], which a lenient metric would reward or clamp."""

import torch

from mibench.attacks.base import Attack

CAUGHT_BY = "attack-output"


class Bright(Attack):
    """A look-up with more contrast than images have."""

    def prepare(self, target, auxiliary, validation):
        self.images = auxiliary.images()
        self.messages = target.query(self.images)[0].flatten(1)

    def reconstruct(self, shares):
        nearest = torch.cdist(shares[0].flatten(1), self.messages).argmin(1)
        return (self.images[nearest] - 0.5) * 2 + 0.5
