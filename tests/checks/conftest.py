"""Makers for the tests of checks."""

import pytest
import torch
from small_splits import build_split

from mibench.registry import defenses
from mibench.task import Classification


@pytest.fixture
def make_defense():
    """A built-in defense with random weights."""

    def make(name, features):
        torch.manual_seed(0)
        cls = defenses.load(name)
        split = build_split(features, Classification(tuple("abcde")))
        return cls(split, cls.Params()).eval().requires_grad_(False)

    return make
