"""How many images an attack works on at once, so that large images need no more memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mibench.defenses.base import Shares

VALUES = 2**22
"""Pixel values at once: 1,365 images of 32 pixels, 341 of 64, or 27 of 224."""


def images_at_once(image_shape: tuple[int, ...]) -> int:
    """Returns how many images of shape (3, H, W) are worked on at once, at least one."""
    return max(1, VALUES // math.prod(image_shape))


def in_groups(
    attack: Callable[[Shares, Tensor], Tensor], shares: Shares, weights: Tensor, size: int
) -> Tensor:
    """Attacks images group by group, in order.

    Args:
        attack: (shares, weight per image (B,)) → images.
        shares: what was received, batch axis first.
        weights: one per image, (N,).
        size: most images of a group.

    Returns:
        Images (N, 3, H, W).
    """
    parts = []
    for start in range(0, len(weights), size):
        part = slice(start, start + size)
        parts.append(attack(tuple(share[part] for share in shares), weights[part]))
    return torch.cat(parts)
