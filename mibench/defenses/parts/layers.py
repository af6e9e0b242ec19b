"""Layers that read maps (B, C, h, w) and tokens (B, N, D) alike, channel by channel."""

from __future__ import annotations

from torch import Tensor, nn


def channels_of(shape: tuple[int, ...]) -> int:
    """Channels of features of this shape: C of maps (C, h, w), D of tokens (N, D)."""
    return shape[0] if len(shape) == 3 else shape[-1]


def per_channel(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Lays values (C,) out as (C, 1, 1) or (D,), to broadcast over features of this shape."""
    return values[:, None, None] if len(shape) == 3 else values


def pointwise(shape: tuple[int, ...], outputs: int) -> nn.Module:
    """A linear layer over the channels of each place: a 1x1 convolution, or one for each token.

    Args:
        shape: of the features that it reads, without the batch axis.
        outputs: channels behind it.
    """
    inputs = channels_of(shape)
    return nn.Conv2d(inputs, outputs, 1) if len(shape) == 3 else nn.Linear(inputs, outputs)


def standardisation(shape: tuple[int, ...]) -> nn.Module:
    """Batch normalisation of each channel without a learned gain: features of RMS 1.

    A channel is normalised over the batch and all its places: those of a map (C, h, w), or all
    tokens of a set (N, D), class tokens included.
    """
    if len(shape) == 3:
        return nn.BatchNorm2d(shape[0], affine=False)
    return TokenNorm(shape[-1])


class TokenNorm(nn.BatchNorm1d):
    """Batch normalisation of each channel of tokens (B, N, D), without affine part."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Keeps the shape."""
        return super().forward(tokens.flatten(0, 1)).view_as(tokens)
