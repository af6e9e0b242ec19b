"""Features in one layout: maps (B, C, h, w) stay, tokens (B, N, D) become maps (B, D, g, g)."""

from __future__ import annotations

import math

from torch import Tensor


def to_map(features: Tensor, prefix: int = 0) -> Tensor:
    """Lays tokens out on their square grid; maps are returned as they are.

    Args:
        features: maps (B, C, h, w), or tokens (B, prefix + g*g, D) in reading order.
        prefix: leading tokens that stand for no place of the image (class tokens); left out.

    Returns:
        (B, C, h, w) or (B, D, g, g).
    """
    if features.ndim == 4:
        return features
    patches = features[:, prefix:]
    side = math.isqrt(patches.shape[1])
    return on_grid(patches, side, side)


def on_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    """Lays tokens (B, height * width, D) out as maps (B, D, height, width), in reading order."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def to_tokens(maps: Tensor) -> Tensor:
    """Reads maps (B, C, h, w) as tokens (B, h*w, C), in reading order."""
    return maps.flatten(2).transpose(1, 2)
