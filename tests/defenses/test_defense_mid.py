"""MID behind the split: the message is plain, the layer before the classifier is stochastic."""

import pytest
import torch
from small_splits import build_split
from torch import nn
from torch.distributions import Normal, kl_divergence

from mibench.artifacts import Checkpoint
from mibench.defenses.mid import MID
from mibench.errors import InvalidParamsError
from mibench.protocol import Recipe
from mibench.task import Classification
from mibench.training import Step

TASK = Classification(tuple("abcde"))


def step(index=0, total=100):
    return Step(index, total, torch.Generator().manual_seed(index))


@pytest.mark.parametrize("features", ["map", "tokens", "class-token"])
def test_what_is_sent_is_the_plain_split(make_defense, pictures, features):
    defense, plain = (make_defense(name, features=features) for name in ("mid", "none"))
    images = pictures(4).images()
    for mode in (True, False):
        defense.train(mode)
        plain.train(mode)
        assert torch.equal(defense.protect(images)[0], plain.protect(images)[0])
    assert torch.equal(defense.protect(images)[0], defense.protect(images)[0])


@pytest.mark.parametrize(("features", "width"), [("map", 32), ("tokens", 8), ("class-token", 8)])
def test_half_the_features_are_left_before_the_classifier(make_defense, pictures, features, width):
    defense = make_defense("mid", features=features)
    assert defense.bottleneck.in_features == width
    assert defense.bottleneck.out_features == width  # mu and sigma of half as many
    assert defense.classifier.in_features == width // 2
    mean, deviation = defense.statistics(defense.protect(pictures(3).images())[0])
    assert mean.shape == deviation.shape == (3, width // 2)


def test_it_samples_in_training_and_answers_the_mean_at_inference(make_defense, pictures):
    defense = make_defense("mid")
    (share,) = defense.protect(pictures(4).images())
    defense.server.eval()  # its batch statistics stay as they are
    mean, deviation = defense.statistics(share)
    torch.manual_seed(1)
    sampled = defense.serve(0, share)
    torch.manual_seed(1)
    expected = defense.classifier(mean + deviation * torch.randn_like(mean))
    torch.testing.assert_close(sampled, expected)
    defense.eval()
    torch.testing.assert_close(defense.serve(0, share), defense.classifier(mean))


def test_the_term_is_beta_times_the_mean_divergence(make_defense, pictures):
    defense, batch = make_defense("mid", {"beta": 0.3}), pictures(8)
    mean, deviation = defense.statistics(defense.protect(batch.images())[0])
    expected = kl_divergence(Normal(mean, deviation), Normal(0.0, 1.0)).sum() / 8
    terms = defense.loss(batch.images(), batch.labels, step())
    torch.testing.assert_close(terms["information"], 0.3 * expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("features", ["map", "class-token"])
def test_the_deviation_starts_at_nearly_nothing_and_is_trained_up(
    make_defense, pictures, tmp_path, features
):
    defense, images = make_defense("mid", {"beta": 0.1}, features=features), pictures(64)
    assert 0.002 < defense.eval().examine(images)["deviation"] < 0.02
    how = Recipe(steps=60, batch=32, lr=0.05, crop=0, precision="fp32")
    course = defense.fit(images, how, 0, Checkpoint(tmp_path))["losses"]["information"]
    assert defense.examine(images)["deviation"] > 0.1
    assert course[-1][1] < course[0][1] / 2


def test_a_deviation_that_vanishes_leaves_the_loss_finite(make_defense, pictures):
    defense, batch = make_defense("mid"), pictures(4)
    with torch.no_grad():
        defense.bottleneck.bias.fill_(-500.0)
    terms = defense.loss(batch.images(), batch.labels, step())
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in defense.parameters())


@pytest.mark.parametrize("ending", [nn.Softmax(1), nn.Conv2d(8, 5, 8)])
def test_a_server_that_ends_otherwise_is_refused(ending):
    split = build_split("map", TASK)
    linear = isinstance(ending, nn.Softmax)
    split.server = nn.Sequential(*split.server, ending) if linear else nn.Sequential(ending)
    with pytest.raises(InvalidParamsError, match=r"backbone small-resnet ends otherwise; .*vib"):
        MID(split, MID.Params())
