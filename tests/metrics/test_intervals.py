"""Intervals: coverage by simulation, and the properties that any implementation must have."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mibench.metrics import intervals
from mibench.metrics.intervals import (
    bootstrap_mean,
    estimate_mean,
    estimate_median,
    normalised_leakage,
)

score_lists = st.lists(
    st.floats(-1e3, 1e3, allow_nan=False, allow_subnormal=False, width=32), min_size=2, max_size=40
)


def normal(n, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator, dtype=torch.float64) + mean


def leakage(scores, floor, reference, more_leakage="higher", seed=0, **options):
    return normalised_leakage(
        scores, floor, reference, more_leakage=more_leakage, seed=seed, **options
    )


def test_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    hits = 0
    for repetition in range(200):
        low, high = bootstrap_mean(normal(100, 5, repetition), repetition, resamples=400)
        hits += low <= 5 <= high
    assert 0.90 <= hits / 200 <= 0.99


def test_interval_of_normalised_leakage_covers_the_truth_as_often_as_it_says():
    hits = 0
    for repetition in range(200):
        # Shared difficulty of an image, which only pairing removes.
        shared = 3 * normal(100, seed=repetition)
        floor = shared + normal(100, seed=1000 + repetition)
        scores = shared + normal(100, mean=1, seed=2000 + repetition)
        reference = shared + normal(100, mean=4, seed=3000 + repetition)
        estimate = leakage(scores, floor, reference, seed=repetition, resamples=400)
        hits += estimate.low <= 0.25 <= estimate.high
        assert estimate.high - estimate.low < 0.3, "pairing lost"
    assert 0.90 <= hits / 200 <= 0.99


def test_interval_is_near_the_normal_theory_and_narrows_with_more_images():
    values = normal(400)
    low, high = bootstrap_mean(values, seed=0)
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 20, rel=0.1)
    narrow_low, narrow_high = bootstrap_mean(values, seed=0, level=0.5)
    assert low < narrow_low < narrow_high < high


def test_the_seed_decides_the_interval_and_nothing_else_does():
    values = normal(50)
    first = bootstrap_mean(values, seed=7)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert bootstrap_mean(values, seed=7) == first
    assert torch.equal(torch.get_rng_state(), state), "the global stream was used"
    assert bootstrap_mean(values, seed=8) != first


def test_resampling_in_chunks_bounds_memory_and_keeps_the_count(monkeypatch):
    monkeypatch.setattr(intervals, "_WEIGHTS_AT_ONCE", 50 * 30)
    chunks = list(intervals._weights(50, 0, 100))
    assert [len(chunk) for chunk in chunks] == [30, 30, 30, 10]
    assert all((chunk.sum(1) == 50).all() for chunk in chunks)
    low, high = bootstrap_mean(normal(50), seed=0)
    assert low < normal(50).mean() < high


@settings(max_examples=25, deadline=None)
@given(score_lists, st.integers(0, 2**32 - 1))
def test_the_mean_lies_in_its_interval(values, seed):
    estimate = estimate_mean(torch.tensor(values), seed)
    assert estimate.low <= estimate.value <= estimate.high
    assert min(values) - 1e-9 <= estimate.low
    assert estimate.high <= max(values) + 1e-9
    assert (estimate.n, estimate.reason) == (len(values), None)


@settings(max_examples=25, deadline=None)
@given(score_lists, st.floats(0.01, 100), st.floats(-1e3, 1e3))
def test_intervals_follow_shift_and_scale(values, scale, shift):
    scores = torch.tensor(values, dtype=torch.float64)
    low, high = bootstrap_mean(scores, seed=1)
    moved = bootstrap_mean(scale * scores + shift, seed=1)
    assert moved == pytest.approx((scale * low + shift, scale * high + shift), rel=1e-6, abs=1e-6)


def test_equal_values_give_an_interval_of_no_width():
    estimate = estimate_mean(torch.full((37,), 0.1), seed=0)
    assert estimate.low == pytest.approx(estimate.value, abs=1e-12)
    assert estimate.high == pytest.approx(estimate.value, abs=1e-12)


def test_one_image_has_a_mean_but_no_interval():
    estimate = estimate_mean(torch.tensor([3.0]), seed=0)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (3.0, None, None, 1)
    assert "one image" in estimate.reason
    with pytest.raises(ValueError, match="at least two"):
        bootstrap_mean(torch.tensor([3.0]), seed=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.empty(0), "N > 0"),
        (torch.zeros(2, 2), "shape"),
        (torch.tensor([1.0, math.nan]), "finite"),
        (torch.tensor([1.0, math.inf]), "finite"),
    ],
)
def test_refuses_values_without_a_mean(values, message):
    with pytest.raises(ValueError, match=message):
        estimate_mean(values, seed=0)
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(values, seed=0)


@pytest.mark.parametrize("options", [{"level": 0}, {"level": 1}, {"resamples": 99}])
def test_refuses_options_out_of_range(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        bootstrap_mean(normal(5), seed=0, **options)


def test_leakage_is_0_at_the_floor_and_1_at_the_reference():
    floor, reference = normal(30), normal(30, mean=8, seed=1)
    at_floor = leakage(floor, floor, reference)
    assert (at_floor.value, at_floor.low, at_floor.high, at_floor.n) == (0, 0, 0, 30)
    at_reference = leakage(reference, floor, reference)
    assert (at_reference.value, at_reference.low, at_reference.high) == pytest.approx((1, 1, 1))


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 100), st.floats(-100, 100), st.booleans())
def test_leakage_ignores_shift_scale_and_direction_of_the_metric(scale, shift, negate):
    floor, scores, reference = normal(30), normal(30, 3, seed=1), normal(30, 8, seed=2)
    plain = leakage(scores, floor, reference)
    sign = -1 if negate else 1
    moved = leakage(
        *(sign * (scale * column + shift) for column in (scores, floor, reference)),
        more_leakage="lower" if negate else "higher",
    )
    assert (moved.value, moved.low, moved.high) == pytest.approx(
        (plain.value, plain.low, plain.high), rel=1e-6, abs=1e-9
    )
    assert plain.low < plain.value < plain.high


def test_leakage_may_exceed_the_reference_or_fall_below_the_floor():
    floor, reference = normal(50), normal(50, mean=8, seed=1)
    assert leakage(reference + 4, floor, reference).value > 1.4
    assert leakage(floor - 4, floor, reference).value < -0.4


@pytest.mark.parametrize("shift", [0.0, 0.02, -5.0])
def test_leakage_is_undefined_where_the_reference_does_not_exceed_the_floor(shift):
    floor = normal(30)
    reference = normal(30, seed=1)
    reference = reference - reference.mean() + floor.mean() + shift
    estimate = leakage(normal(30, seed=2), floor, reference)
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (None, None, None, 30)
    assert "not above the floor" in estimate.reason


def test_leakage_of_constant_scores_needs_no_spread():
    one = torch.ones(4)
    estimate = leakage(2 * one, one, 3 * one)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((0.5, 0.5, 0.5))
    assert leakage(2 * one, one, one).value is None


def test_leakage_of_a_barely_visible_reference_stays_ordered_and_finite():
    # Scores of 0 or 1, so that some resamples have the reference exactly at the floor.
    floor = torch.zeros(40)
    reference = torch.zeros(40)
    reference[:5] = 1
    scores = torch.zeros(40)
    scores[[0, 7]] = 1
    estimate = leakage(scores, floor, reference)
    assert 0 <= estimate.low <= estimate.value <= estimate.high < math.inf
    assert estimate.value == pytest.approx(0.4)


def test_leakage_of_one_image_is_undefined():
    one = torch.ones(1)
    estimate = leakage(2 * one, one, 3 * one)
    assert estimate.value is None
    assert "one image" in estimate.reason


def test_leakage_refuses_unpaired_values_and_unknown_directions():
    with pytest.raises(ValueError, match="same images"):
        leakage(normal(3), normal(4), normal(4))
    with pytest.raises(ValueError, match="floor"):
        leakage(normal(3), torch.empty(0), normal(3))
    with pytest.raises(ValueError, match="more_leakage"):
        leakage(normal(3), normal(3), normal(3), more_leakage="up")


def test_the_median_lies_in_its_interval_and_ignores_what_is_far_off():
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 1e6])
    found = estimate_median(values, 0)
    assert (found.value, found.n) == (3.0, 5)
    assert found.low <= 3.0 <= found.high
    assert estimate_median(torch.full((40,), 2.5), 0).high == 2.5
    assert estimate_median(values, 0) == found
    with pytest.raises(ValueError, match="at least two"):
        estimate_median(values[:1], 0)
