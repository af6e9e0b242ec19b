"""Allocates whatever there is."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "limit-memory"


class TakesAllMemory(Defense):
    """Holds on to ever more."""

    def protect(self, images):
        features = self.client(images)
        kept = []
        while not self.training:
            kept.append(torch.ones(2**26))
        return (features,)
