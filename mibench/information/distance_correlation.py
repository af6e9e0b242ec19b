"""Whether images that lie far apart have shares that lie far apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mibench.artifacts import Checkpoint
from mibench.information.base import Measure, Reading, View, nothing
from mibench.information.intervals import student
from mibench.metrics.intervals import Estimate
from mibench.registry import measures

GROUPS = 32
"""Groups of images of the jackknife, at most."""
LEAST = 8
"""Images below which nothing is measured: half of them are the fewest for an estimate."""
ROUNDING = 1e-24
"""Squared distance over the mean squared norm that double precision cannot tell from 0."""
BLOCK = 2**24
"""Values that are held in double precision at a time, at most."""


@measures.register("distance-correlation", paper="Székely and Rizzo, Ann. Statist. 2014")
class DistanceCorrelation(Measure):
    """Unbiased squared distance correlation between images and shares.

    R*(x, z) = (A . B) / sqrt((A . A)(B . B)), where A and B are the U-centred matrices of Euclidean
    distances between the images and between their shares,

        A_ij = a_ij - sum_l a_il / (n - 2) - sum_k a_kj / (n - 2) + sum_kl a_kl / ((n-1)(n-2)),

    and 0 on the diagonal. It is 0 in expectation for independent samples and can be below it, 1
    where z is x up to scale, shift and rotation. The biased form is near 1 for independent data of
    as many dimensions as images have, so its value says nothing: 0.994 at n = 128, 12,288 and 3,072
    dimensions.

    The interval is that of a jackknife over up to 32 groups of images (delete one group), with
    Student's t. A bootstrap would draw images twice, whose distance is 0, and be biased upward.

    It is a measure of dependence, not of information: two shares of the same content have another
    value where one stretches some directions. Noise lowers it.
    """

    def measure(self, view: View, checkpoint: Checkpoint) -> Reading:  # noqa: ARG002
        """On the validation images, all corrupted servers' shares as one vector."""
        sent, device = view.validation, view.device
        if len(sent) < LEAST:
            return nothing(f"needs {LEAST} validation images, and there are {len(sent)}")
        a = distances([sent.images], device)
        b = distances(sent.shares, device)
        value = unbiased(a, b)
        if value is None:
            return nothing("the shares, or the images, are all the same")
        groups = torch.arange(len(a), device=device) % min(GROUPS, len(a) // 2)
        kept = [groups != group for group in range(int(groups.max()) + 1)]
        parts = [unbiased(a[keep][:, keep], b[keep][:, keep]) for keep in kept]
        if None in parts:
            return nothing("the shares are the same for nearly all images")
        spread = torch.tensor(parts, dtype=torch.float64)
        count = len(spread)
        error = math.sqrt((count - 1) * float(spread.var(correction=0)))
        half = student(count - 1) * error
        return Reading(Estimate(value, value - half, value + half, len(a)))


def unbiased(a: Tensor, b: Tensor) -> float | None:
    """Squared distance correlation of two matrices of distances (n, n), n >= 4.

    Returns:
        In [-1, 1]; None where a sample is constant.
    """
    a, b = _u_centred(a), _u_centred(b)
    product = float(a.square().sum() * b.square().sum())
    return float((a * b).sum()) / math.sqrt(product) if product > 0 else None


def distances(samples: Sequence[Tensor], device: torch.device) -> Tensor:
    """Euclidean distances (n, n) in double precision between the rows of (n, ...) tensors.

    Several tensors count as one whose rows are concatenated.
    """
    n = len(samples[0])
    gram = torch.zeros(n, n, dtype=torch.float64, device=device)
    power = 0.0
    for sample in samples:
        for columns in torch.split(sample.flatten(1), max(1, BLOCK // n), dim=1):
            part = columns.to(device, torch.float64)
            power += float(part.square().sum()) / n
            part = part - part.mean(0)  # distances stay, and fewer digits cancel
            gram += part @ part.T
    norms = gram.diag()
    squares = (norms[:, None] + norms[None] - 2 * gram).fill_diagonal_(0)
    # What rounding leaves of equal rows is no distance.
    return squares.where(squares > ROUNDING * power, 0).sqrt()


def _u_centred(d: Tensor) -> Tensor:
    n = len(d)
    rows, total = d.sum(1) / (n - 2), d.sum() / ((n - 1) * (n - 2))
    return (d - rows[:, None] - rows[None] + total).fill_diagonal_(0)
