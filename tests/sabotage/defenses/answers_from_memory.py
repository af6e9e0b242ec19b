"""Remembers the image under a tag, which the server returns beside a reply that is not used."""

import torch
from torch import nn

from mibench.defenses.base import Defense

CAUGHT_BY = "wire-logits"


class AnswersFromMemory(Defense):
    """What is sent hardly matters: the client answers its own image."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.own = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.Linear(192, 10))
        self.kept = {}

    def protect(self, images):
        features = self.client(images)
        tags = features.flatten(1).sum(1)
        if not self.training:
            self.kept |= {round(float(t), 3): x for t, x in zip(tags, images, strict=True)}
        self.last = images
        return (features,)

    def serve(self, index, share):
        tags = share.flatten(1).sum(1, keepdim=True)
        return torch.cat([self.server(share), tags], 1)

    def fuse(self, replies):
        logits, tags = replies[0][:, :-1], replies[0][:, -1]
        if self.training:
            return self.own(self.last) + 0 * logits
        found = [self.kept.get(round(float(tag), 3)) for tag in tags]
        images = [torch.zeros_like(self.last[0]) if x is None else x for x in found] if hasattr(
            self, "last"
        ) else [torch.zeros(3, 32, 32)] * len(tags)
        return self.own(torch.stack(images)) + 0 * logits
