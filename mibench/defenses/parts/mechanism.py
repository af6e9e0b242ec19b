"""Noise that is not PyTorch's own, and the differential privacy of one noisy message."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_epsilon(ratio: float, delta: float) -> float:
    """Smallest epsilon of the Gaussian mechanism (Balle and Wang, ICML 2018, theorem 8).

    delta = Phi(r/2 - eps/r) - e^eps Phi(-r/2 - eps/r), solved for epsilon; unlike the classical
    bound it holds for every epsilon.

    Args:
        ratio: r, largest distance of two messages over the deviation of the noise.
        delta: in (0, 1).
    """
    low, high = 0.0, 1.0
    while _gaussian_delta(ratio, high) > delta:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _gaussian_delta(ratio, middle) > delta else (low, middle)
    return high


def _gaussian_delta(ratio: float, epsilon: float) -> float:
    # Logarithms throughout: e^epsilon alone would overflow.
    ends = [ratio / 2 - epsilon / ratio, -ratio / 2 - epsilon / ratio]
    first, second = torch.special.log_ndtr(torch.tensor(ends, dtype=torch.float64)).tolist()
    return math.exp(first) - math.exp(epsilon + second)


def laplace_like(values: Tensor) -> Tensor:
    """Draws from the Laplace law of scale 1, in the shape of ``values`` and full precision.

    The difference of two exponential draws; the inverse of the distribution function would send a
    draw at the end of its interval to infinity.
    """
    draws = torch.empty(2, *values.shape, device=values.device).exponential_()
    return draws[0] - draws[1]
