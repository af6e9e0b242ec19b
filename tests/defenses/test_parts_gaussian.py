"""The KL of a diagonal Gaussian to the standard one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from mibench.defenses.parts.gaussian import kl_to_standard


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 20), st.floats(-6, 3))
def test_it_is_the_divergence_summed_over_each_row(seed, scale, level):
    draws = torch.Generator().manual_seed(seed)
    mean = scale * torch.randn(3, 2, 4, 4, generator=draws)
    log_deviation = level + 0.1 * torch.randn(3, 2, 4, 4, generator=draws)
    expected = kl_divergence(Normal(mean.double(), log_deviation.double().exp()), Normal(0.0, 1.0))
    found = kl_to_standard(mean, log_deviation)
    assert (found >= 0).all()
    torch.testing.assert_close(found.double(), expected.flatten(1).sum(1), rtol=1e-4, atol=1e-6)


def test_it_is_zero_at_the_standard_gaussian_alone():
    zero = torch.zeros(2, 5)
    assert torch.equal(kl_to_standard(zero, zero), torch.zeros(2))
    # 1/2 (sigma^2 - 1) - log sigma is about (log sigma)^2 there, far below the digits of sigma^2.
    near = kl_to_standard(zero, torch.full((2, 5), 1e-3))
    torch.testing.assert_close(near, torch.full((2,), 5e-6), rtol=0.01, atol=0)


def test_it_is_in_full_precision_under_autocast():
    mean = torch.full((1, 10_000), 1.0, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = kl_to_standard(mean, torch.zeros_like(mean))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(5000)
