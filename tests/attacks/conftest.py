"""Settings and makers for the attack tests."""

import copy

import pytest
import torch
from small_splits import build_split
from torch import nn
from torch.nn import functional as F

from mibench.artifacts import ArtifactStore
from mibench.attacks.base import Workshop
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense
from mibench.registry import defenses
from mibench.task import Classification
from mibench.threat import Adversary, Knowledge, Target

SIDE = 16


class Client(Defense):
    """A deterministic client that is one given function."""

    def __init__(self, function):
        nn.Module.__init__(self)
        self.function = function

    @property
    def servers(self):
        return len(self.function(torch.zeros(1, 3, SIDE, SIDE)))

    def protect(self, images):
        return self.function(images)


@pytest.fixture(scope="session")
def make_target():
    """Wraps a function from images to shares as the target of an attack."""

    def make(
        function, knowledge=Knowledge.WHITE_BOX, corrupted=(0,), identity="toy", transmissions=1
    ):
        adversary = Adversary(knowledge, corrupted, transmissions)
        return Target(Client(function), adversary, identity)

    return make


@pytest.fixture(scope="session")
def make_defense():
    """A deployed built-in defense with random weights, on features of any layout."""
    made = {}

    def make(name, features, params=None):
        key = (name, features, repr(params))
        torch.manual_seed(0)
        if key not in made:
            made[key] = build(name, features, params or {})
        return copy.deepcopy(made[key])

    def build(name, features, params):
        cls = defenses.load(name)
        split = build_split(features, Classification(tuple("abcde")))
        defense = cls(split, cls.Params(**params))
        defense.train()
        with torch.no_grad():
            for seed in range(20):  # the statistics of normalisations
                defense(
                    torch.rand(32, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
                )
        return defense.eval().requires_grad_(False)

    return make


@pytest.fixture
def workshop(tmp_path):
    return Workshop((3, SIDE, SIDE), 0, torch.device("cpu"), ArtifactStore(tmp_path / "cache"), 1)


@pytest.fixture(scope="session")
def pictures():
    """Smooth random images."""

    def make(count, seed=0, side=SIDE):
        draws = torch.Generator().manual_seed(seed)
        coarse = torch.rand(count, 3, 4, 4, generator=draws)
        smooth = F.interpolate(coarse, (side, side), mode="bilinear")
        labels = torch.zeros(count, dtype=torch.int64)
        return ImageSet((smooth * 255).round().to(torch.uint8), labels)

    return make
