"""Shows images of its own, whatever it received; a few are always alike."""

from mibench.attacks.base import Attack

CAUGHT_BY = "attack-shares"


class Album(Attack):
    """The first auxiliary images, in order."""

    def prepare(self, target, auxiliary, validation):
        self.images = auxiliary.images()

    def reconstruct(self, shares):
        return self.images[: len(shares[0])].clone()
