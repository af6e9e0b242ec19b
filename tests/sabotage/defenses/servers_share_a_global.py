"""Two servers exchange their shares through a module global."""

import torch

from mibench.defenses.base import Defense

CAUGHT_BY = "wire-servers"
BOARD = {}


class ServersShareAGlobal(Defense):
    """As servers that talk, with nothing on the object."""

    @property
    def servers(self):
        return 2

    def protect(self, images):
        return self.client(images).chunk(2, dim=1)

    def serve(self, index, share):
        BOARD[index] = share
        other = BOARD.get(1 - index)
        if other is None or other.shape != share.shape:
            other = torch.zeros_like(share)
        pair = (share, other) if index == 0 else (other, share)
        return self.server(torch.cat(pair, dim=1))

    def fuse(self, replies):
        return replies[1]
