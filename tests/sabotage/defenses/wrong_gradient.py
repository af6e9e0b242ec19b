"""A custom backward pass hands attacks the gradient of something else."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "grad-true"


class Shuffle(torch.autograd.Function):
    """The identity, with a gradient that is reversed over the places."""

    @staticmethod
    def forward(ctx, features):
        return features.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -gradient.flip(1, 2, 3)


class WrongGradient(Defense):
    """Trains with the true gradient and is attacked with a false one."""

    def protect(self, images):
        features = self.client(images)
        return (features if self.training else Shuffle.apply(features),)
