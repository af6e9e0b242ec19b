"""Starts another program that could do anything."""

import contextlib
import subprocess

from mibench.defenses.base import Defense

CAUGHT_BY = "limit-process"


class StartsAProcess(Defense):
    """Hides that it was refused."""

    def protect(self, images):
        with contextlib.suppress(OSError):
            subprocess.run(["true"], check=False)
        return (self.client(images),)
