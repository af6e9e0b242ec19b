"""The published methods in the sampler, each against its own algorithm; distances; presets."""

import math

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mibench.attacks import budget
from mibench.attacks.diffusion import sampler as sampler_module
from mibench.attacks.diffusion.attack import DRAG, PRESETS, SCALES, Diffusion
from mibench.attacks.diffusion.denoiser import Prior
from mibench.attacks.diffusion.misfit import DISTANCES, Cosine, Euclidean, Likelihood, positions
from mibench.attacks.diffusion.sampler import (
    SamplerParams,
    clipped,
    noise_levels,
    sample,
    variation,
)
from mibench.errors import InvalidParamsError
from mibench.params import build

TINY = {"steps": 5, "batch": 8, "channels": (16, 16), "timesteps": 40, "patch": 2}


class Net(nn.Module):
    """A small smooth noise predictor of fixed random weights."""

    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(5)
        self.layer = nn.Conv2d(channels, channels, 3, padding=1)
        self.calls = []

    def forward(self, x, timestep):
        self.calls.append((int(timestep[0]), torch.is_grad_enabled()))
        out = 0.7 * x + 0.3 * torch.tanh(self.layer(x))
        return type("Out", (), {"sample": out})


def make_prior(timesteps=1000, beta_schedule="linear"):
    prior = Prior(Net(), diffusers.DDPMScheduler(timesteps, beta_schedule=beta_schedule), 1)
    return prior.requires_grad_(False)


def client(images):
    """A small client that sends maps of 6 channels."""
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(9)).to(images)
    return (torch.tanh(nn.functional.conv2d(images, weight, stride=2)),)


def guide(make_target, distance, images):
    return DISTANCES[distance](make_target(client), client(images))


# --- DRAG against its algorithm ------------------------------------------------------------------


def drag_by_hand(prior, z, like, params):
    """Sampling by DRAG as its paper's code does it, for a batch of one image."""
    alphas = prior.signal.tolist()
    stride = prior.timesteps // params.steps
    schedule = [stride * i for i in reversed(range(params.steps))]
    x = torch.randn_like(like)
    place = nn.Parameter(x.clone())
    adam = torch.optim.Adam([place], lr=0.0)  # its state lives as long as the sampling
    for t in schedule:
        a, p = alphas[t], alphas[t - stride] if t else 1.0
        for j in range(params.recurrence):
            x = x.detach().requires_grad_()
            eps = prior(x, torch.tensor([t]))
            x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            pixels = (x0 + 1) / 2
            pixels = pixels + (pixels.clamp(0, 1) - pixels).detach()
            tokens = client(pixels)[0].flatten(2).transpose(1, 2)
            loss = (1 - nn.functional.cosine_similarity(tokens, z, dim=2)).mean()
            tv = (x0[..., 1:, :] - x0[..., :-1, :]).abs().sum()
            tv = tv + (x0[..., 1:] - x0[..., :-1]).abs().sum()
            loss = loss + params.tv * tv / x0.numel() + params.l2 * x0.square().mean()
            (g,) = torch.autograd.grad(loss, x)
            place.grad = g.clone()
            nn.utils.clip_grad_norm_([place], params.clip)
            adam.step()
            state, count = adam.state[place], float(adam.state[place]["step"])
            mean = state["exp_avg"] / (1 - 0.9**count)
            s = mean / ((state["exp_avg_sq"] / (1 - 0.999**count)).sqrt() + 1e-8)
            sigma = math.sqrt((1 - p) / (1 - a) * (1 - a / p))
            r = math.sqrt(x.numel()) * sigma
            d = torch.lerp(sigma * torch.randn_like(like), -r * s / s.norm(), params.rate)
            d = r * d / d.norm() if sigma else 0 * d
            x = math.sqrt(p) * x0 + math.sqrt(max(1 - p - sigma**2, 0)) * eps + d
            if j + 1 < params.recurrence:
                x = math.sqrt(a / p) * x + math.sqrt(1 - a / p) * torch.randn_like(like)
    return ((x + 1) / 2).clamp(0, 1).detach()


@pytest.mark.parametrize("seed", range(3))
def test_drag_is_the_published_algorithm(make_target, pictures, seed):
    drag = build(Diffusion.Params, {"preset": "drag"}, "attack")
    how = drag.sampler.model_copy(update={"steps": 5, "recurrence": 3})
    # In double precision: at the first levels x_0 is noise blown up 150 times.
    prior, secret = make_prior().double(), pictures(1, seed, side=10).images().double()
    tokens = client(secret)[0].flatten(2).transpose(1, 2)
    torch.manual_seed(seed)
    with_hand = drag_by_hand(prior, tokens, secret, how)
    torch.manual_seed(seed)
    misfit, start = guide(make_target, drag.distance, secret), torch.full_like(secret, 0.5)
    found = sample(prior, misfit, torch.ones(1), how, start, from_noise=True)
    torch.testing.assert_close(found, with_hand, rtol=1e-4, atol=1e-4)
    assert found.std() > 0.05


def test_the_preset_holds_the_published_numbers():
    drag = build(Diffusion.Params, {"preset": "drag"}, "attack")
    assert (drag.start, drag.distance) == ("noise", "cosine")
    assert drag.sampler == SamplerParams(
        steps=250, spacing="leading", least_signal=0.0, eta=1.0, guidance="dsg", rate=0.2,
        momentum=True, recurrence=16, clip=0.02, tv=0.1, l2=0.01, clamp=False,
    )  # fmt: skip
    levels = noise_levels(make_prior(), drag.sampler, from_noise=True)
    assert levels == list(range(996, -1, -4))
    plus = build(Diffusion.Params, {"preset": "drag++"}, "attack")
    assert plus.start == "decoder"
    assert noise_levels(make_prior(), plus.sampler, from_noise=False) == levels[-75:]
    assert plus.sampler == drag.sampler.model_copy(update={"strength": 0.3})


def test_each_level_is_repeated_k_times(make_target, pictures):
    prior, secret = make_prior(), pictures(1, side=10).images()
    how = SamplerParams(steps=4, spacing="leading", least_signal=0.0, guidance="dsg", recurrence=3)
    misfit = guide(make_target, "cosine", secret)
    sample(prior, misfit, torch.ones(1), how, secret, from_noise=True)
    assert prior.unet.calls == [(t, True) for t in (750, 500, 250, 0) for _ in range(3)]


def test_momentum_lasts_over_all_levels(make_target, pictures, monkeypatch):
    kept = []

    class Watched(sampler_module.Direction):
        def __init__(self, betas):
            super().__init__(betas)
            kept.append(self)

    monkeypatch.setattr(sampler_module, "Direction", Watched)
    how = SamplerParams(steps=5, guidance="dsg", momentum=True, recurrence=2, least_signal=0.0)
    secret = pictures(1, side=10).images()
    sample(
        make_prior(), guide(make_target, "l2", secret), torch.ones(1), how, secret, from_noise=True
    )
    assert [one.count for one in kept] == [10]


SWITCHES = [
    {"guidance": "dps"}, {"guidance": "red-diff"}, {"guidance": "proximal"}, {"momentum": True},
    {"recurrence": 2}, {"clip": 1e-3, "momentum": True}, {"tv": 5.0}, {"l2": 5.0},
    {"clamp": False}, {"eta": 0.5}, {"rate": 0.5}, {"spacing": "leading"}, {"least_signal": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_each_switch_changes_the_result(make_target, pictures, switch):
    secret = pictures(1, side=10).images()
    misfit, found = guide(make_target, "likelihood", secret), []
    without = {"momentum": True} if "clip" in switch else {}
    for extra in (without, switch):
        how = SamplerParams(**{"steps": 6, "guidance": "dsg", "least_signal": 0.0} | extra)
        torch.manual_seed(0)
        start = torch.full_like(secret, 0.5)
        found.append(sample(make_prior(), misfit, torch.ones(1), how, start, from_noise=True))
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("which", ["momentum", "clip", "tv", "l2"])
@pytest.mark.parametrize("guidance", ["proximal", "red-diff"])
def test_a_switch_without_effect_is_refused(which, guidance):
    values = {"sampler": {which: True if which == "momentum" else 1.0, "guidance": guidance}}
    with pytest.raises(InvalidParamsError, match=which) as caught:
        build(Diffusion.Params, values, "attack")
    assert "\n" not in str(caught.value)


@given(st.integers(0, 10**6), st.floats(1e-3, 1e3))
@settings(max_examples=25, deadline=None)
def test_gradients_are_clipped_image_by_image(seed, limit):
    draws = torch.Generator().manual_seed(seed)
    gradient = torch.randn(5, 3, 4, 4, generator=draws, dtype=torch.float64)
    gradient *= torch.tensor([1e-4, 1e-2, 1, 1e2, 1e4]).view(-1, 1, 1, 1)
    short = clipped(gradient, limit)
    norms, before = short.flatten(1).norm(dim=1), gradient.flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, before.clamp_max(limit), rtol=1e-9, atol=0)
    cosine = nn.functional.cosine_similarity(short.flatten(1), gradient.flatten(1), eps=1e-30)
    torch.testing.assert_close(cosine, torch.ones(5, dtype=torch.float64))
    assert clipped(gradient, None) is gradient


def test_the_total_variation_is_counted_as_in_drag():
    images = torch.zeros(2, 3, 4, 5)
    images[1, :, :, 2:] = 1.0  # one vertical edge of 4 pixels in 3 channels
    torch.testing.assert_close(variation(images), torch.tensor([0.0, 12 / 60]))


# --- RED-diff ------------------------------------------------------------------------------------


def test_red_diff_takes_the_step_of_its_algorithm(make_target, pictures):
    prior, scale, lr = make_prior(), 0.25, 0.1
    secret, mu = pictures(2, side=10).images(), pictures(2, seed=1, side=10).images()
    misfit = guide(make_target, "likelihood", secret)
    how = SamplerParams(steps=3, guidance="red-diff", spacing="leading", strength=0.7, lr=lr)
    levels = noise_levels(prior, how, from_noise=False)
    assert levels == [333, 0]
    torch.manual_seed(4)
    found = sample(prior, misfit, torch.full((2,), scale), how, mu)
    assert [grad for _, grad in prior.unet.calls] == [False, False]  # nothing through the denoiser

    torch.manual_seed(4)
    place = nn.Parameter(2 * mu - 1)
    adam = torch.optim.Adam([place], lr=lr, betas=(0.9, 0.99), eps=1e-8)
    for t in levels:
        a = float(prior.signal[t])
        noise = torch.randn_like(place)
        with torch.no_grad():
            eps = prior(math.sqrt(a) * place + math.sqrt(1 - a) * noise, torch.full((2,), t))
        weight = scale * math.sqrt(1 - a) / math.sqrt(a)
        prior_term = (weight * (eps - noise) * place).flatten(1).mean(1)
        pixels = (place + 1) / 2
        data_term = misfit.nats(pixels + (pixels.clamp(0, 1) - pixels).detach()) / misfit.values
        adam.zero_grad()
        (place[0].numel() * (prior_term + data_term)).sum().backward()
        adam.step()
    torch.testing.assert_close(found, ((place.detach() + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-5)
    assert (found - mu).abs().max() > 0.05


def test_red_diff_approaches_what_was_sent(make_target, pictures):
    secret = pictures(2, side=10).images()
    misfit = guide(make_target, "likelihood", secret)
    how = SamplerParams(steps=60, guidance="red-diff", lr=0.05)
    start = torch.full_like(secret, 0.5)
    found = sample(make_prior(), misfit, torch.full((2,), 0.25), how, start, from_noise=True)
    assert (misfit.nats(found) < 0.1 * misfit.nats(start)).all()


# --- distances -----------------------------------------------------------------------------------


def test_without_randomness_the_relative_square_is_the_likelihood(make_target, pictures):
    secret, guess = pictures(3, side=10).images(), pictures(3, seed=1, side=10).images()
    one, other = (guide(make_target, name, secret) for name in ("likelihood", "l2"))
    torch.testing.assert_close(one.nats(guess), other.nats(guess), rtol=1e-4, atol=1e-2)
    z, f = client(secret)[0].flatten(1), client(guess)[0].flatten(1)
    expected = (z - f).norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(other.residual(guess), expected)
    torch.testing.assert_close(one.residual(guess), expected / 0.05, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 4, 4), (5, 8), (12,), (1, 4, 4)])
def test_the_cosine_is_taken_at_each_position(make_target, shape):
    torch.manual_seed(0)
    z, f = torch.randn(2, 3, *shape)
    target = make_target(lambda images: (f,))
    found = Cosine(target, (z,)).residual(torch.zeros(3, 3, 2, 2))
    if len(shape) == 3 and shape[0] > 1:  # places of maps
        pairs = [(z[..., i, j], f[..., i, j]) for i in range(4) for j in range(4)]
    elif len(shape) == 2:  # tokens
        pairs = [(z[:, i], f[:, i]) for i in range(5)]
    else:
        pairs = [(z.flatten(1), f.flatten(1))]
    terms = [1 - nn.functional.cosine_similarity(a, b) for a, b in pairs]
    torch.testing.assert_close(found, torch.stack(terms).mean(0))
    assert positions(z).shape[1] == len(pairs)
    # The length of a vector does not count, which is what tells it from the square.
    longer = Cosine(make_target(lambda images: (3 * f,)), (z,)).residual(torch.zeros(3, 3, 2, 2))
    torch.testing.assert_close(longer, found)


def test_positions_at_which_nothing_arrived_do_not_count(make_target):
    torch.manual_seed(0)
    z, f = torch.randn(2, 2, 6, 8)
    z[:, 3:] = 0
    found, kept = (
        Cosine(make_target(lambda images, f=g: (f,)), (s,)).residual(torch.zeros(2, 3, 2, 2))
        for s, g in ((z, f), (z[:, :3], f[:, :3]))
    )
    torch.testing.assert_close(found, kept)


@pytest.mark.parametrize("distance", DISTANCES)
def test_all_shares_count_and_images_do_not_meet(make_target, distance):
    def two(images):
        return images[:, :, :4], 2 * images[:, :, 4:].flatten(1)

    torch.manual_seed(0)
    secret, guess = torch.rand(2, 3, 3, 8, 8)
    target = make_target(two, corrupted=(0, 1))
    misfit = DISTANCES[distance](target, two(secret))
    before = misfit.nats(guess), misfit.residual(guess)
    assert misfit.values == 3 * 64
    for at, part in ((0, slice(0, 4)), (1, slice(4, 8))):
        other = guess.clone()
        other[at, :, part] = torch.rand(3, 4, 8)
        for old, new in zip(before, (misfit.nats(other), misfit.residual(other)), strict=True):
            changed = (old - new).abs() > 1e-4
            assert changed.tolist() == [place == at for place in range(3)]


@pytest.mark.parametrize("distance", [Euclidean, Cosine])
def test_only_the_likelihood_reads_a_law_of_another_shape(make_target, pictures, distance):
    target = make_target(lambda images: (torch.cat([images, images], 1),))
    images = pictures(2).images()
    with pytest.raises(InvalidParamsError, match="distance=likelihood"):
        distance(target, (images,)).residual(images)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("guidance", SCALES)
def test_constant_shares_still_give_images(make_target, distance, guidance):
    def constant(images):
        return (0 * nn.functional.avg_pool2d(images, 2),)

    target = make_target(constant)
    misfit = DISTANCES[distance](target, constant(torch.zeros(2, 3, 10, 10)))
    how = SamplerParams(steps=4, guidance=guidance, inner=3)
    start = torch.full((2, 3, 10, 10), 0.5)
    images = sample(make_prior(), misfit, torch.ones(2), how, start, from_noise=True)
    assert images.isfinite().all()


# --- presets and the whole attack ----------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_set_beside_a_preset_wins(preset):
    values = {"preset": preset, "start": "gradient", "sampler": {"steps": 7}, "scales": [0.5, 1]}
    params = build(Diffusion.Params, values, "attack")
    plain = build(Diffusion.Params, {"preset": preset}, "attack")
    assert (params.start, params.sampler.steps, params.scales) == ("gradient", 7, (0.5, 1.0))
    assert params.sampler == plain.sampler.model_copy(update={"steps": 7})
    # The record holds all values; read again they mean the same.
    assert build(Diffusion.Params, params.model_dump(mode="json"), "attack") == params


@pytest.mark.parametrize(
    "values",
    [
        {"preset": "drug"},
        {"preset": ["drag"]},
        {"preset": "drag", "sampler": {"steps": 0}},
        {"preset": "drag", "sampler": 3},
        {"preset": "drag", "prior": {"channels": [3]}},
    ],
    ids=str,
)
def test_a_wrong_value_beside_a_preset_is_explained(values):
    with pytest.raises(InvalidParamsError) as caught:
        build(Diffusion.Params, values, "attack")
    assert "\n" not in str(caught.value)
    assert "attack." in str(caught.value)


def prepared(workshop, make_target, pictures, function=client, **values):
    params = Diffusion.Params(
        **{
            "tuning_images": 2,
            "prior": TINY,
            "decoder": {"steps": 5, "batch": 8},
            "gradient": {"steps": 5, "restarts": 1, "tuning_images": 2},
            "gradient_warm": {
                "steps": 5,
                "tuning_images": 2,
                "decoder": {"steps": 5, "batch": 8},
            },
        }
        | values
    )
    attack = Diffusion(params, workshop)
    attack.prepare(make_target(function), pictures(32), pictures(4, seed=1))
    return attack


@pytest.mark.parametrize("values", [{}, {"preset": "dps"}], ids=str)
def test_lists_of_a_protocol_are_read(values):
    given = {"scales": [1, 0.5], "prior": {"channels": [16, 32]}, "gradient": {"weights": [2]}}
    params = build(Diffusion.Params, given | values, "attack")
    assert (params.scales, params.prior.channels) == ((1.0, 0.5), (16, 32))
    assert params.gradient.weights == (2.0,)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs(workshop, make_target, pictures, preset, monkeypatch):
    monkeypatch.setattr(budget, "VALUES", 2 * 3 * 16 * 16)
    sizes = []

    def counted(images):
        sizes.append(len(images))
        return client(images)

    short = {"steps": 4} | ({"recurrence": 2} if preset.startswith("drag") else {})
    attack = prepared(workshop, make_target, pictures, counted, preset=preset, sampler=short)
    shares = client(pictures(3, seed=2).images())
    sizes.clear()
    torch.manual_seed(0)
    images = attack.reconstruct(shares)
    assert set(sizes) == {2, 1}  # never more than memory holds
    assert images.shape == (3, 3, 16, 16)
    assert images.isfinite().all()
    assert attack.facts()["prior"]["saw"].startswith("the auxiliary")
    torch.manual_seed(0)
    assert not torch.equal(images, attack.reconstruct(tuple(share.roll(1, 0) for share in shares)))


def test_an_attack_begins_where_it_is_told(workshop, make_target, pictures):
    shares, found = client(pictures(2, seed=2).images()), {}
    for start in ("decoder", "gradient", "gradient-warm", "noise"):
        attack = prepared(workshop, make_target, pictures, start=start)
        torch.manual_seed(0)
        found[start] = attack._begin(shares)
        assert (start in attack.facts()) == (start != "noise")
        if start != "noise":
            torch.manual_seed(0)
            assert torch.equal(found[start], attack._first.reconstruct(shares))
    assert (found["noise"] == 0.5).all()
    assert not torch.equal(found["decoder"], found["gradient"])


def test_an_image_that_diverges_stays_where_it_began(make_target, pictures):
    secret = pictures(2, side=10).images()
    misfit = guide(make_target, "likelihood", secret)
    how = SamplerParams(steps=6, guidance="dps", clamp=False, strength=1.0)
    images = sample(make_prior(), misfit, torch.tensor([1e38, 1e-3]), how, secret)
    assert torch.equal(images[0], secret[0])
    assert not torch.equal(images[1], secret[1])


def test_the_likelihood_is_what_guides_by_default():
    assert Diffusion.Params().distance == "likelihood"
    assert DISTANCES["likelihood"] is Likelihood
    assert DRAG["distance"] == "cosine"
