"""Calibrated noise: as strong as it says, whatever the client does, and with the law it says."""

import math

import pytest
import torch

from mibench.artifacts import Checkpoint
from mibench.defenses.parts.mechanism import gaussian_epsilon
from mibench.errors import InvalidParamsError
from mibench.params import build
from mibench.protocol import Recipe
from mibench.registry import defenses

LAWS = ("gaussian", "laplace")


@torch.no_grad()
def snr_db(defense, images):
    (clean,) = defense.predict(images)
    (sent,) = defense.protect(images)
    return 10 * math.log10(clean.square().mean() / (sent - clean).square().mean())


def fitted(make_defense, pictures, folder, features="map", **params):
    defense = make_defense("noise", params, features=features)
    how = Recipe(steps=60, batch=64, lr=0.005, crop=0, flip=False, precision="fp32")
    defense.fit(pictures(128), how, 0, Checkpoint(folder))
    return defense


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("level", [-10.0, 0.0, 12.0])
def test_the_measured_ratio_is_the_declared_one(make_defense, pictures, tmp_path, law, level):
    defense = fitted(make_defense, pictures, tmp_path, law=law, snr_db=level)
    images = pictures(128).images()
    assert snr_db(defense, images) == pytest.approx(level, abs=0.3)
    # The client grows its features tenfold; the normalisation takes it back.
    convolution = [m for m in defense.client.modules() if isinstance(m, torch.nn.Conv2d)][-1]
    norm = [m for m in defense.client.modules() if isinstance(m, torch.nn.BatchNorm2d)][-1]
    for tensor in (convolution.weight, norm.weight, norm.bias):
        tensor.data.mul_(10)
    assert snr_db(defense, images) > level + 3  # before the statistics are taken anew
    defense.train()
    for _ in range(100):
        defense.predict(images)
    defense.eval()
    assert snr_db(defense, images) == pytest.approx(level, abs=0.3)


def test_there_is_no_learned_gain_behind_the_normalisation(make_defense):
    assert not list(make_defense("noise").normalise.parameters())


@pytest.mark.parametrize(("law", "kurtosis"), [("gaussian", 3.0), ("laplace", 6.0)])
@torch.no_grad()
def test_draws_have_the_moments_of_their_law(make_defense, pictures, law, kurtosis):
    defense = make_defense("noise", {"law": law, "snr_db": 0.0}).eval()
    images = pictures(64).images().repeat(16, 1, 1, 1)
    torch.manual_seed(0)
    noise = (defense.protect(images)[0] - defense.predict(images)[0]).double().flatten()
    assert len(noise) > 500_000
    assert noise.mean().abs() < 0.01
    assert noise.var() == pytest.approx(1.0, abs=0.02)
    assert (noise**4).mean() / noise.var() ** 2 == pytest.approx(kurtosis, rel=0.05)
    assert (noise**3).mean().abs() < 0.1
    # Neighbouring values are independent.
    assert (noise[1:] * noise[:-1]).mean().abs() < 0.01


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("level", [-6.0, 20.0])
def test_the_likelihood_is_that_of_the_law(make_defense, law, level):
    defense = make_defense("noise", {"law": law, "snr_db": level}).double()
    draws = torch.Generator().manual_seed(0)
    sent, one, other = torch.randn(3, 4, 8, 8, 8, generator=draws, dtype=torch.float64)
    s = 10 ** (-level / 20)

    def exact(mean):
        family = {
            "gaussian": lambda: torch.distributions.Normal(mean, s),
            "laplace": lambda: torch.distributions.Laplace(mean, s / math.sqrt(2)),
        }
        return family[law]().log_prob(sent).flatten(1).sum(1)

    mine = defense.log_likelihood((sent,), (one,)) - defense.log_likelihood((sent,), (other,))
    torch.testing.assert_close(mine, exact(one) - exact(other), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("law", LAWS)
@torch.no_grad()
def test_the_likelihood_is_greatest_at_the_true_mean(make_defense, pictures, law):
    defense = make_defense("noise", {"law": law}).eval()
    image = pictures(1).images()
    (clean,) = defense.predict(image)
    repeated = clean.expand(64, -1, -1, -1)
    torch.manual_seed(0)
    sent = defense.protect(image.expand(64, -1, -1, -1))
    offsets = (-0.5, -0.2, -0.05, 0.0, 0.05, 0.2, 0.5)
    direction = torch.randn(clean.shape)
    totals = [
        defense.log_likelihood(sent, (repeated + offset * direction,)).sum().item()
        for offset in offsets
    ]
    assert offsets[max(range(len(offsets)), key=totals.__getitem__)] == 0.0


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
def test_draws_stay_finite_in_mixed_precision(make_defense, pictures, law):
    defense = make_defense("noise", {"law": law, "snr_db": 0.0})
    images = pictures(64).images()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(20):
            assert defense.protect(images)[0].isfinite().all()


@pytest.mark.parametrize("features", ["tokens", "class-token"])
def test_tokens_are_normalised_channel_by_channel(make_defense, pictures, tmp_path, features):
    defense = fitted(make_defense, pictures, tmp_path, features, snr_db=3.0)
    images = pictures(128).images()
    assert snr_db(defense, images) == pytest.approx(3.0, abs=0.3)
    defense.train()
    with torch.no_grad():
        (clean,) = defense.predict(images)
        raw = defense.client(images)
    expected = (raw - raw.mean((0, 1))) / (raw.var((0, 1), correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(clean, expected, rtol=1e-4, atol=1e-4)
    assert not list(defense.normalise.parameters())


@pytest.mark.parametrize("law", LAWS)
def test_noise_of_the_image_is_relative_to_the_images(make_defense, pictures, tmp_path, law):
    level = 6.0
    defense = fitted(make_defense, pictures, tmp_path, law=law, snr_db=level, place="input")
    images = pictures(128).images()
    signal = images - images.mean((0, 2, 3), keepdim=True)
    seen = []
    defense.client.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        defense.protect(images)
    noise = seen[0] - images
    measured = 10 * math.log10(signal.square().mean() / noise.square().mean())
    assert measured == pytest.approx(level, abs=0.3)


@pytest.mark.parametrize("features", ["map", "class-token"])
def test_the_law_of_input_noise_has_the_moments_that_arrive(
    make_defense, pictures, tmp_path, features
):
    defense = fitted(make_defense, pictures, tmp_path, features, place="input", snr_db=0.0)
    images = pictures(256, seed=8).images()
    torch.manual_seed(0)
    with torch.no_grad():
        change = defense.protect(images)[0] - defense.predict(images)[0]
    scaled = (change - defense.shift) / defense.spread
    scaled = (scaled.movedim(1, -1) if features == "map" else scaled).flatten(0, -2)
    # The class token hardly moves, and shares its channel's deviation with all others.
    torch.testing.assert_close(scaled.mean(0), torch.zeros(8), rtol=0, atol=0.15)
    torch.testing.assert_close(scaled.std(0), torch.ones(8), rtol=0, atol=0.15)


def test_post_hoc_noise_is_added_to_the_plain_model(make_defense, pictures, tmp_path):
    how = {"snr_db": -10.0, "training": "post_hoc"}
    quiet = fitted(make_defense, pictures, tmp_path / "quiet", snr_db=60.0, training="post_hoc")
    loud = fitted(make_defense, pictures, tmp_path / "loud", **how)
    for one, other in zip(quiet.parameters(), loud.parameters(), strict=True):
        assert torch.equal(one, other)
    assert snr_db(loud, pictures(64).images()) == pytest.approx(-10.0, abs=0.3)


@pytest.mark.parametrize("features", ["map", "tokens"])
@torch.no_grad()
def test_clipped_messages_are_bounded_however_large_the_features(make_defense, pictures, features):
    defense = make_defense("noise", {"clip": True}, features=features).eval()
    bound = math.sqrt(math.prod(defense.shape))
    small, large = pictures(16).images(), 50 * pictures(16).images()
    assert defense.predict(large)[0].flatten(1).norm(dim=1).max() <= bound * (1 + 1e-5)
    plain = make_defense("noise", {}, features=features).eval()
    inside = plain.predict(small)[0].flatten(1).norm(dim=1) <= bound
    unchanged = (plain.predict(small)[0] == defense.predict(small)[0]).flatten(1).all(1)
    assert torch.equal(unchanged, inside)


def test_clipping_belongs_to_features():
    params = defenses.load("noise").Params
    with pytest.raises(InvalidParamsError, match="clip bounds features"):
        build(params, {"clip": True, "place": "input"}, "defense noise")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 100, "loud"])
def test_a_ratio_that_is_none_is_refused(value):
    with pytest.raises(InvalidParamsError, match=r"snr_db|finite|JSON"):
        build(defenses.load("noise").Params, {"snr_db": value}, "defense noise")


@pytest.mark.parametrize("ratio", [0.1, 1.0, 5.0, 300.0])
@pytest.mark.parametrize("delta", [1e-2, 1e-5])
def test_epsilon_is_the_one_at_which_delta_is_reached(ratio, delta):
    epsilon = gaussian_epsilon(ratio, delta)
    if epsilon < 1e-9:  # so much noise that delta alone is enough
        assert ratio <= 2 * delta * math.sqrt(2 * math.pi)
        return
    # The privacy loss of the mechanism is N(r^2/2, r^2): delta by integrating over it.
    grid = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    density = torch.exp(-grid.square() / 2) / math.sqrt(2 * math.pi)
    loss = ratio**2 / 2 + ratio * grid
    beyond = (1 - torch.exp(epsilon - loss)).clamp_min(0)
    found = torch.trapezoid(density * beyond, grid).item()
    assert found == pytest.approx(delta, rel=1e-3)


def test_more_noise_means_a_smaller_epsilon_in_the_record(make_defense):
    for law in LAWS:
        found = [
            make_defense("noise", {"clip": True, "law": law, "snr_db": level}).describe()
            for level in (20.0, 0.0, -20.0)
        ]
        assert found[0]["epsilon"] > found[1]["epsilon"] > found[2]["epsilon"] > 0
        assert found[0]["delta"] == (1e-5 if law == "gaussian" else 0.0)
    assert make_defense("noise").describe() == {}
