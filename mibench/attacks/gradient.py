"""Gradient-based inversion: regularised maximum likelihood over the pixels."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from mibench import progress, seeding
from mibench.artifacts import Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.budget import images_at_once, in_groups
from mibench.attacks.tuning import best_weight
from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.files import Json
from mibench.registry import attacks
from mibench.threat import Knowledge, Target


@attacks.register("gradient", knowledge="white_box", paper="He et al., ACSAC 2019")
class Gradient(Attack):
    """x = argmin -log p(z | client(x)) / dim(z) + w TV(x), by Adam on u with x = sigmoid(u).

    The likelihood is the defense's own law and goes over received values only, of whatever layout.
    All restarts descend at once, and as many images as `budget.VALUES` allows; each image keeps the
    restart with the least objective, which the attacker can compute. He et al. use a squared
    feature distance, fixed weights per layer, 5,000 steps and one start. Here the weight w is
    chosen for every target on the attacker's validation images, with the same grid for every
    defense.
    """

    knowledge = Knowledge.WHITE_BOX
    budget = ("steps",)

    class Params(Attack.Params):
        """Budget of the descent and grid of the prior's weight."""

        steps: int = Field(default=300, gt=0, description="steps of Adam")
        lr: float = Field(default=0.1, gt=0, description="peak learning rate on u")
        restarts: int = Field(default=2, gt=0, description="starting points per image")
        weights: tuple[float, ...] = Field(
            default=(1.0, 10.0, 100.0, 1000.0), min_length=1, description="grid of w"
        )
        tuning_images: int = Field(default=32, gt=0, description="validation images per weight")

    params: Params

    def __init__(self, params: Params, workshop: Workshop) -> None:
        super().__init__(params, workshop)
        self._target: Target | None = None
        self._weight = 0.0
        self._facts: dict[str, Json] = {}

    def prepare(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> None:  # noqa: ARG002
        """Chooses the weight of the total variation on validation images."""
        self._target = target

        def make(_: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            some = validation.take(self.params.tuning_images).images().to(self.workshop.device)
            with seeding.stream(self.workshop.seed, "gradient tuning"):
                shares = target.query(some)
                facts = best_weight(some, shares, self.params.weights, self._descend)
            return {}, facts

        spec = {**self.spec(), "target": target.identity, "validation": validation.identity}
        self._facts = self.workshop.keep("tuning", spec, make).facts
        self._weight = float(self._facts["weight"])  # type: ignore[arg-type]

    def reconstruct(self, shares: Shares) -> Tensor:
        """Descends from every starting point and keeps the best per image."""
        weights = torch.full((len(shares[0]),), self._weight, device=shares[0].device)
        size = max(1, images_at_once(self.workshop.image_shape) // self.params.restarts)
        return in_groups(self._best_start, shares, weights, size)

    def facts(self) -> dict[str, Json]:
        """The chosen weight and the validation error of each candidate."""
        return self._facts

    def _best_start(self, shares: Shares, weights: Tensor) -> Tensor:
        count, restarts = len(weights), self.params.restarts
        repeated = tuple(torch.cat([share] * restarts) for share in shares)
        images, objective = self._optimise(repeated, weights.repeat(restarts))
        # A restart that diverged is never the best.
        best = objective.nan_to_num(nan=torch.inf).view(restarts, count).argmin(0)
        return images.view(restarts, count, *images.shape[1:])[
            best, torch.arange(count, device=best.device)
        ]

    def _descend(self, shares: Shares, weights: Tensor) -> Tensor:
        return self._optimise(shares, weights)[0]

    def _optimise(self, shares: Shares, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Returns images (B, 3, H, W) in [0, 1] and their final objectives (B,)."""
        assert self._target is not None, "prepare() comes first"
        target, steps = self._target, self.params.steps
        count, values = len(shares[0]), sum(share[0].numel() for share in shares)
        start = 0.5 * torch.randn(count, *self.workshop.image_shape).to(shares[0].device)
        u = start.requires_grad_()
        # eps is far below the gradients of a single pixel, so that steps do not shrink with size.
        optimiser = torch.optim.Adam([u], lr=self.params.lr, eps=1e-12)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        with progress.task("Gradient attack", total=steps) as task:
            for _ in range(steps):
                images = u.sigmoid()
                fit = -target.log_likelihood(shares, target.client(images)) / values
                objective = fit + weights * total_variation(images)
                (u.grad,) = torch.autograd.grad(objective.sum(), u)
                optimiser.step()
                schedule.step()
                task.advance(objective=objective.mean().item())
        return u.detach().sigmoid(), objective.detach()


def total_variation(images: Tensor) -> Tensor:
    """Anisotropic total variation per image (B,): mean absolute difference of neighbours."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(1)
    right = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(1)
    return down + right
