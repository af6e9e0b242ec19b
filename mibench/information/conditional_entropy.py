"""An upper bound of the mutual information, where noise makes it finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.information.base import Measure, Reading, View, nothing
from mibench.information.law import gaussian_law
from mibench.metrics.intervals import estimate_mean
from mibench.registry import measures

DIRECTIONS = 1024
"""Images that the directions of the fit come from, at most, and as many for its variances."""
LEAST = 8
NEGLIGIBLE = 1e-5
"""Variance along a direction, over the largest, below which it is rounding."""


@measures.register("conditional-entropy-bound", paper="Xia et al., CVPR 2025, arXiv 2503.00383")
class ConditionalEntropyBound(Measure):
    """The term that noise bounds in H(x|z) = H(x) - I(x; z): what one message can tell at most.

    For any attack, the squared error per value is at least exp(2 H(x|z) / d_x) / (2 pi e). H(x) of
    images is not known, so the bound of I(x; z) is reported, in nats, and no error. For
    z = c(x) + s e the paper bounds I(x; z) through a mixture of Gaussians that is fitted to c; with
    one of them it is 1/2 log det(I + Cov(c) / s^2).

    That covariance cannot be had: from n images it has rank n - 1 at most, the logarithm misses all
    other directions, and the "upper bound" comes out too low. So we use the bound that holds for
    any Gaussian q, however it was fitted, and on images that it has not seen:

        I(x; z) <= E_x KL( N(c(x), sigma(x)^2) || q ),

    with equality to the above for q = N(E c, Cov(c) + s^2 I). Half of the auxiliary images gives
    mean and principal directions of c, the other half the variances along them and the mean one of
    the rest; the expectation is taken on validation images. A poor fit can only raise it. The same
    formula serves a deviation that differs from value to value and from image to image.

    The record's facts hold the plug-in value 1/2 sum log(1 + lambda_i) of the first half beside it,
    to show how far rank limits it. The interval resamples validation images. Empty for a
    deterministic message, and for noise that is not Gaussian.
    """

    unit = "nats"

    def measure(self, view: View, checkpoint: Checkpoint) -> Reading:  # noqa: ARG002
        """Fits on auxiliary images, evaluates on validation images."""
        law = gaussian_law(view)
        if isinstance(law, str):
            return nothing(law)
        half = min(DIRECTIONS, len(view.auxiliary) // 2)
        if half < LEAST:
            return nothing(f"needs {2 * LEAST} auxiliary images")
        images = view.auxiliary.images
        first, second = (law.of(images[at : at + half]) for at in (0, half))
        fit = Fit(first, second)
        values = fit.divergence(*law.of(view.validation.images))
        estimate = estimate_mean(values, seeding.derive(view.seed, "intervals"))
        return Reading(
            estimate,
            f"upper bound of one message, single Gaussian fitted to {2 * half:,} auxiliary images",
            {
                "values": first[0].shape[1],
                "directions": len(fit.along),
                "plug_in_nats": fit.plug_in,
                "deviation": law.deviation,
            },
        )


class Fit:
    """A Gaussian q of full rank: variances along some directions, one variance in all others.

    Everything is in units of the noise: each value is divided by its root mean square deviation.

    Args:
        first: mu and log sigma (n, d) that give mean, unit and directions.
        second: those of other images, which give the variances.
    """

    def __init__(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
        mean, log_deviation = first
        self.unit = (2 * log_deviation).exp().mean(0).sqrt()
        self.centre = mean.mean(0)
        rows = (mean - self.centre) / self.unit
        # Of the n x n products: the d x d covariance would not fit into memory.
        powers, vectors = torch.linalg.eigh((rows @ rows.T).double() / len(rows))
        kept = powers > NEGLIGIBLE * powers.max().clamp_min(1e-30)
        powers, vectors = powers[kept], vectors[:, kept]
        scaled = vectors / (powers * len(rows)).sqrt()
        self.directions = (rows.T.double() @ scaled).float()
        self.plug_in = float(powers.log1p().sum() / 2)
        projected, rest, _ = self._seen(second[0])
        others = mean.shape[1] - len(powers)
        self.along = projected.square().mean(0)
        self.beside = float(rest.mean()) / others if others else 0.0

    def divergence(self, mean: Tensor, log_deviation: Tensor) -> Tensor:
        """KL(N(mu, sigma^2) || q) in nats of each row, (N,) in double precision."""
        projected, rest, d = self._seen(mean)
        log_unit = self.unit.log()
        noise = (2 * (log_deviation - log_unit)).exp()
        along = (noise @ self.directions.square()).double()
        beside = noise.double().sum(1) - along.sum(1)
        others = d - len(self.along)
        spent = ((along + projected.square()) / (1 + self.along)).sum(1)
        spent = spent + (beside + rest) / (1 + self.beside)
        volume = float(self.along.log1p().sum()) + others * math.log1p(self.beside)
        narrow = 2 * (log_deviation - log_unit).double().sum(1)
        nats: Tensor = (spent - d + volume - narrow) / 2
        return nats

    def _seen(self, mean: Tensor) -> tuple[Tensor, Tensor, int]:
        """Coordinates along the directions, squared length of the rest, and all values' number."""
        rows = (mean - self.centre) / self.unit
        projected = (rows @ self.directions).double()
        rest = rows.double().square().sum(1) - projected.square().sum(1)
        return projected, rest.clamp_min(0), rows.shape[1]
