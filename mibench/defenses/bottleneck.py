"""Control: another defense's architecture, trained for the task alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from mibench.backbones.base import Split
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Facts, Phase, Shares
from mibench.defenses.parts.another import OfAnother, another
from mibench.registry import defenses
from mibench.training import Step


@defenses.register("bottleneck", servers="as the other", randomness="as the other", paper="-")
class Bottleneck(Defense):
    """The architecture of another defense with the plain loss of the task, and no other term.

    A defense that narrows what is sent would leak less even if its loss did nothing. What it gains
    over this row is what its loss is worth; what this row gains over ``none`` is the architecture.
    Randomness that belongs to the architecture, such as a sampled layer, stays, and so do phases of
    the training. A smoothing of labels that is the other's own does not.
    """

    class Params(OfAnother):
        """Whose architecture."""

    params: Params

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        # The other defense holds them; twice in one module they would be saved twice.
        del self.client, self.server
        self.other = another(Bottleneck, split, params)

    @property
    def servers(self) -> int:
        """As many as the other defense has."""
        return self.other.servers

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Those of the other defense."""
        return self.other.phases

    def protect(self, images: Tensor) -> Shares:
        """What the other defense sends."""
        return self.other.protect(images)

    def predict(self, images: Tensor) -> Shares:
        """The other defense's law."""
        return self.other.predict(images)

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """The other defense's law."""
        return self.other.log_likelihood(shares, predicted)

    def serve(self, index: int, share: Tensor) -> Tensor:
        """The other defense's server."""
        return self.other.serve(index, share)

    def fuse(self, replies: tuple[Tensor, ...]) -> Tensor:
        """The other defense's fusion."""
        return self.other.fuse(replies)

    def training_logits(self, images: Tensor, step: Step) -> Tensor:
        """Along the path on which the other defense trains."""
        return self.other.training_logits(images, step)

    def begin(self, phase: str, train: ImageSet) -> None:
        """As the other defense begins it."""
        self.other.begin(phase, train)

    def observe(self, train: ImageSet, step: Step) -> None:
        """As the other defense observes it."""
        self.other.observe(train, step)

    def finish(self, train: ImageSet) -> None:
        """As the other defense finishes."""
        self.other.finish(train)

    def describe(self) -> Facts:
        """Facts about the other defense's architecture."""
        return self.other.describe()

    def examine(self, images: ImageSet) -> Facts:
        """The other defense's facts."""
        return self.other.examine(images)

    def client_modules(self) -> Iterable[nn.Module]:
        """The other defense's client."""
        return self.other.client_modules()
