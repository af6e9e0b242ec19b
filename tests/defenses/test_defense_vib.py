"""The bottleneck samples at inference, its law is the one it says, and its KL is its bound."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from mibench.artifacts import Checkpoint
from mibench.backbones.base import BackboneSpec
from mibench.data.sets import ImageSet
from mibench.defenses.vib import SCALE, VIB
from mibench.protocol import Recipe
from mibench.task import Classification
from mibench.training import Step

LAYOUTS = ("map", "tokens", "class-token")


def step(index=0, total=100):
    return Step(index, total, torch.Generator().manual_seed(index))


def law(defense, images):
    mean, log_deviation = defense.predict(images)[0].chunk(2, dim=defense.axis)
    return mean, log_deviation.exp()


@pytest.mark.parametrize("features", LAYOUTS)
@pytest.mark.parametrize("channels", [None, 3])
@torch.no_grad()
def test_a_sample_of_the_declared_law_is_sent_at_inference(
    make_defense, pictures, features, channels
):
    defense = make_defense("vib", {"channels": channels}, features=features).eval()
    images = pictures(2).images()
    mean, deviation = law(defense, images)
    torch.manual_seed(0)
    draws = torch.stack([defense.protect(images)[0] for _ in range(400)])
    assert draws.shape[1:] == mean.shape
    assert mean.shape[defense.axis] == (channels or 8)
    scaled = (draws - mean) / deviation
    assert scaled.mean().abs() < 0.01
    assert scaled.mean(0).abs().max() < 0.3
    torch.testing.assert_close(scaled.var(0).mean(), torch.tensor(1.0), rtol=0.02, atol=0)
    assert (scaled[:, 0] * scaled[:, 1]).mean().abs() < 0.01  # images are independent


def test_the_likelihood_is_that_of_the_law(make_defense, pictures):
    defense = make_defense("vib").eval()
    images, others = pictures(3).images(), pictures(3, seed=1).images()
    with torch.no_grad():
        defense.spread.weight.normal_()  # a deviation that depends on the image
        sent = defense.protect(images)
        difference = defense.log_likelihood(sent, defense.predict(images))
        difference = difference - defense.log_likelihood(sent, defense.predict(others))
        one, other = (
            Normal(*law(defense, x)).log_prob(sent[0]).flatten(1).sum(1) for x in (images, others)
        )
    torch.testing.assert_close(difference, one - other, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("beta", [1e-4, 1e-2, 1.0])
def test_it_starts_as_the_features_with_little_noise(make_defense, pictures, beta):
    """The gain that steadies the optimiser does not change the function it starts from."""
    defense, images = make_defense("vib", {"beta": beta}), pictures(16).images()
    mean, log_deviation = defense.statistics(images)
    torch.testing.assert_close(mean, SCALE * defense.normalise(defense.client(images)))
    torch.testing.assert_close(log_deviation, torch.full_like(mean, -1.0))


@pytest.mark.parametrize("features", ["map", "class-token"])
def test_the_term_is_beta_times_the_mean_divergence(make_defense, pictures, features):
    defense, batch = make_defense("vib", {"beta": 0.02}, features=features), pictures(8)
    mean, log_deviation = defense.statistics(batch.images())
    expected = kl_divergence(Normal(mean, log_deviation.exp()), Normal(0.0, 1.0)).sum() / 8
    terms = defense.loss(batch.images(), batch.labels, step())
    torch.testing.assert_close(terms["information"], 0.02 * expected, rtol=1e-4, atol=0)


def test_growing_features_neither_escape_nor_matter(make_defense, pictures):
    def nats(change):
        defense, batch = make_defense("vib", {"beta": 1.0}), pictures(16)
        with torch.no_grad():
            change(defense)
        return defense.loss(batch.images(), batch.labels, step())["information"].item()

    def grow_client(defense):
        norm = next(m for m in defense.client.modules() if isinstance(m, torch.nn.BatchNorm2d))
        norm.weight.mul_(10)
        norm.bias.mul_(10)

    plain = nats(lambda _: None)
    assert nats(grow_client) == pytest.approx(plain, rel=0.01)
    assert nats(lambda defense: defense.mean.weight.mul_(10)) > 5 * plain


def test_log_sigma_stays_within_its_bounds_and_keeps_a_gradient(make_defense, pictures):
    defense, images = make_defense("vib"), pictures(2).images()
    for level, bound in ((-20.0, -6.0), (12.0, 3.0)):
        with torch.no_grad():
            defense.spread.bias.fill_(level / defense.gain)
        _, log_deviation = defense.statistics(images)
        assert (log_deviation - bound).abs().max() < 0.1
        (gradient,) = torch.autograd.grad(log_deviation.sum(), defense.spread.bias)
        assert (gradient > 0).all()


@pytest.mark.parametrize("lr", [0.1, 0.2])
def test_a_strong_penalty_on_large_features_can_be_trained(tmp_path, lr):
    """The summed KL of 16,384 values: plain heads diverge within ten steps."""
    draws = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(64, 3, 4, 4, generator=draws), (32, 32), mode="bilinear")
    labels = torch.arange(64) % 5
    train = ImageSet((smooth * 255).to(torch.uint8), labels)
    spec = BackboneSpec("small-resnet", {"stem": 64, "width": 8}, "stem")
    torch.manual_seed(0)
    params = VIB.Params(beta=1e-2, channels=None)
    defense = VIB(spec.build((3, 32, 32), Classification(tuple("abcde")), 0), params)
    assert defense.predict(train.images(slice(1)))[0].numel() == 2 * 16_384
    how = Recipe(steps=30, batch=16, lr=lr, precision="fp32")
    course = defense.fit(train, how, 0, Checkpoint(tmp_path))["losses"]["information"]
    values = [value for _, value in course]
    assert max(values) < 1.5 * values[0]
    assert values[-1] < 0.5 * values[0]
    with torch.no_grad():
        _, deviation = law(defense, train.images())
    assert 0.2 < deviation.min() < deviation.max() < 5


def test_more_weight_leaves_less_information(make_defense, pictures, tmp_path):
    found = []
    for beta in (1e-4, 1e-1):
        defense = make_defense("vib", {"beta": beta})
        how = Recipe(steps=40, batch=32, lr=0.05, crop=0, precision="fp32")
        defense.fit(pictures(64), how, 0, Checkpoint(tmp_path / str(beta)))
        found.append(defense.examine(pictures(64))["information_nats"])
    assert found[0] > 3 * found[1]


def test_the_record_says_nats_and_bits(make_defense, pictures):
    defense, images = make_defense("vib").eval(), pictures(300)
    facts = defense.examine(images)
    with torch.no_grad():
        divergence = kl_divergence(Normal(*law(defense, images.images())), Normal(0.0, 1.0))
    assert facts["information_nats"] == pytest.approx(divergence.sum().item() / 300, rel=1e-3)
    assert facts["information_bits"] == pytest.approx(facts["information_nats"] / math.log(2))


def test_sending_the_mean_is_trained_with_samples_and_claims_no_bound(make_defense, pictures):
    defense, images = make_defense("vib", {"transmit": "mean"}), pictures(4).images()
    assert not torch.equal(defense.protect(images)[0], defense.protect(images)[0])
    defense.eval()
    with torch.no_grad():
        mean, _ = defense.statistics(images)
        assert torch.equal(defense.protect(images)[0], mean)
        assert torch.equal(defense.predict(images)[0], mean)
    facts = defense.examine(pictures(4))
    assert facts["information_nats"] is None
    assert "no bound" in facts["information"]


@pytest.mark.parametrize("transmit", ["sample", "mean"])
@torch.no_grad()
def test_the_server_knows_the_scale_of_what_it_is_sent(make_defense, pictures, transmit):
    """Its batch statistics are those of mu where mu is sent: a sample has a larger variance."""
    defense, train = make_defense("vib", {"transmit": transmit}), pictures(64)
    defense.spread.bias.fill_(2.0 / defense.gain)
    defense.protect(train.images())
    for _ in range(50):
        defense(train.images())
    defense.eval()
    defense.finish(train)
    norm = defense.server[0].bn1
    assert norm.momentum == 0.1
    assert not defense.server.training
    arriving = defense.server[0].conv1(defense.protect(train.images())[0])
    expected = arriving.var((0, 2, 3), correction=1)
    torch.testing.assert_close(norm.running_var, expected, rtol=0.1, atol=1e-4)
