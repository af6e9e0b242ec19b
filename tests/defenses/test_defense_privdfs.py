"""Distributed shares: what each holds, how they are learned, and what the proxy attacker sees."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mibench.defenses import privdfs
from mibench.defenses.privdfs import explained_variance
from mibench.errors import InvalidParamsError
from mibench.task import Attributes
from mibench.training import Step

quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def step(index, total=100):
    return Step(index, total, torch.Generator().manual_seed(index))


def assert_partial_partition(defense):
    """Every share holds n units, and no unit is in two shares."""
    rows = [row.tolist() for row in defense.assignment]
    assert len(rows) == defense.servers
    assert all(len(set(row)) == len(row) == defense.kept for row in rows)
    together = [unit for row in rows for unit in row]
    assert len(set(together)) == len(together)
    assert min(together) >= 0
    assert max(together) < defense.units


@quick
@given(st.integers(2, 6), st.floats(0.01, 1.0), st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_shares_are_disjoint_and_of_equal_size(make_defense, servers, density, period, seed):
    params = {"servers": servers, "density": density, "period": period, "width": 4}
    units = 8 * period**2
    wanted = max(1, round(density * units))
    if servers * wanted > units:
        with pytest.raises(InvalidParamsError, match="density can be at most"):
            make_defense("privdfs", params)
        return
    defense = make_defense("privdfs", params, seed)
    assert (defense.units, defense.kept) == (units, wanted)
    assert_partial_partition(defense)
    torch.manual_seed(seed)
    with torch.no_grad():
        defense.logits.copy_(torch.randn_like(defense.logits))
    images = torch.rand(4, 3, 16, 16)
    defense.loss(images, torch.tensor([0, 1, 2, 3]), step(0))
    assert_partial_partition(defense)
    for share in defense.eval().protect(images):
        assert share.shape == (4, wanted, 8 // period, 8 // period)


def test_shares_hold_the_assigned_units_only(make_defense, pictures):
    defense = make_defense("privdfs", {"servers": 4, "density": 0.25, "period": 2}).eval()
    images = pictures(3).images()
    features = defense.client(images)
    for row, share in zip(defense.assignment.tolist(), defense.protect(images), strict=True):
        for place, unit in enumerate(row):
            channel, phase = divmod(unit, 4)
            dy, dx = divmod(phase, 2)
            assert torch.equal(share[:, place], features[:, channel, dy::2, dx::2])


@pytest.mark.parametrize("features", ["tokens", "class-token"])
@pytest.mark.parametrize("period", [1, 2, 8])
def test_units_of_tokens_are_phases_of_their_grid(make_defense, pictures, features, period):
    params = {"servers": 2, "density": 0.25, "period": period}
    defense, images = (
        make_defense("privdfs", params, features=features).eval(),
        pictures(3).images(),
    )
    tokens = defense.client(images)
    prefix = tokens.shape[1] - 64
    assert prefix == (features == "class-token")
    for row, share in zip(defense.assignment.tolist(), defense.protect(images), strict=True):
        assert share.shape == (3, len(row), 8 // period, 8 // period)
        for place, unit in enumerate(row):
            channel, phase = divmod(unit, period**2)
            dy, dx = divmod(phase, period)
            for i in range(8 // period):
                for j in range(8 // period):
                    token = prefix + 8 * (dy + i * period) + dx + j * period
                    assert torch.equal(share[:, place, i, j], tokens[:, token, channel])


def test_a_period_that_does_not_divide_the_token_grid_is_refused(make_defense):
    with pytest.raises(InvalidParamsError, match=r"period is 3, which does not divide .* 8x8"):
        make_defense("privdfs", {"period": 3}, features="class-token")


@pytest.mark.parametrize("index", [0, 99])
@pytest.mark.parametrize("features", ["map", "class-token"])
def test_attributes_are_learned_with_their_own_loss(make_defense, pictures, features, index):
    task, images = Attributes(tuple("abcde"), smoothing=0.1), pictures(8).images()
    defense = make_defense("privdfs", {"branch": 0.5}, features=features, task=task)
    labels = (torch.rand(8, 5, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.uint8)
    terms = defense.loss(images, labels, step(index))
    shares = defense.protect(images)
    replies = tuple(defense.serve(k, share) for k, share in enumerate(shares))
    wanted = labels * 0.9 + 0.05
    fused, *own = (
        F.binary_cross_entropy_with_logits(scores, wanted)
        for scores in (defense.fuse(replies), *replies)
    )
    torch.testing.assert_close(terms["task"], fused, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["branch"], 0.5 * sum(own) / 4, rtol=1e-4, atol=1e-5)


@quick
@given(st.integers(0, 10_000), st.floats(0.01, 30.0))
def test_masks_are_exactly_zero_or_one(make_defense, seed, spread):
    defense = make_defense("privdfs", {"servers": 3, "density": 0.1, "period": 2})
    torch.manual_seed(seed)
    with torch.no_grad():
        defense.logits.copy_(0.1 * spread * torch.randn_like(defense.logits))
    masks = defense._straight_through()
    expected = torch.zeros(3, defense.units).scatter_(1, defense.assignment, 1.0)
    assert torch.equal(masks, expected)


def test_kept_and_dropped_units_feel_the_loss(make_defense, pictures):
    defense, batch = make_defense("privdfs"), pictures(16)
    terms = defense.loss(batch.images(), batch.labels, step(0))
    (gradient,) = torch.autograd.grad(sum(terms.values()), defense.logits)
    gradient = gradient.view(defense.servers, defense.units)
    kept = torch.zeros_like(gradient, dtype=torch.bool).scatter_(1, defense.assignment, value=True)
    assert (gradient[kept] != 0).all()
    dropped_everywhere = ~kept.any(0)
    assert dropped_everywhere.any()
    assert (gradient[:, dropped_everywhere] != 0).all()


def test_a_unit_with_a_higher_logit_is_taken(make_defense, pictures):
    defense, batch = make_defense("privdfs"), pictures(8)
    wanted = [unit for unit in range(defense.units) if unit not in defense.assignment[1]]
    wanted = sorted(wanted[: defense.kept])
    with torch.no_grad():
        defense.logits.view(defense.servers, -1)[1, wanted] = 5.0
    defense.loss(batch.images(), batch.labels, step(0))
    assert defense.assignment[1].tolist() == wanted


@pytest.mark.parametrize(("index", "learned", "moves"), [
    (0, True, True), (40, True, True), (50, True, False), (90, True, False), (0, False, False),
])  # fmt: skip
def test_masks_are_learned_in_the_first_half_only(make_defense, pictures, index, learned, moves):
    defense, batch = make_defense("privdfs", {"learned": learned}), pictures(8)
    before = defense.assignment.clone()
    with torch.no_grad():
        defense.logits.neg_()
    terms = defense.loss(batch.images(), batch.labels, step(index))
    assert torch.equal(defense.assignment, before) is not moves
    (gradient,) = torch.autograd.grad(sum(terms.values()), defense.logits, allow_unused=True)
    assert (gradient is not None) is moves


def test_sending_does_not_move_the_masks(make_defense, pictures):
    defense = make_defense("privdfs").eval()
    before = defense.assignment.clone()
    with torch.no_grad():
        defense.logits.neg_()
    defense(pictures(4).images())
    assert torch.equal(defense.assignment, before)


def test_the_leakage_term_pulls_at_the_stem(make_defense, pictures):
    def gradients(leakage):
        defense, batch = make_defense("privdfs", {"leakage": leakage}), pictures(32)
        terms = defense.loss(batch.images(), batch.labels, step(60))
        assert ("leakage" in terms) is (leakage > 0)
        convolution = next(p for p in defense.client.parameters() if p.ndim == 4)
        return torch.autograd.grad(sum(terms.values()), convolution)[0]

    assert (gradients(0.0) - gradients(1.0)).abs().max() > 1e-6


def test_shrinking_units_does_not_look_private():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 16, 16)
    share = torch.nn.functional.pixel_unshuffle(images, 2) + 0.01 * torch.randn(64, 12, 8, 8)
    scales = torch.logspace(-2, 0, 12).view(-1, 1, 1)
    told, shrunk = explained_variance(share, images), explained_variance(scales * share, images)
    assert told > 0.95
    assert shrunk == pytest.approx(told.item(), abs=0.01)


def test_the_leakage_term_is_that_of_the_worst_share(make_defense, pictures):
    defense, batch = make_defense("privdfs", {"leakage": 2.0}).eval(), pictures(32)
    images = batch.images()
    worst = max(explained_variance(share, images) for share in defense.protect(images))
    term = defense.loss(images, batch.labels, step(60))["leakage"]
    assert term.item() == pytest.approx(2.0 * worst.item(), rel=1e-4)


def test_more_shares_than_units_are_refused_with_the_limit(make_defense):
    with pytest.raises(InvalidParamsError, match=r"density can be at most 0\.25") as caught:
        make_defense("privdfs", {"servers": 4, "density": 0.5})
    assert "\n" not in str(caught.value)


def test_a_period_that_does_not_divide_the_map_is_refused(make_defense):
    with pytest.raises(InvalidParamsError, match="period is 3"):
        make_defense("privdfs", {"period": 3})


def test_facts_count_what_is_sent_and_what_moved(make_defense, pictures):
    defense, batch = make_defense("privdfs", {"servers": 2, "density": 0.25}), pictures(8)
    assert defense.describe()["units_moved"] == [0, 0]
    first = [set(row.tolist()) for row in defense.assignment]
    with torch.no_grad():
        defense.logits.neg_()
    defense.loss(batch.images(), batch.labels, step(0))
    facts = defense.describe()
    now = [set(row.tolist()) for row in defense.assignment]
    assert facts["units_moved"] == [len(b - a) for a, b in zip(first, now, strict=True)]
    assert sum(facts["units_moved"]) > 0
    share = defense.eval().protect(batch.images())[0]
    assert facts["values_per_share"] == share[0].numel()


# --- the proxy attacker -----------------------------------------------------------------------


def test_a_share_that_is_the_image_explains_all_of_it():
    images = torch.rand(64, 3, 8, 8)
    assert explained_variance(F.pixel_unshuffle(images, 2), images) == pytest.approx(1, abs=0.01)
    brightness = 3 * images + 5
    assert explained_variance(brightness, images) == pytest.approx(1, abs=0.01)


def test_noise_explains_nothing():
    torch.manual_seed(0)
    assert explained_variance(torch.randn(256, 2, 8, 8), torch.rand(256, 3, 16, 16)) < 0.02


def test_more_of_the_image_explains_more():
    torch.manual_seed(0)
    images = torch.rand(128, 3, 8, 8)
    values = [explained_variance(images[:, :count], images).item() for count in (1, 2, 3)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(1 / 3, abs=0.05)


def test_it_is_the_variance_that_least_squares_explains():
    torch.manual_seed(0)
    share = torch.randn(200, 2, 4, 4)
    images = torch.rand(200, 3, 8, 8)
    images[:, 0] += 0.3 * F.interpolate(share[:, :1], (8, 8))[:, 0]
    images[:, 1, :-2] += 0.2 * F.interpolate(share[:, 1:], (8, 8))[:, 0, 2:]  # from a neighbour

    inputs, outputs = [], []
    padded = np.pad(share.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    pixels = images.numpy()
    for i in range(4):
        for j in range(4):
            inputs.append(padded[:, :, i : i + 3, j : j + 3].reshape(200, -1))
            outputs.append(pixels[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(200, -1))
    x, y = np.concatenate(inputs).astype(float), np.concatenate(outputs).astype(float)
    x, y = x - x.mean(0), y - y.mean(0)
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    expected = 1 - ((y - x @ weights) ** 2).sum() / (y**2).sum()
    assert 0.1 < expected < 0.9
    assert explained_variance(share, images) == pytest.approx(expected, abs=0.005)


def test_it_can_be_descended():
    torch.manual_seed(0)
    images = torch.rand(64, 3, 8, 8)
    share = images[:, :1].clone().requires_grad_()
    first = explained_variance(share, images)
    for _ in range(20):
        (gradient,) = torch.autograd.grad(explained_variance(share, images), share)
        share = (share - 0.2 * gradient / gradient.norm() * share.norm()).detach().requires_grad_()
    assert explained_variance(share, images) < 0.7 * first


def smooth(count, side):
    draws = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 6, 6, generator=draws)
    return F.interpolate(coarse, (side, side), mode="bilinear")


@pytest.mark.parametrize(("side", "places"), [(224, 112), (96, 96), (224, 7), (224, 1), (30, 4)])
def test_images_and_shares_of_any_size_are_judged(side, places):
    """What is averaged from the image explains much of a smooth one, and noise explains little."""
    images = smooth(16, side)
    share = F.adaptive_avg_pool2d(images, places).requires_grad_()
    told = explained_variance(share, images)
    assert told <= 1.0
    torch.manual_seed(0)
    blind = explained_variance(torch.randn_like(share), images)
    assert told > blind + 0.3 if places > 1 else told > blind
    (gradient,) = torch.autograd.grad(told, share)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_a_thinned_out_share_is_judged_as_the_whole(monkeypatch):
    torch.manual_seed(0)
    images = smooth(24, 128) + 0.2 * torch.rand(24, 3, 128, 128)
    share = F.avg_pool2d(images, 2)[:, :2] + 0.05 * torch.randn(24, 2, 64, 64)
    thin = explained_variance(share, images).item()
    monkeypatch.setattr(privdfs, "LEAKAGE_PLACES", 64)
    whole = explained_variance(share, images).item()
    assert thin != whole
    assert 0.1 < whole < 0.95
    assert thin == pytest.approx(whole, abs=0.02)
