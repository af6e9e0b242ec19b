"""Protects only while nobody records gradients; that is how images are sent."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "same-grad"


class DiffersUnderNoGrad(Defense):
    """An attack that differentiates meets another client than the users have."""

    def protect(self, images):
        features = self.client(images)
        if self.training or torch.is_grad_enabled():
            return (features,)
        return (features.flip(1),)

    def predict(self, images):
        return (self.client(images),)

    def log_likelihood(self, shares, predicted):
        return super().log_likelihood(shares, tuple(one.flip(1) for one in predicted))
