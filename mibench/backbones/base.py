"""A backbone is a list of named stages; a split cuts that list behind one of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mibench import seeding
from mibench.errors import UnknownNameError
from mibench.files import Json
from mibench.params import Parameters, build
from mibench.registry import backbones
from mibench.suggest import unknown
from mibench.task import Task


class Normalise(nn.Module):
    """Maps images in [0, 1] to zero mean and unit deviation, inside the backbone."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Keeps the shape."""
        return (images - self.mean) / self.std


class Backbone(ABC):
    """A family of classifiers. A subclass builds the stages and the branches of its family.

    Args:
        params: the family's own parameters.
        image_shape: (3, H, W).
        task: what the classifier tells of an image.
    """

    required: ClassVar[tuple[str, ...]] = ("stages", "branch")
    name: ClassVar[str]
    version: ClassVar[int]

    class Params(Parameters):
        """Parameters of the family."""

    def __init__(self, params: Params, image_shape: tuple[int, int, int], task: Task) -> None:
        self.params = params
        self.image_shape = image_shape
        self.task = task

    @property
    def classes(self) -> int:
        """Number of logits."""
        return self.task.outputs

    @property
    def prefix_tokens(self) -> int:
        """Leading tokens of the features that stand for no place of the image; 0 for maps."""
        return 0

    @abstractmethod
    def stages(self) -> dict[str, nn.Module]:
        """Builds the stages in order; applied one after the other they map images to logits.

        Every name but the last is a split point.
        """

    @abstractmethod
    def branch(self, share_shape: tuple[int, ...], outputs: int, width: int) -> nn.Module:
        """Builds a smaller server part of the family that reads a share of any shape.

        Args:
            share_shape: shape of one share without the batch axis.
            outputs: length of the reply.
            width: channels of the branch's first stage.
        """


class Split(nn.Module):
    """A classifier cut at a split point.

    Attributes:
        client: images (B, 3, H, W) in [0, 1] → features.
        server: features → logits (B, classes).
        feature_shape: shape of the features without the batch axis: maps (C, h, w), or a set of
            tokens (N, D).
        task: what the logits tell of an image.
        prefix_tokens: leading tokens that stand for no place of the image (class tokens).
        split_point: the last stage of the client.
        later_points: the split points behind it; each is a stage of the server, in order.
    """

    def __init__(self, backbone: Backbone, split_point: str) -> None:
        """Builds the backbone and cuts it behind ``split_point``.

        Raises:
            UnknownNameError: the backbone has no such split point.
        """
        super().__init__()
        stages = backbone.stages()
        points = list(stages)[:-1]
        if split_point not in points:
            raise UnknownNameError(unknown(f"split point of {backbone.name}", split_point, points))
        cut = points.index(split_point) + 1
        self.backbone = backbone
        self.split_point, self.later_points = split_point, points[cut:]
        self.client = nn.Sequential(*list(stages.values())[:cut])
        self.server = nn.Sequential(*list(stages.values())[cut:])
        self.image_shape = backbone.image_shape
        self.task = backbone.task
        self.prefix_tokens = backbone.prefix_tokens
        self.classes = backbone.classes
        with torch.no_grad():
            self.client.eval()
            features: Tensor = self.client(torch.zeros(1, *self.image_shape))
        self.client.train()
        self.feature_shape = tuple(features.shape[1:])

    def branch(self, share_shape: tuple[int, ...], outputs: int, width: int) -> nn.Module:
        """Builds a server branch of the same family; see `Backbone.branch`."""
        return self.backbone.branch(share_shape, outputs, width)


@dataclass(frozen=True)
class BackboneSpec:
    """Which classifier, with which parameters, cut where."""

    name: str
    params: Mapping[str, Json]
    split_point: str

    def build(self, image_shape: tuple[int, int, int], task: Task, seed: int) -> Split:
        """Builds the split with initial weights from the stream ``backbone`` of ``seed``."""
        family = backbones.load(self.name)
        params = build(family.Params, self.params, f"backbone {self.name}")
        with seeding.stream(seed, "backbone"):
            return Split(family(params, image_shape, task), self.split_point)
