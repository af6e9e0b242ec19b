"""ResNet-18 of timm with the stem that is usual for 32-pixel images."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from mibench.backbones.base import Backbone, Normalise
from mibench.backbones.residual import residual_branch
from mibench.registry import backbones

CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2470, 0.2435, 0.2616)


@backbones.register("resnet18", paper="He et al., arXiv 1512.03385")
class ResNet18(Backbone):
    """timm's ResNet-18; the ``cifar`` stem is one 3x3 convolution of stride 1 without pooling.

    Split points: ``stem`` (64, H, W), ``layer1`` (64, H, W), ``layer2`` (128, H/2, W/2), ``layer3``
    (256, H/4, W/4), ``layer4`` (512, H/8, W/8), with the ``cifar`` stem.
    """

    class Params(Backbone.Params):
        """Which stem."""

        stem: Literal["cifar", "imagenet"] = "cifar"
        padding: Literal["zeros", "replicate"] = "zeros"

    params: Params

    def stages(self) -> dict[str, nn.Module]:
        """Builds ``stem``, ``layer1`` to ``layer4`` and ``head`` from timm's model."""
        import timm

        net: Any = timm.create_model("resnet18", pretrained=False, num_classes=self.classes)
        stem = [net.conv1, net.bn1, net.act1, net.maxpool]
        if self.params.stem == "cifar":
            conv = nn.Conv2d(3, 64, 3, 1, 1, bias=False, padding_mode=self.params.padding)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            stem = [conv, net.bn1, net.act1]
        return {
            "stem": nn.Sequential(Normalise(CIFAR_MEAN, CIFAR_STD), *stem),
            "layer1": net.layer1,
            "layer2": net.layer2,
            "layer3": net.layer3,
            "layer4": net.layer4,
            "head": nn.Sequential(net.global_pool, net.fc),
        }

    def branch(self, share_shape: tuple[int, ...], outputs: int, width: int) -> nn.Module:
        """Builds a residual trunk; see `residual_branch`."""
        return residual_branch(share_shape, outputs, width)
