"""Gain over noise: value and interval."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mibench.board import gain, rules
from mibench.board.gain import Accuracy, Compared
from mibench.record import Score

SSIM = Score(
    metric="ssim", version=1, unit="", higher_is_better=True, value=0.5, ci_low=0.4, ci_high=0.6,
    n=128,
)  # fmt: skip
MSE = SSIM.model_copy(update={"metric": "mse", "higher_is_better": False})


def compared(leak, accuracy=0.70, *, scatter=0.02, noise=((0.5, 0.2), (0.7, 0.8)), n=128, sign=1,
             error=0.0):  # fmt: skip
    """A row that leaks so much, beside noise; images that leak much do so everywhere."""
    draws = torch.Generator().manual_seed(1)
    hard = torch.randn(n, generator=draws, dtype=torch.float64)
    hard -= hard.mean()

    def values(share):
        own = torch.randn(n, generator=draws, dtype=torch.float64)
        return sign * (0.1 + 0.8 * share + 0.1 * hard + scatter * (own - own.mean()))

    return Compared(
        row=values(leak),
        floor=values(0.0),
        undefended=values(1.0),
        accuracy=Accuracy(accuracy, error),
        undefended_accuracy=0.76,
        points=tuple((at, values(share)) for at, share in noise),
    )


@pytest.mark.parametrize(("sign", "like"), [(1, SSIM), (-1, MSE)])
def test_gain_is_noise_less_the_row(sign, like):
    found = gain.gain({0: compared(0.3, sign=sign)}, like, 7, "decoder")
    assert found.value == pytest.approx(0.8 - 0.3)
    assert found.ci_low < found.value < found.ci_high
    assert found.n == 128
    assert found.source == "both attacked with decoder, seed 0"
    assert found.metric == f"gain({like.metric})"


def test_a_row_that_leaks_more_than_noise_gains_less_than_nothing():
    assert gain.gain({0: compared(0.95)}, SSIM, 7, "decoder").ci_high < 0


def test_between_two_points_noise_is_interpolated():
    found = gain.gain({0: compared(0.3, accuracy=0.6)}, SSIM, 7, "decoder")
    assert found.value == pytest.approx(0.5 - 0.3)


def test_images_are_paired():
    """What is hard for all columns alike does not widen the interval."""
    found = gain.gain({0: compared(0.3, scatter=0.0)}, SSIM, 7, "decoder")
    assert found.ci_high - found.ci_low < 1e-9


def test_an_uncertain_accuracy_widens_the_interval_by_the_slope():
    sure = gain.gain({0: compared(0.3, accuracy=0.6, scatter=0.0)}, SSIM, 7, "decoder")
    unsure = gain.gain({0: compared(0.3, accuracy=0.6, scatter=0.0, error=0.01)}, SSIM, 7, "d")
    # The curve rises by 0.6 over 0.2 of accuracy; 2 x 1.96 standard errors of 0.01.
    assert unsure.ci_high - unsure.ci_low == pytest.approx(2 * 1.96 * 0.01 * 3, rel=0.1)
    assert sure.ci_high - sure.ci_low < 1e-9


def test_below_the_curve_there_is_no_gain_and_a_reason():
    found = gain.gain({0: compared(0.3, accuracy=0.45)}, SSIM, 7, "decoder")
    assert found.value is None
    assert "45.0 % lies below the last point of the noise curve, 50.0 %" in found.reason


def test_without_a_span_there_is_no_gain():
    flat = compared(0.3)
    flat = Compared(flat.row, flat.undefended, flat.undefended, flat.accuracy, 0.76, flat.points)
    found = gain.gain({0: flat}, SSIM, 7, "decoder")
    assert found.value is None
    assert "not above the floor" in found.reason


def test_seeds_are_averaged_and_those_without_a_gain_left_out():
    both = {0: compared(0.3), 1: compared(0.5), 2: compared(0.1, accuracy=0.3)}
    found = gain.gain(both, SSIM, 7, "decoder")
    assert found.value == pytest.approx(0.4)
    assert found.source.endswith("seed 0, 1")


def test_same_input_same_interval():
    assert gain.gain({0: compared(0.3)}, SSIM, 7, "a") == gain.gain(
        {0: compared(0.3)}, SSIM, 7, "a"
    )


@given(st.floats(0.5, 0.8), st.permutations([(0.5, 0.2), (0.62, 0.9), (0.62, 0.5), (0.7, 0.8)]))
def test_resamples_follow_the_same_curve_as_the_value(accuracy, noise):
    """With no scatter and a sure accuracy the interval is the value of the written rule."""
    one = compared(0.3, accuracy=accuracy, scatter=0.0, noise=noise)
    found = gain.gain({0: one}, SSIM, 7, "decoder")
    wanted = rules.on_curve([(0.5, 0.2), (0.62, 0.7), (0.7, 0.8), (0.76, 1.0)], accuracy) - 0.3
    for value in (found.value, found.ci_low, found.ci_high):
        assert value == pytest.approx(wanted, abs=1e-9)


def test_a_curve_of_one_point_of_equal_accuracy_is_a_point():
    one = compared(0.3, accuracy=0.8, noise=((0.76, 0.6),))
    found = gain.gain({0: one}, SSIM, 7, "decoder")
    assert found.value == pytest.approx(0.8 - 0.3)  # the mean of noise and undefended end
