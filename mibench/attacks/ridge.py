"""Ridge regression from shares to pixels: the cheapest inversion, used to find the worst share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from mibench import seeding
from mibench.defenses.base import Shares

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Candidates, relative to the mean variance of the inputs times their number."""
MAX_INPUTS = 2048
"""Longer messages are projected at random to this length, which keeps most of what is linear."""
BLOCK = 2**14
"""Values of a message that are projected at once."""
SIDE = 32
"""Larger images are predicted at this size: coalitions are ranked, not images rebuilt."""


def ridge_error(
    shares: Shares, images: Tensor, other_shares: Shares, other_images: Tensor, seed: int
) -> float:
    """Fits on one set and returns the mean squared error on the other, with the best penalty.

    Args:
        shares: what the adversary receives for ``images``, batch axis first.
        images: (N, 3, H, W) in [0, 1]; predicted as `shrink` leaves them.
        other_shares: shares of ``other_images``.
        other_images: (M, 3, H, W) in [0, 1].
        seed: of the random projection.
    """
    x, other_x = _inputs(shares, other_shares, seed)
    y, other_y = (shrink(one).flatten(1) for one in (images, other_images))
    mean_y = y.mean(0)
    gram, cross = x.T @ x, x.T @ (y - mean_y)
    scale = gram.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(gram), device=gram.device)
    errors = []
    for penalty in PENALTIES:
        weights = torch.linalg.solve(gram + penalty * scale * identity, cross)
        guess = (other_x @ weights + mean_y).clamp(0, 1)
        errors.append((guess - other_y).square().mean().item())
    return float(min(errors))


def shrink(images: Tensor) -> Tensor:
    """Averages images (N, 3, H, W) down to `SIDE` pixels a side; smaller ones stay as they are."""
    height, width = images.shape[2:]
    if max(height, width) <= SIDE:
        return images
    return F.adaptive_avg_pool2d(images, (min(height, SIDE), min(width, SIDE)))


def _inputs(shares: Shares, other_shares: Shares, seed: int) -> tuple[Tensor, Tensor]:
    """Standardised values of both sets; long messages are projected block by block."""
    blocks = zip(_blocks(shares), _blocks(other_shares), strict=True)
    pairs = (_standardised(one, other) for one, other in blocks)
    length = sum(share[0].numel() for share in shares)
    if length <= MAX_INPUTS:
        return next(pairs)
    draws = seeding.generator(seed, "ridge projection")
    x = other_x = shares[0].new_zeros(())
    for one, other in pairs:
        projection = torch.randn(one.shape[1], MAX_INPUTS, generator=draws) / math.sqrt(length)
        projection = projection.to(one.device)
        x, other_x = x + one @ projection, other_x + other @ projection
    return x, other_x


def _standardised(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    # What a share tells does not depend on its scale, so neither may the penalty.
    mean, std = one.mean(0), one.std(0)
    std = torch.where(std > 1e-6, std, torch.inf)
    return (one - mean) / std, (other - mean) / std


def _blocks(shares: Shares) -> Iterator[Tensor]:
    """Yields the values of all shares (N, n), no more than `BLOCK` of each image at once."""
    rows = [share.flatten(1) for share in shares]
    if sum(row.shape[1] for row in rows) <= BLOCK:
        yield torch.cat(rows, dim=1)
        return
    for row in rows:
        yield from torch.split(row, BLOCK, dim=1)
