"""A second tensor rides along as an attribute of the share."""

from mibench.defenses.base import Defense

CAUGHT_BY = "wire-shares"


class HiddenTensor(Defense):
    """The declared share is one channel; the rest hangs on it."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.channels = split.feature_shape[0]

    def protect(self, images):
        features = self.client(images)
        share = features[:, :1].clone()
        share.rest = features
        return (share,)

    def serve(self, index, share):
        rest = getattr(share, "rest", share.expand(-1, self.channels, -1, -1))
        return self.server(rest)
