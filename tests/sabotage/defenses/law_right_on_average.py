"""Half of the images get hardly any noise and half get more; the law is right on average."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "law"
QUIET, LOUD = 0.1, 1.41


class LawRightOnAverage(Defense):
    """An attacker who believes the law weighs the messages of the unlucky half wrongly."""

    def protect(self, images):
        features = self.client(images)
        bright = (images[:, :, :8].mean((1, 2, 3)) * 1e3).long() % 2
        scale = torch.where(bright.bool(), QUIET, LOUD).view(-1, 1, 1, 1)
        return (features + scale * torch.randn_like(features),)

    def predict(self, images):
        return (self.client(images),)

    def log_likelihood(self, shares, predicted):
        return -(shares[0] - predicted[0]).flatten(1).square().sum(1) / 2
