"""Ridge regression from shares to pixels: the cheapest inversion, used to find the worst share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mibench import seeding
from mibench.defenses.base import Shares

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Candidates, relative to the mean variance of the inputs times their number."""
MAX_INPUTS = 2048
"""Longer messages are projected at random to this length, which keeps most of what is linear."""


def ridge_error(
    shares: Shares, images: Tensor, other_shares: Shares, other_images: Tensor, seed: int
) -> float:
    """Fits on one set and returns the mean squared error on the other, with the best penalty.

    Args:
        shares: what the adversary receives for ``images``, batch axis first.
        images: (N, 3, H, W) in [0, 1].
        other_shares: shares of ``other_images``.
        other_images: (M, 3, H, W) in [0, 1].
        seed: of the random projection.
    """
    x, other_x = _flat(shares), _flat(other_shares)
    # What a share tells does not depend on its scale, so neither may the penalty.
    mean_x, std_x = x.mean(0), x.std(0)
    std_x = torch.where(std_x > 1e-6, std_x, torch.inf)
    x, other_x = (x - mean_x) / std_x, (other_x - mean_x) / std_x
    y = images.flatten(1)
    if x.shape[1] > MAX_INPUTS:
        draws = seeding.generator(seed, "ridge projection")
        projection = torch.randn(x.shape[1], MAX_INPUTS, generator=draws) / math.sqrt(x.shape[1])
        x, other_x = x @ projection.to(x.device), other_x @ projection.to(x.device)
    mean_y = y.mean(0)
    gram, cross = x.T @ x, x.T @ (y - mean_y)
    scale = gram.diagonal().mean().clamp_min(1e-12)
    identity = torch.eye(len(gram), device=gram.device)
    errors = []
    for penalty in PENALTIES:
        weights = torch.linalg.solve(gram + penalty * scale * identity, cross)
        guess = (other_x @ weights + mean_y).clamp(0, 1)
        errors.append((guess - other_images.flatten(1)).square().mean().item())
    return float(min(errors))


def _flat(shares: Shares) -> Tensor:
    return torch.cat([share.flatten(1) for share in shares], dim=1)
