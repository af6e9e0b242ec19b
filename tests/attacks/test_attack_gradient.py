"""The gradient attack and the choice of weights."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from mibench.attacks import budget
from mibench.attacks.gradient import Gradient, total_variation
from mibench.attacks.tuning import best_weight
from mibench.errors import ThreatModelError
from mibench.threat import Knowledge

SMALL = {"steps": 200, "restarts": 1, "tuning_images": 2}


@functools.cache
def rotation(size):
    draws = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(size, size, generator=draws)).Q


def rotated(images):
    """A linear client that can be undone: an orthogonal mixture of all values."""
    return (images.flatten(1) @ rotation(images[0].numel()),)


def made(workshop, target, pictures, **params):
    attack = Gradient(Gradient.Params(**(SMALL | params)), workshop)
    attack.prepare(target, pictures(4), pictures(4, seed=1))
    return attack


def test_it_undoes_a_reversible_linear_client(workshop, make_target, pictures):
    attack = made(workshop, make_target(rotated), pictures, lr=0.2)
    secret = pictures(3, seed=2).images()
    torch.manual_seed(0)
    rebuilt = attack.reconstruct(rotated(secret))
    assert rebuilt.shape == secret.shape
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1
    per_image = (rebuilt - secret).square().flatten(1).mean(1)
    assert all(-10 * math.log10(error) > 25 for error in per_image.tolist())


def test_images_of_a_batch_do_not_meet(workshop, make_target, pictures):
    attack = made(workshop, make_target(rotated), pictures, steps=15, restarts=2)
    (share,) = rotated(pictures(4, seed=2).images())
    other = share.clone()
    other[3] = 10 * torch.randn(share.shape[1])
    torch.manual_seed(0)
    one = attack.reconstruct((share,))
    torch.manual_seed(0)
    two = attack.reconstruct((other,))
    torch.testing.assert_close(one[:3], two[:3], rtol=1e-4, atol=1e-5)
    assert (one[3] - two[3]).abs().max() > 0.1


def constructed(attack, monkeypatch, objective):
    """Makes the descent return images that say which start they come from."""
    restarts, count = objective.shape

    def descend(shares, weights):
        assert len(shares[0]) == len(weights) == restarts * count
        images = torch.arange(float(restarts * count)).view(-1, 1, 1, 1) / 100
        return images.expand(-1, 3, 16, 16), objective.flatten()

    monkeypatch.setattr(attack, "_optimise", descend)
    found = attack.reconstruct((torch.zeros(count, 5),))[:, 0, 0, 0] * 100
    return [divmod(round(place), count) for place in found.tolist()]


def test_each_image_keeps_its_best_start(workshop, make_target, pictures, monkeypatch):
    attack = made(workshop, make_target(rotated), pictures, steps=1, restarts=3)
    objective = torch.tensor([[3.0, 1.0, 2.0, 9.0], [1.0, 2.0, 3.0, -9.0], [2.0, 3.0, 1.0, 0.0]])
    found = constructed(attack, monkeypatch, objective)
    assert found == [(1, 0), (0, 1), (2, 2), (1, 3)]


def test_a_start_that_diverged_is_not_kept(workshop, make_target, pictures, monkeypatch):
    attack = made(workshop, make_target(rotated), pictures, steps=1, restarts=2)
    found = constructed(attack, monkeypatch, torch.tensor([[float("nan"), 1.0], [5.0, 2.0]]))
    assert found == [(1, 0), (0, 1)]


def test_more_starts_reach_a_lower_objective_per_image(workshop, make_target, pictures):
    def bumpy(images):
        return (torch.sin(6 * rotated(images)[0]),)

    attack = made(workshop, make_target(bumpy), pictures, steps=20, restarts=3)
    collected = []

    def spy(shares, weights):
        images, objective = type(attack)._optimise(attack, shares, weights)
        collected.append((images, objective))
        return images, objective

    attack._optimise = spy
    kept = attack.reconstruct(bumpy(pictures(4, seed=3).images()))
    images, objective = collected[0]
    for place in range(4):
        best = min(range(3), key=lambda r: objective[r * 4 + place].item())
        assert torch.equal(kept[place], images[best * 4 + place])


def test_large_batches_descend_in_groups(workshop, make_target, pictures, monkeypatch):
    attack = made(workshop, make_target(rotated), pictures, steps=200, restarts=2, lr=0.2)
    monkeypatch.setattr(budget, "VALUES", 5 * 3 * 16 * 16)
    sizes, descend = [], attack._optimise

    def spy(shares, weights):
        sizes.append(len(weights))
        return descend(shares, weights)

    attack._optimise = spy
    secret = pictures(5, seed=2).images()
    rebuilt = attack.reconstruct(rotated(secret))
    assert sizes == [4, 4, 2]
    per_image = (rebuilt - secret).square().flatten(1).mean(1)
    assert all(-10 * math.log10(error) > 25 for error in per_image.tolist())


def test_it_needs_the_weights_of_the_client(workshop, make_target, pictures):
    attack = made(workshop, make_target(rotated), pictures, steps=1)
    attack._target = make_target(rotated, Knowledge.BLACK_BOX)
    with pytest.raises(ThreatModelError):
        attack.reconstruct(rotated(pictures(2).images()))


def test_total_variation_on_a_small_case():
    flat = torch.full((1, 3, 4, 4), 0.3)
    step = flat.clone()
    step[..., 2:] += 0.6
    noisy = torch.stack([step[0], flat[0]])
    # One of three column differences is 0.6; rows are equal.
    torch.testing.assert_close(total_variation(noisy), torch.tensor([0.2, 0.0]))


# --- the choice of a weight -------------------------------------------------------------------


def choose(errors):
    """Runs the choice with an attack whose error under each weight is known."""
    images = torch.full((3, 3, 4, 4), 0.5)
    shares = (torch.arange(3.0).view(3, 1), torch.arange(3.0).view(3, 1, 1))

    def attack(received, weights):
        # Weight by weight, each with all images in order.
        assert received[0].flatten().tolist() == [0.0, 1.0, 2.0] * len(errors)
        assert received[1].shape[1:] == (1, 1)
        wanted = [w for w in errors for _ in range(3)]
        torch.testing.assert_close(weights, torch.tensor(wanted))
        off = torch.tensor([errors[w] for w in errors for _ in range(3)])
        return images.repeat(len(errors), 1, 1, 1) + off.view(-1, 1, 1, 1)

    return best_weight(images, shares, list(errors), attack)


def test_the_weight_with_the_least_error_is_chosen():
    facts = choose({0.1: 0.3, 1.0: -0.1, 10.0: 0.2})
    assert facts["weight"] == 1.0
    assert list(facts["validation_mse"]) == ["0.1", "1", "10"]
    assert facts["validation_mse"]["0.1"] == pytest.approx(0.09, rel=1e-4)


@pytest.mark.parametrize("limit", [1, 4, 7, 1000])
def test_candidates_are_tried_in_groups(monkeypatch, limit):
    monkeypatch.setattr(budget, "VALUES", limit * 3 * 4 * 4)
    images = torch.rand(3, 3, 4, 4)
    sizes = []

    def attack(shares, weights):
        sizes.append(len(weights))
        assert len(shares[0]) == len(weights)
        return shares[0] + (weights - 0.2).view(-1, 1, 1, 1)

    facts = best_weight(images, (images,), (0.1, 0.2, 0.4), attack)
    assert facts["weight"] == 0.2
    assert facts["validation_mse"]["0.4"] == pytest.approx(0.04, rel=1e-4)
    assert max(sizes) == min(limit, 9)
    assert sum(sizes) == 9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_diverged_is_never_chosen(bad):
    facts = choose({0.1: bad, 1.0: 0.2, 10.0: 0.4})
    assert facts["weight"] == 1.0
    assert facts["validation_mse"]["0.1"] is None


def test_if_all_diverged_there_is_still_a_weight():
    assert choose({0.1: float("nan"), 1.0: float("nan")})["weight"] in (0.1, 1.0)


def test_the_weight_is_the_one_best_for_this_target(workshop, make_target, pictures):
    """Flat images from few values need the prior more than images from all values."""

    def few(images):
        return (F.avg_pool2d(images, 8).flatten(1),)

    chosen = {}
    for name, client in (("all", rotated), ("few", few)):
        target = make_target(client, identity=name)
        attack = made(workshop, target, pictures, steps=60, weights=(1e-4, 1.0))
        facts = attack.facts()
        errors = facts["validation_mse"]
        assert f"{facts['weight']:g}" == min(errors, key=errors.get)
        chosen[name] = facts["weight"]
    assert chosen["few"] == 1.0
