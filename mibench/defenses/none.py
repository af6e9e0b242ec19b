"""No defense: the reference that every leakage and every accuracy is measured against."""

from torch import Tensor

from mibench.defenses.base import Defense, Shares
from mibench.registry import defenses


@defenses.register("none", servers="1", randomness="none", paper="-")
class Undefended(Defense):
    """Plain split inference: the client sends its features as they are."""

    def protect(self, images: Tensor) -> Shares:
        """Returns the features of the split point."""
        return (self.client(images),)
