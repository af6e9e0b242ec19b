"""Checks that gradients through a client are there and true, so that attacks can follow them."""

from __future__ import annotations

import torch
from torch import Tensor

from mibench import seeding
from mibench.checks.battery import Battery, Outcome, failed, passed, skipped, warned
from mibench.checks.shares import named
from mibench.checks.trial import Trial
from mibench.defenses.base import Shares

gradients: Battery[Trial] = Battery()

MOST_ZEROS = 0.5
"""Share of pixels that may have no gradient at all."""
NEAR, FAR = 1e-5, 3e-2
"""Steps of the finite differences, in units of the pixels' range."""
TRUE, USABLE = 0.95, 0.5
"""Correlation of autograd and secants above which a gradient is true, or good enough to follow."""
ATTACKED, ASCENT, RATE = 16, 60, 0.02
LITTLE, SOME = 0.05, 0.2
"""Share of the way to the true image's log-likelihood that the ascent must come."""
READABLE = 1.0
"""Decibels by which the linear reading must beat the mean image to say that something leaks."""


@gradients.check(
    "grad-zero",
    tried="counted the pixels in which the log-likelihood has a gradient of exactly zero",
    advice="give predict() a smooth surrogate of what rounds, signs or saturates; detach nothing",
)
def grad_zero(trial: Trial) -> Outcome:
    """Most pixels have a gradient."""
    shares = trial.send(trial.some.roll(1, 0), trial.seed, "zero")
    told, found = trial.client.ask("defense.likelihood", {"images": trial.some, **named(shares)})
    if told["constant"] or "images.grad" not in found:
        return failed("the log-likelihood does not depend on the image differentiably")
    gradient = found["images.grad"]
    if not bool(gradient.isfinite().all()):
        return failed("some gradients are infinite or not a number")
    share = float((gradient == 0).all(1).double().mean())
    words = f"{share:.1%} of the pixels have no gradient"
    return failed(words) if share > MOST_ZEROS else passed(words)


@gradients.check(
    "grad-true",
    tried="compared autograd through predict() with finite differences",
    advice="let a custom backward pass be the derivative of its forward pass, or near it",
)
def grad_true(trial: Trial) -> Outcome:
    """Autograd tells the slope of what predict() computes."""
    images = trial.some[:8]
    draws = seeding.generator(trial.seed, "directions")
    coarse = torch.randn(6 * len(images), 3, 8, 8, generator=draws)
    smooth = torch.nn.functional.interpolate(coarse, images.shape[2:], mode="bilinear")
    directions = smooth.view(6, *images.shape)
    told, found = trial.client.ask(
        "defense.slopes",
        {"images": 0.1 + 0.8 * images, "directions": directions},
        near=NEAR,
        far=FAR,
        seed=trial.seed,
    )
    own = found["autograd"]
    if not bool(own.abs().max() > 0):
        return skipped("autograd gives zero everywhere; see grad-zero")
    # In single precision a small step drowns in rounding.
    near = _correlation(own, found["near"]) if told["double"] else 0.0
    far = _correlation(own, found["far"])
    words = f"correlation with secants {near:.3f} near and {far:.3f} far"
    if not told["double"]:
        words += " (single precision: near is not measured)"
    if near > TRUE or far > TRUE:
        return passed(words)
    if max(near, far) > USABLE:
        return warned(f"a surrogate, not the slope itself: {words}")
    return failed(words)


@gradients.check(
    "grad-masked",
    tried="read images linearly, and went on from there along the gradient of the likelihood",
    advice="see to it that the gradient of log_likelihood() leads towards what was sent",
)
def grad_masked(trial: Trial) -> Outcome:
    """Where a learned reading gets something, the gradient must be of use to go on from it."""
    learn, test = trial.many[ATTACKED:], trial.many[:ATTACKED]
    known, received = _sent(trial, learn, "learn"), _sent(trial, test, "test")
    guess = _ridge(_flat(known), learn.flatten(1), _flat(received)).view_as(test).clamp(0, 1)
    blind = learn.mean(0, keepdim=True).expand_as(test)
    gain = _psnr(guess, test) - _psnr(blind, test)
    words = f"a linear reading beats the mean image by {gain:.1f} dB"
    if gain < READABLE:
        return skipped(f"{words}, so little leaks that there is nothing to compare")
    start, end, best = _climb(trial, guess, received, test)
    way = ((end - start) / (best - start).clamp_min(1e-6))[best > start]
    if not len(way):
        return failed(f"{words}, and its guess is likelier than the true image")
    share = float(way.clamp(-1, 1).median())
    words += f"; {ASCENT} steps along the gradient go {share:.0%} of the way to the true image"
    if share < LITTLE:
        return failed(f"the gradient leads nowhere: {words}")
    return warned(words) if share < SOME else passed(words)


def _climb(trial: Trial, guess: Tensor, received: Shares, test: Tensor) -> tuple[Tensor, ...]:
    """Log-likelihood of the guess, of the best image on the way, and of the true image."""

    def ask(images: Tensor) -> tuple[Tensor, Tensor]:
        _, found = trial.client.ask("defense.likelihood", {"images": images, **named(received)})
        gradient = found.get("images.grad", torch.zeros_like(images))
        return found["value"].double(), gradient.nan_to_num()

    image = guess.clone().requires_grad_()
    optimiser = torch.optim.Adam([image], lr=RATE)
    start, gradient = ask(image.detach())
    best = start
    for step in range(ASCENT):
        optimiser.param_groups[0]["lr"] = RATE * (1 - step / ASCENT)
        image.grad = -gradient
        optimiser.step()
        with torch.no_grad():
            image.clamp_(0, 1)
        value, gradient = ask(image.detach())
        best = torch.maximum(best, value)
    return start, best, ask(test)[0]


def _ridge(x: Tensor, y: Tensor, wanted: Tensor) -> Tensor:
    """Ridge regression from x to y, by the kernel; its weight is chosen on a tenth of the rows."""
    x, y, wanted = x.double(), y.double(), wanted.double()
    mean, level = x.mean(0), y.mean(0)
    scale = (x - mean).square().mean().sqrt().clamp_min(1e-12)
    x, wanted = (x - mean) / scale, (wanted - mean) / scale
    kernel, across = x @ x.T, wanted @ x.T
    held = len(x) // 10
    best, weight = torch.inf, 1.0
    power = max(float(kernel.diagonal().mean()), 1e-12)  # 0 where all messages are alike
    for candidate in (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0):
        inner = kernel[held:, held:] + candidate * power * torch.eye(len(x) - held).double()
        fitted = kernel[:held, held:] @ torch.linalg.solve(inner, y[held:] - level) + level
        error = float((fitted - y[:held]).square().mean())
        if error < best:
            best, weight = error, candidate
    solved: Tensor = torch.linalg.solve(
        kernel + weight * power * torch.eye(len(x)).double(), y - level
    )
    answer: Tensor = across @ solved + level
    return answer.float()


def _sent(trial: Trial, images: Tensor, name: str) -> Shares:
    return trial.send(images, trial.seed, "masked", name)


def _flat(shares: Shares) -> Tensor:
    return torch.cat([one.flatten(1).float() for one in shares], 1)


def _psnr(guess: Tensor, truth: Tensor) -> float:
    return float((-10 * (guess - truth).square().flatten(1).mean(1).log10()).mean())


def _correlation(one: Tensor, other: Tensor) -> float:
    a, b = one.double().flatten(), other.double().flatten()
    if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
        return 0.0
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))
