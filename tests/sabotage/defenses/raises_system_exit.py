"""Raises SystemExit, which no `except Exception` stops."""

import sys

from mibench.defenses.base import Defense

CAUGHT_BY = "limit-exit"


class RaisesSystemExit(Defense):
    """Would end the command line with status 0."""

    def protect(self, images):
        if not self.training:
            sys.exit(0)
        return (self.client(images),)
