"""Keyed shares: what a key chooses, what an attacker without it knows, whom the servers serve."""

import itertools
import math

import pytest
import torch

from mibench.artifacts import Checkpoint
from mibench.defenses.base import TOLERANCE, Defense
from mibench.defenses.privdfs_kd import PrivDFSKD
from mibench.errors import InvalidParamsError
from mibench.params import build
from mibench.protocol import Recipe
from mibench.training import Step

LAYOUTS = pytest.mark.parametrize("features", ["map", "tokens", "class-token"])
SMALL = {"servers": 2, "density": 0.125, "choices": 4}  # 4 slots a share, all 32 units candidates


def step(index, total=100):
    return Step(index, total, torch.Generator().manual_seed(index))


def fitted(defense, images, folder, **changes):
    how = {"steps": 8, "batch": 16, "lr": 0.05, "crop": 0, "flip": False, "precision": "fp32"}
    return defense.fit(images, Recipe(**how | changes), 0, Checkpoint(folder))


@pytest.mark.parametrize(("density", "choices"), [(0.125, 4), (0.0625, 8), (0.25, 2), (0.1, 3)])
def test_no_unit_is_a_candidate_twice(make_defense, density, choices):
    defense = make_defense("privdfs-kd", {"servers": 2, "density": density, "choices": choices})
    candidates = defense.assignment.flatten().tolist()
    assert len(candidates) == 2 * defense.kept * choices
    assert len(set(candidates)) == len(candidates)
    assert set(candidates) <= set(range(32))
    facts = defense.describe()
    assert facts["overlap"] == 0
    assert facts["units_per_share"] == round(density * 32)
    assert facts["key_bits"] == pytest.approx(2 * defense.kept * math.log2(choices))


@LAYOUTS
def test_every_slot_holds_one_of_its_candidates(make_defense, pictures, features):
    defense = make_defense("privdfs-kd", SMALL, features=features).eval()
    images = pictures(20).images()
    units = defense._cut(images)
    for k, (share, predicted) in enumerate(
        zip(defense.protect(images), defense.predict(images), strict=True)
    ):
        assert share.shape == (20, 4, 4, 4)
        assert predicted.shape == (20, 4, 4, 4, 4)
        candidates = defense.assignment[k].view(4, 4)
        assert torch.equal(predicted, units[:, candidates])
        same = (share[:, :, None] == predicted).flatten(3).all(3)
        assert same.any(2).all()


def test_users_have_keys_of_their_own_and_no_choice_is_preferred(make_defense):
    defense = make_defense("privdfs-kd", SMALL)
    torch.manual_seed(0)
    keys = defense._drawn(4000)
    assert keys.shape == (4000, 2, 4)
    for choice in range(4):
        share = (keys == choice).float().mean(0)
        assert (share - 0.25).abs().max() < 0.04
    # Slots are independent: two agree as often as by chance.
    agree = (keys[:, 0, 0] == keys[:, 1, 3]).float().mean()
    assert agree == pytest.approx(0.25, abs=0.04)


def test_the_same_image_is_sent_under_another_key(make_defense, pictures):
    defense = make_defense("privdfs-kd", SMALL).eval()
    twins = pictures(1).images().expand(64, -1, -1, -1)
    torch.manual_seed(0)
    share = defense.protect(twins)[0]
    distinct = {tuple(row.flatten().tolist()) for row in share}
    # Of 4^4 keys, 64 draws hit about 56 different ones.
    assert 45 < len(distinct) <= 64


def test_the_law_is_the_mean_over_all_keys(make_defense, pictures):
    params = {"servers": 2, "density": 0.1, "choices": 3}  # 3 slots: 27 keys a share
    defense = make_defense("privdfs-kd", params).eval().double()
    received = defense.protect(pictures(4, seed=1).images().double())
    predicted = defense.predict(pictures(4, seed=2).images().double())
    # Near the candidates, so that several keys count.
    predicted = tuple(
        0.03 * guess + share[:, :, None] for share, guess in zip(received, predicted, strict=True)
    )
    expected = torch.zeros(4, dtype=torch.float64)
    for share, candidates in zip(received, predicted, strict=True):
        scale = TOLERANCE * share.flatten(1).square().mean(1).sqrt()
        densities = []
        for key in itertools.product(range(3), repeat=3):
            guess = torch.stack([candidates[:, i, c] for i, c in enumerate(key)], dim=1)
            error = (share - guess).flatten(1).square().sum(1)
            densities.append((-error / (2 * scale**2)).exp())
        expected += torch.stack(densities).mean(0).log()
    found = defense.log_likelihood(received, predicted)
    torch.testing.assert_close(found, expected)
    assert (found < 0).all()
    one = defense.log_likelihood(received[1:], predicted[1:])
    assert (one > found).all()


def test_the_true_image_is_likeliest_whatever_the_key(make_defense, pictures):
    defense = make_defense("privdfs-kd", SMALL).eval()
    images, others = pictures(8).images(), pictures(8, seed=1).images()
    for _ in range(3):
        sent = defense.protect(images)
        top = defense.log_likelihood(sent, defense.predict(images)).detach()
        # In each of the eight slots, one candidate of four fits exactly.
        assert top == pytest.approx([-8 * math.log(4)] * 8, abs=1e-3)
        assert (top > defense.log_likelihood(sent, defense.predict(others))).all()


def test_a_known_key_leaves_nothing_random(make_defense, pictures):
    defense, images = make_defense("privdfs-kd", SMALL | {"key": "known"}).eval(), pictures(6)
    sent, again = (defense.protect(images.images()) for _ in range(2))
    predicted = defense.predict(images.images())
    for k in range(2):
        assert torch.equal(sent[k], again[k])
        assert torch.equal(sent[k], predicted[k])
        chosen = defense.assignment[k].view(4, 4)[range(4), defense.key[0, k]]
        assert torch.equal(sent[k], defense._cut(images.images())[:, chosen])
    law = defense.log_likelihood(sent, predicted)
    assert torch.equal(law, Defense.log_likelihood(defense, sent, predicted))
    assert (law == 0).all()


def test_the_known_key_travels_with_the_weights(make_defense, pictures):
    params = SMALL | {"key": "known"}
    defense, copy = (make_defense("privdfs-kd", params, seed=seed).eval() for seed in (0, 1))
    assert not torch.equal(defense.key, copy.key)
    copy.load_state_dict(defense.state_dict())
    images = pictures(3).images()
    for one, other in zip(defense.protect(images), copy.protect(images), strict=True):
        assert torch.equal(one, other)
    assert "key" not in make_defense("privdfs-kd", SMALL).state_dict()


@pytest.mark.parametrize("index", [0, 99])
def test_training_is_the_same_for_both(make_defense, pictures, index):
    batch = pictures(8)
    found = []
    for key in ("secret", "known"):
        defense = make_defense("privdfs-kd", SMALL | {"key": key})
        torch.manual_seed(5)
        found.append(defense.loss(batch.images(), batch.labels, step(index)))
    assert found[0].keys() == {"task", "branch", "leakage"}
    assert found[0] == found[1]
    again = defense.loss(batch.images(), batch.labels, step(index))
    assert again["task"] != found[1]["task"]  # other keys


def test_a_server_reads_its_slots_and_no_key(make_defense, pictures):
    defense = make_defense("privdfs-kd", SMALL).eval()
    share = defense.protect(pictures(4).images())[1]
    reply = defense.serve(1, share)
    # Whichever unit a value came from, and whoever sends next.
    defense.protect(pictures(4, seed=3).images())
    defense.assignment = defense.assignment.flip(1)
    assert torch.equal(defense.serve(1, share), reply)
    assert not torch.allclose(defense.serve(1, share.flip(1)), reply, atol=1e-4)


@LAYOUTS
@pytest.mark.parametrize("key", ["secret", "known"])
def test_everything_moves(make_defense, pictures, tmp_path, features, key):
    defense = make_defense("privdfs-kd", SMALL | {"key": key}, features=features)
    before = {k: v.detach().clone() for k, v in defense.named_parameters()}
    assert "logits" not in before
    facts = fitted(defense, pictures(32), tmp_path, weight_decay=0.0)
    assert {k for k, v in defense.named_parameters() if torch.equal(v, before[k])} == set()
    assert facts["units_moved"] == [0, 0]


def test_servers_answer_any_key(make_defense, pictures, tmp_path):
    """A model that was trained over keys classifies under keys that it has not met."""
    defense = make_defense("privdfs-kd", SMALL | {"leakage": 0.0})
    images = pictures(32)
    fitted(defense, images, tmp_path, steps=200, batch=32)
    torch.manual_seed(1)
    told = [defense.examine(images)["fused_accuracy"] for _ in range(5)]
    assert min(told) > 0.9


def test_more_candidates_than_units_are_refused_with_the_limit(make_defense):
    with pytest.raises(InvalidParamsError, match=r"lower density to at most 0\.0625") as caught:
        make_defense("privdfs-kd", {"servers": 4, "density": 0.125, "choices": 4})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "params", [{"unit": "token"}, {"masks": "learned"}, {"masks": "information", "leakage": 0.0}]
)
def test_what_keys_cannot_choose_among_is_refused(params):
    with pytest.raises(InvalidParamsError, match="leave unit at phase and masks at random"):
        build(PrivDFSKD.Params, params, "defense privdfs-kd")
