"""Residual blocks (He et al., 2016) and the small trunk that server branches are made of."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from mibench.backbones.tokens import on_grid

WIDEST = 8
"""Widest block of a branch, in widths of its first one; large shares would need too many halvings
for a doubling with each."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut: relu(x + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) → (B, width, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Head(nn.Sequential):
    """Global average pooling and one linear layer."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, outputs))


class AsMap(nn.Module):
    """Lays a set of tokens out on a grid."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.grid = (height, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, D) → (B, D, height, width), in reading order."""
        return on_grid(tokens, *self.grid)


def residual_branch(share_shape: tuple[int, ...], outputs: int, width: int) -> nn.Sequential:
    """A residual trunk for a share: one block per resolution down to 4 pixels a side.

    The width doubles with the first three halvings of the resolution. The first block keeps the
    resolution.

    Args:
        share_shape: maps (C, h, w), or tokens (N, D), which are read on their square grid, or as
            one row where their number is no square.
        outputs: length of the reply.
        width: channels of the first block.
    """
    blocks: list[nn.Module] = []
    if len(share_shape) == 2:
        tokens, channels = share_shape
        height = math.isqrt(tokens) if math.isqrt(tokens) ** 2 == tokens else 1
        size = tokens // height
        blocks.append(AsMap(height, size))
    else:
        channels, height, columns = share_shape
        size = max(height, columns)
    widest = WIDEST * width
    blocks.append(ResidualBlock(channels, width))
    while size > 4:
        wider = min(2 * width, widest)
        blocks.append(ResidualBlock(width, wider, stride=2))
        width, size = wider, (size + 1) // 2
    return nn.Sequential(*blocks, Head(width, outputs))
