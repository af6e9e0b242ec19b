"""The one descent of the optimisation attacks: many images at once, each as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mibench import progress

BETAS = (0.9, 0.99)
"""Decay rates of Adam. The second one is quicker than usual: gradients shrink by orders of
magnitude on the way."""
EPS = 1e-12
"""Far below the gradient of a single pixel, so that steps do not shrink with the image's size."""
WINDOW = 25
"""Steps over which an objective is averaged before it is asked whether it still falls."""
POINTS = 20
"""Points of the course that is kept, at most."""


@dataclass(frozen=True)
class Schedule:
    """Steps and rates: a constant rate, then a fall to zero on a cosine, for each image apart.

    Attributes:
        steps: most steps of an image.
        lr: the constant rate.
        cooling: share of the steps in which the rate falls to zero.
        tolerance: an image begins to cool at once when its mean objective over `WINDOW` steps has
            fallen by less than this share of itself, and leaves the batch when it has cooled.
            0: never before the end.
    """

    steps: int
    lr: float
    cooling: float = 0.5
    tolerance: float = 0.0

    @property
    def cold(self) -> int:
        """Steps in which the rate falls."""
        return max(1, round(self.cooling * self.steps))


@dataclass(frozen=True)
class Moment:
    """Where a descent stands.

    Attributes:
        rows: places of the images that are still in the batch, (b,), ascending.
        step: number of this step, from 0.
        cooling: whether any image has begun to cool.
    """

    rows: Tensor
    step: int
    cooling: bool


@dataclass(frozen=True)
class Descent:
    """Where a descent ended.

    Attributes:
        values: what was optimised, as it ended for each image.
        objective: last value per image, (B,); not finite if the image diverged.
        steps: steps that each image made, (B,).
        course: objective per image at up to `POINTS` steps, (B, points); an image that has left
            keeps its last one.
        at: these steps.
    """

    values: list[Tensor]
    objective: Tensor
    steps: Tensor
    course: Tensor
    at: list[int]


def descend(
    start: list[Tensor],
    objective: Callable[[list[Tensor], Moment], Tensor],
    schedule: Schedule,
    title: str,
) -> Descent:
    """Minimises an objective per image by Adam (Kingma and Ba, arXiv 1412.6980).

    Adam works value by value, the objectives are added and never averaged, and each image has its
    own rate. So no image feels which others are in the batch.

    Args:
        start: what to optimise, each with the batch axis first.
        objective: (values of the images still there, moment) → their objectives (b,).
        schedule: steps and rates.
        title: what the progress bar says.
    """
    count, device, cold = len(start[0]), start[0].device, schedule.cold
    values = [value.detach().clone() for value in start]
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    rows = torch.arange(count, device=device)
    turn = torch.full((count,), schedule.steps - cold, device=device)
    before, window = (torch.full((count,), top, device=device) for top in (math.inf, 0.0))
    ended = [value.clone() for value in values]
    final, made = torch.full((count,), math.inf, device=device), torch.zeros_like(turn)
    every = math.ceil(schedule.steps / POINTS)
    course: list[Tensor] = []
    cooling = schedule.steps == cold
    with progress.task(title, total=schedule.steps) as task:
        for step in range(schedule.steps):
            loss = _step(values, first, second, objective, Moment(rows, step, cooling),
                         schedule.lr * _heat(step - turn, cold))  # fmt: skip
            window += loss
            final[rows] = loss
            made[rows] = step + 1
            if step % every == 0:
                course.append(final.clone())
            cooling = cooling or step + 1 == schedule.steps - cold
            task.advance()
            if (step + 1) % WINDOW:
                continue
            mean, window = window / WINDOW, torch.zeros_like(window)
            still = before - mean >= schedule.tolerance * mean.abs()
            if schedule.tolerance:
                turn = torch.where(still, turn, turn.clamp_max(step + 1))
            before = mean
            gone = (step + 1 - turn >= cold) | ~loss.isfinite()
            task.advance(0, objective=loss.mean().item())
            cooling = cooling or bool((turn <= step + 1).any())
            if gone.any():
                for end, value in zip(ended, values, strict=True):
                    end[rows[gone]] = value[gone]
                kept = ~gone
                rows, turn, before, window = rows[kept], turn[kept], before[kept], window[kept]
                values, first, second = (
                    [value[kept] for value in group] for group in (values, first, second)
                )
                if not len(rows):
                    task.advance(schedule.steps - step - 1)
                    break
    for end, value in zip(ended, values, strict=True):
        end[rows] = value
    # As long for every group of images, however soon its last one left.
    course += [final.clone()] * (math.ceil(schedule.steps / every) - len(course))
    at = [point * every for point in range(len(course))]
    return Descent(ended, final, made, torch.stack(course, 1), at)


def _step(
    values: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    objective: Callable[[list[Tensor], Moment], Tensor],
    moment: Moment,
    rate: Tensor,
) -> Tensor:
    """One step of Adam in place, with a rate per image (b,); returns the objectives before it."""
    for value in values:
        value.requires_grad_()
    loss = objective(values, moment)
    gradients = torch.autograd.grad(loss.sum(), values)
    one, two = (1 - beta ** (moment.step + 1) for beta in BETAS)
    with torch.no_grad():
        for value, gradient, mean, spread in zip(values, gradients, first, second, strict=True):
            value.requires_grad_(False)
            mean.lerp_(gradient, 1 - BETAS[0])
            spread.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            pace = rate.view(-1, *(1,) * (value.ndim - 1)) / one
            value.sub_(pace * mean / ((spread / two).sqrt() + EPS))
    return loss.detach()


def _heat(cooled: Tensor, cold: int) -> Tensor:
    """Rate, as a share of the constant one, of images that have cooled for so many steps."""
    return 0.5 * (1 + (math.pi * cooled.clamp(0, cold) / cold).cos())
