"""One guided sampler for all diffusion variants: DPS, DSG and DRAG, proximal, and RED-diff.

The reverse process is DDIM (Song et al., arXiv 2010.02502) with stochasticity eta, over the states
of whatever prior is given. Everything is per image: norms, clips, directions and step sizes never
mix the images of a batch.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mibench import progress
from mibench.attacks.diffusion.denoiser import Prior, straight_through_clamp
from mibench.attacks.diffusion.misfit import Misfit
from mibench.params import Parameters

BETAS = (0.9, 0.999)
"""Decay rates of the momentum direction (Adam's, as in DRAG)."""
RED_DIFF_BETAS = (0.9, 0.99)
"""Decay rates of RED-diff's Adam."""
THROUGH_DENOISER = ("dps", "dsg")
"""Guidance by the gradient of the residual in x_t, which goes through the denoiser."""


class SamplerParams(Parameters):
    """Switches of the guided sampler."""

    steps: int = Field(default=50, gt=0, description="noise levels from T to 0")
    spacing: Literal["even", "leading"] = Field(
        default="even", description="levels from T - 1 to 0, or every (T / steps)-th from 0"
    )
    least_signal: float = Field(
        default=5e-3, ge=0, lt=1,
        description="abar at which sampling from noise begins; before it all is noise to the eye",
    )  # fmt: skip
    strength: float = Field(
        default=0.1, gt=0, le=1, description="share of the levels run from the initial image"
    )
    eta: float = Field(default=1.0, ge=0, le=1, description="stochasticity: 0 is DDIM, 1 is DDPM")
    guidance: Literal["proximal", "dps", "dsg", "red-diff"] = Field(
        default="proximal", description="how the shares guide; see `sampler.sample`"
    )
    inner: int = Field(default=30, gt=0, description="descent steps per level of proximal guidance")
    lr: float = Field(default=0.1, gt=0, description="learning rate of RED-diff's Adam")
    rate: float = Field(default=0.2, gt=0, le=1, description="g_r of DSG")
    momentum: bool = Field(default=False, description="direction smoothed as in DRAG")
    recurrence: int = Field(default=1, gt=0, description="k, repeats of each level")
    clamp: bool = Field(
        default=True, description="keep the estimate of x_0 inside the range of pixels"
    )
    clip: float | None = Field(
        default=None, gt=0, description="largest norm of an image's gradient, as in DRAG"
    )
    tv: float = Field(default=0.0, ge=0, description="weight of the total variation of x_0")
    l2: float = Field(default=0.0, ge=0, description="weight of the mean square of x_0")

    @model_validator(mode="after")
    def _guides(self) -> SamplerParams:
        if self.guidance == "dsg" and self.eta == 0:
            raise ValueError("dsg guides through the noise of a step, so eta must be above 0")
        ignored = [name for name in ("momentum", "clip", "tv", "l2") if getattr(self, name)]
        if ignored and self.guidance not in THROUGH_DENOISER:
            raise ValueError(
                f"{', '.join(ignored)} shapes the gradient of dps and dsg; {self.guidance} has none"
            )
        return self


class Direction:
    """The direction of descent: the gradient, or Adam's step for it, with state kept over all.

    Args:
        betas: Adam's decay rates; None leaves the gradient as it is.
    """

    def __init__(self, betas: tuple[float, float] | None) -> None:
        self.betas = betas
        self.count = 0
        self.first: Tensor | None = None
        self.second: Tensor | None = None

    def __call__(self, gradient: Tensor) -> Tensor:
        """Returns the direction for this gradient, element by element."""
        if self.betas is None:
            return gradient
        if self.first is None or self.second is None:
            self.first, self.second = torch.zeros_like(gradient), torch.zeros_like(gradient)
        self.count += 1
        one, two = self.betas
        self.first = one * self.first + (1 - one) * gradient
        self.second = two * self.second + (1 - two) * gradient.square()
        mean = self.first / (1 - one**self.count)
        spread = self.second / (1 - two**self.count)
        return mean / (spread.sqrt() + 1e-8)


def per_image_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each image, (B, 1, 1, 1)."""
    norm: Tensor = x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)
    return norm


def clipped(gradient: Tensor, limit: float | None) -> Tensor:
    """Shortens the gradient of each image to a norm of ``limit`` at most; None leaves it."""
    if limit is None:
        return gradient
    return gradient * (limit / per_image_norm(gradient)).clamp_max(1)


def variation(images: Tensor) -> Tensor:
    """Total variation per image (B,): sum of |differences| over values, as in DRAG."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).sum(1)
    right = (images[..., 1:] - images[..., :-1]).abs().flatten(1).sum(1)
    return (down + right) / images[0].numel()


def dsg_step(noise: Tensor, direction: Tensor, sigma: float, rate: float) -> Tensor:
    """Spherical Gaussian constraint (Yang et al., arXiv 2402.03201): a step on the noise's sphere.

    d = r (m / |m|) with m = (1 - rate) sigma noise - rate r direction / |direction| and
    r = sigma sqrt(dim), per image.

    Args:
        noise: standard normal (B, ...).
        direction: of ascent of the residual; only its direction counts.
        sigma: deviation of the reverse step.
        rate: share of the guidance.
    """
    radius = sigma * math.sqrt(noise[0].numel())
    mixed = (1 - rate) * sigma * noise - rate * radius * direction / per_image_norm(direction)
    return radius * mixed / per_image_norm(mixed)


def proximal(
    prior: Prior, misfit: Misfit, clean: Tensor, spread: float, weight: Tensor, steps: int
) -> Tensor:
    """Data step of DiffPIR (Zhu et al., arXiv 2305.08995, equation 13), by Adam.

    Minimises -log p(z | x) + weight |x - clean|^2 / (2 spread^2) from x = ``clean``, per image:
    what the shares say against what the denoiser says, each with its own variance. The second
    moment of Adam is one per image, so that pixels keep their relative weight.

    Args:
        prior: decodes and confines states.
        misfit: what the shares say.
        clean: the denoiser's estimate of the state (B, ...).
        spread: deviation of that estimate, sqrt((1 - abar) / abar).
        weight: lambda per image, (B, 1, 1, 1).
        steps: descent steps.
    """
    x = clean.clone()
    momentum, scale = torch.zeros_like(x), torch.zeros_like(x[:, :1, :1, :1])
    for step in range(1, steps + 1):
        x = x.detach().requires_grad_()
        pull = (weight * (x - clean).square()).flatten(1).sum(1) / (2 * spread**2)
        fit = misfit.nats(_pixels(prior.decode(x)))
        (gradient,) = torch.autograd.grad((fit + pull).sum(), x)
        momentum = 0.8 * momentum + 0.2 * gradient
        scale = 0.95 * scale + 0.05 * gradient.square().mean((1, 2, 3), keepdim=True)
        mean, root = momentum / (1 - 0.8**step), (scale / (1 - 0.95**step)).sqrt().clamp_min(1e-20)
        rate = 0.3 * min(spread, 0.5) * (1 - (step - 1) / steps)
        x = prior.confine(x.detach() - rate * mean / root)
    return x.detach()


def sample(
    prior: Prior,
    misfit: Misfit | None,
    scale: Tensor,
    params: SamplerParams,
    start: Tensor,
    *,
    from_noise: bool = False,
) -> Tensor:
    """Draws images from the prior, guided towards a small residual.

    ``dps`` (Chung et al., arXiv 2209.14687) subtracts ``scale`` times the gradient of the residual;
    ``dsg`` replaces the random part of the step by `dsg_step`; ``proximal`` moves the estimate of
    x_0 itself and ``red-diff`` optimises x_0 (see `red_diff`), both without a gradient through the
    denoiser. With ``recurrence`` k each level is repeated k times, with fresh noise between (DRAG,
    arXiv 2509.11724).

    Args:
        prior: the denoiser.
        misfit: what guides; None samples from the prior alone.
        scale: per image (B,): step size of DPS, weight lambda of ``proximal`` and ``red-diff``;
            unused by DSG.
        params: switches.
        start: images (B, 3, H, W) in [0, 1] to begin from. With ``from_noise`` they are what an
            image is where sampling diverges, and where RED-diff begins.
        from_noise: begin at pure noise instead of ``start`` at level ``strength``.

    Returns:
        Images (B, 3, H, W) in [0, 1]: the last estimate of x_0. Random draws come from PyTorch's
        global state.
    """
    levels = noise_levels(prior, params, from_noise=from_noise)
    with torch.no_grad():
        initial = prior.encode(start)
    if misfit is not None and params.guidance == "red-diff":
        states = red_diff(prior, misfit, scale, params, levels, initial)
    else:
        states = _reverse(prior, misfit, scale, params, levels, initial, from_noise=from_noise)
    images = prior.images(states)
    # A step size that is too large for one image must not end the run of all.
    fine = images.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
    return torch.where(fine, images, start)


def noise_levels(prior: Prior, params: SamplerParams, *, from_noise: bool) -> list[int]:
    """Returns the timesteps that are run, descending."""
    total = prior.timesteps
    if params.spacing == "leading":
        stride = max(1, total // params.steps)
        levels = list(range(0, min(total, stride * params.steps), stride))[::-1]
    else:
        levels = torch.linspace(total - 1, 0, params.steps).round().long().tolist()
    if from_noise:
        # At the first levels x_0 = (x - ...) / sqrt(abar) is noise blown up a thousand times.
        clear = [level for level in levels if prior.signal[level] >= params.least_signal]
        return clear or levels[-1:]
    return levels[-max(1, round(params.strength * params.steps)) :]


def red_diff(
    prior: Prior,
    misfit: Misfit,
    scale: Tensor,
    params: SamplerParams,
    levels: list[int],
    initial: Tensor,
) -> Tensor:
    """RED-diff (Mardani et al., arXiv 2305.04391, algorithm 1): a variational mean, no sampling.

    Adam on -log p(z | mu) / n + scale sqrt((1 - abar) / abar) mean(sg[eps(x_t, t) - eps] mu) with
    x_t = sqrt(abar) mu + sqrt(1 - abar) eps and fresh eps at every step, t descending. n is the
    number of received values; the paper's data term is that of unit Gaussian noise, and its
    ``scale`` 0.25. One forward pass of the denoiser and one gradient of the client a step.

    Returns:
        The state mu after the last level.
    """
    size = initial[0].numel()
    state, direction = initial.detach(), Direction(RED_DIFF_BETAS)
    scale = scale.view(-1, 1, 1, 1)
    with progress.task("RED-diff", total=len(levels) * params.recurrence) as task:
        for level in levels:
            now = float(prior.signal[level])
            timestep = torch.full((len(state),), level, device=state.device)
            for _ in range(params.recurrence):
                noise = torch.randn_like(state)
                with torch.no_grad():
                    eps = prior(math.sqrt(now) * state + math.sqrt(1 - now) * noise, timestep)
                state = state.detach().requires_grad_()
                fit = misfit.nats(_pixels(prior.decode(state))) / misfit.values
                (data,) = torch.autograd.grad(fit.sum(), state)
                # Both times the number of values, to which Adam is blind but for its epsilon.
                pull = scale * math.sqrt((1 - now) / now) * (eps - noise)
                state = state.detach() - params.lr * direction(size * data + pull)
                task.advance()
    return state


def _reverse(
    prior: Prior,
    misfit: Misfit | None,
    scale: Tensor,
    params: SamplerParams,
    levels: list[int],
    initial: Tensor,
    *,
    from_noise: bool,
) -> Tensor:
    """The reverse process; returns the last state."""
    signals = [float(prior.signal[level]) for level in levels] + [1.0]
    x = torch.randn_like(initial)
    if not from_noise:
        x = math.sqrt(signals[0]) * initial + math.sqrt(1 - signals[0]) * x
    direction = Direction(BETAS if params.momentum else None)
    scale = scale.view(-1, 1, 1, 1)
    through = misfit is not None and params.guidance in THROUGH_DENOISER
    with progress.task("Diffusion sampling", total=len(levels) * params.recurrence) as task:
        for at, level in enumerate(levels):
            now, then = signals[at], signals[at + 1]
            timestep = torch.full((len(x),), level, device=x.device)
            for repeat in range(params.recurrence):
                x = x.detach().requires_grad_(through)
                with torch.set_grad_enabled(through):
                    eps = prior(x, timestep)
                    clean = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
                    if params.clamp:
                        clean = prior.confine(clean)
                push = torch.zeros_like(x)
                if misfit is not None and through:
                    loss = _guiding(misfit, prior.decode(clean), params)
                    (gradient,) = torch.autograd.grad(loss.sum(), x)
                    push = direction(clipped(gradient, params.clip))
                elif misfit is not None:
                    spread = math.sqrt((1 - now) / now)
                    clean = proximal(prior, misfit, clean, spread, scale, params.inner)
                clean, x = clean.detach(), x.detach()
                # The noise that belongs to this estimate, so that both stay consistent.
                eps = (x - math.sqrt(now) * clean) / math.sqrt(1 - now)
                sigma = params.eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
                x = math.sqrt(then) * clean + math.sqrt(max(1 - then - sigma**2, 0.0)) * eps
                noise = torch.randn_like(x)
                if through and params.guidance == "dsg":
                    x = x + dsg_step(noise, push, sigma, params.rate)
                else:
                    x = x + sigma * noise - scale * push
                if repeat + 1 < params.recurrence:
                    back = now / then
                    x = math.sqrt(back) * x + math.sqrt(1 - back) * torch.randn_like(x)
                task.advance()
    return x


def _guiding(misfit: Misfit, images: Tensor, params: SamplerParams) -> Tensor:
    """What the gradient through the denoiser lessens (B,), for images around [-1, 1]."""
    loss = misfit.residual(_pixels(images))
    if params.tv:
        loss = loss + params.tv * variation(images)
    if params.l2:
        loss = loss + params.l2 * images.square().flatten(1).mean(1)
    return loss


def _pixels(images: Tensor) -> Tensor:
    """Images around [-1, 1] → what the client may be given, in [0, 1]; the gradient passes."""
    return (straight_through_clamp(images) + 1) / 2
