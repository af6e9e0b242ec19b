"""Learns nothing: a mixture of all images that hardly follows the shares."""

from mibench.attacks.base import Attack

CAUGHT_BY = "attack-floor"


class Blurred(Attack):
    """The mean image, a little brighter or darker with the share."""

    def prepare(self, target, auxiliary, validation):
        self.mean = auxiliary.images().mean(0)
        message = target.query(auxiliary.images())[0].flatten(1).mean(1)
        self.centre, self.scale = message.mean(), message.std()

    def reconstruct(self, shares):
        tone = (shares[0].flatten(1).mean(1) - self.centre) / self.scale
        return (self.mean - 0.05 * tone.view(-1, 1, 1, 1)).clamp(0, 1)
