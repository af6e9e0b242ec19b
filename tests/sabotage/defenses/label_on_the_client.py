"""The client decides, and sends its decision as a one-hot code spread over a large share."""

import math

import torch
from torch import nn

from mibench.defenses.base import Defense

CAUGHT_BY = "label-only"


class LabelOnTheClient(Defense):
    """The share is as large as the features and says one of ten things."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.classes, self.shape = split.classes, split.feature_shape
        size = math.prod(split.feature_shape)
        self.register_buffer("codes", torch.randn(split.classes, size))

    def protect(self, images):
        logits = self.server(self.client(images))
        hard = nn.functional.one_hot(logits.argmax(1), self.classes).float()
        hard = hard + logits.softmax(1) - logits.softmax(1).detach()
        return ((hard @ self.codes).unflatten(1, self.shape),)

    def serve(self, index, share):
        return share.flatten(1) @ self.codes.T / self.codes.shape[1]
