"""The small network on which He et al. first inverted split inference."""

from __future__ import annotations

from torch import nn

from mibench.backbones.base import Backbone, Normalise
from mibench.backbones.residual import residual_branch
from mibench.errors import InvalidParamsError
from mibench.registry import backbones

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet."""
WIDTHS = (64, 128, 128)
"""Channels of the three groups of two convolutions."""
HIDDEN = 512
SHRINK = 2 ** len(WIDTHS)


@backbones.register("he-cnn", paper="He et al., ACSAC 2019")
class HeCNN(Backbone):
    """Six 3x3 convolutions in three groups with max-pooling, and two fully connected layers.

    The CIFAR-10 network of "Model inversion attacks against collaborative inference". Split points:
    ``conv11``, ``ReLU11``, ``conv12``, ``ReLU12`` (64, H, W), ``pool1`` (64, H/2, W/2), ``conv21``
    to ``ReLU22`` (128, H/2, W/2), ``pool2`` (128, H/4, W/4), ``conv31`` to ``ReLU32``
    (128, H/4, W/4), ``pool3`` (128, H/8, W/8), ``fc1`` and ``sigmoid`` (512, 1, 1): a map of one
    pixel, so that whatever reads maps reads it.
    """

    def stages(self) -> dict[str, nn.Module]:
        """Builds the layers under their names in the paper; the last, ``fc2``, is the head.

        Raises:
            InvalidParamsError: the image cannot be halved three times.
        """
        _, height, width = self.image_shape
        if height % SHRINK or width % SHRINK:
            raise InvalidParamsError(
                f"backbone {self.name}: images of {height}x{width} pixels cannot be halved "
                f"{len(WIDTHS)} times; take a multiple of {SHRINK} as image size."
            )
        built: dict[str, nn.Module] = {}
        channels = 3
        for group, out in enumerate(WIDTHS, 1):
            for layer in (1, 2):
                built[f"conv{group}{layer}"] = nn.Conv2d(channels, out, 3, padding=1)
                built[f"ReLU{group}{layer}"] = nn.ReLU()
                channels = out
            built[f"pool{group}"] = nn.MaxPool2d(2)
        built["conv11"] = nn.Sequential(Normalise(MEAN, STD), built["conv11"])
        flat = channels * (height // SHRINK) * (width // SHRINK)
        return {
            **built,
            "fc1": nn.Sequential(
                nn.Flatten(), nn.Linear(flat, HIDDEN), nn.Unflatten(1, (HIDDEN, 1, 1))
            ),
            "sigmoid": nn.Sigmoid(),
            "fc2": nn.Sequential(nn.Flatten(), nn.Linear(HIDDEN, self.classes)),
        }

    def branch(self, share_shape: tuple[int, ...], outputs: int, width: int) -> nn.Module:
        """Builds a residual trunk; see `residual_branch`."""
        return residual_branch(share_shape, outputs, width)
