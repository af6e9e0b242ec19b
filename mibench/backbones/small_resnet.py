"""A small residual network for protocols that two CPU cores can train."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from mibench.backbones.base import Backbone, Normalise
from mibench.backbones.residual import Head, ResidualBlock, residual_branch
from mibench.registry import backbones


@backbones.register("small-resnet", paper="after He et al., arXiv 1512.03385")
class SmallResNet(Backbone):
    """Stride-2 stem and three residual stages; trained in minutes on two CPU cores.

    Split points: ``stem`` (C, H/2, W/2), ``layer1`` (w, H/2, W/2), ``layer2`` (2w, H/4, W/4),
    ``layer3`` (4w, H/8, W/8). The stem continues the border by replication: with zero padding, a
    kernel without response to constants still sees the difference to the padding at the border,
    that is the absolute colour.
    """

    class Params(Backbone.Params):
        """Widths of the network."""

        stem: int = Field(default=64, gt=0, description="channels of the stem")
        width: int = Field(default=64, gt=0, description="channels of layer1, doubled twice")

    params: Params

    def stages(self) -> dict[str, nn.Module]:
        """Builds ``stem``, ``layer1`` to ``layer3`` and ``head``."""
        stem, width = self.params.stem, self.params.width
        return {
            "stem": nn.Sequential(
                Normalise((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
                nn.Conv2d(3, stem, 3, 2, 1, bias=False, padding_mode="replicate"),
                nn.BatchNorm2d(stem),
                nn.ReLU(),
            ),
            "layer1": ResidualBlock(stem, width),
            "layer2": ResidualBlock(width, 2 * width, stride=2),
            "layer3": ResidualBlock(2 * width, 4 * width, stride=2),
            "head": Head(4 * width, self.classes),
        }

    def branch(self, share_shape: tuple[int, ...], outputs: int, width: int) -> nn.Module:
        """Builds a residual trunk; see `residual_branch`."""
        return residual_branch(share_shape, outputs, width)
