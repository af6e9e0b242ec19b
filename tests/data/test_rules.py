"""Roles scaled down to the images that are there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mibench.data.base import Dataset
from mibench.data.rules import ROLES, fitted
from mibench.data.sets import stack
from mibench.errors import DataError
from mibench.protocol import DataRule, RoleRule
from mibench.registry import datasets
from mibench.task import Classification

RULE = DataRule(
    dataset="whole",
    image_size=8,
    train=RoleRule(split="train", start=0, count=30_000),
    auxiliary=RoleRule(split="train", start=30_000, count=18_000),
    validation=RoleRule(split="train", start=48_000, count=2_000),
    private=RoleRule(split="test", start=0, count=10_000),
    attacked=128,
)


class Part(Dataset):
    """A dataset of so many images."""

    task = Classification(("a", "b"))
    sizes: dict[str, int]

    def size(self, split):
        return self.sizes[split]

    def load(self, split, start, count):
        images = [torch.full((3, 8, 8), n % 251, dtype=torch.uint8) for n in range(count)]
        return stack(images, [0] * count)


def fit(tmp_path, rule=RULE, **sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Part, "sizes", sizes, raising=False)
        patch.setattr(datasets, "load", lambda _: Part)
        return fitted(rule, None, tmp_path)


def test_a_rule_that_fits_is_the_same(tmp_path):
    assert fit(tmp_path, train=50_000, test=10_000) == RULE
    assert fit(tmp_path, train=60_000, test=20_000) == RULE


def test_the_part_of_cifar10(tmp_path):
    rule = fit(tmp_path, train=15_000, test=4_000)
    assert (rule.train.start, rule.train.count) == (0, 9_000)
    assert (rule.auxiliary.start, rule.auxiliary.count) == (9_000, 5_400)
    assert (rule.validation.start, rule.validation.count) == (14_400, 600)
    assert (rule.private.start, rule.private.count) == (0, 4_000)
    assert rule.attacked == 128


def test_only_the_split_that_is_short_is_scaled(tmp_path):
    rule = fit(tmp_path, train=50_000, test=100)
    assert rule.train == RULE.train
    assert rule.private.count == rule.attacked == 100


@settings(max_examples=100, deadline=None)
@given(st.integers(200, 50_000), st.integers(2, 10_000))
def test_scaled_roles_fit_and_stay_disjoint(tmp_path_factory, train, test):
    sizes = {"train": train, "test": test}
    rule = fit(tmp_path_factory.getbasetemp(), **sizes)
    for name in ROLES:
        role = getattr(rule, name)
        assert 2 <= role.count <= getattr(RULE, name).count
        assert role.start + role.count <= sizes[role.split]
    assert rule.train.start + rule.train.count <= rule.auxiliary.start
    assert rule.auxiliary.start + rule.auxiliary.count <= rule.validation.start
    assert rule.attacked <= rule.private.count
    assert rule.strength == RULE.strength


@pytest.mark.parametrize("sizes", [{"train": 49, "test": 10_000}, {"train": 50_000, "test": 1}])
def test_too_small_a_part(tmp_path, sizes):
    with pytest.raises(DataError, match="too few") as caught:
        fit(tmp_path, **sizes)
    assert "\n" not in str(caught.value)


def test_roles_by_hash_need_no_scaling_but_few_attacked(tmp_path):
    cuts = {"train": (0, 0.5), "auxiliary": (0.5, 0.7), "validation": (0.7, 0.75)}
    cuts["private"] = (0.75, 1)
    roles = {name: RoleRule(split="train", hashed=cut) for name, cut in cuts.items()}
    rule = DataRule(dataset="whole", image_size=8, attacked=128, **roles)
    found = fit(tmp_path, rule, train=100)
    assert found.private == rule.private
    assert 2 <= found.attacked < 100
    assert fit(tmp_path, rule, train=5000) == rule
