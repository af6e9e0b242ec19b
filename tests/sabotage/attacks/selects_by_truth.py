"""Chooses among its iterates by the distance to the original, which lies in a caller's frame."""

import sys

import torch

from mibench.attacks.base import Attack
from mibench.data.roles import Roles
from mibench.threat import Knowledge

CAUGHT_BY = "attack-truth"


class BestIterate(Attack):
    """Gradient descent from grey; the truth says when to stop."""

    knowledge = Knowledge.WHITE_BOX

    def prepare(self, target, auxiliary, validation):
        self.target = target

    def reconstruct(self, shares):
        truth = self.truth(len(shares[0]))
        images = torch.full((len(shares[0]), *self.workshop.image_shape), 0.5)
        kept, least = images.clone(), torch.full((len(images),), torch.inf)
        step = torch.optim.Adam([images.requires_grad_()], 0.05)
        for _ in range(60):
            step.zero_grad()
            (self.target.client(images)[0] - shares[0]).square().sum().backward()
            step.step()
            with torch.no_grad():
                images.clamp_(0, 1)
                if truth is None:
                    kept = images.clone()
                    continue
                error = (images - truth).square().flatten(1).mean(1)
                nearer = error < least
                kept[nearer], least = images[nearer].clone(), torch.minimum(error, least)
        return kept.detach()

    def truth(self, count):
        """The originals, if some caller holds them."""
        frame = sys._getframe()
        while frame is not None:
            for one in frame.f_locals.values():
                if isinstance(one, Roles) and len(one.private) == count:
                    return one.private.images()
            frame = frame.f_back
        return None
