"""In large batches, as users send in the benchmark, images are mixed with each other."""

from mibench.defenses.base import Defense

CAUGHT_BY = "same-batch"


class DiffersByBatch(Defense):
    """Alone, an image is sent plainly."""

    def protect(self, images):
        features = self.client(images)
        if self.training or len(images) < 8:
            return (features,)
        return (features - features.mean(0, keepdim=True),)
