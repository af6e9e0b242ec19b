"""Tiny classifiers of both families, for tests: features (8, 8, 8), (64, 8) and (65, 8)."""

from mibench.backbones.base import BackboneSpec

SHAPE = (3, 16, 16)
VIT = {"width": 8, "depth": 2, "heads": 2, "patch": 2}
SPECS = {
    "map": BackboneSpec("small-resnet", {"stem": 8, "width": 8}, "stem"),
    "tokens": BackboneSpec("small-vit", {**VIT, "pool": "avg"}, "block1"),
    "class-token": BackboneSpec("small-vit", {**VIT, "pool": "token"}, "block1"),
}


def build_split(features, task, seed=0):
    """A split whose features have this layout."""
    return SPECS[features].build(SHAPE, task, seed)
