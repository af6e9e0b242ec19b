"""Answers queries of attacks with other messages than the users', by the active seed."""

import torch

from mibench import seeding
from mibench.defenses.base import Defense

CAUGHT_BY = "seed-blind"
KNOWN = {seeding.derive(seed, name) for seed in range(4) for name in ("prepare", "linear queries")}


class SeesTheAdversarysSeed(Defense):
    """Knows the streams in which attacks query."""

    def protect(self, images):
        features = self.client(images)
        return (features.flip(1) if torch.initial_seed() in KNOWN else features,)
