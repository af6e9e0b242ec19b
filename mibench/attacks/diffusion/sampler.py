"""One guided sampler for all diffusion variants: DPS, DSG and proximal guidance, with their extras.

The reverse process is DDIM (Song et al., arXiv 2010.02502) with stochasticity eta. Everything is
per image: norms, clips, directions and step sizes never mix the images of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mibench import progress
from mibench.attacks.diffusion.prior import Prior
from mibench.params import Parameters

Misfit = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) in [0, 1] → -log p(shares | images) (B,), differentiable."""

LEAST_SIGNAL = 5e-3
"""Sampling from noise begins where abar reaches this; what lies before is noise to the eye."""
BETAS = (0.9, 0.999)
"""Decay rates of the momentum direction (Adam's, as in DRAG)."""


class SamplerParams(Parameters):
    """Switches of the guided sampler."""

    steps: int = Field(default=50, gt=0, description="noise levels from T to 0")
    strength: float = Field(
        default=0.1, gt=0, le=1, description="share of the levels run from the initial image"
    )
    eta: float = Field(default=1.0, ge=0, le=1, description="stochasticity: 0 is DDIM, 1 is DDPM")
    guidance: Literal["proximal", "dps", "dsg"] = "proximal"
    inner: int = Field(default=30, gt=0, description="descent steps per level of proximal guidance")
    rate: float = Field(default=0.2, gt=0, le=1, description="g_r of DSG")
    momentum: bool = Field(default=False, description="direction smoothed as in DRAG")
    recurrence: int = Field(default=1, gt=0, description="k, repeats of each level")

    @model_validator(mode="after")
    def _guides(self) -> SamplerParams:
        if self.guidance == "dsg" and self.eta == 0:
            raise ValueError("dsg guides through the noise of a step, so eta must be above 0")
        return self


class Direction:
    """The guidance direction: the gradient, or its momentum-smoothed version (Adam with rate 0)."""

    def __init__(self, momentum: bool) -> None:
        self.momentum = momentum
        self.count = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def __call__(self, gradient: Tensor) -> Tensor:
        """Returns the direction for this gradient; state is kept over all steps."""
        if not self.momentum:
            return gradient
        if self.first is None or self.second is None:
            self.first, self.second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.count += 1
        one, two = BETAS
        self.first = one * self.first + (1 - one) * gradient
        self.second = two * self.second + (1 - two) * gradient.square()
        mean = self.first / (1 - one**self.count)
        spread = self.second / (1 - two**self.count)
        return mean / (spread.sqrt() + 1e-8)


def per_image_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each image, (B, 1, 1, 1)."""
    norm: Tensor = x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return norm


def dsg_step(noise: Tensor, direction: Tensor, sigma: float, rate: float) -> Tensor:
    """Spherical Gaussian constraint (Yang et al., arXiv 2402.03201): a step on the noise's sphere.

    d = r (m / |m|) with m = (1 - rate) sigma noise - rate r direction / |direction| and
    r = sigma sqrt(dim), per image.

    Args:
        noise: standard normal (B, 3, H, W).
        direction: of ascent of the residual; only its direction counts.
        sigma: deviation of the reverse step.
        rate: share of the guidance.
    """
    radius = sigma * math.sqrt(noise[0].numel())
    mixed = (1 - rate) * sigma * noise - rate * radius * direction / per_image_norm(direction)
    return radius * mixed / per_image_norm(mixed)


def straight_through_clamp(x: Tensor) -> Tensor:
    """Clamps to [-1, 1] and passes the gradient as if it had not: a cut gradient guides nowhere."""
    return x + (x.clamp(-1, 1) - x).detach()


def proximal(misfit: Misfit, clean: Tensor, spread: float, weight: Tensor, steps: int) -> Tensor:
    """Data step of DiffPIR (Zhu et al., arXiv 2305.08995, equation 13), by Adam.

    Minimises -log p(z | x) + weight |x - clean|^2 / (2 spread^2) from x = ``clean``, per image:
    what the shares say against what the denoiser says, each with its own variance. The second
    moment of Adam is one per image, so that pixels keep their relative weight.

    Args:
        misfit: negative log-likelihood of the shares.
        clean: the denoiser's estimate (B, 3, H, W) in [-1, 1].
        spread: deviation of that estimate, sqrt((1 - abar) / abar).
        weight: lambda per image, (B, 1, 1, 1).
        steps: descent steps.
    """
    x = clean.clone()
    momentum, scale = torch.zeros_like(x), torch.zeros_like(x[:, :1, :1, :1])
    for step in range(1, steps + 1):
        x = x.detach().requires_grad_()
        pull = (weight * (x - clean).square()).flatten(1).sum(1) / (2 * spread**2)
        (gradient,) = torch.autograd.grad((misfit((x + 1) / 2) + pull).sum(), x)
        momentum = 0.8 * momentum + 0.2 * gradient
        scale = 0.95 * scale + 0.05 * gradient.square().mean((1, 2, 3), keepdim=True)
        mean, root = momentum / (1 - 0.8**step), (scale / (1 - 0.95**step)).sqrt().clamp_min(1e-20)
        rate = 0.3 * min(spread, 0.5) * (1 - (step - 1) / steps)
        x = (x.detach() - rate * mean / root).clamp(-1, 1)
    return x.detach()


def sample(
    prior: Prior,
    misfit: Misfit | None,
    values: int,
    scale: Tensor,
    params: SamplerParams,
    start: Tensor,
    *,
    from_noise: bool = False,
) -> Tensor:
    """Draws images from the prior, guided towards a small residual.

    DPS (Chung et al., arXiv 2209.14687) subtracts ``scale`` times the gradient of the (un-squared)
    residual sqrt(2 misfit / values), which for Gaussian noise is |z - client(x_0)| over its
    expected size; DSG replaces the random part of the step by `dsg_step`; ``proximal`` moves the
    estimate of x_0 itself, without a gradient through the denoiser. With ``recurrence`` k each
    level is repeated k times, with fresh noise between (DRAG, arXiv 2509.11724).

    Args:
        prior: the denoiser.
        misfit: what guides; None samples from the prior alone.
        values: number of values that the adversary received per image.
        scale: per image (B,): step size of DPS, weight lambda of ``proximal``; unused by DSG.
        params: switches.
        start: images (B, 3, H, W) in [0, 1] to begin from; only the shape counts with
            ``from_noise``.
        from_noise: begin at pure noise instead of ``start`` at level ``strength``.

    Returns:
        Images (B, 3, H, W) in [0, 1]: the last estimate of x_0. Random draws come from PyTorch's
        global state.
    """
    levels = torch.linspace(prior.timesteps - 1, 0, params.steps).round().long().tolist()
    if from_noise:
        # At the first levels x_0 = (x - ...) / sqrt(abar) is noise blown up a thousand times.
        levels = [level for level in levels if prior.signal[level] >= LEAST_SIGNAL]
    else:
        levels = levels[-max(1, round(params.strength * params.steps)) :]
    signals = [float(prior.signal[level]) for level in levels] + [1.0]
    x = torch.randn_like(start)
    if not from_noise:
        x = math.sqrt(signals[0]) * (2 * start - 1) + math.sqrt(1 - signals[0]) * x
    direction = Direction(params.momentum)
    scale = scale.view(-1, 1, 1, 1)
    through_denoiser = misfit is not None and params.guidance != "proximal"
    with progress.task("Diffusion sampling", total=len(levels) * params.recurrence) as task:
        for at, level in enumerate(levels):
            now, then = signals[at], signals[at + 1]
            for repeat in range(params.recurrence):
                x = x.detach().requires_grad_(through_denoiser)
                timestep = torch.full((len(x),), level, device=x.device)
                with torch.set_grad_enabled(through_denoiser):
                    eps = prior(x, timestep)
                    clean = straight_through_clamp((x - math.sqrt(1 - now) * eps) / math.sqrt(now))
                push = torch.zeros_like(x)
                if misfit is not None and through_denoiser:
                    residual = (2 * misfit((clean + 1) / 2) / values).clamp_min(1e-12).sqrt()
                    (gradient,) = torch.autograd.grad(residual.sum(), x)
                    push = direction(gradient)
                elif misfit is not None:
                    spread = math.sqrt((1 - now) / now)
                    clean = proximal(misfit, clean, spread, scale, params.inner)
                clean, x = clean.detach(), x.detach()
                # The noise that belongs to this estimate, so that both stay consistent.
                eps = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
                sigma = params.eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
                x = math.sqrt(then) * clean + math.sqrt(max(1 - then - sigma**2, 0.0)) * eps
                noise = torch.randn_like(x)
                if through_denoiser and params.guidance == "dsg":
                    x = x + dsg_step(noise, push, sigma, params.rate)
                else:
                    x = x + sigma * noise - scale * push
                if repeat + 1 < params.recurrence:
                    back = now / then
                    x = math.sqrt(back) * x + math.sqrt(1 - back) * torch.randn_like(x)
                task.advance()
    return ((x + 1) / 2).clamp(0, 1)
