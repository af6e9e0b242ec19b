"""Alone, as its cost is counted, an image sends little; in a batch it sends everything."""

from torch import nn

from mibench.defenses.base import Defense

CAUGHT_BY = "wire-bytes"


class PayloadByBatch(Defense):
    """The size of a message depends on the batch."""

    def protect(self, images):
        features = self.client(images)
        return (features if len(images) > 1 else features[:, :2],)

    def serve(self, index, share):
        missing = self.channels - share.shape[1]
        return self.server(nn.functional.pad(share, (0, 0, 0, 0, 0, missing)))

    def __init__(self, split, params):
        super().__init__(split, params)
        self.channels = split.feature_shape[0]
