"""Settings and makers for the defense tests."""

import pytest
import torch
from small_splits import SHAPE, build_split

from mibench.data.sets import ImageSet
from mibench.registry import defenses
from mibench.task import Classification

CLASSES = 5
TASK = Classification(tuple("abcde"))


@pytest.fixture(scope="session")
def make_defense():
    """Builds a defense by name on a tiny backbone; by default, features are maps (8, 8, 8)."""

    def make(name, params=None, seed=0, features="map", task=TASK):
        params = params or {}
        split = build_split(features, task, seed)
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
