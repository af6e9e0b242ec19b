"""What linear decoders explain in closed form, against least squares."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mibench.defenses.parts import closed_form
from mibench.defenses.parts.closed_form import (
    explained_alone,
    explained_by_tokens,
    explained_variance,
)


def test_the_score_is_what_least_squares_explains():
    draws = torch.Generator().manual_seed(0)
    units = torch.randn(300, 4, 3, generator=draws)
    units[:, 3] = 0.25  # dead
    targets = torch.randn(300, 5, generator=draws)
    targets[:, :3] += 2 * units[:, 0] + 1
    targets[:, 4] += units[:, 1, 2]
    found, deviation = explained_alone(zip(units.split(100), targets.split(100), strict=True))
    y = targets.numpy() - targets.numpy().mean(0)
    for unit in range(3):
        x = units[:, unit].numpy() - units[:, unit].numpy().mean(0)
        rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
        assert found[unit] == pytest.approx(1 - (rest**2).sum() / (y**2).sum(), abs=0.002)
    assert found[0] > 0.5 > found[1] > found[2]
    assert found[3] == pytest.approx(0, abs=1e-4)
    assert deviation[:3] == pytest.approx(np.ones(3), abs=0.1)
    assert deviation[3] == pytest.approx(0, abs=1e-3)


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


def test_tokens_that_are_pixels_explain_the_part_that_is_sent():
    torch.manual_seed(0)
    images = torch.rand(100, 3, 8, 8)
    tokens = F.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2)
    told = [
        explained_by_tokens(tokens[:, :count], images, torch.arange(count), (4, 4)).item()
        for count in (16, 8, 1)
    ]
    assert told == pytest.approx([1, 0.5, 1 / 16], abs=0.02)


def test_a_token_is_judged_by_its_own_place():
    torch.manual_seed(0)
    images, places = torch.rand(200, 3, 8, 8), torch.tensor([1, 6, 11])
    tokens = F.avg_pool2d(images, 2).flatten(2).transpose(1, 2)[:, places]
    tokens = 5 * tokens + 0.1 * torch.randn_like(tokens)
    told = explained_by_tokens(tokens, images, places, (4, 4))
    assert told > 10 * explained_by_tokens(tokens, images, places + 1, (4, 4))

    x = tokens.flatten(0, 1).numpy().astype(float)
    blocks = F.pixel_unshuffle(images, 2).flatten(2).transpose(1, 2).numpy().astype(float)
    y = blocks[:, places].reshape(600, 12)
    x, y = x - x.mean(0), y - y.mean(0)
    rest = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    whole = ((blocks - blocks.mean((0, 1))) ** 2).sum()
    assert told == pytest.approx(((y**2).sum() - (rest**2).sum()) / whole, rel=0.01)


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
    monkeypatch.setattr(closed_form, "PLACES", 64)
    whole = explained_variance(share, images).item()
    assert thin != whole
    assert 0.1 < whole < 0.95
    assert thin == pytest.approx(whole, abs=0.02)
