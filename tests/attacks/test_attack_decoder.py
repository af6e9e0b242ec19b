"""The decoder: learns, with all of its parts, from shares of any shape."""

import dataclasses
import math
import socket

import pytest
import torch
from torch.nn import functional as F

from mibench import training
from mibench.artifacts import ArtifactStore
from mibench.attacks import budget
from mibench.attacks import decoder as module
from mibench.attacks.decoder import Decoder
from mibench.attacks.inverse import (
    SIZES,
    Attention,
    CoarseLevel,
    InverseNetwork,
    Placement,
    Size,
    TokenEntry,
)
from mibench.data.sets import ImageSet
from mibench.errors import InvalidParamsError, ThreatModelError, UnavailableError
from mibench.metrics import perceptual
from mibench.params import build
from mibench.threat import Knowledge

REAL = dict(SIZES)
QUICK = {"steps": 120, "batch": 16, "lr": 5e-3}
TINY = Size(8, 1)


@pytest.fixture(autouse=True)
def quick_sizes(monkeypatch):
    """Both sizes with the same parts and fewer channels, for tests that train."""
    monkeypatch.setitem(SIZES, "small", Size(16, 1))
    monkeypatch.setitem(SIZES, "large", Size(16, 1, coarse_width=32, coarse_blocks=2))


def psnr(one, other):
    return -10 * math.log10(F.mse_loss(one, other).item())


def fine(count, seed, side=16):
    """Smooth pictures with detail inside each patch."""
    draws = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, side // 2, side // 2, generator=draws)
    images = F.interpolate(small, (side, side), mode="bilinear")
    labels = torch.zeros(count, dtype=torch.int64)
    return ImageSet((images * 255).round().to(torch.uint8), labels)


def half_size(images):
    return (F.pixel_unshuffle(images, 2) * 7 - 100,)


def prepared(workshop, target, auxiliary, validation, **params):
    attack = Decoder(Decoder.Params(**(QUICK | params)), workshop)
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


def mixed(images):
    """A coalition of four: maps, a vector, tokens, and maps that are coarse."""
    maps = F.pixel_unshuffle(images[:, :2], 2)
    return (
        maps,
        images[:, 2:].mean((2, 3)),
        maps.flatten(2).transpose(1, 2),
        maps[:, :, ::2, ::2],
    )


@pytest.mark.parametrize("size", SIZES)
def test_every_part_of_the_network_learns(workshop, make_target, pictures, monkeypatch, size):
    networks, before = [], []

    def spy(network, *args, **kwargs):
        networks.append(network)
        before.append({k: v.detach().clone() for k, v in network.named_parameters()})
        return original(network, *args, **kwargs)

    original = module.optimise
    monkeypatch.setattr(module, "optimise", spy)
    target = make_target(mixed, corrupted=(0, 1, 2, 3))
    prepared(workshop, target, pictures(64), pictures(8), steps=10, size=size)
    assert len(networks[0].entries) == 4
    names = {name for name, p in networks[0].named_parameters() if p.requires_grad}
    assert names == set(before[0])
    for name, parameter in networks[0].named_parameters():
        assert not torch.equal(parameter, before[0][name]), name
        # By its gradient, and not by the decay of the weights alone.
        assert parameter.grad.abs().max() > 1e-9, name


# --- two fixed sizes -----------------------------------------------------------------------------

LAYOUTS = {
    "maps": [(64, 32, 32)],
    "few maps": [(3, 16, 16)],
    "tokens": [(65, 128)],
    "a vector": [(256,)],
    "a coalition": [(16, 32, 32)] * 3,
    "mixed": [(8, 8, 8), (64, 8), (9,)],
}


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_size_does_not_depend_on_the_shares(size, layout):
    network = InverseNetwork(LAYOUTS[layout], (3, 32, 32), REAL[size])
    entries = count(network.entries.parameters())
    whole = count(network.parameters())
    assert whole - entries == {"small": 228_492, "large": 6_376_972}[size]
    if layout != "a vector":  # whose entry has a weight for each of its values at each place
        low, high = {"small": (0.23e6, 0.6e6), "large": (5e6, 10e6)}[size]
        assert low <= whole <= high


@pytest.mark.parametrize("side", [32, 64, 112, 128, 224])
def test_large_is_as_large_for_every_image_size(side):
    network = InverseNetwork([(8, 16, 16)], (3, side, side), REAL["large"])
    assert 5e6 < count(network.parameters()) < 10e6
    (coarse,) = [part for part in network.blocks if isinstance(part, CoarseLevel)]
    places = network.entries[0](torch.zeros(1, 8, 16, 16)).shape[-1]
    assert 8 <= math.ceil(places / coarse.fold) <= 16


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("size", SIZES)
def test_an_entry_hands_on_more_values_than_the_image_has(size, side):
    network = InverseNetwork([(4, 8, 8)], (3, side, side), REAL[size])
    assert network.entries[0](torch.zeros(1, 4, 8, 8)).numel() >= 3 * side**2


def test_small_is_three_blocks_of_64_channels():
    network = InverseNetwork([(64, 32, 32)], (3, 32, 32), REAL["small"])
    shapes = {name: tuple(value.shape) for name, value in network.named_parameters()}
    expected = {"entries.0.placement.layer.weight": (64, 256, 3, 3), "exit.weight": (12, 64, 3, 3)}
    expected |= {f"blocks.{k}.conv{n}.weight": (64, 64, 3, 3) for k in range(3) for n in (1, 2)}
    expected |= {
        name.replace("weight", "bias"): shape[:1] for name, shape in list(expected.items())
    }
    assert shapes == expected


@pytest.mark.parametrize("side", [16, 31, 50])
def test_every_place_of_the_coarse_level_sees_every_other_one(side):
    torch.manual_seed(0)
    level = CoarseLevel(Size(4, 1, coarse_width=8, coarse_blocks=1), side)
    for parameter in level.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 4, side, side, requires_grad=True)
    out = level(x)
    assert out.shape == x.shape
    (gradient,) = torch.autograd.grad(out[0, :, 0, 0].sum(), x)
    assert (gradient[0] != 0).all()
    assert (gradient[1] == 0).all()


def test_attention_is_the_formula():
    torch.manual_seed(0)
    layer = Attention(8)
    torch.nn.init.normal_(layer.out.weight)
    x = torch.randn(2, 8, 3, 5)
    q, k, v = layer.qkv(layer.norm(x)).flatten(2).split(8, dim=1)
    parts = []
    for head in range(4):
        own = slice(2 * head, 2 * head + 2)
        weights = (q[:, own].transpose(1, 2) @ k[:, own] / math.sqrt(2)).softmax(2)
        parts.append(v[:, own] @ weights.transpose(1, 2))
    expected = x + layer.out(torch.cat(parts, 1).unflatten(2, (3, 5)))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("client", [half_size, mixed])
def test_large_learns(workshop, make_target, pictures, client):
    target = make_target(client, corrupted=tuple(range(len(client(torch.zeros(1, 3, 16, 16))))))
    attack = prepared(workshop, target, pictures(256), pictures(16, seed=1), size="large")
    secret = pictures(32, seed=2).images()
    mean = pictures(256).images().mean(0).expand_as(secret)
    assert psnr(attack.reconstruct(client(secret)), secret) > psnr(mean, secret) + 4


def test_the_size_cannot_be_set_by_hand():
    with pytest.raises(InvalidParamsError, match=r"unknown parameter attack\.width"):
        build(Decoder.Params, {"width": 128}, "attack")


# --- judged on validation images -----------------------------------------------------------------


def judged(monkeypatch, errors):
    """Lets the n-th judgement find the n-th error, and keeps the networks that were judged."""
    seen = []

    def error(self, network, target, images):
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return {"mse": errors[min(len(seen), len(errors)) - 1]}

    monkeypatch.setattr(Decoder, "_errors", error)
    return seen


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_judged_state_is_kept(workshop, make_target, pictures, monkeypatch):
    seen = judged(monkeypatch, [0.5, 0.2, 0.3, 0.2, 0.4])
    attack = prepared(
        workshop, make_target(half_size), pictures(32), pictures(8), steps=50, judgements=5
    )
    assert len(seen) == 6  # the last one is of the network that is kept
    assert same(attack._network.state_dict(), seen[1])
    assert not same(seen[1], seen[3])
    facts = attack.facts()
    assert facts["chosen_step"] == 20
    course = [[10, 0.5], [20, 0.2], [30, 0.3], [40, 0.2], [50, 0.4]]
    assert facts["validation_course"] == course


def test_impatience_ends_the_training(workshop, make_target, pictures, monkeypatch):
    judged(monkeypatch, [0.5, 0.2, 0.3, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    parts = (workshop, make_target(half_size), pictures(32), pictures(8))
    attack = prepared(*parts, steps=50, judgements=10, patience=2)
    assert attack.facts()["chosen_step"] == 10
    assert [step for step, _ in attack.facts()["validation_course"]] == [5, 10, 15, 20]


def test_the_averaged_weights_are_judged_and_always_on_the_same_draws(
    workshop, make_target, pictures
):
    def noisy(images):
        return (images + 0.1 * torch.randn_like(images),)

    target = make_target(noisy)
    attack = prepared(workshop, target, pictures(64), pictures(8, seed=1), steps=40)
    facts = attack.facts()
    assert len(facts["validation_course"]) == 10
    errors = dict(facts["validation_course"])
    assert facts["validation_mse"] == errors[facts["chosen_step"]] == min(errors.values())
    again = attack._errors(attack._network, target, pictures(8, seed=1))
    assert again["mse"] == facts["validation_mse"]


class Killed(BaseException):
    """Ends a training from outside."""


def test_a_killed_training_ends_where_an_undisturbed_one_ends(
    workshop, make_target, pictures, tmp_path, monkeypatch
):
    images, how = (pictures(64), pictures(8, seed=1)), {"steps": 30, "judgements": 6}
    whole = prepared(workshop, make_target(half_size), *images, **how)

    sent = 0

    def dying(images):
        nonlocal sent
        sent += 1
        if sent > 25:
            raise Killed
        return half_size(images)

    shop = dataclasses.replace(
        workshop, store=ArtifactStore(tmp_path / "other", checkpoint_interval=0.0)
    )
    with pytest.raises(Killed):
        prepared(shop, make_target(dying), *images, **how)
    going_on = []
    monkeypatch.setattr(training.progress, "note", going_on.append)
    resumed = prepared(shop, make_target(half_size), *images, **how)
    assert any("going on from step" in line for line in going_on)
    assert same(resumed._network.state_dict(), whole._network.state_dict())
    assert resumed.facts() == whole.facts()


# --- the perceptual term -------------------------------------------------------------------------


class Edges(torch.nn.Module):
    """In the place of LPIPS: a distance between differences of neighbouring pixels."""

    def forward(self, one, other):
        return (one.diff(dim=3) - other.diff(dim=3)).square().mean((1, 2, 3))


def test_the_perceptual_term_changes_the_gradient(workshop, monkeypatch):
    monkeypatch.setattr(perceptual, "_network", Edges)
    images = torch.rand(4, 3, 16, 16)
    gradients, terms = {}, {}
    for weight in (0.0, 1.0, 2.0):
        attack = Decoder(Decoder.Params(perceptual=weight), workshop)
        guess = torch.full_like(images, 0.5).requires_grad_()
        terms[weight] = attack._terms(guess, images)
        (gradients[weight],) = torch.autograd.grad(sum(terms[weight].values()), guess)
    assert set(terms[0.0]) == {"mse"}
    assert set(terms[1.0]) == {"mse", "perceptual"}
    added = gradients[1.0] - gradients[0.0]
    assert added.abs().max() > 0.01 * gradients[0.0].abs().max()
    torch.testing.assert_close(gradients[2.0] - gradients[0.0], 2 * added)


def test_with_the_perceptual_term_it_still_learns(workshop, make_target, pictures, monkeypatch):
    monkeypatch.setattr(perceptual, "_network", Edges)
    target = make_target(half_size)
    parts = (pictures(256), pictures(16, seed=1))
    attack = prepared(workshop, target, *parts, perceptual=0.1)
    plain = prepared(workshop, target, *parts)
    secret = pictures(32, seed=2).images()
    rebuilt = attack.reconstruct(half_size(secret))
    assert psnr(rebuilt, secret) > 20
    assert not torch.equal(rebuilt, plain.reconstruct(half_size(secret)))
    facts = attack.facts()
    # Judged by the whole objective; the squared error stands apart.
    assert 0 < facts["validation_mse"] < min(error for _, error in facts["validation_course"])


def test_without_its_weights_the_perceptual_term_is_refused_in_one_line(
    workshop, make_target, pictures, monkeypatch, tmp_path
):
    def refuse(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(module, "optimise", None)  # nothing is trained before
    perceptual._network.cache_clear()
    with pytest.raises(UnavailableError, match=r"attack decoder with perceptual=0.5: lpips") as no:
        prepared(workshop, make_target(half_size), pictures(8), pictures(4), perceptual=0.5)
    assert "\n" not in str(no.value)
    assert str(tmp_path) in str(no.value)


# --- shares of any shape -------------------------------------------------------------------------


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
        [(3, 5, 7)],
        [(3, 11, 11)],
        [(64, 6)],
        [(65, 6)],
        [(20, 6)],
        [(13, 6)],
        [(50, 6)],
        [(60, 6)],
        [(100, 6)],
        [(256, 3)],
        [(5, 6)],
        [(16, 6), (4, 8, 8)],
        [(65, 6)] * 3,
    ],
    ids=str,
)
def test_shares_of_any_shape_are_read_to_the_last_value(shapes):
    torch.manual_seed(0)
    network = InverseNetwork(shapes, (3, 16, 16), TINY)
    shares = tuple(torch.randn(4, *shape) * 3 + 5 for shape in shapes)
    network.standardise([shares])
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


@pytest.mark.parametrize("shape", [(4, 8, 8), (65, 4), (30,)], ids=str)
def test_the_scale_of_a_share_does_not_matter(shape):
    torch.manual_seed(0)
    share = torch.randn(32, *shape)
    network = InverseNetwork([shape], (3, 16, 16), TINY)
    network.standardise([(share,)])
    small = network((share,))
    network.standardise([(1e3 * share + 50,)])
    torch.testing.assert_close(network((1e3 * share + 50,)), small, rtol=1e-3, atol=1e-4)


def test_a_dead_channel_is_not_blown_up():
    network = InverseNetwork([(2, 8, 8)], (3, 16, 16), TINY)
    network.standardise([(torch.zeros(4, 2, 8, 8),)])
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


# --- tokens and coarse maps ----------------------------------------------------------------------


def patches(images):
    """Tokens (B, 16, 48): the pixels of each 4x4 patch."""
    return (100 - 7 * F.pixel_unshuffle(images, 4).flatten(2).transpose(1, 2),)


def with_class_token(images):
    (tokens,) = patches(images)
    return (torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1),)


def some_tokens(images):
    """A subset, as a defense might send it: 13 of the 16."""
    return (patches(images)[0][:, 3:],)


def coarse(images):
    """Maps (B, 192, 4, 4) of images of 32 pixels."""
    return (F.pixel_unshuffle(images, 8),)


@pytest.mark.parametrize(
    ("client", "side", "patch"), [(patches, 16, 4), (with_class_token, 16, 4), (coarse, 32, 8)]
)
def test_what_a_patch_holds_is_put_back_in_its_place(workshop, make_target, client, side, patch):
    shop = dataclasses.replace(workshop, image_shape=(3, side, side))
    auxiliary, validation, secret = (fine(n, seed, side) for seed, n in enumerate((256, 16, 32)))
    attack = prepared(shop, make_target(client), auxiliary, validation)
    images = secret.images()
    rebuilt = attack.reconstruct(client(images))
    # Pixel by pixel, not only the colour of each patch.
    colours = F.interpolate(F.avg_pool2d(images, patch), scale_factor=patch)
    assert psnr(rebuilt, images) > 24
    assert psnr(rebuilt, images) > psnr(colours, images) + 6


def test_a_subset_of_the_tokens_rebuilds_part_of_the_image(workshop, make_target, pictures):
    target = make_target(some_tokens)
    attack = prepared(workshop, target, pictures(256), pictures(16, seed=1), steps=200)
    secret = pictures(32, seed=2).images()
    mean = pictures(256).images().mean(0).expand_as(secret)
    assert psnr(attack.reconstruct(some_tokens(secret)), secret) > psnr(mean, secret) + 3


@pytest.mark.parametrize(
    ("count", "prefix", "side"), [(16, 0, 4), (17, 1, 4), (64, 0, 8), (65, 1, 8), (69, 5, 8)]
)
def test_a_grid_of_tokens_starts_where_it_belongs(count, prefix, side):
    mixing = TokenEntry((count, 6), 8, 16).mixing.detach()
    assert torch.equal(mixing[:, prefix:], torch.eye(side**2))
    assert (mixing[:, :prefix] == 1 / side).all()


@pytest.mark.parametrize("count", [13, 14, 50, 60, 64, 65, 71])
def test_every_token_starts_somewhere(count):
    mixing = TokenEntry((count, 6), 8, 16).mixing.detach()
    assert (mixing.sum(0) > 0).all()
    assert (mixing.sum(1) > 0).all()


@pytest.mark.parametrize(
    ("side", "size"), [(32, 16), (64, 32), (96, 48), (128, 64), (160, 40), (224, 56), (31, 16)]
)
def test_images_of_any_size_are_rebuilt(side, size):
    shapes = [(8, size, size), (65, 6), (30,), (4, 14, 14)]
    network = InverseNetwork(shapes, (3, side, side), Size(4, 1))
    shares = tuple(torch.randn(1, *shape) for shape in shapes)
    read = [reader(share) for reader, share in zip(network.entries, shares, strict=True)]
    assert {one.shape for one in read} == {(1, 4, size, size)}
    assert network(shares).shape == (1, 3, side, side)


@pytest.mark.parametrize(("side", "size"), [(5, 16), (6, 16), (8, 16), (14, 56), (7, 56)])
def test_a_coarse_position_reaches_the_pixels_that_it_covers(side, size):
    torch.manual_seed(0)
    placement = Placement(3, side, 4, size)
    maps = torch.randn(1, 3, side, side, requires_grad=True)
    out = placement(maps)
    assert out.shape == (1, 4, size, size)
    for row in range(size):
        (gradient,) = torch.autograd.grad(out[0, :, row, 0].sum(), maps, retain_graph=True)
        told = gradient.abs().sum((0, 1, 3)).nonzero().flatten().tolist()
        low, high = row * side / size, (row + 1) * side / size
        assert math.floor(low) in told
        assert all(low - 2 < place < high + 1 for place in told)  # with its neighbours
    # Positions inside a place differ: it can hold their content.
    step = size // side
    block = placement(torch.ones_like(maps))[0, :, step : 2 * step, step : 2 * step].flatten(1)
    assert (block.std(1) > 0).all()


# --- bounded memory ------------------------------------------------------------------------------


class Counting:
    """A client that notes how many images it was sent at once."""

    def __init__(self, client):
        self.client, self.sizes = client, []

    def __call__(self, images):
        self.sizes.append(len(images))
        return self.client(images)


@pytest.mark.parametrize("client", [half_size, patches])
def test_many_images_are_sent_in_parts_and_tell_the_same(
    workshop, make_target, pictures, monkeypatch, client
):
    parts, networks = (pictures(100), pictures(70, seed=1)), {}
    shares = client(pictures(4, seed=2).images())
    for limit in (2**22, 32 * 3 * 16 * 16):
        monkeypatch.setattr(budget, "VALUES", limit)
        counting = Counting(client)
        target = make_target(counting, identity=str(limit))
        attack = prepared(workshop, target, *parts, steps=10)
        networks[max(counting.sizes)] = attack.reconstruct(shares), attack.facts()["validation_mse"]
    assert sorted(networks) == [32, 100]
    torch.testing.assert_close(networks[32], networks[100], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(4, 8, 8), (17, 6), (30,)], ids=str)
@pytest.mark.parametrize("size", [1, 32, 99])
def test_statistics_of_parts_are_those_of_the_whole(shape, size):
    torch.manual_seed(0)
    share = torch.randn(100, *shape) * torch.rand(shape) + torch.linspace(-3, 3, 100).view(
        -1, *(1 for _ in shape)
    )
    whole, parts = (InverseNetwork([shape], (3, 16, 16), TINY).entries[0] for _ in range(2))
    whole.standardise([whole.moments(share)])
    parts.standardise([parts.moments(part) for part in share.split(size)])
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.std, whole.std, rtol=0.03, atol=0)
    values = share.flatten(1) if len(shape) == 1 else share
    axes = {1: (0,), 2: (0, 1), 3: (0, 2, 3)}[len(shape)]
    assert torch.equal(whole.std.flatten(), values.std(axes))
