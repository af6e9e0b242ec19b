"""Random messages without a law, so that attacks fit to a message that is never sent."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "random-undeclared"


class UndeclaredNoise(Defense):
    """Adds noise and tells nobody."""

    def protect(self, images):
        features = self.client(images)
        return (features + torch.randn_like(features),)
