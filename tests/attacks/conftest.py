"""Settings and makers for the attack tests."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mibench.artifacts import ArtifactStore
from mibench.attacks.base import Workshop
from mibench.data.base import ImageSet
from mibench.defenses.base import Defense
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

    def make(function, knowledge=Knowledge.WHITE_BOX, corrupted=(0,), identity="toy"):
        return Target(Client(function), Adversary(knowledge, corrupted), identity)

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
