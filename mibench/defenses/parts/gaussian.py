"""Diagonal Gaussians: what a sample of one can tell."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_to_standard(mean: Tensor, log_deviation: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, I)) of each row, in nats.

    1/2 sum(mu^2 + sigma^2 - 2 log sigma - 1) over all values of a row. Its mean over images is an
    upper bound on the information that a sample carries about its image (Alemi et al., 2017).

    Args:
        mean: mu, (B, ...).
        log_deviation: log sigma, of the same shape.

    Returns:
        (B,), in full precision, 0 where mu is 0 and sigma 1.
    """
    with torch.autocast(mean.device.type, enabled=False):
        mean, log_deviation = mean.float(), log_deviation.float()
        # sigma^2 - 2 log sigma - 1 loses its digits near sigma = 1; expm1 keeps them.
        terms = mean.square() + torch.expm1(2 * log_deviation) - 2 * log_deviation
        return terms.flatten(1).sum(1) / 2
