"""Bootstrap intervals for what the tables report: means over images, and ratios of them.

The images are resampled, nothing else: an interval says how far the number would move with other
images of the same kind, not with another training run of the attacker or of the defense.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_LEVEL = 0.95
RESAMPLES = 2000
"""Resamples of an interval."""
_FEWEST_RESAMPLES = 100
_WEIGHTS_AT_ONCE = 2**22  # 32 MiB of float64


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, or the reason why there is none.

    Attributes:
        value: Point estimate, None if it is undefined.
        low: Lower end of the interval, None if there is no interval.
        high: Upper end.
        n: Number of images it rests on.
        reason: Why ``value`` or the interval is missing, None if both are there.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None


def bootstrap_mean(
    values: Tensor, seed: int, level: float = _LEVEL, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over images.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.

    Args:
        values: One score per image, (N,), any dtype, N >= 2.
        seed: Seed of the resampling; same seed and values give the same interval.
        level: Nominal coverage, in (0, 1).
        resamples: Number of resamples, at least 100.

    Returns:
        Lower and upper end, in the unit of the values; the mean lies between them.

    Raises:
        ValueError: If there are fewer than two values, any is not finite, or level or resamples
            is out of range.
    """
    scores = _checked(values, "values")
    if len(scores) < 2:
        raise ValueError("a bootstrap interval needs at least two values, got 1")
    mean = float(scores.mean())
    # Around the mean, for precision where the spread is small beside it.
    deviations = resampled_means((scores - mean)[:, None], seed, resamples)[:, 0]
    low, high = percentiles(deviations, level)
    # Nearly equal values must not put their mean outside by rounding.
    return mean + min(low, 0.0), mean + max(high, 0.0)


def estimate_mean(values: Tensor, seed: int) -> Estimate:
    """Mean over images with its 95 % percentile bootstrap interval.

    Args:
        values: One score per image, (N,), N >= 1.
        seed: Seed of the resampling.

    Returns:
        The estimate, in the unit of the values; without an interval if N is 1.

    Raises:
        ValueError: If there are no values or any is not finite.
    """
    scores = _checked(values, "values")
    mean, n = float(scores.mean()), len(scores)
    if n == 1:
        return Estimate(mean, None, None, n, "one image gives no interval")
    low, high = bootstrap_mean(scores, seed)
    return Estimate(mean, low, high, n)


def estimate_median(values: Tensor, seed: int) -> Estimate:
    """Median of measurements with its 95 % percentile bootstrap interval.

    Args:
        values: Measurements, (N,), N >= 2.
        seed: Seed of the resampling.

    Returns:
        The estimate, in the unit of the values.

    Raises:
        ValueError: If there are fewer than two values or any is not finite.
    """
    scores = _checked(values, "values")
    if len(scores) < 2:
        raise ValueError("a bootstrap interval needs at least two values, got 1")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(scores), (RESAMPLES, len(scores)), generator=generator)
    low, high = percentiles(scores[drawn].quantile(0.5, dim=1), _LEVEL)
    return Estimate(float(scores.quantile(0.5)), low, high, len(scores))


def normalised_leakage(
    scores: Tensor,
    floor: Tensor,
    reference: Tensor,
    *,
    more_leakage: Literal["higher", "lower"],
    seed: int,
    level: float = _LEVEL,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Leakage as the share of the undefended split's leakage above the floor that remains.

    Formula: ``(mean scores - mean floor) / (mean reference - mean floor)``: 0 is what an attacker
    gets without the features, 1 is what it gets without a defense. It may fall outside [0, 1]. The
    interval resamples images, the same ones in all three, since the three are paired.

    Args:
        scores: Scores under the defense, (N,).
        floor: Scores of a reconstruction made without the features, same images, (N,).
        reference: Scores of the undefended split, same images, (N,).
        more_leakage: The metric's direction; decides on which side of the floor leakage lies.
        seed: Seed of the resampling.
        level: Nominal coverage, in (0, 1).
        resamples: Number of resamples, at least 100.

    Returns:
        The estimate, a pure number. Its value is None, with the reason, where the reference does
        not exceed the floor by more than the half width of the bootstrap interval of their
        difference: the ratio would then divide by noise.

    Raises:
        ValueError: If the three differ in length, are empty or hold a value that is not finite, or
            if level, resamples or more_leakage is out of range.
    """
    if more_leakage not in ("higher", "lower"):
        raise ValueError(f"more_leakage must be 'higher' or 'lower', got {more_leakage!r}")
    columns = [
        _checked(values, what)
        for values, what in ((scores, "scores"), (floor, "floor"), (reference, "reference"))
    ]
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(
            "scores, floor and reference must be of the same images, "
            f"got {lengths[0]}, {lengths[1]} and {lengths[2]} values"
        )
    n = lengths[0]
    if n == 1:
        return Estimate(
            None, None, None, n, "one image cannot tell the undefended split from the floor"
        )
    score, base, top = columns
    sign = 1.0 if more_leakage == "higher" else -1.0
    # The mean of per-image differences is the difference of the means, resample by resample.
    differences = sign * torch.stack([score - base, top - base], 1)
    gain, span = (float(mean) for mean in differences.mean(0))
    gains, spans = resampled_means(differences, seed, resamples).unbind(1)
    low, high = percentiles(spans, level)
    if span <= (high - low) / 2:
        return Estimate(
            None,
            None,
            None,
            n,
            f"the undefended split is not above the floor (difference {span:.3g} in the direction "
            f"of leakage, interval half width {(high - low) / 2:.3g})",
        )
    # A resample in which the reference is not above the floor has no share; at the usual levels
    # the test above leaves at most a few of them.
    usable = spans > 0
    value = gain / span
    low, high = percentiles(gains[usable] / spans[usable], level)
    return Estimate(value, min(low, value), max(high, value), n)


def balanced_accuracy(told: Tensor, truth: Tensor, seed: int) -> Estimate:
    """Balanced accuracy of yes-or-no attributes, averaged over them, with its interval.

    Per attribute the mean of the share of rightly told yes and the share of rightly told no, so
    that a constant answer gets one half however rare the attribute is. An attribute that all images
    share, or none, has no such mean and is left out, in a resample as well.

    Args:
        told: Answers, bool (N, A).
        truth: Labels, bool (N, A).
        seed: Seed of the resampling of images.
    """
    columns = _outcomes(told, truth)
    value = _balanced(columns.mean(0, keepdim=True))[0].nanmean()
    if value.isnan():
        return Estimate(None, None, None, len(told), "every attribute has one value only")
    means = resampled_means(columns, seed, RESAMPLES)
    low, high = percentiles(_balanced(means).nanmean(1).nan_to_num(nan=float(value)), _LEVEL)
    return Estimate(float(value), min(low, float(value)), max(high, float(value)), len(told))


def balanced_per_attribute(told: Tensor, truth: Tensor) -> list[float | None]:
    """Balanced accuracy of each attribute; None where all images share one value."""
    values = _balanced(_outcomes(told, truth).mean(0, keepdim=True))[0]
    return [None if value != value else value for value in values.tolist()]


def _outcomes(told: Tensor, truth: Tensor) -> Tensor:
    told, truth = told.cpu(), truth.cpu()
    return torch.cat([told & truth, truth, ~told & ~truth, ~truth], dim=1).double()


def _balanced(means: Tensor) -> Tensor:
    """(R, 4A) means of right yes, yes, right no, no → balanced accuracy (R, A), or NaN."""
    right_yes, yes, right_no, no = means.chunk(4, dim=1)
    return (right_yes / yes + right_no / no) / 2


def _checked(values: Tensor, what: str) -> Tensor:
    """The values as a detached float64 vector on the CPU."""
    if values.ndim != 1 or values.numel() == 0:
        raise ValueError(f"{what} must be of shape (N,) with N > 0, got {tuple(values.shape)}")
    scores = values.detach().cpu().double()
    if not bool(scores.isfinite().all()):
        raise ValueError(f"{what} must be finite")
    return scores


def resampled_means(columns: Tensor, seed: int, resamples: int) -> Tensor:
    """Means of (N, k) columns over resampled rows, (resamples, k); all columns share the rows.

    The same seed and N give the same rows, so that means of two calls are paired as well.
    """
    if resamples < _FEWEST_RESAMPLES:
        raise ValueError(f"resamples must be at least {_FEWEST_RESAMPLES}, got {resamples}")
    sums = [weights @ columns for weights in _weights(len(columns), seed, resamples)]
    return torch.cat(sums) / len(columns)


def _weights(n: int, seed: int, resamples: int) -> Iterator[Tensor]:
    """How often each of n rows is drawn, (r, n) at a time."""
    generator = torch.Generator().manual_seed(seed)
    per_chunk = max(1, _WEIGHTS_AT_ONCE // n)
    for start in range(0, resamples, per_chunk):
        rows = min(per_chunk, resamples - start)
        drawn = torch.randint(n, (rows, n), generator=generator)
        counts = torch.zeros(rows, n, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones(1, 1, dtype=torch.float64).expand(rows, n))


def percentiles(resampled: Tensor, level: float = _LEVEL) -> tuple[float, float]:
    """Both ends of the interval that holds the share ``level`` of resampled numbers (R,)."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    tail = (1 - level) / 2
    ends = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(ends[0]), float(ends[1])
