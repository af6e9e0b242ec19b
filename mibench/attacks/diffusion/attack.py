"""The diffusion attack: sample from a prior, guided by what the servers received."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.budget import images_at_once, in_groups
from mibench.attacks.decoder import Decoder
from mibench.attacks.diffusion.prior import Prior, PriorParams, get_prior
from mibench.attacks.diffusion.sampler import SamplerParams, sample
from mibench.attacks.tuning import best_weight
from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.files import Json
from mibench.registry import attacks
from mibench.threat import Knowledge, Target

SCALES = {
    "proximal": (0.01, 0.1, 1.0, 10.0, 100.0),
    "dps": (0.3, 1.0, 3.0, 10.0, 30.0),
    "dsg": (1.0,),  # takes only the direction of the gradient: there is no weight to choose
}
"""Grids of the guidance weight, chosen from on the attacker's validation images."""


@attacks.register("diffusion", knowledge="white_box", paper="DPS 2209.14687, DRAG 2509.11724")
class Diffusion(Attack):
    """Guided sampling from an unconditional diffusion prior, from noise or from a decoder's image.

    What guides is the likelihood of the received values under the defense's own law; see
    `sampler.sample` for the three kinds of guidance. ``start: decoder`` begins at the decoder
    attack's image, noised to ``strength`` (the warm start of DRAG++); ``start: noise`` is plain DPS
    or DRAG. The weight of the guidance is chosen for every target on the attacker's validation
    images, with the same grid for every defense.

    A sample from a posterior has up to twice the squared error of the posterior's mean, 3 dB of
    PSNR. With ``samples`` above 1 the answer is the mean of so many.
    """

    knowledge = Knowledge.WHITE_BOX
    budget = ("sampler.steps", "decoder.steps")

    class Params(Attack.Params):
        """Start, guidance, prior, and the grid of step sizes."""

        start: Literal["decoder", "noise"] = "decoder"
        sampler: SamplerParams = SamplerParams()
        scales: tuple[float, ...] | None = Field(
            default=None, min_length=1, description="grid of guidance weights; null: `SCALES`"
        )
        tuning_images: int = Field(default=16, gt=0, description="validation images per weight")
        samples: int = Field(default=1, gt=0, description="samples whose mean is the answer")
        prior: PriorParams = PriorParams()
        decoder: Decoder.Params = Decoder.Params()

    params: Params

    def __init__(self, params: Params, workshop: Workshop) -> None:
        super().__init__(params, workshop)
        self._decoder = Decoder(params.decoder, workshop)
        self._target: Target | None = None
        self._prior: Prior | None = None
        self._scale = 0.0
        self._facts: dict[str, Json] = {}

    def prepare(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> None:
        """Trains or loads prior and decoder, then chooses the step size on validation images."""
        self._target = target
        self._prior, prior_facts = get_prior(
            self.params.prior, self.workshop, auxiliary, validation
        )
        if self.params.start == "decoder":
            self._decoder.prepare(target, auxiliary, validation)

        def make(_: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            some = validation.take(self.params.tuning_images).images().to(self.workshop.device)
            with seeding.stream(self.workshop.seed, "diffusion tuning"):
                shares = target.query(some)
                facts = best_weight(some, shares, self._candidates(), self._sample)
            return {}, facts

        spec = {
            **self.spec(),
            "target": target.identity,
            "auxiliary": auxiliary.identity,
            "validation": validation.identity,
        }
        tuned = self.workshop.keep("tuning", spec, make)
        self._scale = float(tuned.facts["weight"])  # type: ignore[arg-type]
        self._facts = {"scale": tuned.facts, "prior": prior_facts, "decoder": self._decoder.facts()}

    def reconstruct(self, shares: Shares) -> Tensor:
        """One guided sample per image, or the mean of several."""
        scale = torch.full((len(shares[0]),), self._scale, device=shares[0].device)
        size = images_at_once(self.workshop.image_shape)
        drawn = [in_groups(self._sample, shares, scale, size) for _ in range(self.params.samples)]
        return torch.stack(drawn).mean(0)

    @torch.no_grad()
    def blind(self, count: int) -> Tensor:
        """Unconditional samples of the prior."""
        nothing = torch.zeros(count, device=self.workshop.device)
        return in_groups(self._draw, (), nothing, images_at_once(self.workshop.image_shape))

    def facts(self) -> dict[str, Json]:
        """The chosen step size with its validation errors, the prior and the decoder."""
        return self._facts

    def _candidates(self) -> tuple[float, ...]:
        return self.params.scales or SCALES[self.params.sampler.guidance]

    def _draw(self, _: Shares, scale: Tensor) -> Tensor:
        assert self._prior is not None, "prepare() comes first"
        start = torch.zeros(len(scale), *self.workshop.image_shape, device=scale.device)
        return sample(self._prior, None, 1, scale, self.params.sampler, start, from_noise=True)

    def _sample(self, shares: Shares, scale: Tensor) -> Tensor:
        assert self._target is not None, "prepare() comes first"
        assert self._prior is not None, "prepare() comes first"
        target, values = self._target, sum(share[0].numel() for share in shares)

        def misfit(images: Tensor) -> Tensor:
            return -target.log_likelihood(shares, target.client(images))

        from_noise = self.params.start == "noise"
        shape = (len(shares[0]), *self.workshop.image_shape)
        start = (
            torch.zeros(shape, device=shares[0].device)
            if from_noise
            else self._decoder.reconstruct(shares)
        )
        return sample(
            self._prior, misfit, values, scale, self.params.sampler, start, from_noise=from_noise
        )
