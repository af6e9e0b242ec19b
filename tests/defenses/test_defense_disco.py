"""DISCO: hard in use, chosen image by image, and learned by a pruner that plays against a proxy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_splits import SHAPE, SPECS
from torch.nn import functional as F

from mibench.artifacts import Checkpoint
from mibench.defenses.base import TOLERANCE
from mibench.defenses.disco import TEMPERATURE, Disco
from mibench.defenses.parts.proxy import unexplained
from mibench.errors import InvalidParamsError
from mibench.protocol import Recipe
from mibench.training import Step

every_layout = pytest.mark.parametrize("features", list(SPECS))
STEP = Step(0, 10, torch.Generator())


def terms_of(defense, batch):
    return defense.loss(batch.images(), batch.labels, STEP)


def by_channel(z):
    """(B, C, everything else)."""
    return z.flatten(2) if z.ndim == 4 else z.transpose(1, 2)


@pytest.fixture
def decided(make_defense, pictures):
    """Makes a defense whose choice depends strongly on the image, and whose proxy has learned."""

    def make(features="map", steps=30, **params):
        defense, batch = make_defense("disco", params, features=features), pictures(16)
        with torch.no_grad():
            defense.pruner.network[-1].bias.zero_()
            for _ in range(40):  # statistics of the normalisation
                defense.protect(batch.images())
        learner = torch.optim.Adam(defense.proxy.parameters(), lr=1e-2)
        for _ in range(steps):
            loss = terms_of(defense, batch)["reconstruction"]
            learner.zero_grad()
            loss.backward()
            learner.step()
        return defense, batch

    return make


@every_layout
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.8])
def test_dropped_channels_are_zero_and_kept_ones_as_they_are(decided, features, ratio):
    defense, batch = decided(features, steps=1, ratio=ratio)
    for mode in (True, False):
        defense.train(mode)
        with torch.no_grad():
            sent, clean = defense.protect(batch.images())[0], defense.client(batch.images())
        sent, clean = by_channel(sent), by_channel(clean)
        zero, same = (sent == 0).all(2), (sent == clean).all(2)
        assert (zero | same).all()
        # A kept channel can be dead by itself, so no more than these are seen.
        assert (~zero).sum(1).max() <= math.ceil((1 - ratio) * 8)
        assert ((~zero).sum(1) == math.ceil((1 - ratio) * 8)).any()


@settings(deadline=None, max_examples=60)
@given(channels=st.integers(2, 400), percent=st.integers(1, 99))
def test_as_many_channels_are_kept_as_the_paper_says(channels, percent):
    class Shallow:
        feature_shape, image_shape = (channels, 2, 2), SHAPE
        prefix_tokens, task, client, server = 0, None, None, None

    exact = -((percent - 100) * channels // 100)  # ceil, in whole numbers
    if exact == channels:
        with pytest.raises(InvalidParamsError, match=r"disco\.ratio"):
            Disco(Shallow, Disco.Params(ratio=percent / 100))
    else:
        assert Disco(Shallow, Disco.Params(ratio=percent / 100)).kept == exact


@every_layout
def test_the_choice_depends_on_the_image(decided, pictures, features):
    defense, batch = decided(features, steps=1)
    with torch.no_grad():
        masks = by_channel(defense.eval().protect(batch.images())[0] != 0).any(2)
    assert len(masks.unique(dim=0)) > 1
    facts = defense.examine(pictures(300))
    assert facts["channels"] == 8
    assert facts["channels_kept"] == 4
    assert facts["channels_always_kept"] < 4
    assert facts["channels_never_kept"] < 4


def test_scores_cannot_run_away_from_the_threshold(make_defense, pictures):
    defense, images = make_defense("disco"), pictures(8).images()
    with torch.no_grad():
        z = defense.client(images)
        before = defense.pruner(z)
        defense.pruner.network[-1].weight.mul_(1000)
        defense.pruner.network[-1].bias.mul_(1000)
        after = defense.pruner(z)
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)


def test_the_gate_has_the_gradient_of_the_soft_one(make_defense, pictures):
    defense = make_defense("disco")
    with torch.no_grad():
        z = defense.client(pictures(4).images())
    scores = defense.pruner(z).detach().requires_grad_()
    defense.pruner.forward = lambda _: scores
    gate = defense._gate(z)[:, :, 0, 0]
    ordered = scores.detach().sort(1, descending=True).values
    threshold = (ordered[:, 3:4] + ordered[:, 4:5]) / 2
    assert torch.equal(gate, (scores > threshold).float())
    weights = torch.randn(gate.shape)
    (slope,) = torch.autograd.grad((gate * weights).sum(), scores)
    soft = ((scores.detach() - threshold) * 30).sigmoid()
    torch.testing.assert_close(slope, weights * soft * (1 - soft) / TEMPERATURE)


@every_layout
def test_the_reconstruction_term_moves_the_pruner_and_the_proxy_alone(decided, features):
    defense, batch = decided(features, steps=1)
    term = terms_of(defense, batch)["reconstruction"]
    slopes = torch.autograd.grad(
        term, list(defense.parameters()), allow_unused=True, retain_graph=True
    )
    names = [name for name, _ in defense.named_parameters()]
    moved = {
        name.partition(".")[0]
        for name, slope in zip(names, slopes, strict=True)
        if slope is not None
    }
    assert moved == {"pruner", "proxy"}


@every_layout
def test_the_task_moves_client_server_and_pruner(decided, features):
    defense, batch = decided(features, steps=1)
    slopes = torch.autograd.grad(
        terms_of(defense, batch)["task"], list(defense.parameters()), allow_unused=True
    )
    moved = {
        name.partition(".")[0]
        for (name, _), slope in zip(defense.named_parameters(), slopes, strict=True)
        if slope is not None and slope.abs().sum() > 0
    }
    assert moved == {"client", "server", "pruner"}


@every_layout
def test_the_pruner_raises_the_error_of_a_frozen_proxy(decided, features):
    defense, batch = decided(features)
    images = batch.images()

    def soft_error():
        """The proxy's error through the gate that the gradient belongs to, to first order."""
        gate = defense._gate(z)
        return unexplained(defense.proxy(z * gate), images).mean()

    z = defense.client(images).detach()
    term = terms_of(defense, batch)["reconstruction"]
    weights = list(defense.pruner.parameters())
    mine = torch.autograd.grad(term, weights)
    raising = torch.autograd.grad(soft_error(), weights)
    # Reversed with weight 1, and no image is as bad as the mean image.
    for one, other in zip(mine, raising, strict=True):
        torch.testing.assert_close(one, -other, rtol=1e-4, atol=1e-7)
    # What counts is the hard choice: steps of the pruner alone make it worse for the proxy.
    before = soft_error().item()
    learner = torch.optim.Adam(weights, lr=3e-2)
    for _ in range(30):
        learner.zero_grad()
        terms_of(defense, batch)["reconstruction"].backward()
        learner.step()
    assert soft_error().item() > before + 0.02


def test_the_proxy_lowers_its_error(decided):
    defense, batch = decided(steps=1)
    early = terms_of(defense, batch)["reconstruction"]
    defense, _ = decided(steps=30)
    assert terms_of(defense, batch)["reconstruction"] < 0.8 * early


def test_the_weight_is_of_the_pruner_alone(make_defense, pictures):
    batch, found = pictures(16), []
    for weight in (1.0, 3.0, 0.0):
        defense = make_defense("disco", {"adversarial": weight})
        mine, its = defense.pruner.network[-1].weight, defense.proxy.network[-1].weight
        term = terms_of(defense, batch)["reconstruction"]
        found.append(torch.autograd.grad(term, [mine, its]))
    (pruner, proxy), (stronger, same), (none, again) = found
    assert pruner.abs().sum() > 0
    torch.testing.assert_close(stronger, 3 * pruner, rtol=1e-3, atol=1e-7)
    assert none.abs().sum() == 0
    assert torch.equal(proxy, same)
    assert torch.equal(proxy, again)


@every_layout
def test_the_law_is_over_the_channels_that_arrived(decided, pictures, features):
    defense, batch = decided(features, steps=1)
    defense.eval()
    images, others = batch.images(), pictures(16, seed=3).images()
    with torch.no_grad():
        sent, predicted = defense.protect(images), defense.predict(others)
        arrived, guessed = (by_channel(z != 0).any(2) for (z,) in (sent, predicted))
        value = defense.log_likelihood(sent, predicted)
    assert (guessed & ~arrived).any()
    residual = by_channel(sent[0] - predicted[0]).square().sum(2)
    scale = TOLERANCE * sent[0].flatten(1).square().mean(1).sqrt()
    expected = -(residual * arrived).sum(1) / (2 * scale.square())
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    # A channel that arrived and is missing from the guess counts, so that a guess that sends
    # nothing of what arrived is not the best one.
    nothing = defense.log_likelihood(sent, (torch.zeros_like(sent[0]),))
    assert (nothing < defense.log_likelihood(sent, defense.predict(images)) - 100).all()


def test_attacks_get_the_gradient_of_the_channels_that_are_kept(decided):
    defense, batch = decided(steps=1)
    defense.eval()
    images = batch.images().requires_grad_()
    (sent,) = defense.predict(images)
    weights = torch.randn(sent.shape)
    (slope,) = torch.autograd.grad((sent * weights).sum(), images)
    clean = defense.client(images)
    kept = (sent != 0).any(3, keepdim=True).any(2, keepdim=True)
    (expected,) = torch.autograd.grad((clean * kept * weights).sum(), images)
    torch.testing.assert_close(slope, expected)
    assert slope.abs().sum() > 0


@pytest.mark.parametrize("ratio", [0.01, 0.999])
def test_a_ratio_that_leaves_nothing_to_choose_is_refused(make_defense, ratio):
    if ratio == 0.01:
        with pytest.raises(InvalidParamsError, match=r"drops 0 of 8 channels.*from 0.125 to 0.875"):
            make_defense("disco", {"ratio": ratio})
    else:
        assert make_defense("disco", {"ratio": ratio}).kept == 1


def test_pruner_and_stem_are_the_client(make_defense):
    defense = make_defense("disco")
    held = {id(p) for module in defense.client_modules() for p in module.parameters()}
    expected = [*defense.client.parameters(), *defense.pruner.parameters()]
    assert held == {id(p) for p in expected}


def test_training_moves_the_choice(make_defense, pictures, tmp_path):
    how = Recipe(steps=30, batch=32, lr=0.1, crop=0, flip=False, precision="fp32")
    defense, fresh = make_defense("disco"), make_defense("disco").eval()
    facts = defense.fit(pictures(64), how, 0, Checkpoint(tmp_path))
    assert set(facts["losses"]) == {"task", "reconstruction"}
    batch = pictures(64)
    with torch.no_grad():
        masks = [by_channel(d.protect(batch.images())[0] != 0).any(2) for d in (fresh, defense)]
        loss = F.cross_entropy(defense(batch.images()), batch.labels)
    assert (masks[0] != masks[1]).float().mean() > 0.05
    assert loss < facts["losses"]["task"][0][1]
