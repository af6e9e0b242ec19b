"""Residual blocks (He et al., 2016) and the small trunk that server branches are made of."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


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


def residual_branch(share_shape: tuple[int, ...], outputs: int, width: int) -> nn.Sequential:
    """A residual trunk for a share (C, h, w): one block per resolution down to 4 pixels a side.

    The width doubles with every halving of the resolution. The first block keeps the resolution.
    """
    channels, size, _ = share_shape
    blocks: list[nn.Module] = [ResidualBlock(channels, width)]
    while size > 4:
        blocks.append(ResidualBlock(width, 2 * width, stride=2))
        width, size = 2 * width, size // 2
    return nn.Sequential(*blocks, Head(width, outputs))
