"""Ends the interpreter with status 0, as if all were well."""

import os

from mibench.defenses.base import Defense

CAUGHT_BY = "limit-exit"


class Exits(Defense):
    """Would end the benchmark itself."""

    def protect(self, images):
        if not self.training:
            os._exit(0)
        return (self.client(images),)
