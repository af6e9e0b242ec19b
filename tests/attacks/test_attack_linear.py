"""The linear attack: the closed form, chosen on validation images, in bounded memory."""

import dataclasses

import pytest
import torch
from small_splits import SPECS
from torch.nn import functional as F

from mibench import progress
from mibench.attacks import budget, linear, ridge
from mibench.attacks.linear import Linear
from mibench.errors import InvalidParamsError, ThreatModelError
from mibench.params import build
from mibench.threat import Adversary, Knowledge, Target


def prepared(workshop, target, auxiliary, validation, **params):
    attack = Linear(Linear.Params(**params), workshop)
    attack.prepare(target, auxiliary, validation)
    return attack


def maps(images):
    return (F.pixel_unshuffle(images, 2) * 7 - 100,)


def bent(images):
    """A message, in two shares, that is neither linear nor whole."""
    torch.manual_seed(3)
    mixing = torch.randn(3 * 16 * 16, 40) / 10
    return (images.flatten(1) @ mixing).tanh(), images.mean((2, 3)) ** 2


def values(shares):
    return torch.cat([share.flatten(1) for share in shares], dim=1).double()


def closed_form(target, auxiliary, penalty, shares):
    """The same answer by least squares on rows that stand for the penalty, in float64."""
    x, y = values(target.query(auxiliary.images())), auxiliary.images().flatten(1).double()
    mean, std = x.mean(0), x.std(0)
    inputs, asked = (x - mean) / std, (values(shares) - mean) / std
    weight = (penalty * (len(x) - 1)) ** 0.5  # the mean squared norm of a standardised input
    rows = torch.cat([inputs, weight * torch.eye(inputs.shape[1], dtype=torch.float64)])
    wanted = torch.cat([y - y.mean(0), torch.zeros(inputs.shape[1], y.shape[1]).double()])
    weights = torch.linalg.lstsq(rows, wanted).solution
    return (asked @ weights + y.mean(0)).clamp(0, 1).view(-1, 3, 16, 16).float()


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_it_is_the_closed_form(workshop, make_target, pictures, penalty):
    target, auxiliary = make_target(bent, corrupted=(0, 1)), pictures(200)
    attack = prepared(workshop, target, auxiliary, pictures(20, seed=1), penalties=(penalty,))
    shares = target.query(pictures(10, seed=2).images())
    expected = closed_form(target, auxiliary, penalty, shares)
    torch.testing.assert_close(attack.reconstruct(shares), expected, rtol=0, atol=1e-4)
    assert attack.facts()["penalty"] == penalty


def test_it_undoes_a_linear_client_and_says_so(workshop, make_target, pictures):
    target = make_target(maps, Knowledge.BLACK_BOX)
    attack = prepared(workshop, target, pictures(1000), pictures(50, seed=1))
    secret = pictures(20, seed=2).images()
    assert F.mse_loss(attack.reconstruct(maps(secret)), secret) < 1e-4
    facts = attack.facts()
    assert facts["learned"]
    assert facts["validation_mse"] < 1e-4
    assert facts["validation_errors"][f"{facts['penalty']:g}"] == pytest.approx(
        facts["validation_mse"], rel=1e-3
    )
    assert facts["validation_errors"]["1"] > facts["validation_errors"]["1e-05"]
    assert facts["images"] == 1000


def noisy(images):
    return (images + 0.7 * torch.randn_like(images),)


def test_the_penalty_suits_the_target(workshop, make_target, pictures):
    chosen = {}
    for client in (maps, noisy):
        target = make_target(client, identity=client.__name__)
        attack = prepared(workshop, target, pictures(1000), pictures(100, seed=1))
        errors = attack.facts()["validation_errors"]
        chosen[client] = attack.facts()["penalty"]
        assert errors[f"{chosen[client]:g}"] == min(errors.values())
    assert chosen[maps] < chosen[noisy]


@pytest.mark.parametrize("features", SPECS)
def test_it_beats_the_mean_image_on_the_undefended_split(
    workshop, make_defense, pictures, features
):
    defense = make_defense("none", features)
    target = Target(defense, Adversary(Knowledge.BLACK_BOX, (0,)), features)
    auxiliary, secret = pictures(600), pictures(50, seed=2)
    attack = prepared(workshop, target, auxiliary, pictures(50, seed=1))
    rebuilt = attack.reconstruct(defense.transmit(secret, 50, 0))
    mean = auxiliary.images().mean(0).expand_as(rebuilt)
    assert F.mse_loss(rebuilt, secret.images()) < 0.25 * F.mse_loss(mean, secret.images())


def test_repeated_transmissions_are_averaged(workshop, make_target, pictures):
    secret, errors = pictures(50, seed=2).images(), {}
    for times in (1, 4):
        target = make_target(noisy, identity=str(times), transmissions=times)
        attack = prepared(workshop, target, pictures(800), pictures(50, seed=1))
        shares = target.query(secret)
        errors[times] = F.mse_loss(attack.reconstruct(shares), secret).item()
        turned = attack.reconstruct(shares[::-1])
        torch.testing.assert_close(attack.reconstruct(shares), turned)
    assert errors[4] < 0.7 * errors[1]


def test_a_long_message_is_projected_and_read(workshop, make_target, pictures, monkeypatch):
    monkeypatch.setattr(ridge, "MAX_INPUTS", 100)
    monkeypatch.setattr(ridge, "BLOCK", 64)
    target = make_target(lambda images: (*maps(images), *maps(images.flip(3))), corrupted=(0, 1))
    attack = prepared(workshop, target, pictures(600), pictures(20, seed=1))
    secret = pictures(20, seed=2).images()
    assert F.mse_loss(attack.reconstruct(target.query(secret)), secret) < 1e-3
    assert attack._solution.weights.shape == (100, 768)


def test_nothing_more_is_held_than_allowed(workshop, make_target, pictures, monkeypatch):
    parts, found, sizes = (pictures(300), pictures(40, seed=1)), [], []
    secret = pictures(30, seed=2).images()

    def client(images):
        sizes.append(len(images))
        return bent(images)

    for most in (2**27, 39 * (768 + 43)):
        monkeypatch.setattr(linear, "HELD", most)
        monkeypatch.setattr(budget, "VALUES", most // 4)
        sizes.clear()
        read = []

        class Spy(linear.Reader):
            def __call__(self, shares, read=read):
                read.append(len(shares[0]))
                return super().__call__(shares)

        monkeypatch.setattr(linear, "Reader", Spy)
        attack = prepared(
            workshop, make_target(client, corrupted=(0, 1), identity=str(most)), *parts
        )
        found.append(attack.reconstruct(bent(secret)))
        small = most < 2**27
        assert max(read) == (30 if small else 300)  # three queries, not four
        assert max(sizes) == (10 if small else 300)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-3)


def test_of_long_messages_fewer_images_are_read(workshop, make_target, pictures, monkeypatch):
    monkeypatch.setattr(linear, "READ", 100 * 768)
    attack = prepared(workshop, make_target(maps), pictures(300), pictures(40, seed=1))
    assert attack.facts()["images"] == 100


def test_the_number_of_images_is_bounded(workshop, make_target, pictures):
    few = prepared(
        workshop, make_target(bent, corrupted=(0, 1)), pictures(300), pictures(9, seed=1), images=20
    )
    same = prepared(
        workshop,
        make_target(bent, corrupted=(0, 1), identity="2"),
        pictures(20),
        pictures(9, seed=1),
    )
    shares = bent(pictures(5, seed=2).images())
    assert few.facts()["images"] == 20
    torch.testing.assert_close(few.reconstruct(shares), same.reconstruct(shares))


@pytest.mark.parametrize("side", [64, 96, 224])
def test_large_images_are_rebuilt_at_a_smaller_size(workshop, make_target, pictures, side):
    shop = dataclasses.replace(workshop, image_shape=(3, side, side))

    def client(images):
        return (F.adaptive_avg_pool2d(images, 8),)

    attack = prepared(
        shop, make_target(client), pictures(100, side=side), pictures(8, seed=1, side=side)
    )
    assert attack._solution.offset.shape == (3 * 64 * 64,)
    secret = pictures(4, seed=2, side=side).images()
    rebuilt = attack.reconstruct(client(secret))
    assert rebuilt.shape == (4, 3, side, side)
    assert F.mse_loss(rebuilt, secret) < 0.003
    assert attack.facts()["validation_mse"] < 0.003


class Notes:
    """A display that keeps what it is told."""

    def __init__(self):
        self.lines = []

    def start(self, title, total):
        return self

    def finish(self, task):
        pass

    def advance(self, steps=1, **figures):
        pass

    def note(self, text):
        self.lines.append(text)


def constant(images):
    return (torch.full((len(images), 4, 8, 8), 2.5),)


@pytest.mark.parametrize("count", [1, 2, 50])
def test_where_nothing_can_be_learned_it_answers_the_mean_and_says_so(
    workshop, make_target, pictures, count
):
    client = maps if count == 1 else constant
    notes, auxiliary = Notes(), pictures(count)
    with progress.shown_by(notes):
        attack = prepared(workshop, make_target(client), auxiliary, pictures(10, seed=1))
    rebuilt = attack.reconstruct(client(pictures(3, seed=2).images()))
    expected = auxiliary.images().mean(0).expand_as(rebuilt)
    torch.testing.assert_close(rebuilt, expected)
    assert not attack.facts()["learned"]
    (line,) = [line for line in notes.lines if "attack linear" in line]
    assert "no more than the mean auxiliary image" in line
    assert "\n" not in line


def test_fewer_images_than_values_are_enough(workshop, make_target, pictures):
    attack = prepared(workshop, make_target(maps), pictures(3), pictures(10, seed=1))
    rebuilt = attack.reconstruct(maps(pictures(3).images()))
    assert F.mse_loss(rebuilt, pictures(3).images()) < 1e-2
    assert rebuilt.isfinite().all()


def test_a_solution_is_taken_from_the_cache(workshop, make_target, pictures, monkeypatch):
    parts = (pictures(100), pictures(10, seed=1))
    first = prepared(workshop, make_target(bent, corrupted=(0, 1)), *parts)
    shares = bent(pictures(5, seed=2).images())

    def never(*_):
        raise AssertionError("solved again")

    monkeypatch.setattr(linear.Equations, "solve", never)
    again = prepared(workshop, make_target(bent, corrupted=(0, 1)), *parts)
    assert torch.equal(again.reconstruct(shares), first.reconstruct(shares))
    assert again.facts() == first.facts()
    with pytest.raises(AssertionError, match="solved again"):
        prepared(workshop, make_target(bent, corrupted=(0, 1), identity="other"), *parts)


def test_it_needs_queries(workshop, make_target, pictures):
    with pytest.raises(ThreatModelError):
        prepared(workshop, make_target(maps, Knowledge.DATA_ONLY), pictures(8), pictures(4))


def test_a_penalty_is_above_zero():
    with pytest.raises(InvalidParamsError, match="penalties"):
        build(Linear.Params, {"penalties": [0.0]}, "attack linear")
