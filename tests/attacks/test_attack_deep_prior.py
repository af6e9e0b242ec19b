"""The untrained networks: as many as images, each as if it were alone."""

import json

import pytest
import torch
from torch.nn import functional as F

from mibench.attacks import budget
from mibench.attacks.deep_prior import LEVELS, DeepPrior, Hourglasses, jitter
from mibench.threat import Adversary, Knowledge, Target

SMALL = {
    "steps": 60, "width": 8, "scales": 2, "lr": 0.03, "weights": (0.1, 10.0), "tuning_images": 2,
}  # fmt: skip


@pytest.fixture
def target(make_defense):
    return Target(make_defense("none", "map"), Adversary(Knowledge.WHITE_BOX, (0,)), "none")


def made(workshop, target, pictures, **params):
    attack = DeepPrior(DeepPrior.Params(**(SMALL | params)), workshop)
    attack.prepare(target, pictures(4), pictures(4, seed=1))
    return attack


def test_it_beats_the_mean_image_on_an_undefended_split(workshop, target, pictures):
    attack = made(workshop, target, pictures)
    secret = pictures(4, seed=2).images()
    torch.manual_seed(0)
    rebuilt = attack.reconstruct(target.query(secret))
    assert rebuilt.shape == secret.shape
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1
    mean = pictures(200, seed=3).images().mean(0)
    errors = (rebuilt - secret).square().flatten(1).mean(1)
    floor = (mean - secret).square().flatten(1).mean(1)
    assert (errors < 0.5 * floor).all()


def test_the_answer_follows_from_the_shares_alone(workshop, target, pictures):
    """Shares of one image under the eyes of an attack that could see another one: no difference."""
    attack = made(workshop, target, pictures, steps=10)
    shares = target.query(pictures(2, seed=2).images())
    answers, queries = [], target.queries
    for seed in (4, 5):
        pictures(2, seed=seed).images()
        torch.manual_seed(0)
        answers.append(attack.reconstruct(shares))
    assert torch.equal(*answers)
    assert target.queries == queries


def test_the_answer_is_the_mean_of_the_last_images(workshop, target, pictures, monkeypatch):
    attack = made(workshop, target, pictures, steps=10, averaged=0.3)
    shares = target.query(pictures(2, seed=2).images())
    shown, client = [], target.client

    def spy(images):
        shown.append(images.detach().clone())
        return client(images)

    monkeypatch.setattr(target, "client", spy)
    rebuilt = attack.reconstruct(shares)
    assert len(shown) == 10
    torch.testing.assert_close(rebuilt, torch.stack(shown[-3:]).mean(0))


def test_images_together_are_images_one_by_one(workshop, target, pictures, monkeypatch):
    attack = made(workshop, target, pictures, steps=15)
    shares = target.query(pictures(3, seed=2).images())
    torch.manual_seed(0)
    together = attack.reconstruct(shares)
    # Room for one network at a time.
    monkeypatch.setattr(budget, "VALUES", 1)
    torch.manual_seed(0)
    apart = attack.reconstruct(shares)
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-3)


def test_a_network_that_diverged_leaves_the_others_alone(workshop, target, pictures):
    attack = made(workshop, target, pictures, steps=30)
    (share,) = target.query(pictures(3, seed=2).images())
    broken = share.clone()
    broken[1] = float("nan")
    found = []
    for received in (share, broken):
        torch.manual_seed(0)
        found.append(attack.reconstruct((received,)))
    whole, other = found
    assert other.isfinite().all()
    torch.testing.assert_close(other[[0, 2]], whole[[0, 2]], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 33, 20), (3, 4, 4)])
def test_the_networks_of_a_batch_do_not_meet(shape):
    torch.manual_seed(0)
    networks = Hourglasses(shape, 8, 3)
    drawn = [networks.draw() for _ in range(3)]
    inputs, *theta = (torch.stack(parts) for parts in zip(*drawn, strict=True))
    theta[3] += torch.randn_like(theta[3])
    images = networks(theta, inputs)
    assert images.shape == (3, *shape)
    for place in range(3):
        alone = networks([part[place : place + 1] for part in theta], inputs[place : place + 1])
        torch.testing.assert_close(alone[0], images[place], rtol=1e-4, atol=1e-5)
    assert (images[0] - images[1]).abs().max() > 0.01


def test_every_weight_of_a_network_learns():
    torch.manual_seed(0)
    networks = Hourglasses((3, 16, 16), 8, 2)
    inputs, *theta = (part[None].requires_grad_() for part in networks.draw())
    wanted = torch.rand(1, 3, 16, 16)
    gradients = torch.autograd.grad(F.mse_loss(networks(theta, inputs), wanted), theta)
    for gradient in gradients:
        per_layer = gradient[0].flatten(1) if gradient.ndim > 2 else gradient
        assert (per_layer.abs().amax(1) > 0).all()


def test_the_input_is_disturbed_ever_less_and_not_at_all_at_the_end():
    course = [jitter(step / 100) for step in range(100)]
    assert course == sorted(course, reverse=True)
    assert course[0] == LEVELS[0][1]
    assert set(course[88:]) == {0.0}


def test_the_chosen_weight_and_its_course_are_kept(workshop, target, pictures):
    facts = made(workshop, target, pictures, steps=20).facts()
    assert f"{facts['weight']:g}" == min(facts["validation_mse"], key=facts["validation_mse"].get)
    assert len(facts["course"]) == 20
    assert facts["course"][-1][1] < facts["course"][0][1]
    json.dumps(facts, allow_nan=False)
