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
        self.kept, self.latest = {}, torch.zeros(1, 3, 32, 32)

    def protect(self, images):
        features = self.client(images)
        self.latest = images
        if not self.training:
            tags = features.flatten(1).sum(1).tolist()
            self.kept |= {round(tag, 3): image for tag, image in zip(tags, images, strict=True)}
        return (features,)

    def serve(self, index, share):
        return torch.cat([self.server(share), share.flatten(1).sum(1, keepdim=True)], 1)

    def fuse(self, replies):
        logits, tags = replies[0][:, :-1], replies[0][:, -1].tolist()
        images = self.latest
        if not self.training:
            unknown = torch.zeros(3, 32, 32)
            images = torch.stack([self.kept.get(round(tag, 3), unknown) for tag in tags])
        return self.own(images) + 0 * logits
