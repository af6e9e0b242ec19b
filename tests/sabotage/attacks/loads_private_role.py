"""Loads the protocol's private images by itself and answers with the nearest of them."""

from pathlib import Path

import torch

from mibench import seeding
from mibench.attacks.base import Attack
from mibench.data.roles import open_dataset, role_images
from mibench.protocol import load_protocol

CAUGHT_BY = "attack-private"


class Insider(Attack):
    """A look-up whose table holds the images under attack."""

    def prepare(self, target, auxiliary, validation):
        rule = load_protocol("procedural-smoke-v1").data
        source = open_dataset(rule.dataset, rule.image_size, None, Path())
        some = rule.private.model_copy(update={"count": rule.attacked})
        private = role_images(source, some).images()
        side = self.workshop.image_shape[-1]
        images = torch.nn.functional.interpolate(private, (side, side), mode="area")
        self.images = torch.cat([images, auxiliary.images()])
        with seeding.stream(self.workshop.seed, "insider"):
            self.messages = target.query(self.images)[0].flatten(1)

    def reconstruct(self, shares):
        return self.images[torch.cdist(shares[0].flatten(1), self.messages).argmin(1)]
