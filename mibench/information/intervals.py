"""Intervals from few independent values."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mibench.metrics.intervals import Estimate

QUANTILES = {
    1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 6: 2.4469, 7: 2.3646, 8: 2.3060,
    9: 2.2622, 10: 2.2281, 15: 2.1314, 20: 2.0860, 25: 2.0595, 30: 2.0423,
}  # fmt: skip
"""97.5 % quantile of Student's t by degrees of freedom."""


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t; between tabled degrees of freedom, that of the fewer."""
    return QUANTILES[max(known for known in QUANTILES if known <= freedom)]


def over_seeds(values: Sequence[float], n: int) -> Estimate:
    """Mean of two or more runs with its 95 % interval over runs, by Student's t.

    Args:
        values: one per seed.
        n: images that each of them rests on.
    """
    each = torch.tensor(values, dtype=torch.float64)
    mean = float(each.mean())
    half = student(len(each) - 1) * float(each.std()) / len(each) ** 0.5
    return Estimate(mean, mean - half, mean + half, n)
