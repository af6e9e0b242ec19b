"""NoPeek: the term is the distance correlation, and the client's step lowers it."""

import math

import pytest
import torch
from small_splits import SPECS

from mibench.artifacts import Checkpoint
from mibench.defenses.parts.dependence import distance_correlation
from mibench.errors import InvalidParamsError
from mibench.protocol import Recipe
from mibench.training import Step

every_layout = pytest.mark.parametrize("features", list(SPECS))
STEP = Step(0, 10, torch.Generator())


def terms_of(defense, batch):
    return defense.loss(batch.images(), batch.labels, STEP)


def fitted(make_defense, pictures, folder, strength, **params):
    defense = make_defense("nopeek", {"strength": strength, **params})
    how = Recipe(steps=40, batch=64, lr=0.05, crop=0, flip=False, precision="fp32")
    defense.fit(pictures(256), how, 0, Checkpoint(folder))
    images = pictures(256, seed=1).images()
    with torch.no_grad():
        return distance_correlation(images, defense.predict(images)[0], unbiased=True).item()


@every_layout
def test_the_term_is_the_distance_correlation_of_all_that_is_sent(make_defense, pictures, features):
    batch = pictures(16)
    defense = make_defense("nopeek", {"strength": 0.5}, features=features)
    squared = distance_correlation(batch.images(), defense.protect(batch.images())[0])
    found = terms_of(defense, batch)["dependence"]
    assert found.item() == pytest.approx(0.5 * math.sqrt(squared.item()), rel=1e-5)


def test_without_bias_it_is_the_square_and_may_be_negative(make_defense, pictures):
    defense = make_defense("nopeek", {"dcor": "unbiased", "strength": 1.0})
    batch = pictures(16)
    squared = distance_correlation(
        batch.images(), defense.protect(batch.images())[0], unbiased=True
    )
    assert terms_of(defense, batch)["dependence"].item() == pytest.approx(squared.item(), rel=1e-5)
    # A client that answers the same images in another order, as if they were independent.
    values = []
    for seed in range(20):
        order = torch.randperm(16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            defense.protect = lambda images, order=order: (defense.client(images)[order],)
            values.append(terms_of(defense, batch)["dependence"].item())
    assert min(values) < 0


@every_layout
@pytest.mark.parametrize("dcor", ["biased", "unbiased"])
def test_a_step_of_the_client_lowers_it(make_defense, pictures, features, dcor):
    defense, batch = make_defense("nopeek", {"dcor": dcor}, features=features), pictures(32)
    before = terms_of(defense, batch)["dependence"]
    weights = [p for p in defense.client.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(before, weights)
    size = sum(slope.square().sum() for slope in slopes)
    assert size > 0
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight -= 0.01 * slope / size
        after = terms_of(defense, batch)["dependence"]
    # To first order it falls by 0.01.
    assert 0.004 < before - after < 0.02


@pytest.mark.parametrize("dcor", ["biased", "unbiased"])
def test_training_with_it_leaves_less_dependence(make_defense, pictures, tmp_path, dcor):
    plain = fitted(make_defense, pictures, tmp_path / "a", 0.0, dcor=dcor)
    defended = fitted(make_defense, pictures, tmp_path / "b", 3.0, dcor=dcor)
    assert defended < plain - 0.1


def test_without_strength_there_is_no_term(make_defense, pictures):
    assert set(terms_of(make_defense("nopeek", {"strength": 0.0}), pictures(4))) == {"task"}


def test_constant_features_have_a_finite_gradient(make_defense, pictures):
    defense = make_defense("nopeek")
    for weight in defense.client.parameters():
        torch.nn.init.zeros_(weight)
    term = terms_of(defense, pictures(8))["dependence"]
    slopes = torch.autograd.grad(term, list(defense.client.parameters()), allow_unused=True)
    assert all(slope.isfinite().all() for slope in slopes if slope is not None)
    assert term < 1e-3


def test_too_small_batches_are_refused(make_defense, pictures):
    with pytest.raises(InvalidParamsError, match=r"recipe\.batch"):
        terms_of(make_defense("nopeek", {"dcor": "unbiased"}), pictures(3))
