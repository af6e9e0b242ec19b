"""Gradient-based inversion that begins at the decoder's image."""

from __future__ import annotations

from typing import Any

from pydantic import Field
from torch import Tensor

from mibench.attacks.base import Workshop
from mibench.attacks.decoder import Decoder
from mibench.attacks.gradient import Gradient
from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.files import Json
from mibench.registry import attacks
from mibench.threat import Target

EDGE = 0.02
"""Least distance of the decoder's pixels from 0 and 1, where a sigmoid has no slope."""


@attacks.register("gradient-warm", knowledge="white_box", paper="ours, after He et al., ACSAC 2019")
class GradientWarm(Gradient):
    """x = argmin -log p(z | client(x)) / dim(z) + w (TV(x) + pull |v|^2 / dim(x)), by Adam.

    x = sigmoid(s + S v) as in `Gradient`, with s the logit of what the `decoder` attack makes of
    the same shares. So the descent begins at that image, and the prior is a Gaussian around it: the
    more the defense hides, the larger the weight that validation images choose, and the more of the
    decoder's image stays. Where a client has lost what the likelihood would need, as behind a
    funnel, `Gradient` alone ends below a blind guess, and this attack ends at the decoder's image.

    No paper that we know of publishes it; DRAG++ (arXiv 2509.11724) begins a diffusion sampler so.
    """

    class Params(Gradient.Params):
        """As those of `Gradient`, with the decoder and how far its image holds."""

        restarts: int = Field(default=1, gt=0, le=100, description="starting points per image")
        pull: float = Field(
            default=10.0, ge=0, description="weight of the decoder's image, relative to TV"
        )
        decoder: Decoder.Params = Decoder.Params()

    params: Params

    def __init__(self, params: Params, workshop: Workshop) -> None:
        super().__init__(params, workshop)
        self._decoder = Decoder(params.decoder, workshop)

    @classmethod
    def budget(cls, params: Any) -> tuple[str, ...]:
        """The descent's steps, and the decoder's."""
        decoder = (f"decoder.{key}" for key in Decoder.budget(params.decoder))
        return *super().budget(params), *decoder

    def prepare(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> None:
        """Trains the decoder, then chooses the weight of the prior on validation images."""
        self._decoder.prepare(target, auxiliary, validation)
        super().prepare(target, auxiliary, validation)
        self._facts = {**self._facts, "decoder": self._decoder.facts()}

    def spec(self) -> dict[str, Json]:
        """Also the decoder's."""
        return {**super().spec(), "decoder": self._decoder.spec()}

    def _centre(self, shares: Shares) -> Tensor:
        return self._decoder.reconstruct(shares).clamp(EDGE, 1 - EDGE).logit()

    def _prior(self, images: Tensor, v: Tensor) -> Tensor:
        return super()._prior(images, v) + self.params.pull * v.square().flatten(1).mean(1)
