"""ResNet-18 and ResNet-50 of timm, by default with the stem that is usual for 32-pixel images."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from mibench.backbones.base import Backbone
from mibench.backbones.pretrained import network, normalisation
from mibench.backbones.residual import residual_branch
from mibench.registry import backbones


class TimmResNet(Backbone):
    """A residual network of timm, whose stem may be one 3x3 convolution without pooling."""

    arch: ClassVar[str]

    class Params(Backbone.Params):
        """Which stem, and whose weights."""

        stem: Literal["cifar", "imagenet"] = Field(
            default="cifar",
            description="cifar: 3x3, stride 1, no pooling; imagenet: 7x7, stride 2, pooling",
        )
        padding: Literal["zeros", "replicate"] = Field(
            default="zeros", description="how the stem's convolution continues the border"
        )
        pretrained: bool = Field(
            default=False, description="ImageNet weights; the cifar stem is fresh even then"
        )

    params: Params

    def stages(self) -> dict[str, nn.Module]:
        """Builds ``stem``, ``layer1`` to ``layer4`` and ``head`` from timm's model."""
        net = network(self.arch, self.classes, pretrained=self.params.pretrained)
        return {
            "stem": nn.Sequential(normalisation(self.arch), *self._stem(net)),
            "layer1": net.layer1,
            "layer2": net.layer2,
            "layer3": net.layer3,
            "layer4": net.layer4,
            "head": nn.Sequential(net.global_pool, net.fc),
        }

    def branch(self, share_shape: tuple[int, ...], outputs: int, width: int) -> nn.Module:
        """Builds a residual trunk; see `residual_branch`."""
        return residual_branch(share_shape, outputs, width)

    def _stem(self, net: Any) -> list[nn.Module]:
        cifar = self.params.stem == "cifar"
        kernel, stride = (3, 1) if cifar else (7, 2)
        conv = nn.Conv2d(
            3, 64, kernel, stride, kernel // 2, bias=False, padding_mode=self.params.padding
        )
        if cifar:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            return [conv, nn.BatchNorm2d(64), net.act1]
        conv.load_state_dict(net.conv1.state_dict())
        return [conv, net.bn1, net.act1, net.maxpool]


@backbones.register("resnet18", paper="He et al., arXiv 1512.03385")
class ResNet18(TimmResNet):
    """timm's ResNet-18; the ``cifar`` stem is one 3x3 convolution of stride 1 without pooling.

    Split points with the ``cifar`` stem: ``stem`` (64, H, W), ``layer1`` (64, H, W), ``layer2``
    (128, H/2, W/2), ``layer3`` (256, H/4, W/4), ``layer4`` (512, H/8, W/8). With the ``imagenet``
    stem all are four times smaller a side.
    """

    arch = "resnet18.a1_in1k"


@backbones.register("resnet50", paper="He et al., arXiv 1512.03385")
class ResNet50(TimmResNet):
    """timm's ResNet-50; the ``cifar`` stem is one 3x3 convolution of stride 1 without pooling.

    Split points with the ``cifar`` stem: ``stem`` (64, H, W), ``layer1`` (256, H, W), ``layer2``
    (512, H/2, W/2), ``layer3`` (1024, H/4, W/4), ``layer4`` (2048, H/8, W/8). With the ``imagenet``
    stem all are four times smaller a side.
    """

    arch = "resnet50.a1_in1k"
