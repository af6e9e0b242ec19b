"""Whether a message is a Gaussian sample about something, and about what."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mibench import seeding
from mibench.defenses.base import Shares
from mibench.information.base import View
from mibench.threat import Target

TRIED = 64
"""Images on which a law is examined, at most."""
STATED = 1e-3
"""How far, relatively, the stated law may be from the Gaussian form."""
FOUND = 0.05
"""How far real messages may be from the stated law, beside what chance allows."""
CHUNK = 256


@dataclass(frozen=True)
class GaussianLaw:
    """z = mu(x) + sigma(x) e, e ~ N(0, I), independent in every value and message.

    Attributes:
        target: whose shares.
        deviation: sigma where it is one number for all values and images; None where `predict`
            states it for each.
        axis: of each share, along which `predict` then has mu and log sigma one after the other.
        device: where the client computes.
    """

    target: Target
    deviation: float | None
    axis: int
    device: torch.device

    @torch.no_grad()
    def of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mu and log sigma (N, d) of images (N, 3, H, W), all shares joined, on the CPU."""
        means, logs = [], []
        for some in torch.split(images, CHUNK):
            mean, log_deviation = self._split(self.target.client(some.to(self.device)))
            means.append(mean.cpu())
            logs.append(log_deviation.cpu())
        return torch.cat(means), torch.cat(logs)

    def _split(self, predicted: Shares) -> tuple[Tensor, Tensor]:
        if self.deviation is not None:
            mean = _flat(predicted)
            return mean, mean.new_full((1, 1), math.log(self.deviation)).expand_as(mean)
        halves = [one.chunk(2, self.axis) for one in predicted]
        return _flat(tuple(h[0] for h in halves)), _flat(tuple(h[1] for h in halves))


@torch.no_grad()
def gaussian_law(view: View) -> GaussianLaw | str:
    """Finds the Gaussian law of a defense's messages, or says why there is none.

    A defense does not state the form of its law; it states the density of a message. So the density
    is tried at messages beside the expected one: is its logarithm a parabola of one width, or of
    the widths that `predict` gives? Then real messages are compared with it: their deviation, their
    fourth moment, and that neither neighbouring values nor two messages of one image are
    correlated. That is a rough test, and no proof of independence.
    """
    images = view.validation.images[:TRIED].to(view.device)
    with seeding.stream(view.seed, "law"):
        sent, again = view.target.query(images), view.target.query(images)
    predicted = view.target.client(images)
    if all(map(torch.equal, sent, again)):
        return "the message is deterministic: without noise I(x; z) is infinite, or H(x)"
    if all(a.shape == b.shape for a, b in zip(sent, predicted, strict=True)):
        law = _of_one_width(view, sent, predicted)
    else:
        law = _of_stated_widths(view, sent, predicted)
    if isinstance(law, str):
        return law
    mean, log_deviation = law.of(images.cpu())
    residuals = [(_flat(one).cpu() - mean) * (-log_deviation).exp() for one in (sent, again)]
    return law if _standard(*residuals) else "real messages do not follow the law that it states"


def _of_one_width(view: View, sent: Shares, predicted: Shares) -> GaussianLaw | str:
    residual = tuple(a - b for a, b in zip(sent, predicted, strict=True))
    found = torch.cat(
        [
            power / (2 * drop)
            for power, drop in _tried(view.target, residual, predicted, predicted, residual)
        ]
    )
    low, high = float(found.min()), float(found.max())
    if not (math.isfinite(high) and high > 0 and high - low <= STATED * high):
        return "its noise is not additive and Gaussian of one deviation"
    return GaussianLaw(view.target, math.sqrt(float(found.median())), 0, view.device)


def _of_stated_widths(view: View, sent: Shares, predicted: Shares) -> GaussianLaw | str:
    for axis in (1, -1):
        wanted = [list(share.shape) for share in sent]
        for shape in wanted:
            shape[axis] *= 2
        if wanted != [list(one.shape) for one in predicted]:
            continue
        halves = [one.chunk(2, axis) for one in predicted]
        mean = tuple(half[0] for half in halves)
        residual = tuple(a - b for a, b in zip(sent, mean, strict=True))
        scaled = tuple(r * (-h[1]).exp() for r, h in zip(residual, halves, strict=True))
        tried = _tried(view.target, residual, mean, predicted, scaled)
        off = torch.cat([power / (2 * drop) - 1 for power, drop in tried])
        if bool(off.isfinite().all()) and float(off.abs().max()) <= STATED:
            return GaussianLaw(view.target, None, axis, view.device)
    return "its noise is not Gaussian with a mean and a deviation that it states"


def _tried(
    target: Target, residual: Shares, mean: Shares, predicted: Shares, measured: Shares
) -> list[tuple[Tensor, Tensor]]:
    """How much of ``measured`` is in a step from the mean, and how far log p falls, (B,) each.

    The steps are parts of ``residual``: half and twice of it, every other value, the others.
    """
    top = target.log_likelihood(mean, predicted)
    found = []
    for scale, start in ((0.5, None), (2.0, None), (1.0, 0), (1.0, 1)):
        step, counted = (_thinned(one, scale, start) for one in (residual, measured))
        moved = tuple(a + b for a, b in zip(mean, step, strict=True))
        drop = top - target.log_likelihood(moved, predicted)
        found.append((_flat(counted).square().sum(1), drop))
    return found


def _thinned(shares: Shares, scale: float, start: int | None) -> Shares:
    """Scaled, and with ``start`` only every second value from there."""
    kept = []
    for share in shares:
        mask = torch.ones_like(share[0]).flatten()
        if start is not None:
            mask = torch.zeros_like(mask)
            mask[start::2] = 1
        kept.append(scale * share * mask.view(share.shape[1:]))
    return tuple(kept)


def _standard(one: Tensor, other: Tensor) -> bool:
    """Whether two draws (B, d) look like independent N(0, 1), roughly."""
    one, other = one.double(), other.double()
    chance = 4 / math.sqrt(one.numel())
    power = float(one.square().mean())
    return (
        abs(power - 1) <= FOUND + math.sqrt(2) * chance
        and abs(float(one.pow(4).mean()) / power**2 - 3) <= 3 * FOUND + math.sqrt(24) * chance
        and abs(float((one * other).mean())) <= FOUND + chance
        and abs(float((one[:, 1:] * one[:, :-1]).mean())) <= FOUND + chance
    )


def _flat(shares: Shares) -> Tensor:
    return torch.cat([share.flatten(1) for share in shares], 1)
