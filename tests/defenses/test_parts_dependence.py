"""Distance correlation: its definition, its two estimates and its gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mibench.defenses.parts.dependence import distance_correlation
from mibench.errors import InvalidParamsError


def gaussians(n, first, second, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(n, first, generator=draws), torch.randn(n, second, generator=draws)


def by_definition(x, z, unbiased):
    """Székely's sums, written out entry by entry in double precision."""
    n = len(x)

    def centred(rows):
        d = [[(a - b).norm().item() for b in rows.double()] for a in rows.double()]
        mean = [sum(row) for row in d]
        total = sum(mean)
        out = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            for j in range(n):
                if unbiased:
                    value = d[i][j] - (mean[i] + mean[j]) / (n - 2) + total / ((n - 1) * (n - 2))
                    out[i, j] = 0.0 if i == j else value
                else:
                    out[i, j] = d[i][j] - (mean[i] + mean[j]) / n + total / n**2
        return out

    a, b = centred(x), centred(z)
    return ((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()).item()


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("n", [4, 9])
def test_it_is_what_its_definition_says(n, unbiased):
    x, noise = gaussians(n, 6, 3)
    z = x[:, :3] + 0.3 * noise
    value = distance_correlation(x, z, unbiased=unbiased).item()
    assert value == pytest.approx(by_definition(x, z, unbiased), abs=1e-5)


# Values of an independent calculation; the unbiased one is 0 in the mean, and scatters with n.
@pytest.mark.parametrize(
    ("n", "first", "second", "biased", "scatter"),
    [
        (32, 12288, 3072, 0.998, 0.15),
        (128, 12288, 3072, 0.994, 0.04),
        (128, 3072, 512, 0.965, 0.04),
        (512, 3072, 512, 0.876, 0.01),
    ],
)
def test_independent_gaussians(n, first, second, biased, scatter):
    x, z = gaussians(n, first, second)
    assert distance_correlation(x, z).item() == pytest.approx(biased, abs=1.5e-3)
    assert abs(distance_correlation(x, z, unbiased=True).item()) < scatter


def test_the_unbiased_estimate_can_be_negative_and_has_mean_zero():
    found = [distance_correlation(*gaussians(16, 64, 64, s), unbiased=True) for s in range(200)]
    values = torch.stack(found)
    assert (values < 0).any()
    assert values.mean().abs() < 4 * values.std() / len(values) ** 0.5


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-9, 1e6),
    shift=st.floats(-1, 1),
    unbiased=st.booleans(),
)
def test_scale_shift_and_order_of_the_sample_do_not_count(seed, scale, shift, unbiased):
    x, noise = gaussians(8, 12, 12, seed)
    z = x + noise
    value = distance_correlation(x, z, unbiased=unbiased)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    for one, other in [(x, scale * (z + shift)), (x[order], z[order]), (z, x)]:
        again = distance_correlation(one, other, unbiased=unbiased)
        torch.testing.assert_close(again, value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("unbiased", [False, True])
def test_a_copy_depends_fully_and_a_constant_not_at_all(unbiased):
    x, _ = gaussians(12, 5, 1)
    assert distance_correlation(x, 3 * x + 1, unbiased=unbiased).item() == pytest.approx(1.0)
    constant = torch.full((12, 7), 0.3, requires_grad=True)
    value = distance_correlation(x, constant, unbiased=unbiased)
    assert value.item() == 0
    value.backward()
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("unbiased", [False, True])
def test_the_gradient_is_right_and_survives_equal_rows(unbiased):
    x, z = gaussians(6, 4, 3)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(distance_correlation(x, z, unbiased=unbiased), z)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    around = [distance_correlation(x, z + e * direction, unbiased=unbiased) for e in (5e-3, -5e-3)]
    slope = (around[0] - around[1]) / 1e-2
    torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=0.02, atol=1e-3)
    twins = torch.cat([z.detach()[:1], z.detach()[:1], z.detach()[2:]]).requires_grad_()
    (gradient,) = torch.autograd.grad(distance_correlation(x, twins, unbiased=unbiased), twins)
    assert gradient.isfinite().all()
    assert gradient.abs().max() < 10


def test_it_is_computed_in_full_precision():
    x, z = gaussians(16, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distance_correlation(x, z, unbiased=True)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, distance_correlation(x, z, unbiased=True))


@pytest.mark.parametrize(("n", "unbiased"), [(1, False), (3, True)])
def test_too_few_images_are_refused_in_one_sentence(n, unbiased):
    with pytest.raises(InvalidParamsError, match=f"batch holds {n}; raise recipe.batch"):
        distance_correlation(torch.rand(n, 3), torch.rand(n, 3), unbiased=unbiased)
