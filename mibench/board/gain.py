"""Gain over noise: how much less a row leaks than noise at the same accuracy, with its interval."""

from __future__ import annotations

from collections.abc import Mapping
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


def gain(seeds: Mapping[int, Compared], like: Score, seed: int, attack: str) -> Score:
    """Noise's leakage less the row's, mean over the seeds that have one.

    Images are resampled, the same ones for row, noise, floor and undefended split, for all of them
    attack the same images. In each resample the row's accuracy is moved by a normal draw of its
    own standard error, so that the interval covers where on the curve the row belongs.

    Args:
        seeds: what each seed gives, one or more.
        like: a score of the metric; gives name, version and direction.
        seed: of the draws.
        attack: that both met.
    """
    parts = {
        at: _one(one, like, seeding.derive(seed, f"gain {at}"), seed) for at, one in seeds.items()
    }
    told = {at: one for at, one in parts.items() if not isinstance(one, str)}
    if not told:
        return nothing(like, next(one for one in parts.values() if isinstance(one, str)))
    value = sum(one for one, _ in told.values()) / len(told)
    low, high = percentiles(torch.stack([draws for _, draws in told.values()]).mean(0))
    return nothing(like, None).model_copy(
        update={
            "value": value,
            "ci_low": min(low, value),
            "ci_high": max(high, value),
            "n": len(next(iter(seeds.values())).row),
            "source": f"both attacked with {attack}, seed {', '.join(map(str, told))}",
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
    """Accuracy and leakage of the points of noise and of the undefended end, by accuracy.

    Equally accurate points become their mean.

    Args:
        one: what one seed gives.
        sign: 1 where a higher value of the metric means more leakage, else -1.
    """
    span = float((one.undefended - one.floor).mean()) * sign
    leaks = [float((values - one.floor).mean()) * sign / span for _, values in one.points]
    accuracies, shares = _ordered(one, torch.tensor([[*leaks, 1.0]], dtype=torch.float64))
    return list(zip(accuracies.tolist(), shares[0].tolist(), strict=True))


def _ordered(one: Compared, leaks: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts leakages (R, points, then the undefended end) by accuracy: (K,) and (R, K)."""
    given = [*(at for at, _ in one.points), one.undefended_accuracy]
    accuracies = sorted(set(given))
    columns = [
        leaks[:, [at for at, accuracy in enumerate(given) if accuracy == wanted]].mean(1)
        for wanted in accuracies
    ]
    return torch.tensor(accuracies, dtype=torch.float64), torch.stack(columns, 1)


def _one(one: Compared, like: Score, draws: int, seed: int) -> tuple[float, Tensor] | str:
    """The gain of one seed and what each resample makes of it (R,), or why there is none."""
    sign = 1.0 if like.higher_is_better else -1.0
    columns = sign * torch.stack(
        [values - one.floor for values in (one.row, one.undefended, *(v for _, v in one.points))], 1
    )
    resampled = resampled_means(columns, seed, RESAMPLES)
    low, high = percentiles(resampled[:, 1])
    row, span = (float(mean) for mean in columns[:, :2].mean(0))
    if span <= (high - low) / 2:
        return "the undefended split is not above the floor"
    noise = rules.on_curve(curve(one, sign), one.accuracy.value)
    if noise is None:
        last = min(at for at, _ in one.points)
        return (
            f"an accuracy of {100 * one.accuracy.value:.1f} % lies below the last point of the "
            f"noise curve, {100 * last:.1f} %"
        )
    value = noise - row / span
    # A resample in which the undefended split is not above the floor has no share.
    shares = resampled[resampled[:, 1] > 0]
    shares = shares / shares[:, 1:2]
    accuracies, leaks = _ordered(one, torch.cat([shares[:, 2:], shares[:, 1:2]], 1))
    generator = torch.Generator().manual_seed(draws)
    moved = torch.randn(len(shares), generator=generator, dtype=torch.float64)
    moved = one.accuracy.value + one.accuracy.error * moved
    gains = _along(accuracies, leaks, moved.clamp(accuracies[0], accuracies[-1])) - shares[:, 0]
    return value, torch.cat([gains, gains.new_full((RESAMPLES - len(gains),), value)])


def _along(accuracies: Tensor, leaks: Tensor, at: Tensor) -> Tensor:
    """`rules.on_curve` for many curves (R, K) at once, each at its own accuracy (R,)."""
    right = torch.searchsorted(accuracies, at).clamp(1, max(1, len(accuracies) - 1))
    if len(accuracies) == 1:
        return leaks[:, 0]
    left = right - 1
    share = (at - accuracies[left]) / (accuracies[right] - accuracies[left])
    lower, upper = (leaks.gather(1, one[:, None])[:, 0] for one in (left, right))
    return lower + share * (upper - lower)
