"""Ridge regression: exact where the client is linear, and a judge of shares."""

import pytest
import torch
from torch.nn import functional as F

from mibench.attacks import ridge
from mibench.attacks.ridge import ridge_error, shrink


def images(count, seed):
    return torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def mixing(inputs, outputs):
    draws = torch.Generator().manual_seed(9)
    return torch.linalg.qr(
        torch.randn(max(inputs, outputs), max(inputs, outputs), generator=draws)
    ).Q[:inputs, :outputs]


def test_it_is_exact_for_a_linear_client():
    learn, judge = images(400, 0), images(50, 1)
    matrix = mixing(48, 48)

    def client(x):
        mixed = 5 * x.flatten(1) @ matrix + 3
        return mixed[:, :20], mixed[:, 20:].view(-1, 7, 2, 2)

    assert ridge_error(client(learn), learn, client(judge), judge, 0) < 1e-5


def test_half_of_the_values_explain_half():
    learn, judge = images(2000, 0), images(200, 1)

    def client(x):
        return (x.flatten(1)[:, :24],)

    error = ridge_error(client(learn), learn, client(judge), judge, 0)
    assert error == pytest.approx(0.5 / 12, rel=0.1)  # a uniform value has variance 1/12


def test_a_share_without_information_is_no_better_than_the_mean():
    learn, judge = images(1000, 0), images(200, 1)
    noise = torch.Generator().manual_seed(5)

    def client(x):
        return (torch.randn(len(x), 10, generator=noise),)

    mean = (judge - learn.mean(0)).square().mean()
    error = ridge_error(client(learn), learn, client(judge), judge, 0)
    assert error == pytest.approx(mean.item(), rel=0.05)


def test_the_leaking_share_has_the_smaller_error():
    learn, judge = images(500, 0), images(100, 1)
    noise = torch.Generator().manual_seed(5)

    def shares(x, level):
        flat = x.flatten(1)
        return (flat + level * torch.randn(flat.shape, generator=noise),)

    errors = [
        ridge_error(shares(learn, level), learn, shares(judge, level), judge, 0)
        for level in (0.0, 0.2, 1.0)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.1 * errors[2]


def test_a_long_message_is_projected_and_still_read(monkeypatch):
    monkeypatch.setattr(ridge, "MAX_INPUTS", 64)
    learn, judge = images(500, 0), images(50, 1)
    matrix = mixing(48, 200)

    def client(x):
        return (x.flatten(1) @ matrix,)

    error = ridge_error(client(learn), learn, client(judge), judge, 0)
    assert error < 0.1 / 12
    assert error == ridge_error(client(learn), learn, client(judge), judge, 0)


def test_a_long_message_is_read_block_by_block(monkeypatch):
    monkeypatch.setattr(ridge, "MAX_INPUTS", 64)
    learn, judge = images(500, 0), images(50, 1)
    matrix = mixing(48, 200)

    def client(x):
        mixed = x.flatten(1) @ matrix
        return mixed[:, :90], mixed[:, 90:]

    whole = ridge_error(client(learn), learn, client(judge), judge, 0)
    monkeypatch.setattr(ridge, "BLOCK", 32)
    parts = ridge_error(client(learn), learn, client(judge), judge, 0)
    assert parts < 0.1 / 12
    assert parts == pytest.approx(whole, rel=0.5)


def test_large_images_are_predicted_at_a_smaller_size():
    draws = torch.Generator().manual_seed(0)
    learn, judge = (torch.rand(60, 3, 64, 64, generator=draws) for _ in range(2))

    def client(x):
        return (F.avg_pool2d(x, 16).flatten(2).transpose(1, 2),)

    small = [F.avg_pool2d(x, 2) for x in (learn, judge)]
    error = ridge_error(client(learn), learn, client(judge), judge, 0)
    assert error == pytest.approx(ridge_error(client(learn), small[0], client(judge), small[1], 0))
    assert torch.equal(shrink(small[0]), small[0])
    assert shrink(torch.rand(1, 3, 224, 224)).shape == (1, 3, 32, 32)


def test_guesses_stay_in_range():
    learn, judge = images(100, 0), torch.ones(10, 3, 4, 4)
    far = (100 * torch.ones(10, 48),)
    assert ridge_error((learn.flatten(1),), learn, far, judge, 0) == 0.0


def test_a_share_does_not_hide_behind_its_scale():
    torch.manual_seed(0)
    images, other = torch.rand(400, 3, 4, 4), torch.rand(50, 3, 4, 4)

    def share(of, gain):
        junk = torch.randn(len(of), 20)
        return (torch.cat([gain * of.flatten(1), junk], dim=1),)

    plain = ridge_error(share(images, 1.0), images, share(other, 1.0), other, seed=0)
    shrunk = ridge_error(share(images, 0.01), images, share(other, 0.01), other, seed=0)
    assert shrunk < 0.01
    assert shrunk == pytest.approx(plain, rel=0.5, abs=1e-4)
