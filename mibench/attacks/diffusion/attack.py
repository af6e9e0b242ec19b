"""The diffusion attack: sample from a prior, guided by what the servers received."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import diffusers
import torch
from pydantic import Field, model_validator
from torch import Tensor

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.budget import images_at_once, in_groups
from mibench.attacks.decoder import Decoder
from mibench.attacks.diffusion.denoiser import Prior
from mibench.attacks.diffusion.misfit import DISTANCES
from mibench.attacks.diffusion.prior import PriorParams, get_prior
from mibench.attacks.diffusion.sampler import SamplerParams, sample
from mibench.attacks.gradient import Gradient
from mibench.attacks.gradient_warm import GradientWarm
from mibench.attacks.tuning import best_weight
from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.files import Json
from mibench.registry import attacks, lineage, package_fingerprint
from mibench.threat import Knowledge, Target

SCALES = {
    "proximal": (0.01, 0.1, 1.0, 10.0, 100.0),
    "dps": (0.3, 1.0, 3.0, 10.0, 30.0),
    "dsg": (1.0,),  # takes only the direction of the gradient: there is no weight to choose
    "red-diff": (0.25, 2.5, 25.0, 250.0),
}
"""Grids of the guidance weight, chosen from on the attacker's validation images."""

DRAG: Mapping[str, Any] = {
    "start": "noise",
    "distance": "cosine",
    "sampler": {
        "steps": 250, "spacing": "leading", "least_signal": 0.0, "eta": 1.0, "guidance": "dsg",
        "rate": 0.2, "momentum": True, "recurrence": 16, "clip": 0.02, "tv": 0.1, "l2": 0.01,
        "clamp": False,
    },
}  # fmt: skip
"""DRAG (arXiv 2509.11724) with a prior of pixels, as in its published code; see `Diffusion`."""

FIRST: Mapping[str, type[Attack]] = {
    "decoder": Decoder,
    "gradient": Gradient,
    "gradient-warm": GradientWarm,
}
"""Attacks at whose image sampling may begin."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "dps": {"start": "noise", "sampler": {"steps": 100, "guidance": "dps"}},
    "drag": DRAG,
    "drag++": {**DRAG, "start": "decoder", "sampler": {**DRAG["sampler"], "strength": 0.3}},
    "red-diff": {"start": "noise", "sampler": {"steps": 200, "guidance": "red-diff"}},
}


@attacks.register("diffusion", knowledge="white_box", paper="DPS 2209.14687, DRAG 2509.11724")
class Diffusion(Attack):
    """One guided sample from an unconditional diffusion prior, from noise or from a first image.

    What guides is the likelihood of the received values under the defense's own law; see
    `sampler.sample` for the kinds of guidance. ``start: decoder``, ``gradient`` and
    ``gradient-warm`` begin at that attack's image, noised to ``strength`` of the levels (the warm
    start of DRAG++);
    ``start: noise`` is plain sampling. The weight of the guidance is chosen for every target on the
    attacker's validation images, with the same grid for every defense.

    Presets are the published methods. ``drag`` (arXiv 2509.11724): at every of 250 levels, 16 times
    g = grad_x [mean_p (1 - cos(client(x_0)_p, z_p)) + 0.1 TV(x_0) + 0.01 mean x_0^2] through the
    denoiser, |g| cut to 0.02, its direction from Adam's moments over all steps, a step on the
    sphere of the noise (`sampler.dsg_step`, g_r 0.2), and noised back. For a latent prior the
    published ``sampler.tv`` is 0. ``drag++`` begins at the decoder's image and runs the last 30 %.
    ``dps`` (arXiv 2209.14687) and ``red-diff`` (arXiv 2305.04391) take the likelihood for their
    squared residual. Departures: the published code works on one image and takes norms over its
    batch, here all is per image; it clamps what the client is given, which cuts the gradient where
    a weak prior leaves [0, 1], and here the gradient passes. RED-diff begins at grey, since a
    client has no pseudo-inverse.
    """

    knowledge = Knowledge.WHITE_BOX
    samples: ClassVar[int] = 1
    """Samples whose mean is the answer."""

    class Params(Attack.Params):
        """Start, guidance, prior, and the grid of weights."""

        preset: Literal["dps", "drag", "drag++", "red-diff"] | None = Field(
            default=None, description="a published method: sets what is not set beside it"
        )
        start: Literal["decoder", "gradient", "gradient-warm", "noise"] = Field(
            default="decoder", description="noise, or the attack at whose image sampling begins"
        )
        distance: Literal["likelihood", "l2", "cosine"] = Field(
            default="likelihood", description="what compares messages; only the first is adaptive"
        )
        sampler: SamplerParams = SamplerParams()
        scales: tuple[float, ...] | None = Field(
            default=None, min_length=1, description="grid of guidance weights; null: `SCALES`"
        )
        tuning_images: int = Field(default=16, gt=0, description="validation images per weight")
        prior: PriorParams = PriorParams()
        decoder: Decoder.Params = Decoder.Params()
        gradient: Gradient.Params = Gradient.Params()
        gradient_warm: GradientWarm.Params = GradientWarm.Params()

        @model_validator(mode="before")
        @classmethod
        def _filled(cls, given: Any) -> Any:
            """Puts the preset's values where nothing was given."""
            # What comes from JSON is read strictly as Python from here on: lists would be refused.
            given = _tuples(given)
            name = given.get("preset") if isinstance(given, dict) else None
            if not isinstance(name, str) or name not in PRESETS:
                return given
            filled = {**PRESETS[name], **given}
            if isinstance(filled["sampler"], dict):
                filled["sampler"] = {**PRESETS[name]["sampler"], **filled["sampler"]}
            return filled

    params: Params

    def __init__(self, params: Params, workshop: Workshop) -> None:
        super().__init__(params, workshop)
        self._first: Attack | None = None
        if params.start != "noise":
            held = _held(params.start)
            self._first = FIRST[params.start](getattr(params, held), workshop)
        self._target: Target | None = None
        self._prior: Prior | None = None
        self._scale = 0.0
        self._facts: dict[str, Json] = {}
        self._loaded: Json = None

    @classmethod
    def budget(cls, params: Any) -> tuple[str, ...]:
        """The noise levels, and what the first image costs."""
        if params.start == "noise":
            return ("sampler.steps",)
        held = _held(params.start)
        first = FIRST[params.start].budget(getattr(params, held))
        return "sampler.steps", *(f"{held}.{key}" for key in first)

    def prepare(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> None:
        """Trains or loads prior and first attack, then chooses the weight on validation images."""
        self._target = target
        self._prior, prior_facts = get_prior(
            self.params.prior, self.workshop, auxiliary, validation
        )
        self._loaded = prior_facts.get("identity")
        if self._first is not None:
            self._first.prepare(target, auxiliary, validation)

        def make(_: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            some = validation.take(self.params.tuning_images).images().to(self.workshop.device)
            with seeding.stream(self.workshop.seed, "diffusion tuning"):
                shares = target.query(some)
                begun = (*shares, self._begin(shares))
                return {}, best_weight(some, begun, candidates, self._draw_all)

        candidates = self.params.scales or SCALES[self.params.sampler.guidance]
        chosen: Mapping[str, Json] = {"weight": candidates[0]}
        if len(candidates) > 1:
            spec = {
                **self.spec_of(target, auxiliary, validation),
                # What follows does not depend on the number of samples.
                "attack": Diffusion.name,
                "code": [*lineage(Diffusion), package_fingerprint("mibench.attacks")],
            }
            chosen = self.workshop.keep("tuning", spec, make).facts
        self._scale = float(chosen["weight"])  # type: ignore[arg-type]
        self._facts = {"scale": chosen, "prior": prior_facts, "samples": self.samples}
        if self._first is not None:
            self._facts[self.params.start] = self._first.facts()

    def reconstruct(self, shares: Shares) -> Tensor:
        """One guided sample per image, or the mean of several."""
        begun = (*shares, self._begin(shares))
        scale = torch.full((len(shares[0]),), self._scale, device=shares[0].device)
        total = self._draw_all(begun, scale)
        for _ in range(1, self.samples):
            total = total + self._draw_all(begun, scale)
        return total / self.samples

    @torch.no_grad()
    def blind(self, count: int) -> Tensor:
        """Unconditional samples of the prior."""
        assert self._prior is not None, "prepare() comes first"
        return unconditional(self._prior, self.workshop, self.params.sampler, count)

    def facts(self) -> dict[str, Json]:
        """The chosen weight with its validation errors, the prior and the first attack."""
        return self._facts

    def spec(self) -> dict[str, Json]:
        """Also the first attack's, and the hash of a loaded prior: a name does not tell it."""
        return {
            **super().spec(),
            "diffusers": diffusers.__version__,
            "first": None if self._first is None else self._first.spec(),
            "prior": self._loaded,
        }

    def _begin(self, shares: Shares) -> Tensor:
        """Images (B, 3, H, W) to begin from."""
        first, shape, device = self._first, self.workshop.image_shape, shares[0].device
        if first is None:
            return torch.full((len(shares[0]), *shape), 0.5, device=device)
        if isinstance(first, Gradient):
            return first.reconstruct(shares)  # in groups of its own, for its restarts
        size, nothing = images_at_once(shape), torch.zeros(len(shares[0]), device=device)
        return in_groups(lambda some, _: first.reconstruct(some), shares, nothing, size)

    def _draw_all(self, begun: Shares, scale: Tensor) -> Tensor:
        """One sample for each image: shares with the first images behind them → images."""
        assert self._prior is not None, "prepare() comes first"
        size = images_at_once(self._prior.working_shape(self.workshop.image_shape))
        return in_groups(self._draw, begun, scale, size)

    def _draw(self, begun: Shares, scale: Tensor) -> Tensor:
        assert self._target is not None, "prepare() comes first"
        assert self._prior is not None, "prepare() comes first"
        *shares, start = begun
        misfit = DISTANCES[self.params.distance](self._target, tuple(shares))
        from_noise = self.params.start == "noise"
        return sample(self._prior, misfit, scale, self.params.sampler, start, from_noise=from_noise)


@attacks.register("diffusion-mean", knowledge="white_box", paper="DPS 2209.14687, DRAG 2509.11724")
class DiffusionMean(Diffusion):
    """The mean of 8 samples of `diffusion`, with the same prior and the same weight.

    A sample from a posterior has up to twice the squared error of the posterior's mean, 3 dB of
    PSNR; the mean is smoother, so perceptual scores may prefer the one sample.
    """

    samples = 8


def unconditional(prior: Prior, workshop: Workshop, how: SamplerParams, count: int) -> Tensor:
    """Draws ``count`` images from a prior alone, no more at once than memory surely holds."""
    once = how.model_copy(update={"recurrence": 1})  # nothing guides: once a level is enough

    def draw(_: Shares, scale: Tensor) -> Tensor:
        start = torch.full((len(scale), *workshop.image_shape), 0.5, device=scale.device)
        return sample(prior, None, scale, once, start, from_noise=True)

    size = images_at_once(prior.working_shape(workshop.image_shape))
    with torch.no_grad():
        return in_groups(draw, (), torch.zeros(count, device=workshop.device), size)


def _held(start: str) -> str:
    """Name of the parameter that holds those of a first attack."""
    return start.replace("-", "_")


def _tuples(value: Any) -> Any:
    """The same value with tuples for lists."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
