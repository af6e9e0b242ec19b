"""Adversarial training: client and proxy pull in opposite directions, and it shows in the end."""

import pytest
import torch
from small_splits import SPECS

from mibench.artifacts import Checkpoint
from mibench.defenses.parts.proxy import unexplained
from mibench.protocol import Recipe
from mibench.training import Step

every_layout = pytest.mark.parametrize("features", list(SPECS))
STEP = Step(0, 10, torch.Generator())
HOW = {"batch": 32, "lr": 0.05, "crop": 0, "flip": False, "precision": "fp32"}


def error(defense, images):
    return unexplained(defense.proxy(defense.protect(images)[0]), images).mean()


def term(defense, batch):
    return defense.loss(batch.images(), batch.labels, STEP)["reconstruction"]


@pytest.fixture
def warm(make_defense, pictures):
    """Makes a defense whose proxy has learned something on these very images."""

    def make(features, batch):
        defense = make_defense("adversarial", {"strength": 1.0}, features=features)
        learner = torch.optim.Adam(defense.proxy.parameters(), lr=1e-2)
        for _ in range(25):
            loss = term(defense, batch)
            learner.zero_grad()
            loss.backward()
            learner.step()
        return defense

    return make


@every_layout
def test_the_client_raises_the_error_of_a_frozen_proxy(warm, pictures, features):
    batch = pictures(16)
    defense = warm(features, batch)
    before = term(defense, batch)
    weights = list(defense.client.parameters())
    slopes = torch.autograd.grad(before, weights)
    size = sum(slope.square().sum() for slope in slopes)
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight -= 0.001 * slope / size
        after = error(defense, batch.images())
    # Reversed with weight 1: a step down the client's gradient raises the error by 0.001 at first.
    assert 0.0004 < after - before < 0.004


@every_layout
def test_the_proxy_lowers_its_error_for_a_frozen_client(warm, pictures, features):
    batch = pictures(16)
    defense = warm(features, batch)
    before = term(defense, batch)
    weights = list(defense.proxy.parameters())
    slopes = torch.autograd.grad(before, weights)
    size = sum(slope.square().sum() for slope in slopes)
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight -= 0.001 * slope / size
        after = error(defense, batch.images())
    assert -0.004 < after - before < -0.0002


def test_strength_weighs_the_client_and_not_the_proxy(make_defense, pictures):
    batch = pictures(16)
    found = []
    for strength in (1.0, 3.0, 0.0):
        defense = make_defense("adversarial", {"strength": strength})
        mine, its = defense.client[0][1].weight, defense.proxy.network[-1].weight
        found.append(torch.autograd.grad(term(defense, batch), [mine, its]))
    (client, proxy), (stronger, same), (none, again) = found
    assert client.abs().sum() > 0
    torch.testing.assert_close(stronger, 3 * client, rtol=1e-3, atol=1e-7)
    assert none.abs().sum() == 0
    assert torch.equal(proxy, same)
    assert torch.equal(proxy, again)


def test_the_server_does_not_take_part(make_defense, pictures):
    defense = make_defense("adversarial")
    weights = list(defense.server.parameters())
    slopes = torch.autograd.grad(term(defense, pictures(8)), weights, allow_unused=True)
    assert all(slope is None for slope in slopes)


def test_the_record_tells_what_the_proxy_still_rebuilds(make_defense, pictures, tmp_path):
    found = {}
    for strength in (0.0, 3.0):
        defense = make_defense("adversarial", {"strength": strength})
        facts = defense.fit(
            pictures(128), Recipe(steps=40, **HOW), 0, Checkpoint(tmp_path / str(strength))
        )
        course = facts["losses"]["reconstruction"]
        assert course[-1][0] == 39
        found[strength] = course[-1][1]
        assert course[-1][1] < course[0][1]
    assert found[3.0] > 1.3 * found[0.0]


def test_the_proxy_is_no_part_of_the_client(make_defense):
    defense = make_defense("adversarial")
    held = {id(p) for module in defense.client_modules() for p in module.parameters()}
    assert not held & {id(p) for p in defense.proxy.parameters()}
