"""Backbones: a cut changes nothing, and normalisation is inside."""

import re

import pytest
import torch
from torch import nn

from mibench.backbones.base import BackboneSpec, Split
from mibench.errors import InvalidParamsError, UnknownNameError
from mibench.registry import backbones
from mibench.task import Classification

SHAPE = (3, 32, 32)
TASK = Classification(tuple("abcdefg"))


def resnet(*widths):
    points = ("stem", "layer1", "layer2", "layer3", "layer4")
    sides = (32, 32, 16, 8, 4)
    return {
        point: (width, side, side) for point, width, side in zip(points, widths, sides, strict=True)
    }


def vit(tokens, width, depth):
    return dict.fromkeys(["embed", *(f"block{i + 1}" for i in range(depth))], (tokens, width))


def he_cnn():
    shapes = {}
    for group, width, side in ((1, 64, 32), (2, 128, 16), (3, 128, 8)):
        for layer in (1, 2):
            shapes[f"conv{group}{layer}"] = shapes[f"ReLU{group}{layer}"] = (width, side, side)
        shapes[f"pool{group}"] = (width, side // 2, side // 2)
    return {**shapes, "fc1": (512, 1, 1), "sigmoid": (512, 1, 1)}


# (family, parameters, shapes of the features at each split point for 32-pixel images)
FAMILIES = [
    (
        "small-resnet",
        {"stem": 6, "width": 8},
        {"stem": (6, 16, 16), "layer1": (8, 16, 16), "layer2": (16, 8, 8), "layer3": (32, 4, 4)},
    ),
    ("resnet18", {}, resnet(64, 64, 128, 256, 512)),
    ("resnet50", {}, resnet(64, 256, 512, 1024, 2048)),
    ("he-cnn", {}, he_cnn()),
    ("small-vit", {"width": 24, "depth": 3, "heads": 3}, vit(65, 24, 3)),
    ("small-vit", {"width": 24, "depth": 2, "heads": 2, "pool": "avg"}, vit(64, 24, 2)),
    ("vit-tiny", {"patch": 8}, vit(17, 192, 12)),
    ("vit-small", {"patch": 16}, vit(5, 384, 12)),
]
IDS = [f"{name}-{params['pool']}" if "pool" in params else name for name, params, _ in FAMILIES]
every_family = pytest.mark.parametrize(("name", "params", "shapes"), FAMILIES, ids=IDS)


def family(name, params, shape=SHAPE):
    cls = backbones.load(name)
    return cls(cls.Params(**params), shape, TASK)


def images(count=2):
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))


def some(points):
    """All split points of a short network, and a few of a long one."""
    return list(points) if len(points) < 8 else list(points)[::5]


def test_all_built_in_families_are_tested_here():
    builtin = {entry.name for entry in backbones.entries() if entry.origin == "mibench"}
    assert builtin == {name for name, _, _ in FAMILIES}


@every_family
def test_the_features_have_the_documented_shape_at_every_split_point(name, params, shapes):
    stages = family(name, params).stages()
    assert list(stages)[:-1] == list(shapes)
    features = images(3)
    with torch.no_grad():
        for point, stage in list(stages.items())[:-1]:
            features = stage.eval()(features)
            assert features.shape == (3, *shapes[point]), point


@every_family
def test_no_cut_changes_the_output(name, params, shapes):
    whole = nn.Sequential(*family(name, params).stages().values()).eval()
    with torch.no_grad():
        expected = whole(images())
    assert expected.shape == (2, TASK.outputs)
    assert not torch.equal(expected[0], expected[1])
    for point in some(shapes):
        split = Split(family(name, params), point)
        assert split.feature_shape == shapes[point]
        assert split.training
        split.eval()
        # Whatever a module is called in its half, it is the same list of weights.
        merged = [*split.client.state_dict().values(), *split.server.state_dict().values()]
        for mine, theirs in zip(merged, whole.state_dict().values(), strict=True):
            mine.copy_(theirs)
        with torch.no_grad():
            assert torch.equal(split.server(split.client(images())), expected), point


@every_family
def test_initial_weights_come_from_the_seed_and_not_from_the_cut(name, params, shapes):
    def weights(point, seed):
        split = BackboneSpec(name, params, point).build(SHAPE, TASK, seed)
        return [*split.client.parameters(), *split.server.parameters()]

    first, *_, last = shapes
    one, other, different = weights(first, 3), weights(last, 3), weights(first, 4)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    # Of matrices: many vectors begin as zeros or ones whatever the seed.
    assert not any(torch.equal(a, b) for a, b in zip(one, different, strict=True) if a.ndim > 1)


@every_family
def test_every_parameter_of_a_split_learns(name, params, shapes):
    split = Split(family(name, params), next(iter(shapes)))
    split.server(split.client(images())).square().sum().backward()
    assert all(parameter.grad is not None for parameter in split.parameters())


@every_family
def test_normalisation_is_inside(name, params, shapes):
    split = Split(family(name, params), next(iter(shapes))).eval()
    entered = []
    first = next(m for m in split.client.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    for level in (0.0, 0.5, 1.0):
        split.client(torch.full((1, *SHAPE), level))
    black, grey, white = entered
    assert black.max() <= -1
    assert grey.abs().max() < 0.5
    assert white.min() >= 1


@pytest.mark.parametrize(
    ("name", "black"),
    [("resnet18", -0.485 / 0.229), ("he-cnn", -0.485 / 0.229), ("small-vit", -1.0)],
)
def test_normalisation_is_that_of_the_published_weights(name, black):
    first = next(iter(family(name, {}).stages().values()))
    normalise = next(m for m in first.modules() if type(m).__name__ == "Normalise")
    assert normalise(torch.zeros(1, *SHAPE))[0, 0, 0, 0].item() == pytest.approx(black)


@every_family
def test_the_number_of_class_tokens_is_told(name, params, shapes):
    split = Split(family(name, params), next(iter(shapes)))
    has_class_token = "vit" in name and params.get("pool") != "avg"
    assert split.prefix_tokens == int(has_class_token)
    if len(split.feature_shape) == 2:
        side = round((split.feature_shape[0] - split.prefix_tokens) ** 0.5)
        assert side**2 + split.prefix_tokens == split.feature_shape[0]


@pytest.mark.parametrize(
    ("name", "wrong", "near"),
    [
        ("resnet50", "layer_2", "layer2"),
        ("vit-tiny", "blok1", "block1"),
        ("he-cnn", "relu22", "ReLU22"),
        ("small-resnet", "layer_2", "layer2"),
    ],
)
def test_an_unknown_split_point_names_the_nearest(name, wrong, near):
    said = re.escape(f"did you mean '{near}'")
    with pytest.raises(UnknownNameError, match=said) as caught:
        Split(family(name, {}), wrong)
    assert name in str(caught.value)


@pytest.mark.parametrize(("name", "head"), [("small-vit", "head"), ("he-cnn", "fc2")])
def test_the_last_stage_is_no_split_point(name, head):
    with pytest.raises(UnknownNameError):
        Split(family(name, {}), head)


def test_a_wrong_parameter_of_a_backbone_is_explained():
    with pytest.raises(InvalidParamsError, match=r"backbone small-resnet\.width"):
        BackboneSpec("small-resnet", {"width": 0}, "stem").build(SHAPE, TASK, 0)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_large_stem_reads_large_images(name):
    split = Split(family(name, {"stem": "imagenet"}, (3, 64, 64)), "layer1")
    assert split.feature_shape[1:] == (16, 16)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_replicated_borders_hide_the_absolute_colour(stem):
    def spread(padding):
        backbone = family("resnet18", {"stem": stem, "padding": padding})
        conv = next(m for m in backbone.stages()["stem"].modules() if isinstance(m, nn.Conv2d))
        return conv(torch.ones(1, *SHAPE)).std((2, 3)).max().item()

    assert spread("replicate") < 1e-5 < spread("zeros")


def test_the_network_of_he_et_al_at_other_sizes():
    split = Split(family("he-cnn", {}, (3, 16, 16)), "fc1")
    assert split.server(split.client(torch.rand(2, 3, 16, 16))).shape == (2, TASK.outputs)
    with pytest.raises(InvalidParamsError, match="multiple of 8"):
        family("he-cnn", {}, (3, 28, 28)).stages()


@pytest.mark.parametrize(
    ("size", "tokens"), [(8, 64), (28, 49), (32, 64), (64, 64), (96, 144), (224, 196)]
)
def test_the_patch_follows_the_image(size, tokens):
    params = {"width": 8, "depth": 1, "heads": 1, "pool": "avg"}
    split = Split(family("small-vit", params, (3, size, size)), "embed")
    assert split.feature_shape == (tokens, 8)


@pytest.mark.parametrize(
    ("size", "patch", "said"),
    [
        (32, 5, r"backbone vit-tiny\.patch: given 5.* choose one of 1, 2, 4, 8, 16, 32"),
        (37, None, "no patch cuts images of 37 pixels"),
    ],
)
def test_a_patch_that_does_not_divide_the_image_is_refused(size, patch, said):
    with pytest.raises(InvalidParamsError, match=said):
        family("vit-tiny", {"patch": patch}, (3, size, size)).stages()


def test_heads_that_do_not_divide_the_width_are_refused():
    spec = BackboneSpec("small-vit", {"width": 30, "heads": 4}, "embed")
    with pytest.raises(InvalidParamsError, match="4 heads do not divide the width 30"):
        spec.build(SHAPE, TASK, 0)
