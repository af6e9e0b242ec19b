"""What an independent judge makes of a reconstruction: its label, and whose image it is."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from mibench.errors import UnavailableError
from mibench.metrics.base import Metric
from mibench.registry import metrics

if TYPE_CHECKING:
    from mibench.exhibit import Exhibit, Sought, Witness


class Judged(Metric):
    """A metric that asks the protocol's judge; it has to be bound to an exhibit first."""

    unit: ClassVar[str] = ""
    more_leakage: ClassVar[Literal["higher", "lower"]] = "higher"
    bounds: ClassVar[tuple[float, float]] = (0.0, 1.0)

    def __init__(self, witness: Witness | None = None) -> None:
        self._witness = witness

    def bound(self, exhibit: Exhibit) -> Judged:
        """Returns this metric with the exhibit's witness.

        Raises:
            UnavailableError: the exhibit has none.
        """
        return type(self)(exhibit.asked())

    def witness(self) -> Witness:
        """Who is asked.

        Raises:
            UnavailableError: the metric is bound to no exhibit.
        """
        if self._witness is None:
            raise UnavailableError(f"{self.name} needs a judge: bind it to an exhibit")
        return self._witness


@metrics.register("recognition", version=1)
class Recognition(Judged):
    """Whether the judge tells the original's label from the reconstruction.

    1 where the judge's first choice is the true class, else 0; the mean is a top-1 accuracy. For a
    dataset of attributes, the share of attributes that are told rightly. Range [0, 1], higher means
    more leakage. Input (N, 3, H, W), output (N,). A perfect copy gets what the judge makes of the
    original, which the record gives as the judge's accuracy, not always 1.
    """

    def per_image(self, reconstructions: Tensor, originals: Tensor) -> Tensor:
        """Share of the label that is told, (n,)."""
        return self.witness().told(reconstructions, originals)


class Reidentification(Judged):
    """Seeks the original in a gallery by the cosine of the judge's features.

    Where several images are as like the reconstruction as its original, the value is the mean over
    all orders of these: what all images have in common gains nothing.
    """

    def bound(self, exhibit: Exhibit) -> Judged:
        """Returns this metric with the exhibit's witness.

        Raises:
            UnavailableError: the exhibit has none, or none with a gallery.
        """
        asking = super().bound(exhibit)
        asking.witness().require_gallery()
        return asking

    def per_image(self, reconstructions: Tensor, originals: Tensor) -> Tensor:
        """The rank's worth, (n,)."""
        return self.worth(self.witness().sought(reconstructions, originals))

    @abstractmethod
    def worth(self, sought: Sought) -> Tensor:
        """What the places of the originals are worth, (n,) float64 in [0, 1]."""


@metrics.register("reid-top1", version=1)
class ReidentificationFirst(Reidentification):
    """Whether the original is the image of the gallery that is most like the reconstruction.

    Range [0, 1], higher means more leakage; a blind guess gets 1 / gallery. See `Reidentification`.
    """

    def worth(self, sought: Sought) -> Tensor:
        """The chance that the original is the first."""
        return _among(sought, 1)


@metrics.register("reid-top5", version=1)
class ReidentificationFive(Reidentification):
    """Whether the original is among the five images most like the reconstruction.

    Range [0, 1], higher means more leakage; a blind guess gets 5 / gallery. See `Reidentification`.
    """

    def worth(self, sought: Sought) -> Tensor:
        """The chance that the original is among the first five."""
        return _among(sought, 5)


@metrics.register("reid-mrr", version=1)
class ReciprocalRank(Reidentification):
    """One over the rank of the original among the images of the gallery.

    The mean is the mean reciprocal rank. Range (0, 1], 1 where the original is the first, higher
    means more leakage; a blind guess gets about ln(gallery) / gallery. See `Reidentification`.
    """

    def worth(self, sought: Sought) -> Tensor:
        """The mean of one over the ranks that are possible."""
        last = sought.nearer + sought.alike + 1
        steps = torch.arange(1, int(last.max()) + 1, dtype=torch.float64)
        sums = torch.cat([torch.zeros(1, dtype=torch.float64), steps.reciprocal().cumsum(0)])
        return (sums[last] - sums[sought.nearer]) / (sought.alike + 1)


def _among(sought: Sought, first: int) -> Tensor:
    """The chance that the original is among the first so many, (n,)."""
    alike = sought.alike.double() + 1
    return ((first - sought.nearer) / alike).clamp(0, 1)
