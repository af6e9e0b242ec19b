"""Two servers each hold half of the features and put them together on the object."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "wire-servers"


class ServersThatTalk(Defense):
    """A single server seems to know half; both together answer."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.seen = {}

    @property
    def servers(self):
        return 2

    def protect(self, images):
        return self.client(images).chunk(2, dim=1)

    def serve(self, index, share):
        self.seen[index] = share
        other = self.seen.get(1 - index)
        if other is None or other.shape != share.shape:
            other = torch.zeros_like(share)
        pair = (share, other) if index == 0 else (other, share)
        return self.server(torch.cat(pair, dim=1))

    def fuse(self, replies):
        return replies[1]
