"""Gradient-based inversion: regularised maximum likelihood over the pixels."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.budget import images_at_once, split
from mibench.attacks.descent import Descent, Moment, Schedule, descend
from mibench.attacks.spectrum import Spectrum
from mibench.attacks.tuning import best_descent
from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.files import Json
from mibench.registry import attacks
from mibench.threat import Knowledge, Target
from mibench.training import autocast

SPREAD = 0.02
"""Deviation of the coefficients at the start: nearly grey, yet no two starts alike."""


@attacks.register("gradient", knowledge="white_box", paper="He et al., ACSAC 2019")
class Gradient(Attack):
    """x = argmin -log p(z | client(x)) / dim(z) + w TV(x), by Adam.

    He et al. minimise |client(x) - z|^2 + w TV(x) over the pixels in 5,000 steps from one grey
    start, with w fixed by hand per layer. Departures:

    - The likelihood is the defense's own law and goes over received values only, of any layout.
    - w is chosen for every target on the attacker's validation images, with one grid and one budget
      for all defenses. To tune once per split point and to keep that for all defenses would let a
      defense hide behind a weight that suits another law.
    - x = sigmoid(S v), and Adam works on v: S gives coarse structure and brightness the longer
      steps, see `Spectrum`. Adam on pixels gives each of them steps of one size, and so makes noise
      first; behind a few layers with pooling nothing leads out of that noise.
    - TV is the mean absolute difference of neighbours, theirs the squared one.
    - All starts of an image descend at once and the image keeps the one with the least objective,
      which the attacker can compute.
    """

    knowledge = Knowledge.WHITE_BOX

    class Params(Attack.Params):
        """Budget of the descent, and the grid of the prior's weight."""

        steps: int = Field(default=300, gt=0, le=100_000, description="most steps of Adam")
        lr: float = Field(default=0.05, gt=0, le=10, description="peak learning rate on v")
        tolerance: float = Field(
            default=0.0, ge=0, lt=1,
            description="an image whose objective falls by less than this share cools and leaves",
        )  # fmt: skip
        restarts: int = Field(default=2, gt=0, le=100, description="starting points per image")
        weights: tuple[float, ...] = Field(
            default=(0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, 1000.0), min_length=1,
            description="grid of w",
        )  # fmt: skip
        tuning_images: int = Field(default=16, gt=0, description="validation images per weight")
        precision: Literal["fp32", "mixed", "bf16"] = Field(
            default="fp32",
            description="of the client, where the device has bf16; mixed: fp32 once an image cools",
        )

    params: Params

    def __init__(self, params: Params, workshop: Workshop) -> None:
        super().__init__(params, workshop)
        self._target: Target | None = None
        self._spectrum = Spectrum(workshop.image_shape, workshop.device)
        self._weight = 0.0
        self._facts: dict[str, Json] = {}

    @classmethod
    def budget(cls, params: Any) -> tuple[str, ...]:  # noqa: ARG003
        """The descent's steps."""
        return ("steps",)

    def prepare(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> None:
        """Chooses the weight of the total variation on validation images."""
        self._target = target
        spec = self.spec_of(target, auxiliary, validation)

        def make(_: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            some = validation.take(self.params.tuning_images).images().to(self.workshop.device)

            def once(shares: Shares, weights: Tensor) -> tuple[Tensor, Descent]:
                images, run = self._descend(shares, weights, 1)
                return images[:, 0], run

            with seeding.stream(self.workshop.seed, "gradient tuning"):
                return {}, best_descent(some, target.query(some), self.params.weights, once)

        self._facts = self.workshop.keep("tuning", spec, make).facts
        self._weight = float(self._facts["weight"])  # type: ignore[arg-type]

    def reconstruct(self, shares: Shares) -> Tensor:
        """Descends from every starting point and keeps the best per image."""
        restarts = self.params.restarts
        size = images_at_once(self.workshop.image_shape, self.workshop.device) // restarts

        def work(part: slice) -> Tensor:
            own = tuple(share[part] for share in shares)
            weights = torch.full((len(own[0]),), self._weight, device=own[0].device)
            images, run = self._descend(own, weights, restarts)
            # A start that diverged is never the best.
            objective = run.objective.nan_to_num(nan=torch.inf).view(-1, restarts)
            return images[torch.arange(len(images), device=images.device), objective.argmin(1)]

        return split(work, len(shares[0]), max(1, size))

    def facts(self) -> dict[str, Json]:
        """The chosen weight, the validation error of each, and the course of the objective.

        The course is the mean objective of the validation images under the chosen weight.
        """
        return self._facts

    def _centre(self, shares: Shares) -> Tensor:
        """Where to begin: logits (B, 3, H, W), here of grey."""
        return torch.zeros(len(shares[0]), *self.workshop.image_shape, device=shares[0].device)

    def _prior(self, images: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        """What is added to the misfit (B,), for images sigmoid(centre + S v)."""
        return total_variation(images)

    def _descend(self, shares: Shares, weights: Tensor, restarts: int) -> tuple[Tensor, Descent]:
        """Returns images (B, restarts, 3, H, W) in [0, 1] and the descent of all B restarts."""
        assert self._target is not None, "prepare() comes first"
        target, params, shape = self._target, self.params, self.workshop.image_shape
        centre = self._centre(shares)
        repeated = tuple(share.repeat_interleave(restarts, 0) for share in shares)
        centre, weights = (one.repeat_interleave(restarts, 0) for one in (centre, weights))
        values = sum(share[0].numel() for share in shares)
        # Drawn image by image, so that no draw depends on how the images are grouped.
        start = torch.stack([SPREAD * torch.randn(shape) for _ in weights]).to(weights.device)

        def objective(found: list[Tensor], moment: Moment) -> Tensor:
            (v,), rows = found, moment.rows
            images = (centre[rows] + self._spectrum(v)).sigmoid()
            low = params.precision == "bf16" or (params.precision == "mixed" and not moment.cooling)
            received = tuple(share[rows] for share in repeated)
            fit = misfit(target, received, images, "bf16" if low else "fp32") / values
            return fit + weights[rows] * self._prior(images, v)

        schedule = Schedule(params.steps, params.lr, tolerance=params.tolerance)
        run = descend([start], objective, schedule, "Gradient attack")
        with torch.no_grad():
            # Where even the shares are no numbers, the answer is grey.
            images = (centre + self._spectrum(run.values[0])).sigmoid().nan_to_num(nan=0.5)
        return images.view(-1, restarts, *shape), run


def misfit(target: Target, shares: Shares, images: Tensor, precision: str = "fp32") -> Tensor:
    """Returns -log p(shares | client(images)), (B,), in fp32 whatever the client computes in."""
    if precision == "bf16":
        images = images.contiguous(memory_format=torch.channels_last)
    with autocast(images.device, precision):
        predicted = target.client(images)
    return -target.log_likelihood(shares, tuple(share.float() for share in predicted))


def total_variation(images: Tensor) -> Tensor:
    """Anisotropic total variation per image (B,): mean absolute difference of neighbours."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(1)
    right = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1)
    return down + right
