"""The descent that begins at the decoder's image."""

import torch
from torch.nn import functional as F

from mibench.attacks.gradient_warm import GradientWarm

SMALL = {"restarts": 1, "tuning_images": 2}


def halved(images):
    """A linear client that loses half of the resolution."""
    return (F.avg_pool2d(images, 2),)


def made(workshop, target, pictures, **params):
    attack = GradientWarm(GradientWarm.Params(**(SMALL | params)), workshop)
    attack.prepare(target, pictures(16), pictures(4, seed=1))
    return attack


def test_it_improves_on_the_decoders_image(workshop, make_target, pictures):
    attack = made(
        workshop, make_target(halved), pictures, decoder={"steps": 15, "batch": 8}, steps=100
    )
    secret = pictures(6, seed=2).images()
    shares = halved(secret)
    warm = attack._decoder.reconstruct(shares)
    rebuilt = attack.reconstruct(shares)
    assert rebuilt.shape == secret.shape
    assert F.mse_loss(rebuilt, secret) < 0.8 * F.mse_loss(warm, secret)


def test_the_record_tells_of_the_descent_and_of_the_decoder(workshop, make_target, pictures):
    attack = made(
        workshop, make_target(halved), pictures, decoder={"steps": 5, "batch": 8}, steps=10
    )
    facts = attack.facts()
    assert set(facts["validation_mse"]) == {f"{w:g}" for w in attack.params.weights}
    assert "validation_mse" in facts["decoder"]


def test_a_strong_pull_keeps_the_decoders_image(workshop, make_target, pictures):
    attack = made(
        workshop, make_target(halved), pictures, pull=1e3, weights=(1e3,),
        decoder={"steps": 5, "batch": 8}, steps=60,
    )  # fmt: skip
    shares = halved(pictures(6, seed=2).images())
    warm = attack._decoder.reconstruct(shares)
    assert F.mse_loss(attack.reconstruct(shares), warm) < 1e-4


def test_without_a_pull_it_is_left_behind(workshop, make_target, pictures):
    attack = made(
        workshop, make_target(halved), pictures, pull=0.0, weights=(1e-3,),
        decoder={"steps": 5, "batch": 8}, steps=60,
    )  # fmt: skip
    shares = halved(pictures(6, seed=2).images())
    warm = attack._decoder.reconstruct(shares)
    assert F.mse_loss(attack.reconstruct(shares), warm) > 1e-3


def test_it_repeats(workshop, make_target, pictures):
    attack = made(
        workshop, make_target(halved), pictures, decoder={"steps": 5, "batch": 8}, steps=10
    )
    shares, found = halved(pictures(3, seed=2).images()), []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(attack.reconstruct(shares))
    assert torch.equal(*found)
