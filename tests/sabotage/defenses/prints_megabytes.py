"""Prints until something gives way."""

from mibench.defenses.base import Defense

CAUGHT_BY = "limit-output"


class PrintsMegabytes(Defense):
    """A hundred megabytes a message."""

    def protect(self, images):
        if not self.training:
            for _ in range(100_000):
                print("x" * 1000)  # noqa: T201
        return (self.client(images),)
