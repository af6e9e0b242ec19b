"""Controls: what an attacker gets without looking at the features of the image under attack.

*Prior-only* is the best blind guess, *permuted* is the attack itself on another image's shares. An
attack that does not beat both has learned nothing from the features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.exhibit import Case
from mibench.scoring import Scores, score
from mibench.stored import rounded


def blind_guesses(auxiliary: ImageSet, count: int) -> dict[str, Tensor]:
    """Guesses made from auxiliary images alone.

    Args:
        auxiliary: the attacker's images.
        count: number of images to guess.

    Returns:
        By name, (count, 3, H, W) in [0, 1]: ``mean-image``, and ``typical-image``, the auxiliary
        image with the least mean squared distance to all others (that is, nearest to their mean).
    """
    total = torch.zeros(auxiliary.image_shape, dtype=torch.float64)
    for chunk in auxiliary.chunks():
        total += chunk.double().sum(0)
    mean = (total / len(auxiliary)).float()
    distances = [(chunk - mean).square().flatten(1).sum(1) for chunk in auxiliary.chunks()]
    nearest = int(torch.cat(distances).argmin())
    typical = auxiliary.images(slice(nearest, nearest + 1))[0]
    return {
        "mean-image": rounded(mean[None]).expand(count, *mean.shape),
        "typical-image": typical.expand(count, *typical.shape),
    }


def permute(shares: Shares) -> Shares:
    """Gives every image the shares of its successor, so that none keeps its own."""
    return tuple(torch.roll(share, -1, dims=0) for share in shares)


def best_guess(
    names: Sequence[str], guesses: Mapping[str, Tensor], case: Case, seed: int
) -> Scores:
    """Scores, for each metric, the guess that is best on the attacker's validation images."""
    count = len(case.known.originals)
    trials = {
        name: score(names, images[:count], case.known, seed) for name, images in guesses.items()
    }
    best = []
    for at, metric in enumerate(names):
        rated = {name: trial.summary[at] for name, trial in trials.items()}
        known_values = {name: one.value for name, one in rated.items() if one.value is not None}
        sign = 1 if next(iter(rated.values())).higher_is_better else -1
        order = sorted(known_values, key=lambda name: -sign * known_values[name])
        chosen = next(iter([*order, *guesses]))
        best.append(score((metric,), guesses[chosen], case.attacked, seed).named(chosen))
    return Scores.joined(best)
