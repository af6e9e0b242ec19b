"""Writes outside its folder, and hides that it was refused."""

import contextlib
from pathlib import Path

from mibench.defenses.base import Defense

CAUGHT_BY = "limit-files"


class WritesOutside(Defense):
    """Leaves something for a later run."""

    def protect(self, images):
        with contextlib.suppress(OSError):
            Path("~/../mibench-sabotage.txt").expanduser().write_text("found")
        return (self.client(images),)
