"""The diffusion attack: sampler, guidance and prior against their definitions."""

import math
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from mibench.attacks import budget
from mibench.attacks.diffusion import prior as prior_module
from mibench.attacks.diffusion.attack import SCALES, Diffusion, DiffusionMean
from mibench.attacks.diffusion.denoiser import Prior, straight_through_clamp
from mibench.attacks.diffusion.misfit import Misfit
from mibench.attacks.diffusion.prior import PriorParams, get_prior
from mibench.attacks.diffusion.sampler import (
    BETAS,
    THROUGH_DENOISER,
    Direction,
    SamplerParams,
    dsg_step,
    sample,
)
from mibench.errors import InvalidParamsError

TINY = {"steps": 5, "batch": 8, "channels": (16, 16), "timesteps": 40, "patch": 2}
GUIDANCE = tuple(SCALES)


# --- pieces of the sampler ---------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.03, 1.0, 7.0])
@pytest.mark.parametrize("rate", [0.05, 0.2, 1.0])
def test_a_spherical_step_has_the_length_of_the_noise(sigma, rate):
    torch.manual_seed(0)
    noise, gradient = torch.randn(2, 5, 3, 8, 8).double()
    gradient *= torch.tensor([1e-6, 1e-2, 1, 1e2, 1e6]).view(-1, 1, 1, 1)
    lengths = dsg_step(noise, gradient, sigma, rate).flatten(1).norm(dim=1)
    expected = torch.full((5,), sigma * math.sqrt(3 * 8 * 8), dtype=torch.float64)
    torch.testing.assert_close(lengths, expected, rtol=1e-9, atol=0)


def test_a_spherical_step_turns_towards_descent_by_the_known_angle():
    torch.manual_seed(0)
    noise, gradient = torch.randn(2, 40, 3, 32, 32)
    step = dsg_step(noise, gradient, 0.4, 0.2)
    cosine = nn.functional.cosine_similarity(step.flatten(1), -gradient.flatten(1))
    # rate / sqrt((1 - rate)^2 + rate^2), since noise is nearly orthogonal to any direction
    assert (cosine.mean() - 0.2425).abs() < 0.02
    assert cosine.std() < 0.03


def test_a_full_rate_is_pure_descent():
    torch.manual_seed(0)
    noise, gradient = torch.randn(2, 2, 3, 8, 8)
    step = dsg_step(noise, gradient, 0.4, 1.0)
    cosine = nn.functional.cosine_similarity(step.flatten(1), -gradient.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(2))


def test_a_spherical_step_sees_its_own_image_only():
    torch.manual_seed(0)
    noise, gradient = torch.randn(2, 4, 3, 8, 8)
    before = dsg_step(noise, gradient, 0.4, 0.2)
    noise[3], gradient[3] = 1e3, -1e3
    after = dsg_step(noise, gradient, 0.4, 0.2)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3], after[3])


def test_the_clamp_cuts_values_and_no_gradient():
    x = torch.tensor([-5.0, -1.0, -0.3, 0.0, 0.9, 1.0, 40.0], requires_grad=True)
    clamped = straight_through_clamp(x)
    torch.testing.assert_close(clamped, x.detach().clamp(-1, 1), rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(clamped.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))


def test_the_momentum_direction_is_that_of_adam():
    torch.manual_seed(0)
    direction, place = Direction(BETAS), torch.zeros(2, 3, 4, 4, requires_grad=True)
    adam = torch.optim.Adam([place], lr=1.0, betas=BETAS, eps=1e-8)
    for size in (1.0, 0.1, 5.0, 1e-3, 1.0):
        gradient = size * torch.randn_like(place)
        before = place.detach().clone()
        place.grad = gradient.clone()
        adam.step()
        torch.testing.assert_close(
            direction(gradient), before - place.detach(), rtol=1e-4, atol=1e-5
        )
    assert BETAS == (0.9, 0.999)


def test_without_momentum_the_direction_is_the_gradient():
    direction = Direction(None)
    for gradient in torch.randn(3, 2, 3, 4, 4):
        assert torch.equal(direction(gradient), gradient)


# --- sampling with priors that are known in closed form ------------------------------------------


class KnownPrior(Prior):
    """The ideal denoiser where every value is drawn from N(mean, deviation^2)."""

    def __init__(self, mean=0.1, deviation=0.3, timesteps=40):
        schedule = diffusers.DDPMScheduler(timesteps, beta_schedule="squaredcos_cap_v2")
        super().__init__(nn.Identity(), schedule, 1)
        self.mean, self.deviation = mean, deviation

    def forward(self, noisy, timestep):
        a = self.signal[timestep].to(noisy.dtype).view(-1, 1, 1, 1)
        gain = a.sqrt() * self.deviation**2 / (a * self.deviation**2 + 1 - a)
        clean = self.mean + gain * (noisy - a.sqrt() * self.mean)
        return (noisy - a.sqrt() * clean) / (1 - a).sqrt()


class Known(Misfit):
    """A given negative log-likelihood of images."""

    def __init__(self, values, function):
        super().__init__(values)
        self.function = function

    def nats(self, images):
        return self.function(images)


def run(prior, misfit, scale, start, *, seed=0, from_noise=True, values=None, **params):
    how = SamplerParams(**({"steps": 20, "strength": 0.5} | params))
    torch.manual_seed(seed)
    guide = None if misfit is None else Known(values or start[0].numel(), misfit)
    return sample(prior, guide, scale, how, start, from_noise=from_noise)


@pytest.mark.parametrize("deviation", [0.2, 3.0], ids=["inside", "clipped"])
def test_without_guidance_and_noise_it_is_ddim(deviation):
    steps = 30
    prior, start = KnownPrior(deviation=deviation, timesteps=steps), torch.zeros(2, 3, 8, 8)
    mine = run(prior, None, torch.zeros(2), start, steps=steps, eta=0.0, least_signal=0.0)

    reference = diffusers.DDIMScheduler(
        steps, beta_schedule="squaredcos_cap_v2", clip_sample=deviation > 1
    )
    reference.set_timesteps(steps)
    torch.manual_seed(0)
    x = torch.randn_like(start)
    for t in reference.timesteps:
        eps = prior(x, t.expand(2))
        x = reference.step(eps, int(t), x, eta=0.0, use_clipped_model_output=True).prev_sample
    torch.testing.assert_close(mine, ((x + 1) / 2).clamp(0, 1), rtol=1e-4, atol=1e-4)
    assert mine.std() > 0.05


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_unguided_samples_follow_the_prior(eta):
    prior, start = KnownPrior(mean=0.2, deviation=0.25), torch.zeros(40, 3, 8, 8)
    drawn = 2 * run(prior, None, torch.zeros(40), start, steps=40, eta=eta) - 1
    assert drawn.mean() == pytest.approx(0.2, abs=0.02)
    assert drawn.std() == pytest.approx(0.25, rel=0.15)


def observed(truth, noise=0.05):
    """Half of the values of the truth, with a Gaussian likelihood."""

    def misfit(images):
        error = (images - truth)[..., ::2, :].flatten(1)
        return error.square().sum(1) / (2 * noise**2)

    return misfit


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize(
    "extras",
    [{}, {"eta": 0.5}, {"recurrence": 2}, {"momentum": True}, {"from_noise": False}],
    ids=str,
)
def test_guided_images_fit_what_was_observed(guidance, extras):
    torch.manual_seed(1)
    if "momentum" in extras and guidance not in THROUGH_DENOISER:
        with pytest.raises(ValueError, match="momentum"):
            SamplerParams(guidance=guidance, **extras)
        return
    prior, truth = KnownPrior(), (0.55 + 0.15 * torch.randn(2, 3, 8, 8)).clamp(0, 1)
    misfit, start = observed(truth), torch.full_like(truth, 0.5)
    values = truth[0].numel() // 2
    free = run(prior, None, torch.zeros(2), start)
    guided = [
        run(prior, misfit, torch.full((2,), s), start, guidance=guidance, values=values, **extras)
        for s in SCALES[guidance]
    ]
    for images in guided:
        assert images.shape == truth.shape
        assert images.min() >= 0
        assert images.max() <= 1
        assert not images.requires_grad
    best = torch.stack([misfit(images) for images in guided]).min(0).values
    assert (best < 0.7 * misfit(free)).all()


@pytest.mark.parametrize("guidance", GUIDANCE)
def test_the_seed_decides_everything(guidance):
    torch.manual_seed(1)
    prior, truth = KnownPrior(), torch.rand(2, 3, 8, 8)
    scale = torch.full((2,), SCALES[guidance][0])

    def one(seed):
        return run(prior, observed(truth), scale, truth * 0, seed=seed, guidance=guidance)

    assert torch.equal(one(3), one(3))
    assert not torch.equal(one(3), one(4))


@pytest.mark.parametrize(
    ("guidance", "extras"),
    [(guidance, {}) for guidance in GUIDANCE]
    + [(g, {"momentum": True, "clip": 0.02, "tv": 0.1, "l2": 0.1}) for g in THROUGH_DENOISER],
    ids=str,
)
@pytest.mark.parametrize("from_noise", [False, True])
def test_images_of_a_batch_do_not_meet(guidance, extras, from_noise):
    torch.manual_seed(1)
    prior, truth = KnownPrior(), torch.rand(4, 3, 8, 8)
    scale, start = torch.full((4,), SCALES[guidance][0]), torch.rand(4, 3, 8, 8)
    found = []
    for last in (0.2, 0.9):
        truth, start, scale = truth.clone(), start.clone(), scale.clone()
        truth[3], start[3], scale[3] = last, 1 - last, last
        how = {"guidance": guidance, "from_noise": from_noise} | extras
        found.append(run(prior, observed(truth), scale, start, **how))
    one, two = found
    torch.testing.assert_close(one[:3], two[:3], rtol=1e-5, atol=1e-6)
    assert (one[3] - two[3]).abs().max() > 1e-3


def test_a_warm_start_stays_near_its_image():
    torch.manual_seed(1)
    prior = KnownPrior(mean=0.0, deviation=0.5)
    start = (0.5 + 0.2 * torch.randn(4, 3, 8, 8)).clamp(0, 1)
    near, far = (
        run(prior, None, torch.zeros(4), start, from_noise=False, strength=strength)
        for strength in (0.1, 1.0)
    )
    assert (near - start).square().mean() < 0.25 * (far - start).square().mean()


# --- the prior -----------------------------------------------------------------------------------


def test_the_prior_learns(workshop, pictures):
    losses = []
    for steps in (1, 80):
        params = PriorParams(**(TINY | {"steps": steps, "lr": 4e-3, "batch": 16}))
        prior, facts = get_prior(params, workshop, pictures(128), pictures(64, seed=1))
        assert not prior.training
        assert facts["source"] == "auxiliary"
        losses.append(facts["validation_loss"])
    # One that always says "no noise" has an error of one.
    assert losses[1] < 0.6
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize("side", [32, 64, 96, 224])
def test_the_default_prior_fits_images_of_any_usual_size(side):
    prior = prior_module._build(PriorParams(), (3, side, side))
    assert sum(p.numel() for p in prior.parameters()) < 5e6
    seen = []
    prior.unet.mid_block.register_forward_hook(lambda *args: seen.append(args[1][0].shape))
    with torch.no_grad():
        assert prior(torch.randn(1, 3, side, side), torch.tensor([3])).shape == (1, 3, side, side)
    assert seen == [(1, 96, side // 8, side // 8)]


@pytest.mark.parametrize(("side", "params"), [(30, {}), (36, {}), (224, {"patch": 3})])
def test_images_that_the_prior_cannot_halve_are_refused(side, params):
    with pytest.raises(InvalidParamsError, match=f"images of {side} pixels") as caught:
        prior_module._build(PriorParams(**params), (3, side, side))
    assert "\n" not in str(caught.value)


def test_the_prior_is_judged_in_parts(workshop, pictures, monkeypatch):
    prior = KnownPrior(mean=0.0, deviation=0.5)
    images, sizes = pictures(400), []
    prior.register_forward_hook(lambda *args: sizes.append(len(args[1][0])))
    whole = prior_module._validation_error(prior, workshop, images)
    monkeypatch.setattr(budget, "VALUES", 133 * 3 * 16 * 16)
    parts = prior_module._validation_error(prior, workshop, images)
    assert sizes == [400, 133, 133, 133, 1]
    assert parts == pytest.approx(whole, rel=0.2)  # other draws


def test_a_trained_prior_comes_from_the_cache(workshop, pictures):
    params, parts = PriorParams(**TINY), (pictures(16), pictures(8, seed=1))
    one, facts = get_prior(params, workshop, *parts)
    notes = list((workshop.store.root / "prior").iterdir())
    two, again = get_prior(params, workshop, *parts)
    assert list((workshop.store.root / "prior").iterdir()) == notes
    assert facts == again
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_folding_into_patches_loses_nothing(patch):
    seen = []

    class Echo(nn.Module):
        def forward(self, folded, timestep):
            seen.append(folded.shape)
            return SimpleNamespace(sample=folded)

    schedule = diffusers.DDPMScheduler(10)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(Prior(Echo(), schedule, patch)(images, torch.tensor([1, 2])), images)
    assert seen == [(2, 3 * patch**2, 16 // patch, 16 // patch)]


def test_noising_is_that_of_the_schedule():
    schedule = diffusers.DDPMScheduler(50, beta_schedule="squaredcos_cap_v2")
    prior = Prior(nn.Identity(), schedule, 1)
    torch.manual_seed(0)
    images, noise, t = (
        torch.randn(4, 3, 4, 4),
        torch.randn(4, 3, 4, 4),
        torch.tensor([0, 9, 30, 49]),
    )
    expected = schedule.add_noise(images, noise, t)
    torch.testing.assert_close(prior.add_noise(images, noise, t), expected, rtol=1e-5, atol=1e-5)


# --- the attack ----------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("start", ["decoder", "gradient", "gradient-warm", "noise"])
def test_the_whole_attack_runs_and_repeats(workshop, make_target, pictures, guidance, start):
    def client(images):
        return (nn.functional.avg_pool2d(images, 2),)

    params = Diffusion.Params(
        start=start,
        sampler=SamplerParams(steps=6, strength=0.5, guidance=guidance, inner=3),
        tuning_images=2,
        prior=PriorParams(**TINY),
        decoder={"steps": 5, "batch": 8},
        gradient={"steps": 5, "restarts": 1, "tuning_images": 2},
        gradient_warm={"steps": 5, "tuning_images": 2, "decoder": {"steps": 5, "batch": 8}},
    )
    attack = Diffusion(params, workshop)
    target = make_target(client)
    attack.prepare(target, pictures(32), pictures(4, seed=1))
    shares = client(pictures(3, seed=2).images())
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(attack.reconstruct(shares))
    assert torch.equal(*found)
    assert found[0].shape == (3, 3, 16, 16)
    assert found[0].min() >= 0
    assert found[0].max() <= 1
    facts = attack.facts()["scale"]
    assert facts["weight"] in SCALES[guidance]
    # Where there is nothing to choose, nothing is tried.
    if len(SCALES[guidance]) > 1:
        assert len(facts["validation_mse"]) == len(SCALES[guidance])
    blind = attack.blind(5)
    assert blind.shape == (5, 3, 16, 16)
    assert blind.min() >= 0
    assert blind.max() <= 1


def test_the_mean_of_samples_is_the_mean_of_single_ones(workshop, make_target, pictures):
    def client(images):
        return (nn.functional.avg_pool2d(images, 4),)

    params = {
        "start": "noise",
        "sampler": {"steps": 4, "guidance": "dps"},
        "tuning_images": 2,
        "prior": TINY,
    }
    one, mean = (
        Diffusion(Diffusion.Params(**params), workshop),
        DiffusionMean(DiffusionMean.Params(**params), workshop),
    )
    for attack in (one, mean):
        attack.prepare(make_target(client), pictures(32), pictures(4, seed=1))
    # Prior and weight are the same ones, out of the cache.
    kept = {kind: len(list((workshop.store.root / kind).iterdir())) for kind in ("prior", "tuning")}
    assert set(kept.values()) == {2}, kept  # the artifact and its lock
    assert one.spec() != mean.spec()
    shares = client(pictures(2, seed=2).images())
    torch.manual_seed(0)
    single = torch.stack([one.reconstruct(shares) for _ in range(DiffusionMean.samples)])
    torch.manual_seed(0)
    together = mean.reconstruct(shares)
    assert single.std(0).max() > 0.01
    assert (mean.facts()["samples"], one.facts()["samples"]) == (8, 1)
    torch.testing.assert_close(together, single.mean(0))


def test_large_batches_are_sampled_in_groups(workshop, make_target, pictures, monkeypatch):
    monkeypatch.setattr(budget, "VALUES", 4 * 3 * 16 * 16)
    sizes = []

    def client(images):
        sizes.append(len(images))
        return (nn.functional.avg_pool2d(images, 2),)

    params = Diffusion.Params(
        sampler=SamplerParams(steps=4, strength=0.5, inner=2),
        tuning_images=3,
        prior=PriorParams(**TINY | {"batch": 2}),
        decoder={"steps": 2, "batch": 2},
    )
    attack = Diffusion(params, workshop)
    attack.prepare(make_target(client), pictures(8), pictures(9, seed=1))
    shares = client(pictures(9, seed=2).images())
    sizes.clear()
    rebuilt = attack.reconstruct(shares)
    assert set(sizes) == {4, 1}
    assert rebuilt.shape == attack.blind(9).shape == (9, 3, 16, 16)
    assert rebuilt.isfinite().all()


@pytest.mark.parametrize("guidance", ["dps", "proximal"])
def test_guidance_from_noise_recovers_what_is_seen_as_it_is(guidance):
    """On a client that sends the image itself, some weight of the grid must find it again."""
    torch.manual_seed(0)
    truth = torch.rand(2, 3, 8, 8)
    values = truth[0].numel()

    def misfit(images):
        return (images - truth).flatten(1).square().sum(1) / (2 * 0.05**2)

    prior, found = KnownPrior(deviation=0.5, timesteps=1000), []
    for scale in SCALES[guidance]:
        weights = torch.full((2,), scale)
        images = run(
            prior, misfit, weights, torch.zeros_like(truth),
            values=values, guidance=guidance, steps=100, inner=10,
        )  # fmt: skip
        found.append((images - truth).square().mean().item())
    assert 10 * math.log10(1 / min(found)) > 25
