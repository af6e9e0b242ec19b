"""What every split point of a backbone sends and costs, without training anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mibench import seeding
from mibench.errors import blaming
from mibench.files import Json
from mibench.metrics.cost import client_cost, count_parameters
from mibench.params import build
from mibench.registry import backbones
from mibench.task import Task


@dataclass(frozen=True)
class Cut:
    """One split point.

    Attributes:
        split_point: its name.
        feature_shape: maps (C, h, w) or tokens (N, D).
        parameters: number of the client's parameters.
        flops: what the client computes for one image, 2 per multiply-add; see `client_cost`.
        expansion: values of the features over values of the image.
    """

    split_point: str
    feature_shape: tuple[int, ...]
    parameters: int
    flops: int
    expansion: float


def survey(
    name: str, params: Mapping[str, Json], image_shape: tuple[int, int, int], task: Task
) -> list[Cut]:
    """Returns one row per split point, first to last, from one pass over all stages.

    The pass computes shapes and no values, so it is quick for images of any size.

    Args:
        name: name of the backbone.
        params: its parameters.
        image_shape: (3, H, W).
        task: what the classifier tells.

    Raises:
        UnknownNameError: no backbone has this name.
        InvalidParamsError: the parameters are wrong, or do not fit the image.
        PluginError: a plugin's own code failed.
    """
    family = backbones.load(name)
    backbone = family(build(family.Params, params, f"backbone {name}"), image_shape, task)
    with blaming(family, "stages"), seeding.stream(0, "survey"):
        # Built as usual and moved then: not every network can be built without values.
        stages = {point: stage.eval().to("meta") for point, stage in backbone.stages().items()}
        features = torch.zeros(1, *image_shape, device="meta")
        client: list[nn.Module] = []
        cuts: list[Cut] = []
        flops = 0
        for point, stage in list(stages.items())[:-1]:
            client.append(stage)
            cost, features = _pass(stage, features)
            flops += cost
            shape = tuple(features.shape[1:])
            expansion = math.prod(shape) / math.prod(image_shape)
            cuts.append(Cut(point, shape, count_parameters(client), flops, expansion))
    return cuts


def _pass(stage: nn.Module, features: Tensor) -> tuple[int, Tensor]:
    passed: list[Tensor] = []
    cost = client_cost(lambda given: passed.append(stage(given)), features)
    return cost, passed[0]
