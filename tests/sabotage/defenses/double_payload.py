"""Values of eight bytes carry twice what the features' shape tells."""

from mibench.defenses.base import Defense

CAUGHT_BY = "wire-bytes"


class DoublePayload(Defense):
    """Sends float64."""

    def protect(self, images):
        return (self.client(images).double(),)

    def serve(self, index, share):
        return self.server(share.float())
