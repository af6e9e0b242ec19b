"""Controls: guesses that look at nothing, and shares that are another image's."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from mibench.controls import blind_guesses, permute
from mibench.data.sets import ImageSet


def pictures(count, seed=0):
    draws = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=draws, dtype=torch.uint8)
    return ImageSet(pixels, torch.zeros(count, dtype=torch.int64))


@given(st.integers(2, 40), st.integers(1, 3))
def test_no_image_keeps_its_shares_and_none_is_lost(count, servers):
    order = torch.arange(count)
    shares = tuple(
        (order + 100 * k).view(-1, 1, 1).expand(count, 2, 3).clone() for k in range(servers)
    )
    moved = permute(shares)
    owners = []
    for k, share in enumerate(moved):
        assert share.shape == shares[k].shape
        owner = share[:, 0, 0] - 100 * k
        assert torch.equal(share, shares[k][owner])
        assert not (owner == order).any()
        assert sorted(owner.tolist()) == order.tolist()
        owners.append(owner)
    # All servers' shares of one place come from one image.
    assert all(torch.equal(owner, owners[0]) for owner in owners)


def test_the_mean_image_is_the_best_constant():
    auxiliary = pictures(50)
    images = auxiliary.images()
    guess = blind_guesses(auxiliary, 50)["mean-image"]
    least = (guess - images).square().mean()
    draws = torch.Generator().manual_seed(1)
    rivals = [guess + 0.02 * torch.randn(1, 3, 4, 4, generator=draws) for _ in range(20)]
    rivals += [guess * 0 + 0.5, images[:1], images.median(0).values[None]]
    for rival in rivals:
        assert (rival - images).square().mean() > least


def test_the_typical_image_is_a_real_one_and_the_best_of_them():
    auxiliary = pictures(30)
    images = auxiliary.images()
    guess = blind_guesses(auxiliary, 4)["typical-image"]
    assert guess.shape == (4, 3, 4, 4)
    errors = [(image - images).square().mean().item() for image in images]
    assert torch.equal(guess[0], images[min(range(30), key=errors.__getitem__)])


def test_guesses_are_the_same_for_every_image():
    for guess in blind_guesses(pictures(10), 6).values():
        assert guess.shape == (6, 3, 4, 4)
        assert torch.equal(guess, guess[:1].expand_as(guess))
        assert guess.min() >= 0
        assert guess.max() <= 1
