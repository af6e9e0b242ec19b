"""Distance correlation (Székely et al., 2007): how far two samples depend on each other."""

from __future__ import annotations

import torch
from torch import Tensor

from mibench.errors import InvalidParamsError

NEAR = 1e-5
"""Squared distance over the sample's mean squared norm that rounding cannot tell from 0."""


def distance_correlation(x: Tensor, z: Tensor, *, unbiased: bool = False) -> Tensor:
    """Squared distance correlation between two samples of the same n images.

    dCor^2 = dCov^2(x, z) / sqrt(dVar^2(x) dVar^2(z)), from double-centred matrices of Euclidean
    distances. The biased estimate (V-statistic) lies in [0, 1] and is near 1 for independent data
    of many dimensions: at n = 128, two independent Gaussians of 12,288 and 3,072 dimensions give
    0.994. The unbiased one (U-centred, Székely and Rizzo, 2014) is about 0 there and can be
    negative. Neither depends on the scale of a sample.

    Args:
        x: (n, ...); flattened. n is at least 2, or 4 for the unbiased estimate.
        z: (n, ...); flattened.
        unbiased: which estimate.

    Returns:
        Scalar in float32, differentiable in both, 0 where a sample is constant.

    Raises:
        InvalidParamsError: there are too few images for the estimate.
    """
    least = 4 if unbiased else 2
    if len(x) < least:
        raise InvalidParamsError(
            f"distance correlation {'without bias ' if unbiased else ''}needs at least {least} "
            f"images at a time, but a batch holds {len(x)}; raise recipe.batch."
        )
    with torch.autocast(x.device.type, enabled=False):
        centre = _u_centred if unbiased else _double_centred
        a, b = (centre(_distances(sample.flatten(1).float())) for sample in (x, z))
        covariance, product = (a * b).sum(), a.square().sum() * b.square().sum()
        # Both variances can be 0: the root's gradient would be infinite there.
        return covariance / product.clamp_min(1e-20).sqrt()


def _distances(rows: Tensor) -> Tensor:
    """Euclidean distances (n, n) in units of their root mean square; 0 on the diagonal."""
    rows = rows - rows.mean(0)
    # Without this, small features would fall below the floors and look independent.
    rows = rows / rows.square().sum(1).mean().clamp_min(1e-30).sqrt()
    squares = rows.square().sum(1)
    between = squares[:, None] + squares[None] - 2 * rows @ rows.T
    # The root has no gradient at 0, where a row meets itself or its equal.
    itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    apart = (between > NEAR) & ~itself
    return torch.where(apart, between, 1.0).sqrt() * apart


def _double_centred(d: Tensor) -> Tensor:
    return d - d.mean(0) - d.mean(1, keepdim=True) + d.mean()


def _u_centred(d: Tensor) -> Tensor:
    n = len(d)
    rows, total = d.sum(1, keepdim=True) / (n - 2), d.sum() / ((n - 1) * (n - 2))
    centred = d - rows - rows.T + total
    return centred * ~torch.eye(n, dtype=torch.bool, device=d.device)
