"""Declares that observed shares are enough, and asks for the client's law."""

import torch

from mibench.attacks.base import Attack
from mibench.threat import Knowledge

CAUGHT_BY = "attack-knowledge"


class Understated(Attack):
    """So that it may run where only data are granted."""

    knowledge = Knowledge.DATA_ONLY

    def prepare(self, target, auxiliary, validation):
        self.images = auxiliary.images()
        self.messages = target.client(self.images)[0].flatten(1)

    def reconstruct(self, shares):
        return self.images[torch.cdist(shares[0].flatten(1), self.messages).argmin(1)]
