"""Gain over noise: how much less a row leaks than noise at the same accuracy, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mibench import seeding
from mibench.board import rules
from mibench.metrics.intervals import RESAMPLES, percentiles, resampled_means
from mibench.record import Score


class Accuracy(NamedTuple):
    """A share of right answers and its standard error."""

    value: float
    error: float


@dataclass(frozen=True)
class Compared:
    """What one seed gives: a row and the noise curve, attacked by the same attack.

    All columns are values per image (N,) of one metric, of the same images.

    Attributes:
        row: of the row.
        floor: of the blind guess.
        undefended: of the undefended split.
        accuracy: of the row.
        undefended_accuracy: of the undefended model: the curve's end.
        points: accuracy and values of each point of noise.
    """

    row: Tensor
    floor: Tensor
    undefended: Tensor
    accuracy: Accuracy
    undefended_accuracy: float
    points: tuple[tuple[float, Tensor], ...]


def gain(seeds: Sequence[Compared], like: Score, seed: int, source: str) -> Score:
    """Noise's leakage less the row's, mean over seeds.

    Images are resampled, the same ones for row, noise, floor and undefended split, for all of them
    attack the same images. In each resample the row's accuracy is moved by a normal draw of its
    own standard error, so that the interval covers where on the curve the row belongs.

    Args:
        seeds: one or more.
        like: a score of the metric; gives name, version and direction.
        seed: of the draws.
        source: against what.
    """
    parts = [_one(one, like, seeding.derive(seed, f"gain {at}"), seed)
             for at, one in enumerate(seeds)]  # fmt: skip
    told = [one for one in parts if not isinstance(one, str)]
    if not told:
        return nothing(like, next(one for one in parts if isinstance(one, str)))
    value = sum(one for one, _ in told) / len(told)
    low, high = percentiles(torch.stack([draws for _, draws in told]).mean(0))
    return nothing(like, None).model_copy(
        update={
            "value": value,
            "ci_low": min(low, value),
            "ci_high": max(high, value),
            "n": len(seeds[0].row),
            "source": source,
            "reason": None,
        }
    )


def nothing(like: Score, reason: str | None) -> Score:
    """A gain without a value, and why."""
    return Score(
        metric=f"gain({like.metric})",
        version=like.version,
        unit="share of the undefended leakage",
        higher_is_better=False,
        value=None,
        ci_low=None,
        ci_high=None,
        n=0,
        reason=reason or "not computed",
    )


def curve(one: Compared, sign: float) -> list[tuple[float, float]]:
    """Accuracy and leakage of the points of noise and of the undefended end, by accuracy."""
    span = float((one.undefended - one.floor).mean()) * sign
    leaks = [(at, float((values - one.floor).mean()) * sign / span) for at, values in one.points]
    return _ordered([*leaks, (one.undefended_accuracy, 1.0)])


def _ordered(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """By accuracy; equally accurate points become their mean."""
    together: dict[float, list[float]] = {}
    for at, leak in points:
        together.setdefault(at, []).append(leak)
    return [(at, sum(leaks) / len(leaks)) for at, leaks in sorted(together.items())]


def _one(one: Compared, like: Score, draws: int, seed: int) -> tuple[float, Tensor] | str:
    """The gain of one seed and what each resample makes of it (R,), or why there is none."""
    sign = 1.0 if like.higher_is_better else -1.0
    columns = sign * torch.stack(
        [values - one.floor for values in (one.row, one.undefended, *(v for _, v in one.points))], 1
    )
    means = columns.mean(0)
    resampled = resampled_means(columns, seed, RESAMPLES)
    low, high = percentiles(resampled[:, 1])
    if float(means[1]) <= (high - low) / 2:
        return "the undefended split is not above the floor"
    accuracies = [at for at, _ in one.points]
    noise = rules.on_curve(curve(one, sign), one.accuracy.value)
    if noise is None:
        return (
            f"an accuracy of {100 * one.accuracy.value:.1f} % lies below the last point of the "
            f"noise curve, {100 * min(accuracies):.1f} %"
        )
    value = noise - float(means[0] / means[1])
    generator = torch.Generator().manual_seed(draws)
    moved = torch.randn(RESAMPLES, generator=generator, dtype=torch.float64)
    ends = [*accuracies, one.undefended_accuracy]
    moved = (one.accuracy.value + one.accuracy.error * moved).clamp(min(ends), max(ends))
    usable = resampled[:, 1] > 0
    shares = resampled / resampled[:, 1:2]
    gains = [
        _at([*zip(accuracies, line[2:], strict=True), (one.undefended_accuracy, 1.0)], at) - line[0]
        for line, at, fine in zip(shares.tolist(), moved.tolist(), usable.tolist(), strict=True)
        if fine
    ]
    padded = gains + [value] * (RESAMPLES - len(gains))
    return value, torch.tensor(padded, dtype=torch.float64)


def _at(points: Sequence[tuple[float, float]], accuracy: float) -> float:
    found = rules.on_curve(_ordered(points), accuracy)
    assert found is not None, "the accuracy was moved inside the curve"
    return found
