"""Backbones: a cut changes nothing, and normalisation is inside."""

import re

import pytest
import torch
from torch import nn

from mibench.backbones.base import BackboneSpec, Split
from mibench.errors import InvalidParamsError, UnknownNameError
from mibench.registry import backbones

SHAPE, CLASSES = (3, 32, 32), 7

# (family, parameters, shapes of the features at each split point for 32-pixel images)
FAMILIES = [
    (
        "small-resnet",
        {"stem": 6, "width": 8},
        {"stem": (6, 16, 16), "layer1": (8, 16, 16), "layer2": (16, 8, 8), "layer3": (32, 4, 4)},
    ),
    (
        "resnet18",
        {},
        {
            "stem": (64, 32, 32),
            "layer1": (64, 32, 32),
            "layer2": (128, 16, 16),
            "layer3": (256, 8, 8),
            "layer4": (512, 4, 4),
        },
    ),
]
CUTS = [(name, params, point) for name, params, shapes in FAMILIES for point in shapes]


def family(name, params):
    cls = backbones.load(name)
    return cls(cls.Params(**params), SHAPE, CLASSES)


def images(count=2):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def test_all_built_in_families_are_tested_here():
    builtin = {entry.name for entry in backbones.entries() if entry.origin == "mibench"}
    assert builtin == {name for name, _, _ in FAMILIES}


@pytest.mark.parametrize(("name", "params", "shapes"), FAMILIES)
def test_no_cut_changes_the_output(name, params, shapes):
    stages = family(name, params).stages()
    assert list(stages)[:-1] == list(shapes)
    whole = nn.Sequential(*stages.values()).eval()
    with torch.no_grad():
        expected = whole(images())
    assert expected.shape == (2, CLASSES)
    assert not torch.allclose(expected[0], expected[1])
    for point in shapes:
        split = Split(family(name, params), point).eval()
        # Whatever a module is called in its half, it is the same list of weights.
        merged = [*split.client.state_dict().values(), *split.server.state_dict().values()]
        for mine, theirs in zip(merged, whole.state_dict().values(), strict=True):
            mine.copy_(theirs)
        with torch.no_grad():
            assert torch.equal(split.server(split.client(images())), expected), point


@pytest.mark.parametrize(("name", "params", "shapes"), FAMILIES)
def test_initial_weights_come_from_the_seed_and_not_from_the_cut(name, params, shapes):
    def weights(point, seed):
        split = BackboneSpec(name, params, point).build(SHAPE, CLASSES, seed)
        return [*split.client.parameters(), *split.server.parameters()]

    first, *_, last = shapes
    one, other = weights(first, 3), weights(last, 3)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], weights(first, 4)[0])


@pytest.mark.parametrize(("name", "params", "point"), CUTS)
def test_features_have_the_documented_shape(name, params, point):
    shapes = next(shapes for family, _, shapes in FAMILIES if family == name)
    split = Split(family(name, params), point)
    assert split.feature_shape == shapes[point]
    assert split.training
    with torch.no_grad():
        assert split.eval().client(images(3)).shape == (3, *shapes[point])


@pytest.mark.parametrize(("name", "params", "shapes"), FAMILIES)
def test_normalisation_is_inside(name, params, shapes):
    split = Split(family(name, params), "stem").eval()
    entered = []
    first = next(m for m in split.client.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    for level in (0.0, 0.5, 1.0):
        split.client(torch.full((1, *SHAPE), level))
    black, grey, white = entered
    assert black.max() < -1.5
    assert grey.abs().max() < 0.5
    assert white.min() > 1.5


@pytest.mark.parametrize(("name", "params", "shapes"), FAMILIES)
def test_an_unknown_split_point_names_the_nearest(name, params, shapes):
    with pytest.raises(UnknownNameError, match=re.escape("did you mean 'layer2'")) as caught:
        Split(family(name, params), "layer_2")
    assert name in str(caught.value)
    with pytest.raises(UnknownNameError):
        Split(family(name, params), "head")


@pytest.mark.parametrize("name", [name for name, _, _ in FAMILIES])
@pytest.mark.parametrize("share", [(5, 32, 32), (3, 8, 8), (4, 2, 2), (6, 1, 1)])
def test_a_branch_reads_shares_of_any_size(name, share):
    branch = family(name, {}).branch(share, outputs=9, width=4).eval()
    assert branch(torch.rand(2, *share)).shape == (2, 9)


def test_a_wrong_parameter_of_a_backbone_is_explained():
    with pytest.raises(InvalidParamsError, match=r"backbone small-resnet\.width"):
        BackboneSpec("small-resnet", {"width": 0}, "stem").build(SHAPE, CLASSES, 0)


def test_the_large_stem_of_resnet18_reads_large_images():
    cls = backbones.load("resnet18")
    split = Split(cls(cls.Params(stem="imagenet"), (3, 64, 64), CLASSES), "layer1")
    assert split.feature_shape == (64, 16, 16)
