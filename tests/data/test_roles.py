"""Roles: cut from one dataset, and refused where an image is in two of them."""

import pytest
import torch

from mibench.data.base import Dataset, ImageSet, load_roles, stack
from mibench.errors import DataError
from mibench.protocol import DataRule, RoleRule
from mibench.registry import datasets

PLACES = {"train": 0, "auxiliary": 100, "validation": 200, "private": 300}


class Numbered(Dataset):
    """Image i shows the number i, but a table can say otherwise."""

    class_names = ("a", "b")
    instead: dict[int, int]

    def load(self, split, start, count):
        assert split == "s"
        numbers = [self.instead.get(i, i) for i in range(start, start + count)]
        images = [torch.full((3, 8, 8), n % 256, dtype=torch.uint8) for n in numbers]
        for image, n in zip(images, numbers, strict=True):
            image[0, 0, 0] = n // 256
        return stack(images, [n % 2 for n in numbers])


@pytest.fixture
def cut(monkeypatch):
    def make(instead=None, attacked=4):
        monkeypatch.setattr(Numbered, "instead", instead or {}, raising=False)
        monkeypatch.setattr(datasets, "load", lambda _: Numbered)
        roles = {n: RoleRule(split="s", start=at, count=10) for n, at in PLACES.items()}
        return load_roles(DataRule(dataset="n", image_size=8, attacked=attacked, **roles), None)

    return make


def test_each_role_holds_its_images_in_order(cut):
    roles = cut()
    for name, start in PLACES.items():
        images = getattr(roles, name)
        numbers = [int(p[0, 0, 0]) * 256 + int(p[2, 7, 7]) for p in images.pixels]
        assert numbers == list(range(start, start + 10))
        assert images.labels.tolist() == [n % 2 for n in numbers]
    assert roles.class_names == ("a", "b")


@pytest.mark.parametrize("role", ["train", "auxiliary", "validation"])
@pytest.mark.parametrize("place", [0, 9])
def test_an_attacked_image_in_another_role_is_refused(cut, role, place):
    with pytest.raises(DataError, match=f"1 images of the role '{role}'") as caught:
        cut({PLACES[role] + place: PLACES["private"] + 3})
    assert "\n" not in str(caught.value)


def test_the_label_does_not_hide_a_copy(cut, monkeypatch):
    original = Numbered.load

    def relabelled(self, split, start, count):
        images = original(self, split, start, count)
        return ImageSet(images.pixels, images.labels + start)

    monkeypatch.setattr(Numbered, "load", relabelled)
    with pytest.raises(DataError, match="also in the role"):
        cut({PLACES["auxiliary"]: PLACES["private"]})


def test_hashes_name_pixels_and_identity_names_the_set():
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(5))
    hashes = images.hashes()
    assert len(set(hashes)) == 5
    assert images.take(2).hashes() == hashes[:2]
    assert len(images.take(2)) == 2
    # Another layout in memory is the same images.
    shuffled = ImageSet(pixels.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1), images.labels)
    assert shuffled.hashes() == hashes
    assert shuffled.identity == images.identity
    touched = pixels.clone()
    touched[4, 2, 7, 7] ^= 1
    assert ImageSet(touched, images.labels).hashes()[:4] == hashes[:4]
    assert ImageSet(touched, images.labels).hashes()[4] != hashes[4]
    others = [
        ImageSet(touched, images.labels),
        ImageSet(pixels, images.labels.flip(0)),
        ImageSet(pixels.flip(0), images.labels),
        images.take(4),
    ]
    assert len({images.identity, *(other.identity for other in others)}) == 5


def test_images_come_out_between_zero_and_one():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    images = ImageSet(pixels, torch.zeros(3, dtype=torch.int64))
    assert images.image_shape == (3, 2, 2)
    assert images.images()[:, 0, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
    assert images.images(torch.tensor([2, 0]))[:, 0, 0, 0].tolist() == [1, 0]
