"""NoPeek: little distance correlation between images and features."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from mibench.defenses.base import Defense, Shares
from mibench.defenses.parts.dependence import distance_correlation
from mibench.registry import defenses
from mibench.training import Losses, Step


@defenses.register(
    "nopeek", servers="1", randomness="none", paper="Vepakomma et al., arXiv 2008.09161"
)
class NoPeek(Defense):
    """Client and server learn the task while the features forget how far apart images are.

        L = L_task + lambda dCor(x, z),

    x the image and z = f(x), both flattened, class tokens included; distances are Euclidean, the
    mean is over the batch, and nothing but z is sent.

    The biased estimate is the published one, in the form dCor = sqrt(dCor^2). Its value says
    little: in a batch of 128 it is near 1 for independent data of so many dimensions. Its gradient
    still lowers the dependence that there is. ``dcor=unbiased`` takes the U-centred dCor^2 instead,
    which is about 0 for independent data and can be negative, so that it has no root.

    Inferred: that distances in z are Euclidean for tokens too, and lambda. Published codes differ
    in both: squared distances, or cosines token by token; 0.1 to 5.
    """

    class Params(Defense.Params):
        """Weight and estimate of the distance correlation."""

        strength: float = Field(
            default=3.0, ge=0, description="lambda, weight of the distance correlation"
        )
        dcor: Literal["biased", "unbiased"] = Field(
            default="biased", description="dCor as published, or dCor^2 without its bias"
        )

    params: Params

    def protect(self, images: Tensor) -> Shares:
        """Returns the features; the protection lies in how they were learned."""
        return (self.client(images),)

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:  # noqa: ARG002
        """The task's loss and lambda dCor of images and features."""
        (z,) = self.protect(images)
        terms = {"task": self.task.loss(self.answer((z,)), labels)}
        if self.params.strength:
            terms["dependence"] = self.params.strength * self._dependence(images, z)
        return terms

    def _dependence(self, images: Tensor, z: Tensor) -> Tensor:
        if self.params.dcor == "unbiased":
            return distance_correlation(images, z, unbiased=True)
        # The root has no gradient at 0, where features are constant.
        return distance_correlation(images, z).clamp_min(1e-8).sqrt()
