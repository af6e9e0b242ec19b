"""The first messages of a process are plain, as a smoke test sees them; later ones are not."""

from mibench.defenses.base import Defense

CAUGHT_BY = "same-again"


class DiffersWhenCalledAgain(Defense):
    """Counts its calls."""

    def __init__(self, split, params):
        super().__init__(split, params)
        self.calls = 0

    def protect(self, images):
        features = self.client(images)
        if self.training:
            return (features,)
        self.calls += 1
        return (features if self.calls <= 2 else features.flip(1),)
