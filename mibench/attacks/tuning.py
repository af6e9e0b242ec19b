"""How an attacker chooses a weight: on images of its own, whose originals it knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mibench.attacks.budget import images_at_once, in_groups
from mibench.attacks.descent import Descent
from mibench.defenses.base import Shares
from mibench.files import Json


def best_weight(
    images: Tensor,
    shares: Shares,
    candidates: Sequence[float],
    attack: Callable[[Shares, Tensor], Tensor],
    size: int | None = None,
) -> dict[str, Json]:
    """Runs all candidates and returns the one with the least error.

    Args:
        images: the attacker's validation images (B, 3, H, W) in [0, 1].
        shares: what the client sends for them.
        candidates: weights to try.
        attack: (shares, weight per image (B,)) → images. Gets all candidates at once, or groups of
            images where memory would not hold so many, see `budget`.
        size: most images of a group; None: as `images_at_once` says.

    Returns:
        ``weight`` and ``validation_mse``, the mean squared error of each candidate.
    """
    repeated = tuple(torch.cat([share] * len(candidates)) for share in shares)
    weights = torch.tensor(candidates, device=images.device).repeat_interleave(len(images))
    size = size or images_at_once(images.shape[1:], images.device)
    rebuilt = in_groups(attack, repeated, weights, size)
    rebuilt = rebuilt.view(len(candidates), *images.shape)
    errors = (rebuilt - images).square().flatten(1).mean(1).tolist()
    # A candidate that diverged (not a number) is never the best.
    errors = [error if error == error else float("inf") for error in errors]
    best = min(range(len(candidates)), key=errors.__getitem__)
    return {
        "weight": candidates[best],
        "validation_mse": {
            f"{weight:g}": error if error < float("inf") else None
            for weight, error in zip(candidates, errors, strict=True)
        },
    }


def best_descent(
    images: Tensor,
    shares: Shares,
    candidates: Sequence[float],
    descend: Callable[[Shares, Tensor], tuple[Tensor, Descent]],
    size: int | None = None,
) -> dict[str, Json]:
    """Chooses as `best_weight` does, and tells how the descents under the chosen weight went.

    Args:
        images: as of `best_weight`, and so are the next two.
        shares: what the client sends for them.
        candidates: weights to try.
        descend: (shares, weight per image (B,)) → images, and the descent that led there.
        size: most images of a group; None: as `images_at_once` says.

    Returns:
        The facts of `best_weight`, and ``course``: see `mean_course`.
    """
    runs: list[Descent] = []

    def attack(shares: Shares, weights: Tensor) -> Tensor:
        found, run = descend(shares, weights)
        runs.append(run)
        return found

    facts = best_weight(images, shares, candidates, attack, size)
    first = candidates.index(float(facts["weight"])) * len(images)  # type: ignore[arg-type]
    return {**facts, "course": mean_course(runs, slice(first, first + len(images)))}


def mean_course(runs: Sequence[Descent], part: slice) -> list[Json]:
    """Returns [step, mean objective] along the descent of some images, for the record.

    Args:
        runs: descents of groups of images, in order.
        part: places of those images among all; a mean that is not finite becomes None.
    """
    means = torch.cat([run.course for run in runs])[part].mean(0).tolist()
    return [
        [step, mean if math.isfinite(mean) else None]
        for step, mean in zip(runs[0].at, means, strict=True)
    ]
