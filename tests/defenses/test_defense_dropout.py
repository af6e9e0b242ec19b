"""Dropped features: how many, how the gaps are told from zeros, and what averaging brings back."""

import math

import pytest
import torch

from mibench.errors import InvalidParamsError
from mibench.params import build
from mibench.registry import defenses


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.95])
@torch.no_grad()
def test_the_share_of_gaps_is_the_rate_and_what_is_kept_is_untouched(make_defense, pictures, rate):
    defense = make_defense("dropout", {"rate": rate}).eval()
    images = pictures(64).images()
    clean, sent = defense.predict(images)[0], defense.protect(images)[0]
    live = clean != 0
    kept = sent[live] != 0
    assert 1 - kept.float().mean() == pytest.approx(rate, abs=0.02)
    assert torch.equal(sent[live][kept], clean[live][kept])


@torch.no_grad()
def test_a_gap_says_little_and_a_value_says_much(make_defense):
    defense = make_defense("dropout", {"rate": 0.5})
    f = torch.ones(1, 8, 8, 8)
    sent = f.clone()
    sent[:, :, :4] = 0
    fits = defense.log_likelihood((sent,), (f,))
    unseen = f.clone()
    unseen[:, :, :4] = 7.0  # where nothing arrived, a feature can be anything that is not zero
    torch.testing.assert_close(defense.log_likelihood((sent,), (unseen,)), fits)
    seen = f.clone()
    seen[:, :, 4:] = 1.2
    assert defense.log_likelihood((sent,), (seen,)) < fits - 100
    # A feature of zero explains a gap better than one that had to be dropped.
    zero = f.clone()
    zero[:, :, :4] = 0
    gain = defense.log_likelihood((sent,), (zero,)) - fits
    assert gain.item() == pytest.approx(256 * math.log(2), rel=1e-5)


@pytest.mark.parametrize("value", [-0.1, 0.0, 1.0, 1.5])
def test_a_rate_out_of_range_is_refused(value):
    with pytest.raises(InvalidParamsError, match=r"rate.*expected a number > 0.* and < 1"):
        build(defenses.load("dropout").Params, {"rate": value}, "defense dropout")
