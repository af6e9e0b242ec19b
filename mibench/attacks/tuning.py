"""How an attacker chooses a weight: on images of its own, whose originals it knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mibench.attacks.budget import images_at_once, in_groups
from mibench.defenses.base import Shares
from mibench.files import Json


def best_weight(
    images: Tensor,
    shares: Shares,
    candidates: Sequence[float],
    attack: Callable[[Shares, Tensor], Tensor],
) -> dict[str, Json]:
    """Runs all candidates and returns the one with the least error.

    Args:
        images: the attacker's validation images (B, 3, H, W) in [0, 1].
        shares: what the client sends for them.
        candidates: weights to try.
        attack: (shares, weight per image (B,)) → images. Gets all candidates at once, or groups of
            images where that would be more than `budget.VALUES`.

    Returns:
        ``weight`` and ``validation_mse``, the mean squared error of each candidate.
    """
    repeated = tuple(torch.cat([share] * len(candidates)) for share in shares)
    weights = torch.tensor(candidates, device=images.device).repeat_interleave(len(images))
    rebuilt = in_groups(attack, repeated, weights, images_at_once(images.shape[1:]))
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
