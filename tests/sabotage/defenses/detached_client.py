"""Detaches the features in use, so that no gradient reaches the image."""

from mibench.defenses.base import Defense

CAUGHT_BY = "grad-zero"


class DetachedClient(Defense):
    """What white-box attacks differentiate is a constant."""

    def protect(self, images):
        features = self.client(images)
        return (features if self.training else features.detach(),)
