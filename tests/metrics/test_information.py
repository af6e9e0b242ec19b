"""Measures of information against known answers and independent references."""

import math
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.defenses.parts.dependence import distance_correlation
from mibench.information.base import Amounts, Messages, View
from mibench.information.conditional_entropy import Fit
from mibench.information.distance_correlation import distances, unbiased
from mibench.information.intervals import over_seeds, student
from mibench.information.mine import (
    Critic,
    donsker_varadhan,
    learn,
    sharpest,
    statistics,
    surrogate,
)
from mibench.information.quantised import Quantiser
from mibench.information.siftfunnel_mine import PublishedCritic, bound
from mibench.registry import measures
from mibench.threat import Adversary, Knowledge, Target

CPU = torch.device("cpu")
ENOUGH = Amounts(steps=60, batch=128, seeds=2, published=64, epochs=2)


class Client:
    """A client with a law, without the rest of a defense."""

    def __init__(self, mean, log_deviation=None, deviation=None, law="gaussian"):
        self.mean, self.log_deviation, self.deviation = mean, log_deviation, deviation
        self.law = law

    def predict(self, images):
        mean = self.mean(images)
        if self.log_deviation is None:
            return (mean,)
        return (torch.cat([mean, self.log_deviation(images)], 1),)

    def protect(self, images):
        mean = self.mean(images)
        draws = torch.randn(mean.shape)
        if self.law == "laplace":
            draws = torch.empty(2, *mean.shape).exponential_().diff(dim=0)[0] / math.sqrt(2)
        if self.law == "frozen":
            draws = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
            draws = draws + 1e-3 * torch.randn(mean.shape)
        if self.log_deviation is not None:
            return (mean + self.log_deviation(images).exp() * draws,)
        return (mean + (self.deviation or 0) * draws,)

    def log_likelihood(self, shares, predicted):
        if self.log_deviation is not None:
            mean, log = predicted[0].chunk(2, 1)
            return -(((shares[0] - mean) / log.exp()).square() / 2 + log).flatten(1).sum(1)
        residual = (shares[0] - predicted[0]).flatten(1)
        if self.law == "laplace":
            return -math.sqrt(2) * residual.abs().sum(1) / self.deviation
        return -residual.square().sum(1) / (2 * (self.deviation or 1.0) ** 2)


def view(images, client, others=None, amounts=ENOUGH, seed=0):
    torch.manual_seed(seed)
    target = Target(client, Adversary(Knowledge.WHITE_BOX, (0,)), "client")
    first, second = images, others
    return View(
        Messages(first, client.protect(first)),
        Messages(second, client.protect(second)),
        target,
        amounts,
        seed,
        CPU,
    )


def pictures(count, seed):
    draws = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=draws)
    return nn.functional.interpolate(coarse, (16, 16), mode="bilinear")


def take(name, seen, tmp_path):
    return measures.load(name)()(seen, Checkpoint(tmp_path / name))


def gaussian_pairs(count, dims, correlation, seed):
    draws = torch.Generator().manual_seed(seed)
    x, e = torch.randn(2, count, dims, generator=draws)
    return Messages(x, (correlation * x + math.sqrt(1 - correlation**2) * e,))


# --- mine ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """The bound on new pairs by correlation of four independent pairs of Gaussians."""
    found = {}
    for correlation in (0.0, 0.8):
        pairs, new = (gaussian_pairs(2048, 4, correlation, seed) for seed in (1, 2))
        quantiser = Quantiser.of(pairs.shares)
        folder = tmp_path_factory.mktemp("mine") / "part"
        critic = learn(pairs, quantiser, ENOUGH, 0, Checkpoint(folder), CPU)
        found[correlation] = critic, statistics(critic, new.take(1024), quantiser)
    return found


def test_mine_comes_near_the_information_of_gaussians(told):
    truth = -4 / 2 * math.log(1 - 0.8**2)
    # A lower bound, short of the truth by what the network and 60 steps miss.
    assert 0.8 * truth < donsker_varadhan(told[0.8][1]) < 1.05 * truth


def test_mine_finds_nothing_in_independent_samples(told):
    assert abs(donsker_varadhan(told[0.0][1])) < 0.05


def test_every_parameter_of_the_statistics_network_moves(told):
    pairs = gaussian_pairs(2048, 4, 0.8, 1)
    with seeding.stream(0, "weights"):
        before = dict(Critic(pairs).named_parameters())
    for name, value in told[0.8][0].named_parameters():
        assert not torch.equal(value, before[name]), name


def test_donsker_varadhan_of_the_true_ratio_is_the_information():
    pairs, correlation = gaussian_pairs(2000, 1, 0.6, 3), 0.6
    x, z = pairs.images.double(), pairs.shares[0].double()
    rest = 1 - correlation**2
    table = correlation * x @ z.T / rest - correlation**2 * (x.square() + z.square().T) / 2 / rest
    truth = -math.log(rest) / 2
    assert donsker_varadhan(table) == pytest.approx(truth, abs=0.05)
    assert donsker_varadhan(table + 7) == pytest.approx(donsker_varadhan(table))
    # Twice the best statistic is too sure of itself.
    assert donsker_varadhan(2 * table) < truth
    value, factor = sharpest(2 * table)
    assert factor == pytest.approx(0.5, abs=0.1)
    assert value == pytest.approx(truth, abs=0.05)


def test_the_moving_average_stands_in_the_gradient():
    torch.manual_seed(0)
    critic = Critic(gaussian_pairs(16, 2, 0.5, 0))
    critic.log_mean.fill_(1.3)
    table = torch.randn(5, 5, requires_grad=True)
    surrogate(critic, table).backward()
    mean = 0.95 * math.exp(1.3) + 0.05 * table.detach().exp()[~torch.eye(5, dtype=bool)].mean()
    wanted = table.detach().exp() / mean / 20
    wanted[torch.eye(5, dtype=bool)] = -1 / 5
    torch.testing.assert_close(table.grad, wanted)
    assert critic.log_mean == pytest.approx(math.log(mean))


@pytest.mark.parametrize("shape", [(3, 16, 16), (9, 6), (7,)])
def test_statistics_do_not_depend_on_how_many_images_go_through_at_once(shape, monkeypatch):
    draws = torch.Generator().manual_seed(0)
    some = Messages(pictures(20, 0), (torch.randn(20, *shape, generator=draws),))
    quantiser = Quantiser.of(some.shares)
    torch.manual_seed(0)
    critic = Critic(some)
    whole = statistics(critic, some, quantiser)
    monkeypatch.setattr("mibench.information.mine.CHUNK", 3)
    torch.testing.assert_close(statistics(critic, some, quantiser), whole, rtol=1e-5, atol=1e-5)
    alone = critic(some.images[4:5], quantiser.rounded(some.at(torch.tensor([9])).shares))
    assert alone.item() == pytest.approx(float(whole[4, 9]), abs=1e-4)


def test_mine_has_an_interval_over_seeds_and_says_what_it_did(tmp_path):
    few = Amounts(steps=5, batch=16, seeds=3)
    client = Client(lambda x: x[:, :, ::2, ::2], deviation=0.1)
    seen = view(pictures(64, 0), client, pictures(32, 1), few)
    reading = take("mine", seen, tmp_path)
    assert reading.estimate.low < reading.estimate.value < reading.estimate.high
    assert len(reading.facts["per_seed"]) == 3
    assert len(set(reading.facts["per_seed"])) == 3
    assert "8 bits" in reading.source
    assert take("mine", seen, tmp_path / "again") == reading
    short = view(pictures(8, 0), client, pictures(32, 1), few)
    assert take("mine", short, tmp_path / "short").estimate.value is None


# --- the published variant -----------------------------------------------------------------------


def plain_statistic(critic, images, share):
    """The published network, written as it is described."""
    padded = nn.functional.pad(
        share, (0, images.shape[3] - share.shape[3], 0, images.shape[2] - share.shape[2])
    )
    mean = torch.tensor([0.4914, 0.4822, 0.4465]).view(1, 3, 1, 1)
    deviation = torch.tensor([0.2023, 0.1994, 0.2010]).view(1, 3, 1, 1)
    stacked = torch.cat([(images - mean) / deviation, padded], 1)
    return critic.rest(critic.first(stacked)).mean((1, 2, 3))


@pytest.mark.parametrize("side", [1, 5, 15, 16])
def test_the_shares_part_of_the_first_layer_is_that_of_padded_shares(side):
    torch.manual_seed(0)
    images, share = pictures(6, 0), torch.randn(6, 7, side, side)
    critic, order = PublishedCritic(7), torch.randperm(6)
    pairs, strangers = critic(images, (share[:, :4], share[:, 4:]), order)
    torch.testing.assert_close(pairs, plain_statistic(critic, images, share))
    torch.testing.assert_close(strangers, plain_statistic(critic, images, share[order]))


def test_the_published_variant_stays_below_one_nat_however_sure_it_is(tmp_path):
    torch.manual_seed(0)
    critic, some = PublishedCritic(3), Messages(pictures(8, 0), (torch.randn(8, 3, 4, 4),))
    critic.rest[-2].weight.data.mul_(1e4)
    assert bound(critic, some, CPU).abs() < 1
    client = Client(lambda x: x[:, :, ::2, ::2])
    reading = take("siftfunnel-mine", view(pictures(64, 0), client, pictures(64, 1)), tmp_path)
    assert -1 < reading.estimate.value < 1
    assert reading.estimate.value == max(reading.facts["per_epoch"])
    assert "published: 100 epochs" in reading.source


def test_every_parameter_of_the_published_variant_moves():
    torch.manual_seed(0)
    critic, some = PublishedCritic(3), Messages(pictures(8, 0), (torch.randn(8, 3, 4, 4),))
    before = [value.detach().clone() for value in critic.parameters()]
    optimiser = torch.optim.AdamW(critic.parameters(), lr=0.01)
    (-bound(critic, some, CPU)).backward()
    assert all(value.grad.abs().sum() > 0 for value in critic.parameters())
    optimiser.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("shape", [(9, 6), (7,), (2, 17, 17)])
def test_the_published_variant_is_empty_where_it_is_not_defined(shape, tmp_path):
    client = Client(lambda x: torch.ones(len(x), *shape))
    reading = take("siftfunnel-mine", view(pictures(16, 0), client, pictures(16, 1)), tmp_path)
    assert reading.estimate.value is None
    assert "defined for shares" in reading.estimate.reason


# --- distance correlation ------------------------------------------------------------------------


def slow_distance_correlation(x, z):
    """The definition of Székely and Rizzo, entry by entry."""
    n = len(x)

    def centred(rows):
        d = [[math.dist(p, q) for q in rows] for p in rows]
        rows_, total = [sum(row) for row in d], sum(map(sum, d))
        return [
            [
                0.0
                if i == j
                else d[i][j] - rows_[i] / (n - 2) - rows_[j] / (n - 2) + total / ((n - 1) * (n - 2))
                for j in range(n)
            ]
            for i in range(n)
        ]

    a, b = centred(x.tolist()), centred(z.tolist())

    def product(p, q):
        return sum(p[i][j] * q[i][j] for i in range(n) for j in range(n)) / (n * (n - 3))

    return product(a, b) / math.sqrt(product(a, a) * product(b, b))


@given(st.integers(4, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000))
def test_distance_correlation_is_its_definition(n, dims, other, seed):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dims, generator=draws, dtype=torch.float64)
    z = torch.randn(n, other, generator=draws, dtype=torch.float64) + x.sum(1, keepdim=True)
    found = unbiased(distances([x], CPU), distances([z], CPU))
    assert found == pytest.approx(slow_distance_correlation(x, z), abs=1e-9)


@pytest.mark.parametrize(("n", "dims", "other"), [(128, 3072, 512), (512, 3072, 512)])
def test_independent_gaussians_have_no_distance_correlation(n, dims, other):
    draws = torch.Generator().manual_seed(0)
    x, z = torch.randn(n, dims, generator=draws), torch.randn(n, other, generator=draws)
    found = unbiased(distances([x], CPU), distances([z], CPU))
    assert abs(found) < (0.05 if n == 128 else 0.02)
    # The biased form, by contrast, is near 1.
    biased = float(distance_correlation(x, z))
    assert biased == pytest.approx({128: 0.965, 512: 0.876}[n], abs=0.01)
    assert found == pytest.approx(float(distance_correlation(x, z, unbiased=True)), abs=1e-3)


def test_distances_of_several_shares_are_those_of_their_values_together(monkeypatch):
    torch.manual_seed(0)
    parts = [torch.randn(6, 2, 3) + 100, torch.randn(6, 5)]
    joined = torch.cat([part.flatten(1) for part in parts], 1).double()
    wanted = torch.cdist(joined, joined, compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(distances(parts, CPU), wanted, rtol=1e-6, atol=1e-9)
    monkeypatch.setattr("mibench.information.distance_correlation.BLOCK", 6)
    torch.testing.assert_close(distances(parts, CPU), wanted, rtol=1e-6, atol=1e-9)


def test_distance_correlation_of_a_copy_is_one_and_falls_with_noise(tmp_path):
    values = []
    for at, deviation in enumerate((0.0, 0.5, 5.0)):
        client = Client(lambda x: 3 - 2 * x, deviation=deviation)
        seen = view(pictures(16, 0), client, pictures(200, 1))
        reading = take("distance-correlation", seen, tmp_path / str(at))
        assert reading.estimate.low <= reading.estimate.value <= reading.estimate.high
        values.append(reading.estimate.value)
    assert values[0] == pytest.approx(1)
    assert values[0] > values[1] + 0.01 > values[2] + 0.02


def test_distance_correlation_is_empty_for_a_constant_message(tmp_path):
    client = Client(lambda x: torch.full((len(x), 5), 0.1))
    reading = take("distance-correlation", view(pictures(16, 0), client, pictures(16, 1)), tmp_path)
    assert reading.estimate.value is None
    assert "all the same" in reading.estimate.reason


# --- volumes -------------------------------------------------------------------------------------


def test_the_volume_counts_what_is_not_zero(tmp_path):
    client = Client(lambda x: torch.cat([x[:, :1] + 1, 0 * x[:, 1:]], 1))
    reading = take("volume", view(pictures(16, 0), client, pictures(20, 1)), tmp_path)
    assert reading.estimate.value == 16 * 16
    assert reading.facts["share"] == pytest.approx(1 / 3)


def test_the_coded_volume_is_that_of_zlib_on_each_image(tmp_path):
    client = Client(lambda x: x[:, :2])
    seen = view(pictures(16, 0), client, pictures(20, 1))
    reading = take("volume-coded", seen, tmp_path)
    low, high = (float(end(seen.auxiliary.shares[0])) for end in (torch.min, torch.max))
    sizes = []
    for share in seen.validation.shares[0]:
        codes = ((share - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
        # Two bytes of header and four of checksum are no content.
        sizes.append(len(zlib.compress(codes.numpy().tobytes(), 9)) - 6)
    assert reading.estimate.value == pytest.approx(sum(sizes) / 20)


def test_noise_fills_the_coded_volume_and_constants_leave_it_empty(tmp_path):
    images = pictures(16, 0), pictures(16, 1)
    noisy = view(images[0], Client(lambda x: 0 * x, deviation=1.0), images[1])
    empty = view(images[0], Client(lambda x: 0 * x), images[1])
    values = 3 * 16 * 16
    assert take("volume-coded", noisy, tmp_path / "a").estimate.value > 0.7 * values
    assert take("volume-coded", empty, tmp_path / "b").estimate.value < 0.05 * values


@given(st.integers(0, 1000))
def test_rounding_errs_by_half_a_step_at_most(seed):
    shares = (torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)),)
    quantiser = Quantiser.of(shares)
    error = (quantiser.rounded(shares)[0] - shares[0]).abs().max()
    assert error <= quantiser.step[0] * 0.501
    assert quantiser.clipped(shares) == 0
    assert quantiser.clipped((3 * shares[0],)) > 0


# --- bounds --------------------------------------------------------------------------------------


def test_the_bound_of_a_gaussian_is_its_information():
    torch.manual_seed(0)
    mixing = torch.randn(6, 6)
    clean = torch.randn(3000, 6) @ mixing
    log = torch.full_like(clean, math.log(0.5))
    parts = [(clean[at : at + 1000], log[at : at + 1000]) for at in (0, 1000, 2000)]
    fit = Fit(parts[0], parts[1])
    covariance = mixing.T.double() @ mixing.double()
    truth = float(torch.logdet(torch.eye(6) + covariance / 0.25)) / 2
    assert float(fit.divergence(*parts[2]).mean()) == pytest.approx(truth, rel=0.03)
    assert fit.plug_in == pytest.approx(truth, rel=0.03)


def test_few_images_raise_the_bound_where_they_lower_the_plug_in_value():
    torch.manual_seed(0)
    clean, dims = torch.randn(600, 400), 400
    log = torch.zeros_like(clean)
    fit = Fit((clean[:100], log[:100]), (clean[100:200], log[100:200]))
    truth = dims / 2 * math.log(2)
    assert fit.plug_in < 0.8 * truth
    assert truth < float(fit.divergence(clean[200:], log[200:]).mean()) < 1.1 * truth


def test_the_divergence_is_that_of_pytorch_for_deviations_that_differ():
    torch.manual_seed(0)
    mean, log = torch.randn(60, 5), 0.3 * torch.randn(60, 5)
    fit = Fit((mean[:20], log[:20]), (mean[20:40], log[20:40]))
    along = fit.directions * (fit.along - fit.beside).float()
    q = (
        torch.diag(fit.unit)
        @ ((1 + fit.beside) * torch.eye(5) + along @ fit.directions.T)
        @ torch.diag(fit.unit)
    )
    normal = torch.distributions.MultivariateNormal
    wanted = torch.distributions.kl_divergence(
        normal(mean[40:], torch.diag_embed((2 * log[40:]).exp())), normal(fit.centre, (q + q.T) / 2)
    )
    found = fit.divergence(mean[40:], log[40:]).float()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def bounds(client, tmp_path):
    seen = view(pictures(64, 0), client, pictures(64, 1))
    return (take(name, seen, tmp_path) for name in ("conditional-entropy-bound", "vib-kl"))


def test_noise_of_one_deviation_is_bounded_and_more_of_it_tells_less(tmp_path):
    found = []
    for deviation in (0.1, 1.0):
        entropy, kl = bounds(Client(lambda x: x, deviation=deviation), tmp_path / str(deviation))
        assert entropy.facts["deviation"] == pytest.approx(deviation, rel=1e-3)
        assert kl.estimate.value is None
        found.append(entropy.estimate.value)
    assert found[0] > 2 * found[1] > 0


def test_a_message_with_its_own_deviations_has_both_bounds(tmp_path):
    client = Client(lambda x: x - 0.5, lambda x: x.flip(1) - 1)
    entropy, kl = bounds(client, tmp_path)
    mean, log = pictures(64, 1) - 0.5, pictures(64, 1).flip(1) - 1
    normal = torch.distributions.Normal
    each = torch.distributions.kl_divergence(normal(mean, log.exp()), normal(0.0, 1.0))
    assert kl.estimate.value == pytest.approx(float(each.flatten(1).sum(1).mean()), rel=1e-4)
    # A Gaussian that was fitted is nearer than N(0, I).
    assert 0 < entropy.estimate.value < kl.estimate.value
    assert entropy.facts["deviation"] is None


@pytest.mark.parametrize(
    ("client", "why"),
    [
        (Client(lambda x: x), "deterministic"),
        (Client(lambda x: x, deviation=0.5, law="laplace"), "not additive and Gaussian"),
        (Client(lambda x: x, deviation=1.0, law="frozen"), "do not follow"),
    ],
)
def test_bounds_are_empty_without_fresh_gaussian_noise(client, why, tmp_path):
    for reading in bounds(client, tmp_path):
        assert reading.estimate.value is None
        assert why in reading.estimate.reason


def test_noise_that_is_not_as_stated_is_not_believed(tmp_path):
    client = Client(lambda x: x, deviation=0.5)
    honest, client.protect = client.protect, None
    client.protect = lambda x: (x + 0.2 * (honest(x)[0] - x),)
    for reading in bounds(client, tmp_path):
        assert "do not follow" in reading.estimate.reason


# --- all of them ---------------------------------------------------------------------------------


def test_students_quantiles_are_those_of_tables():
    assert student(2) == pytest.approx(4.303, abs=1e-3)
    assert student(31) == student(30) == pytest.approx(2.042, abs=1e-3)
    assert student(29) == student(25)
    found = over_seeds([1.0, 2.0, 3.0], 10)
    assert (found.value, found.n) == (2.0, 10)
    assert found.high - 2 == pytest.approx(4.3027 / math.sqrt(3))


@pytest.mark.parametrize("name", measures.names())
def test_nothing_is_drawn_outside_the_named_streams(name, tmp_path):
    client = Client(lambda x: x[:, :, ::2, ::2], deviation=0.1)
    seen = view(pictures(64, 0), client, pictures(32, 1), Amounts.of("test"))
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = take(name, seen, tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert take(name, seen, Path(tmp_path) / "b") == first
