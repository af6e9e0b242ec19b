"""The ranking rule as `docs/leaderboard.md` has it, on plain numbers.

Nothing here knows of records. Leakage is normalised: 0 is a blind guess, 1 the undefended split;
higher is worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

KEYS = ("ssim", "reid-top1")
"""Metrics whose leakage decides the rank: the larger of the two counts."""
MOST_LOST = 3.0
"""Points of accuracy that a ranked row may lose."""
_Z = 1.959963984540054
"""Standard deviations on each side of a 95 % interval."""


class Interval(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float


def larger(leakages: Sequence[Interval]) -> Interval:
    """The worst of several leakages: what a row is ranked by.

    If each number lies in its interval, the largest number lies between the largest lower end and
    the largest upper end.

    Args:
        leakages: one or more.
    """
    values, lows, highs = zip(*leakages, strict=True)
    return Interval(max(values), max(lows), max(highs))


def surely_below(one: Interval, other: Interval) -> bool:
    """Whether one leaks less beyond doubt: the intervals are separate."""
    return one.high < other.low


def places(rows: Sequence[Interval]) -> list[tuple[int, int]]:
    """The best and the worst place of each row that the intervals allow.

    The best is 1 + the number of rows that surely leak less; the worst is the number of all rows
    less those that surely leak more. Ranges can overlap where intervals do not.
    """
    found = []
    for row in rows:
        better = sum(surely_below(other, row) for other in rows)
        worse = sum(surely_below(row, other) for other in rows)
        found.append((1 + better, len(rows) - worse))
    return found


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Marks the Pareto front among points (accuracy, leakage).

    A point is on it unless another one is at least as accurate and leaks no more, and is strictly
    better in one of the two.
    """
    return [
        not any(
            other[0] >= one[0] and other[1] <= one[1] and other != one for other in points
        )
        for one in points
    ]  # fmt: skip


def all_or_none(share: float, n: int) -> tuple[float, float]:
    """The Wilson interval of a share of 0 or 1 among ``n`` images.

    A bootstrap of equal values has no width, as if 128 of 128 images proved that the next one is
    found as well. Wilson's interval, with z = 1.96, ends at n / (n + z^2) there: 0.971 for 128.

    Source: E. B. Wilson, Journal of the American Statistical Association 22, 1927.

    Raises:
        ValueError: the share is neither 0 nor 1.
    """
    if share not in (0.0, 1.0):
        raise ValueError(f"the share must be 0 or 1, not {share}")
    far = _Z**2 / (n + _Z**2)
    return (1 - far, 1.0) if share else (0.0, far)


def on_curve(curve: Sequence[tuple[float, float]], accuracy: float) -> float | None:
    """The leakage of noise at an accuracy, linear between the points of its curve.

    A row that is at least as accurate as the most accurate point is held against that point: noise
    makes nothing more accurate than the undefended model, which is the curve's end.

    Args:
        curve: accuracy and leakage of points with different accuracies, by accuracy.
        accuracy: of the row.

    Returns:
        None where the row is less accurate than every point.
    """
    if accuracy >= curve[-1][0]:
        return curve[-1][1]
    for (low, left), (high, right) in pairwise(curve):
        if low <= accuracy <= high:
            share = (accuracy - low) / (high - low)
            return left + share * (right - left)
    return None
