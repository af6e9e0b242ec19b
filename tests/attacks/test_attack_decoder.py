"""The decoder: learns, with all of its parts, from shares of any shape."""

import math

import pytest
import torch
from torch.nn import functional as F

from mibench.attacks import decoder as module
from mibench.attacks.decoder import Decoder, InverseNetwork
from mibench.errors import ThreatModelError
from mibench.threat import Knowledge

SMALL = {"steps": 120, "batch": 16, "width": 16, "blocks": 1, "lr": 5e-3}


def psnr(one, other):
    return -10 * math.log10(F.mse_loss(one, other).item())


def half_size(images):
    return (F.pixel_unshuffle(images, 2) * 7 - 100,)


def prepared(workshop, target, auxiliary, validation, **params):
    attack = Decoder(Decoder.Params(**(SMALL | params)), workshop)
    attack.prepare(target, auxiliary, validation)
    return attack


def test_it_learns_to_undo_a_reversible_client(workshop, make_target, pictures):
    target = make_target(half_size, Knowledge.BLACK_BOX)
    attack = prepared(workshop, target, pictures(256), pictures(16, seed=1))
    secret = pictures(32, seed=2).images()
    rebuilt = attack.reconstruct(half_size(secret))
    assert rebuilt.shape == secret.shape
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1
    assert psnr(rebuilt, secret) > 20
    mean = pictures(256).images().mean(0).expand_as(secret)
    assert psnr(rebuilt, secret) > psnr(mean, secret) + 6
    assert attack.facts()["validation_mse"] < 0.01


def test_every_part_of_the_network_learns(workshop, make_target, pictures, monkeypatch):
    networks, before = [], []

    def spy(network, *args, **kwargs):
        networks.append(network)
        before.append({k: v.detach().clone() for k, v in network.named_parameters()})
        return original(network, *args, **kwargs)

    original = module.optimise
    monkeypatch.setattr(module, "optimise", spy)

    def two_shares(images):
        return F.pixel_unshuffle(images[:, :2], 2), images[:, 2:].mean((2, 3))

    target = make_target(two_shares, corrupted=(0, 1))
    prepared(workshop, target, pictures(64), pictures(8), steps=10)
    assert len(networks[0].entries) == 2
    names = {name for name, p in networks[0].named_parameters() if p.requires_grad}
    assert names == set(before[0])
    still = {n for n, p in networks[0].named_parameters() if torch.equal(p, before[0][n])}
    assert still == set()


@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 8, 8)],
        [(2, 4, 4)],
        [(3, 16, 16)],
        [(1, 32, 32)],
        [(20,)],
        [(20, 1, 1)],
        [(6, 2, 2)],
        [(5, 8, 8), (7, 1, 1)],
        [(4, 8, 8), (4, 8, 8), (9,)],
    ],
    ids=str,
)
def test_shares_of_any_shape_are_read_to_the_last_value(shapes):
    torch.manual_seed(0)
    network = InverseNetwork(shapes, (3, 16, 16), 8, 1)
    shares = tuple(torch.randn(4, *shape) * 3 + 5 for shape in shapes)
    network.standardise(shares)
    received = tuple(share.clone().requires_grad_() for share in shares)
    images = network(received)
    assert images.shape == (4, 3, 16, 16)
    assert images.min() >= 0
    assert images.max() <= 1
    # Random weights: a sum would let opposite influences cancel.
    value = (images[0] * torch.randn_like(images[0])).sum()
    for gradient in torch.autograd.grad(value, received):
        assert (gradient[0] != 0).all()
        assert (gradient[1:] == 0).all()


def test_the_scale_of_a_share_does_not_matter():
    torch.manual_seed(0)
    share = torch.randn(32, 4, 8, 8)
    network = InverseNetwork([(4, 8, 8)], (3, 16, 16), 8, 1)
    network.standardise((share,))
    small = network((share,))
    network.standardise((1e3 * share + 50,))
    torch.testing.assert_close(network((1e3 * share + 50,)), small, rtol=1e-3, atol=1e-4)


def test_a_dead_channel_is_not_blown_up():
    network = InverseNetwork([(2, 8, 8)], (3, 16, 16), 8, 1)
    network.standardise((torch.zeros(4, 2, 8, 8),))
    images = network((torch.full((4, 2, 8, 8), 1e-6),))
    assert images.isfinite().all()
    assert (images - network((torch.zeros(4, 2, 8, 8),))).abs().max() < 0.05


def test_a_trained_decoder_is_not_trained_again(workshop, make_target, pictures, monkeypatch):
    parts = (pictures(32), pictures(8, seed=1))
    first = prepared(workshop, make_target(half_size), *parts, steps=5)

    def never(*_, **__):
        raise AssertionError("trained again")

    shares = half_size(pictures(4, seed=2).images())
    expected = first.reconstruct(shares)
    with monkeypatch.context() as patch:
        patch.setattr(module, "optimise", never)
        again = prepared(workshop, make_target(half_size), *parts, steps=5)
        assert torch.equal(again.reconstruct(shares), expected)
        assert again.facts() == first.facts()
        with pytest.raises(AssertionError, match="trained again"):
            prepared(workshop, make_target(half_size, identity="other"), *parts, steps=5)
        with pytest.raises(AssertionError, match="trained again"):
            prepared(workshop, make_target(half_size), pictures(32, seed=7), parts[1], steps=5)


def test_it_needs_queries(workshop, make_target, pictures):
    target = make_target(half_size, Knowledge.DATA_ONLY)
    with pytest.raises(ThreatModelError):
        prepared(workshop, target, pictures(8), pictures(4))
