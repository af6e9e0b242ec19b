"""Adversarial training against a proxy decoder (DeepObfuscator, PAN, ResSFL)."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mibench.backbones.base import Split
from mibench.defenses.base import Defense, Shares
from mibench.defenses.parts.proxy import ProxyDecoder, adversarial_loss
from mibench.registry import defenses
from mibench.training import Losses, Step


@defenses.register(
    "adversarial",
    servers="1",
    randomness="none",
    paper="DeepObfuscator (Li et al., arXiv 1909.04126), PAN, ResSFL",
)
class Adversarial(Defense):
    """The features are learned against a decoder that learns to invert them.

        min over client and server   L_task - a E(D(f(x)), x),
        min over the proxy D         E(D(f(x)), x),

    E the squared error over the variance of the images, which is 1 for the mean image. Both sides
    move in every step of one optimiser: the gradient of E is reversed, and weighted by a, between
    proxy and client.

    The papers measure E by structural similarity or absolute errors, and most alternate between the
    two sides. Ours: the squared error, that both sides move at once, that the client stops where an
    image is rebuilt no better than the mean image (else it may gain by fooling this one proxy
    without end), and that the proxy normalises what it reads, so that shrinking features is no way
    out. Tokens, which the papers do not speak of, are read on their grid.

    What withstands this small proxy need not withstand another decoder, and the proxy is no part of
    what is deployed or scored. How much it still rebuilds at the end is the last value of the term
    ``reconstruction``.
    """

    class Params(Defense.Params):
        """Weight of the client's side."""

        strength: float = Field(
            default=10.0, ge=0, description="a, weight of the proxy's error in the client's loss"
        )

    params: Params

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        self.proxy = ProxyDecoder(split.feature_shape, split.image_shape, split.prefix_tokens)

    def protect(self, images: Tensor) -> Shares:
        """Returns the features; the protection lies in how they were learned."""
        return (self.client(images),)

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:  # noqa: ARG002
        """The task's loss, and the proxy's error with the reversed gradient to the client."""
        (z,) = self.protect(images)
        return {
            "task": self.task.loss(self.answer((z,)), labels),
            "reconstruction": adversarial_loss(self.proxy, z, images, self.params.strength),
        }
