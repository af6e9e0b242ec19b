"""Settings and makers for the defense tests."""

import pytest
import torch

from mibench.backbones.base import BackboneSpec
from mibench.data.base import ImageSet
from mibench.registry import defenses

SHAPE, CLASSES = (3, 16, 16), 5


@pytest.fixture(scope="session")
def make_defense():
    """Builds a defense by name on a tiny backbone with features (8, 8, 8)."""

    def make(name, params=None, seed=0):
        params = params or {}
        split = BackboneSpec("small-resnet", {"stem": 8, "width": 8}, "stem").build(
            SHAPE, CLASSES, seed
        )
        cls = defenses.load(name)
        torch.manual_seed(seed)
        return cls(split, cls.Params(**params))

    return make


@pytest.fixture(scope="session")
def pictures():
    """Smooth images with their labels."""

    def make(count, seed=0):
        draws = torch.Generator().manual_seed(seed)
        coarse = torch.rand(count, 3, 4, 4, generator=draws)
        smooth = torch.nn.functional.interpolate(coarse, SHAPE[1:], mode="bilinear")
        labels = torch.randint(0, CLASSES, (count,), generator=draws)
        return ImageSet((smooth * 255).round().to(torch.uint8), labels)

    return make
