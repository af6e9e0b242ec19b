"""A custom backward pass drowns the gradient in noise; a decoder reads everything."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "grad-masked"


class Drown(torch.autograd.Function):
    """The identity, with a random gradient."""

    @staticmethod
    def forward(ctx, features):
        return features.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.randn_like(gradient) * gradient.abs().mean()


class NoisyGradient(Defense):
    """Trains with the true gradient and is attacked with a random one."""

    def protect(self, images):
        features = self.client(images)
        return (features if self.training else Drown.apply(features),)
