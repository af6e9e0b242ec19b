"""Attention as gates between 0 and 1: on channels, on places, and on rotated planes of a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """A gate for each channel, from the means of all channels (Hu et al., CVPR 2018).

    Args:
        channels: of the features, C of maps (B, C, h, w) or of tokens (B, N, C).
        reduction: channels for each hidden unit.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.excite = _bottleneck(channels, reduction)

    def forward(self, features: Tensor) -> Tensor:
        """Keeps the shape."""
        if features.ndim == 3:
            gate: Tensor = self.excite(features.mean(1)).sigmoid()[:, None]
        else:
            gate = self.excite(features.mean((2, 3))).sigmoid()[:, :, None, None]
        return features * gate


class TripletAttention(nn.Module):
    """The mean of three gated maps, one for each pair of axes (Misra et al., WACV 2021).

    Each gate sees the map rotated so that another axis (channels, rows, columns) leads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.ModuleList(
            nn.Sequential(_plane_convolution(), nn.BatchNorm2d(1, momentum=0.01)) for _ in range(3)
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Keeps the shape (B, C, h, w)."""
        gated = []
        for axis, gate in enumerate(self.gates, 1):
            rotated = maps.transpose(1, axis)
            gated.append((rotated * gate(_extent(rotated)).sigmoid()).transpose(1, axis))
        return torch.stack(gated).mean(0)


class CBAM(nn.Module):
    """A gate for each channel, and behind it one for each place (Woo et al., ECCV 2018).

    The channels' gate adds what one network says of their means and of their maxima.

    Args:
        channels: of the maps.
        reduction: channels for each hidden unit.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.channels = _bottleneck(channels, reduction)
        self.places = _plane_convolution()

    def forward(self, maps: Tensor) -> Tensor:
        """Keeps the shape (B, C, h, w)."""
        told = self.channels(maps.mean((2, 3))) + self.channels(maps.amax((2, 3)))
        maps = maps * told.sigmoid()[:, :, None, None]
        gate: Tensor = self.places(_extent(maps)).sigmoid()
        return maps * gate


def _bottleneck(channels: int, reduction: int) -> nn.Sequential:
    hidden = max(1, channels // reduction)
    first = nn.Linear(channels, hidden, bias=False)
    # Mostly it reads what comes from a ReLU: of weights of either sign, whole units would be dead
    # from the start, in a small gate often all of them, and the gate would never learn.
    with torch.no_grad():
        first.weight.abs_()
    return nn.Sequential(first, nn.ReLU(), nn.Linear(hidden, channels, bias=False))


def _plane_convolution() -> nn.Conv2d:
    return nn.Conv2d(2, 1, 7, padding=3, bias=False)


def _extent(maps: Tensor) -> Tensor:
    """Maximum and mean over the leading axis, (B, 2, h, w)."""
    return torch.stack([maps.amax(1), maps.mean(1)], dim=1)
