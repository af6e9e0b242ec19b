"""Random streams: independent, and leaving no trace."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mibench import seeding

NAMES = st.lists(st.text("abc", min_size=1, max_size=3) | st.integers(0, 5), max_size=3)


def draws(seed, *names, count=1000):
    return torch.randn(count, generator=seeding.generator(seed, *names))


@given(st.integers(0, 99), NAMES, st.integers(0, 99), NAMES)
def test_two_streams_have_one_seed_only_if_they_have_one_name(seed, names, other, others):
    same = (seed, list(map(str, names))) == (other, list(map(str, others)))
    assert (seeding.derive(seed, *names) == seeding.derive(other, *others)) is same
    assert 0 <= seeding.derive(seed, *names) < 2**63


def test_streams_repeat_and_do_not_correlate():
    assert torch.equal(draws(0, "a", 1), draws(0, "a", 1))
    streams = [draws(0), draws(1), draws(0, "a"), draws(0, "b"), draws(0, "a", 1), draws(0, "a", 2)]
    matrix = torch.corrcoef(torch.stack(streams))
    assert (matrix - torch.eye(len(streams))).abs().max() < 0.15  # 4.7 deviations


def test_a_name_does_not_slide_into_its_neighbour():
    assert seeding.derive(0, "ab", "c") != seeding.derive(0, "a", "bc")
    assert seeding.derive(1, 1) != seeding.derive(11)


def test_making_a_generator_leaves_the_global_state():
    state = torch.get_rng_state()
    draws(3, "x")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_block_draws_from_its_stream_whatever_was_before():
    found = []
    for before in (1, 2):
        torch.manual_seed(before)
        with seeding.stream(5, "noise"):
            found.append(torch.randn(4))
    assert torch.equal(*found)
    with seeding.stream(5, "other"):
        assert not torch.equal(torch.randn(4), found[0])


def test_a_block_restores_the_global_state():
    state = torch.get_rng_state()
    with seeding.stream(5, "noise"):
        torch.randn(10)
        with seeding.stream(6, "inner"):
            torch.randn(10)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_block_that_fails_restores_it_too():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="stop"), seeding.stream(5):  # noqa: PT012
        torch.randn(10)
        raise RuntimeError("stop")
    assert torch.equal(torch.get_rng_state(), state)
