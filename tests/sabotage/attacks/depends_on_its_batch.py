"""Compares each share with the mean of its batch, so that an image depends on its neighbours."""

import torch

from mibench.attacks.base import Attack

CAUGHT_BY = "attack-batch"


class Neighbours(Attack):
    """A look-up of what is left when the batch's mean is taken away."""

    def prepare(self, target, auxiliary, validation):
        self.images = auxiliary.images()
        message = target.query(self.images)[0].flatten(1)
        self.messages = message - message.mean(0)

    def reconstruct(self, shares):
        share = shares[0].flatten(1)
        return self.images[torch.cdist(share - share.mean(0), self.messages).argmin(1)]
