"""Shares against proxy attackers: who minimises what, and who is pulled at."""

import pytest
import torch

from mibench.artifacts import Checkpoint
from mibench.defenses.parts.proxy import unexplained
from mibench.defenses.privdfs_at import PrivDFSAT
from mibench.errors import InvalidParamsError
from mibench.params import build
from mibench.protocol import Recipe
from mibench.training import Step

LAYOUTS = pytest.mark.parametrize("features", ["map", "tokens", "class-token"])
UNITS = pytest.mark.parametrize("unit", ["phase", "token"])


def step(index, total=100):
    return Step(index, total, torch.Generator().manual_seed(index))


def with_able_proxies(defense, images, rounds=40):
    """Lets the proxies alone learn until they rebuild more than the mean image."""
    optimiser = torch.optim.Adam(defense.proxies.parameters(), 3e-3)
    labels = torch.zeros(len(images), dtype=torch.int64)
    for _ in range(rounds):
        optimiser.zero_grad()
        loss = defense.loss(images, labels, step(99))["adversary"]
        loss.backward()
        optimiser.step()
    assert loss < len(defense.proxies)
    return defense


def errors_of(defense, images):
    """Each proxy's error (K, B), without any reversal."""
    found = []
    for k, share in enumerate(defense.protect(images)):
        if defense.params.unit == "token":
            places = torch.zeros(len(images), 64, 8).index_copy(1, defense.assignment[k], share)
            share = places.transpose(1, 2).reshape(-1, 8, 8, 8)
        found.append(unexplained(defense.proxies[k](share), images))
    return torch.stack(found)


def gradients(value, weights):
    found = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, weights, strict=True)]


@UNITS
@LAYOUTS
def test_the_client_is_pulled_against_the_best_proxy_alone(make_defense, pictures, features, unit):
    params = {"adversary": 0.7, "unit": unit, "density": 0.1}
    defense = make_defense("privdfs-at", params, features=features)
    batch = pictures(16)
    images = batch.images()
    with_able_proxies(defense, images)
    term = defense.loss(images, batch.labels, step(60))["adversary"]
    errors = errors_of(defense, images)
    torch.testing.assert_close(term, errors.mean(1).sum(), rtol=1e-4, atol=1e-5)
    worst = errors[errors.mean(1).argmin()]
    pulling = worst * (worst < 1)
    client = list(defense.client.parameters())
    wanted = [-0.7 * g for g in gradients(pulling.sum() / 16, client)]
    assert sum(g.abs().sum() for g in wanted) > 0
    for found, expected in zip(gradients(term, client), wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    proxies = list(defense.proxies.parameters())
    for found, expected in zip(
        gradients(term, proxies), gradients(errors.mean(1).sum(), proxies), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_proxies_far_worse_than_the_mean_image_pull_at_nobody(make_defense, pictures):
    defense, batch = make_defense("privdfs-at"), pictures(8)
    with torch.no_grad():
        for proxy in defense.proxies:
            proxy.network[-1].bias.fill_(4)  # nearly white, whatever the share
    assert (errors_of(defense, batch.images()) > 2).all()
    term = defense.loss(batch.images(), batch.labels, step(60))["adversary"]
    assert all((g == 0).all() for g in gradients(term, list(defense.client.parameters())))
    assert all((g != 0).any() for g in gradients(term, list(defense.proxies.parameters())))


def test_masks_of_tokens_are_learned_against_the_proxies(make_defense, pictures):
    params = {"unit": "token", "density": 0.1}
    defense, batch = make_defense("privdfs-at", params), pictures(16)
    with_able_proxies(defense, batch.images())
    term = defense.loss(batch.images(), batch.labels, step(1))["adversary"]
    worst = int(errors_of(defense, batch.images()).mean(1).argmin())
    (gradient,) = torch.autograd.grad(term, defense.logits)
    places = gradient.view(4, 64).abs().sum(0)
    sent = torch.zeros(64, dtype=torch.bool)
    sent[defense.assignment[worst]] = True
    assert (places[sent] > 0).all()
    assert (places[~sent] == 0).all()


def test_other_terms_are_those_of_privdfs(make_defense, pictures):
    batch = pictures(8)
    plain, defense = (make_defense(name, {"leakage": 0.2}) for name in ("privdfs", "privdfs-at"))
    defense.load_state_dict(plain.state_dict(), strict=False)
    for index in (0, 60):
        expected = plain.loss(batch.images(), batch.labels, step(index))
        found = defense.loss(batch.images(), batch.labels, step(index))
        assert found.keys() == {*expected, "adversary"}
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


@UNITS
@LAYOUTS
def test_both_sides_learn(make_defense, pictures, tmp_path, features, unit):
    defense = make_defense("privdfs-at", {"unit": unit}, features=features)
    before = {k: v.detach().clone() for k, v in defense.named_parameters()}
    how = Recipe(steps=8, batch=16, lr=0.05, crop=2, precision="fp32", weight_decay=0.0)
    facts = defense.fit(pictures(32), how, 0, Checkpoint(tmp_path))
    assert {k for k, v in defense.named_parameters() if torch.equal(v, before[k])} == set()
    assert facts["losses"].keys() == {"task", "branch", "adversary"}
    assert facts["losses"]["adversary"][-1][1] < facts["losses"]["adversary"][0][1]


def test_a_stronger_client_is_rebuilt_worse(make_defense, pictures, tmp_path):
    def best_proxy(weight):
        defense = make_defense("privdfs-at", {"adversary": weight, "density": 0.25})
        how = Recipe(steps=80, batch=32, lr=0.05, crop=0, flip=False, precision="fp32")
        defense.fit(pictures(64), how, 0, Checkpoint(tmp_path / str(weight)))
        return errors_of(defense, pictures(64).images()).mean(1).min().item()

    assert best_proxy(3.0) > 1.3 * best_proxy(1e-6)


def test_the_client_holds_no_proxy(make_defense):
    defense = make_defense("privdfs-at")
    proxies = {id(p) for p in defense.proxies.parameters()}
    listed = {id(p) for module in defense.client_modules() for p in module.parameters()}
    assert proxies
    assert not proxies & listed


def test_a_frozen_client_is_refused():
    with pytest.raises(InvalidParamsError, match="take masks=learned or masks=random") as caught:
        build(PrivDFSAT.Params, {"masks": "information"}, "defense privdfs-at")
    assert "\n" not in str(caught.value)
