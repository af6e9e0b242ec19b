"""Sends the features four times, so that errors and noise average out."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "wire-bytes"


class OversizedPayload(Defense):
    """A message of four times the undefended size."""

    def protect(self, images):
        features = self.client(images)
        return (torch.cat([features] * 4, dim=1),)

    def serve(self, index, share):
        return self.server(sum(share.chunk(4, dim=1)) / 4)
