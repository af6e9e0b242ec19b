"""What linear decoders explain of an image, in closed form: proxies that need no training."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from mibench.backbones.tokens import to_tokens

PLACES = 32
"""Places a side of a share that are looked at; a finer share is thinned out."""
BLOCK = 32
"""Side of the pixel block of one place; larger blocks are averaged down to it."""
RIDGE = 1e-3
"""Penalty of the closed-form proxy attacker, relative to the mean variance of its inputs."""


def explained_variance(share: Tensor, images: Tensor) -> Tensor:
    """Share of the images' variance that the best local linear decoder explains, in [0, 1].

    Its cost is bounded by that of images of 32 pixels: of a finer share every s-th place a side is
    looked at, and images are averaged down where a place stands for a larger block of pixels than
    `BLOCK`, or for a fraction of pixels.

    Args:
        share: (B, n, h, w).
        images: (B, 3, H, W). Location (i, j) of the share, with its 3x3 neighbourhood (alone where
            h < 4), decodes the block of pixels that it stands for.

    Returns:
        Scalar, differentiable in the share: explained by the ridge fit on these very images, so it
        is too high where a share has many values and the batch few locations.
    """
    with torch.autocast(share.device.type, enabled=False):
        # A linear decoder does not care about scale, so shrinking a unit must not look private.
        share = share.float()
        share = share / (share.std((0, 2, 3), keepdim=True) + 1e-4)
        height, width = share.shape[2:]
        reach, step = 3 if width >= 4 else 1, math.ceil(max(height, width) / PLACES)
        x = F.unfold(share, reach, padding=reach // 2, stride=step).transpose(1, 2).flatten(0, 1)
        y = to_tokens(_blocks(images, height, width)[..., ::step, ::step]).flatten(0, 1)
        x, y = x - x.mean(0), y - y.mean(0)
        explained = _fitted(x.T @ x / len(x), x.T @ y / len(x))
        return explained.sum() / y.square().mean(0).sum()


def explained_by_tokens(
    share: Tensor, images: Tensor, places: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Share of the images' variance that the best linear decoder of single tokens explains.

    One decoder for all places, from a token to the block of pixels that it stands for. Blocks whose
    tokens are not sent count as unexplained.

    Args:
        share: (B, n, D).
        images: (B, 3, H, W).
        places: (n,), where on the grid, in reading order, the tokens stand.
        grid: height and width of the grid of all tokens.

    Returns:
        Scalar in [0, 1], differentiable in the share; too high where n B is not much above D.
    """
    with torch.autocast(share.device.type, enabled=False):
        share = share.float()
        share = share / (share.std((0, 1)) + 1e-4)
        blocks = to_tokens(_blocks(images, *grid))
        whole = (blocks - blocks.mean((0, 1))).square().mean((0, 1)).sum()
        x, y = share.flatten(0, 1), blocks[:, places].flatten(0, 1)
        x, y = x - x.mean(0), y - y.mean(0)
        explained = _fitted(x.T @ x / len(x), x.T @ y / len(x))
        return explained.sum() / whole * (share.shape[1] / blocks.shape[1])


def explained_alone(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Share of the targets' variance that the best linear decoder of each unit alone explains.

    Args:
        batches: values of the units (B, M, d) and targets (B, t).

    Returns:
        The explained share (M,) in [0, 1], and the units' standard deviation (M,) over the images.
    """
    count, sums = 0, [torch.zeros(())] * 5
    for x, y in batches:
        count += len(x)
        products = torch.einsum("bmi,bmj->mij", x, x), torch.einsum("bmi,bt->mit", x, y)
        parts = (x.sum(0), y.sum(0), y.square().sum(0), *products)
        sums = [total.to(part.device) + part for total, part in zip(sums, parts, strict=True)]
    x, y, yy, xx, xy = (total / count for total in sums)
    xx, xy = xx - x[:, :, None] * x[:, None], xy - x[:, :, None] * y
    explained = _fitted(xx, xy).sum((1, 2)) / (yy - y.square()).sum()
    return explained, xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(0).sqrt()


def _fitted(xx: Tensor, xy: Tensor) -> Tensor:
    """Variance explained by a ridge fit with these covariances, by input and output (..., d, t)."""
    ridge = RIDGE * xx.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-8
    identity = torch.eye(xx.shape[-1], device=xx.device)
    weights = torch.linalg.solve(xx + ridge[..., None, None] * identity, xy)
    explained: Tensor = weights * xy
    return explained


def _blocks(images: Tensor, height: int, width: int) -> Tensor:
    """Pixels below each place of a grid (B, 3 b^2, height, width), b at most `BLOCK`."""
    block = min(max(images.shape[-1] // width, 1), BLOCK)
    if images.shape[2:] != (height * block, width * block):
        images = F.adaptive_avg_pool2d(images, (height * block, width * block))
    return F.pixel_unshuffle(images, block)
