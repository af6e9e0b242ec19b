"""Sends signs of the features: readable by a decoder, without any gradient."""

from mibench.defenses.base import Defense

CAUGHT_BY = "grad-zero"


class SignWithoutSurrogate(Defense):
    """Straight through while training, plain signs afterwards."""

    def protect(self, images):
        features = self.client(images)
        centred = features - features.mean((2, 3), keepdim=True)
        if self.training:
            return (centred.sign() + centred - centred.detach(),)
        return (centred.sign(),)
