"""Never returns from protect()."""

from mibench.defenses.base import Defense

CAUGHT_BY = "limit-time"


class NeverReturns(Defense):
    """Waits for ever once it is in use."""

    def protect(self, images):
        while not self.training:
            pass
        return (self.client(images),)
