"""Declares black-box knowledge and descends through the client's weights all the same."""

import torch

from mibench.attacks.base import Attack
from mibench.threat import Knowledge

CAUGHT_BY = "attack-knowledge"


class Burglar(Attack):
    """Gradient descent through a client that it was only allowed to query."""

    knowledge = Knowledge.BLACK_BOX

    def prepare(self, target, auxiliary, validation):
        self.client = target._Target__defense.client

    def reconstruct(self, shares):
        images = torch.full((len(shares[0]), *self.workshop.image_shape), 0.5)
        step = torch.optim.Adam([images.requires_grad_()], 0.05)
        for _ in range(40):
            step.zero_grad()
            (self.client(images) - shares[0]).square().sum().backward()
            step.step()
            with torch.no_grad():
                images.clamp_(0, 1)
        return images.detach()
