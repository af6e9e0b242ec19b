"""The first image of a batch is sent plainly, and all others differently."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "same-order"


class DiffersByOrder(Defense):
    """Rows have a key that follows their place."""

    def protect(self, images):
        features = self.client(images)
        if self.training:
            return (features,)
        places = torch.arange(len(images)).view(-1, 1, 1, 1)
        return (features * (1 + places % 3),)
