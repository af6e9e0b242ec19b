"""Shredder: the noise really learns, the network stays, and the law is the true one."""

import math

import pytest
import torch
from small_splits import SPECS

from mibench.artifacts import Checkpoint
from mibench.defenses.base import TOLERANCE
from mibench.defenses.shredder import Collection, Shredder, laplace_like
from mibench.errors import InvalidParamsError
from mibench.params import build
from mibench.protocol import Recipe
from mibench.training import Step, optimise

every_layout = pytest.mark.parametrize("features", list(SPECS))
every_draw = pytest.mark.parametrize("draw", ["collection", "fitted"])


def step(phase):
    return Step(0, 10, torch.Generator(), phase)


def fitted(make_defense, pictures, folder, steps=20, features="map", **params):
    defense = make_defense("shredder", params, features=features)
    how = Recipe(steps=steps, batch=32, lr=0.1, crop=0, flip=False, precision="fp32")
    facts = defense.fit(pictures(64), how, 0, Checkpoint(folder))
    return defense, facts


def frozen(make_defense, pictures, features="map", **params):
    """A defense at the beginning of its second phase, with a network that has not learned."""
    defense = make_defense("shredder", params, features=features).eval()
    defense.begin("noise", pictures(64))
    return defense.train()


def state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


@every_layout
def test_the_network_learns_first_and_the_noise_behind_it(
    make_defense, pictures, tmp_path, features, monkeypatch
):
    seen = {}
    begin = Shredder.begin

    def watched(self, phase, train):
        seen[phase] = {k: state(getattr(self, k)) for k in ("client", "server", "noise")}
        begin(self, phase, train)
        seen[f"{phase} begun"] = state(self.noise)

    monkeypatch.setattr(Shredder, "begin", watched)
    defense, facts = fitted(make_defense, pictures, tmp_path, features=features)
    for part in ("client", "server"):
        before, between, after = seen["network"][part], seen["noise"][part], getattr(defense, part)
        learned = [k for k, _ in after.named_parameters()]
        assert all(not torch.equal(before[k], between[k]) for k in learned)
        # Statistics of normalisation layers too.
        assert all(torch.equal(between[k], v) for k, v in after.state_dict().items())
    assert torch.equal(seen["network begun"]["values"], seen["noise"]["noise"]["values"])
    started, values = seen["noise begun"]["values"], defense.noise.values
    assert (started != values).all(), "every element of every tensor learns"
    assert set(facts["losses"]) == {"network/task", "noise/task", "noise/noise"}
    assert facts["snr_db"] == defense.describe()["snr_db"]


def test_noise_starts_at_the_scale_of_the_features(make_defense, pictures):
    images = pictures(64).images()
    for initial in (0.5, 2.0):
        defense = frozen(make_defense, pictures, initial=initial)
        noise = defense.noise().detach()
        with torch.no_grad():
            signal = defense.client(images).square().mean().sqrt()
        assert defense.noise.signal.item() == pytest.approx(signal.item(), rel=1e-4)
        assert (noise.square().mean().sqrt() / signal).item() == pytest.approx(initial, rel=0.05)
        kurtosis = (noise**4).mean() / noise.square().mean() ** 2
        assert 5 < kurtosis < 7  # Laplace: 6
        assert defense.describe()["snr_db"] == pytest.approx(-20 * math.log10(initial), abs=0.3)


def test_a_frozen_network_takes_no_gradient_and_no_statistics(make_defense, pictures):
    defense, batch = frozen(make_defense, pictures), pictures(16)
    assert defense.training
    assert not any(m.training for part in (defense.client, defense.server) for m in part.modules())
    before = state(defense)
    terms = defense.loss(batch.images(), batch.labels, step("noise"))
    sum(terms.values()).backward()
    assert all(p.grad is None for p in defense.client.parameters())
    assert all(p.grad is None for p in defense.server.parameters())
    assert defense.noise.values.grad.abs().sum() > 0
    assert all(torch.equal(before[k], v) for k, v in defense.state_dict().items())
    defense.begin("network", pictures(4))
    assert all(p.requires_grad for p in defense.client.parameters())
    assert defense.train().client[0][2].training


@pytest.mark.parametrize("phase", ["task", "noise"])
def test_each_term_moves_the_noise_the_right_way(make_defense, pictures, phase):
    defense, batch = frozen(make_defense, pictures), pictures(32)

    def terms():
        torch.manual_seed(0)
        return defense.loss(batch.images(), batch.labels, step("noise"))

    before, power = terms()[phase], defense.noise.log_ratio().mean()
    (slope,) = torch.autograd.grad(before, defense.noise.values)
    with torch.no_grad():
        defense.noise.values -= 1e-3 * slope / slope.square().sum()
        assert 0.0003 < before - terms()[phase] < 0.003
    if phase == "noise":
        # The published code's term has the other sign: it shrinks the noise.
        assert defense.noise.log_ratio().mean() > power


def test_a_greater_strength_ends_with_more_noise(make_defense, pictures, tmp_path):
    found = [
        fitted(make_defense, pictures, tmp_path / str(strength), 40, strength=strength)[1]["snr_db"]
        for strength in (0.0, 3.0, 30.0)
    ]
    assert found[0] > found[1] + 0.3
    assert found[1] > found[2] + 1.0


def test_a_shift_common_to_all_tensors_counts_nothing(make_defense, pictures):
    noise = frozen(make_defense, pictures).noise
    before = noise.log_ratio()
    with torch.no_grad():
        noise.values.view(noise.shape).add_(torch.randn(noise.shape[1:]))
    torch.testing.assert_close(noise.log_ratio(), before, rtol=1e-3, atol=1e-4)


def test_the_ratio_is_that_of_powers():
    noise = Collection(200, (50, 40), fitted=False)
    noise.start(signal=3.0, ratio=0.5)
    assert noise().std().item() == pytest.approx(1.5, rel=0.02)
    assert noise.log_ratio().mean().item() == pytest.approx(math.log(0.25), abs=0.02)


@torch.no_grad()
def test_one_of_the_tensors_is_added_to_each_image_and_each_is_used(make_defense, pictures):
    defense = frozen(make_defense, pictures).eval()
    images = pictures(1).images().expand(400, -1, -1, -1)
    torch.manual_seed(0)
    added = defense.protect(images)[0] - defense.predict(images)[0]
    distances = torch.cdist(added.flatten(1), defense.noise().flatten(1))
    assert distances.amin(1).max() < 1e-2
    counts = distances.argmin(1).bincount(minlength=16)
    assert counts.min() > 8  # 25 on average
    torch.manual_seed(1)
    again = torch.cdist(
        (defense.protect(images)[0] - defense.predict(images)[0]).flatten(1),
        defense.noise().flatten(1),
    )
    assert (again.argmin(1) != distances.argmin(1)).float().mean() > 0.8


@torch.no_grad()
def test_the_law_of_the_collection_is_the_mixture(make_defense, pictures):
    defense = frozen(make_defense, pictures, tensors=10, initial=0.2).eval().double()
    images = pictures(6).images().double()
    (clean,) = defense.predict(images)
    torch.manual_seed(0)
    (sent,) = defense.protect(images)
    guess = clean + 0.02 * torch.randn_like(clean)
    tolerance = TOLERANCE * sent.flatten(1).square().mean(1).sqrt()
    parts = []
    for noise in defense.noise():
        law = torch.distributions.Normal(guess + noise, tolerance[:, None, None, None])
        parts.append(law.log_prob(sent).flatten(1).sum(1))
    exact = torch.stack(parts).logsumexp(0)
    mine = defense.log_likelihood((sent,), (guess,))
    # Up to the constant of the normal law.
    constant = clean[0].numel() * (tolerance.log() + math.log(2 * math.pi) / 2)
    torch.testing.assert_close(mine - constant, exact, rtol=1e-9, atol=1e-6)


@torch.no_grad()
def test_whoever_knows_the_collection_knows_which_was_drawn(make_defense, pictures):
    defense = frozen(make_defense, pictures, initial=3.0).eval()
    images, others = pictures(8).images(), pictures(8, seed=1).images()
    sent = defense.protect(images)
    right = defense.log_likelihood(sent, defense.predict(images))
    # With the right image a component fits exactly: as likely as a message without noise.
    assert right.min() > -1
    wrong = defense.log_likelihood(sent, defense.predict(others))
    assert (wrong < right - 10).all()


def test_the_fitted_law_is_that_of_the_elements(make_defense, pictures, tmp_path):
    defense, _ = fitted(make_defense, pictures, tmp_path, draw="fitted", tensors=11)
    tensors = defense.noise().detach()
    location, scale = defense.noise.location, defense.noise.scale
    assert torch.equal(location, tensors.sort(0).values[5])
    torch.testing.assert_close(scale, (tensors - location).abs().mean(0))
    images = pictures(1).images().expand(3000, -1, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        noise = defense.protect(images)[0] - defense.predict(images)[0]
    error = (noise.median(0).values - location).abs() / scale
    assert error.max() < 0.15
    spread = (noise - location).abs().mean(0) / scale
    assert spread.min() > 0.9
    assert spread.max() < 1.1
    law = torch.distributions.Laplace(defense.predict(images[:5])[0] + location, scale)
    guess = torch.distributions.Laplace(0.1 + defense.predict(images[:5])[0] + location, scale)
    sent = defense.protect(images[:5])
    exact = (law.log_prob(sent[0]) - guess.log_prob(sent[0])).flatten(1).sum(1)
    predicted = defense.predict(images[:5])
    mine = defense.log_likelihood(sent, predicted)
    mine = mine - defense.log_likelihood(sent, (predicted[0] + 0.1,))
    torch.testing.assert_close(mine, exact, rtol=1e-3, atol=1e-2)


@every_draw
@every_layout
def test_what_is_deployed_has_the_learned_noise(make_defense, pictures, tmp_path, draw, features):
    defense, _ = fitted(make_defense, pictures, tmp_path, 8, features, draw=draw)
    copy = make_defense("shredder", {"draw": draw}, seed=9, features=features).eval()
    copy.load_state_dict(defense.state_dict())
    images = pictures(4, seed=5)
    sent, again = (d.transmit(images, batch=4, seed=2) for d in (defense, copy))
    assert torch.equal(sent[0], again[0])
    law, same = (d.log_likelihood(sent, d.predict(images.images())) for d in (defense, copy))
    torch.testing.assert_close(law, same, rtol=1e-4, atol=1e-2)


@every_draw
def test_a_killed_training_ends_where_an_undisturbed_one_ends(
    make_defense, pictures, tmp_path, draw, monkeypatch
):
    whole, _ = fitted(make_defense, pictures, tmp_path / "whole", draw=draw)
    loss = Shredder.loss

    def killed(self, images, labels, now):
        if now.phase == "noise" and now.index == 3:
            raise KeyboardInterrupt
        return loss(self, images, labels, now)

    monkeypatch.setattr(Shredder, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        fitted(make_defense, pictures, tmp_path / "killed", draw=draw)
    monkeypatch.undo()
    again, _ = fitted(make_defense, pictures, tmp_path / "killed", draw=draw)
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_weight_decay_does_not_shrink_the_noise(make_defense, pictures, tmp_path):
    defense = frozen(make_defense, pictures)
    before = defense.noise.values.detach().clone()
    optimise(
        defense,
        lambda now: {"nothing": 0 * defense.noise.values.sum()},
        Recipe(steps=5, lr=0.1, weight_decay=1.0),
        seed=0,
        checkpoint=Checkpoint(tmp_path),
        title="test",
    )
    assert torch.equal(defense.noise.values, before)


def test_draws_stay_finite_in_mixed_precision():
    draws = laplace_like(torch.zeros(10**6, dtype=torch.bfloat16))
    assert draws.dtype == torch.float32
    assert draws.isfinite().all()
    assert draws.abs().mean().item() == pytest.approx(1.0, abs=0.01)


def test_one_tensor_is_no_noise_and_is_refused():
    with pytest.raises(InvalidParamsError, match="tensors"):
        build(Shredder.Params, {"tensors": 1}, "defense shredder")
