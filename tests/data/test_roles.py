"""Roles: cut from one dataset, and refused where an image is in two of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mibench.data.base import Dataset
from mibench.data.roles import load_roles, open_dataset, role_images
from mibench.data.sets import ImageSet, Selected, digest, stack
from mibench.errors import DataError, UnknownNameError
from mibench.protocol import DataRule, RoleRule
from mibench.registry import datasets
from mibench.task import Classification

PLACES = {"train": 0, "auxiliary": 100, "validation": 200, "private": 300}


class Numbered(Dataset):
    """Image i shows the number i, but a table can say otherwise."""

    name = "numbered"
    task = Classification(("a", "b"))
    instead: dict[int, int]

    length = 400

    def size(self, split):
        return self.length

    def load(self, split, start, count):
        assert split == "s"
        numbers = [self.instead.get(i, i) for i in range(start, start + count)]
        images = [torch.full((3, 8, 8), n % 256, dtype=torch.uint8) for n in numbers]
        for image, n in zip(images, numbers, strict=True):
            image[0, 0, 0] = n // 256
        return stack(images, [n % 2 for n in numbers])


@pytest.fixture
def cut(monkeypatch, tmp_path):
    def make(instead=None, attacked=4, count=10, **rules):
        monkeypatch.setattr(Numbered, "instead", instead or {}, raising=False)
        monkeypatch.setattr(datasets, "load", lambda _: Numbered)
        roles = {n: RoleRule(split="s", start=at, count=count) for n, at in PLACES.items()}
        rule = DataRule(dataset="n", image_size=8, attacked=attacked, **{**roles, **rules})
        return load_roles(rule, None, tmp_path)

    return make


def test_each_role_holds_its_images_in_order(cut):
    roles = cut()
    for name, start in PLACES.items():
        images = getattr(roles, name)
        assert numbers(images) == list(range(start, start + 10))
        assert images.labels.tolist() == [n % 2 for n in numbers(images)]
    assert roles.task.names == ("a", "b")
    assert roles.left_out == {}


def numbers(images):
    return [int(p[0, 0, 0]) * 256 + int(p[2, 7, 7]) for p in images.raw()]


def test_a_few_copies_are_left_out_of_the_other_role(cut, noted):
    # As in CIFAR-100: ten of the test images are training images, pixel for pixel.
    copies = {100 + 100 * k: 5000 + 7 * k for k in range(10)}
    places = {"train": 0, "auxiliary": 2000, "validation": 4000, "private": 5000}
    rules = {
        name: RoleRule(split="s", start=at, count=500 if name == "validation" else 2000)
        for name, at in places.items()
    }
    roles = cut(copies, attacked=8, **rules)
    assert roles.left_out == {"train": 10}
    assert numbers(roles.train) == [n for n in range(2000) if n not in copies]
    assert roles.train.labels.tolist() == [n % 2 for n in range(2000) if n not in copies]
    assert len(roles.private) == len(roles.auxiliary) == 2000
    assert noted == ["left out of train: 10 images that another role holds as well"]


def test_more_copies_are_refused(cut):
    private = RoleRule(split="s", start=5000, count=2000)
    with pytest.raises(DataError, match="11 images of the role 'train'"):
        cut(dict.fromkeys(range(11), 5000), train=RoleRule(split="s", count=50), private=private)


CUTS = {"train": (0, 0.5), "auxiliary": (0.5, 0.8), "validation": (0.8, 0.9), "private": (0.9, 1)}


def hashed(cut, instead=None):
    rules = {name: RoleRule(split="s", hashed=part) for name, part in CUTS.items()}
    roles = cut(instead, attacked=2, **rules)
    return {name: numbers(getattr(roles, name)) for name in CUTS}


def test_roles_by_hash_share_nothing_and_hold_everything(cut):
    parts = hashed(cut)
    assert sorted(n for part in parts.values() for n in part) == list(range(400))
    for name, (low, high) in CUTS.items():
        assert abs(len(parts[name]) - 400 * (high - low)) < 40


def test_copies_play_the_same_role(cut):
    parts = hashed(cut, {300 + k: k for k in range(100)})
    for part in parts.values():
        assert all(part.count(n) == 2 for n in part if n < 100)
    assert sum(part.count(n) for part in parts.values() for n in range(100)) == 200


@settings(max_examples=20, deadline=None)
@given(count=st.integers(60, 300), more=st.integers(0, 60), data=st.data())
def test_images_that_are_added_move_no_others(count, more, data):
    order = data.draw(st.permutations(range(count + more)))  # new ones may lie between old ones
    with pytest.MonkeyPatch.context() as patch:

        def chosen(listed, part):
            patch.setattr(Numbered, "length", len(listed))
            patch.setattr(Numbered, "instead", dict(enumerate(listed)), raising=False)
            data = Numbered(None, 8, None)
            return numbers(role_images(data, RoleRule(split="s", hashed=part)))

        for part in CUTS.values():
            before = chosen(range(count), part)
            after = chosen(order, part)
            assert [n for n in after if n < count] == before


def test_a_role_by_hash_that_stays_empty(cut, monkeypatch):
    monkeypatch.setattr(Numbered, "length", 3)
    with pytest.raises(DataError, match="too few"):
        hashed(cut)


def test_training_images_may_be_auxiliary_ones_only_if_the_protocol_says_so(cut):
    with pytest.raises(DataError, match="'auxiliary' are also in the role 'train'"):
        cut({100 + k: k for k in range(10)})
    roles = cut(auxiliary=RoleRule(split="s", start=0, count=5))
    assert numbers(roles.auxiliary) == numbers(roles.train)[:5]
    assert roles.left_out == {}


def test_only_images_that_differ_are_attacked(cut):
    # A copy of an attacked image would be its own control.
    start = PLACES["private"]
    roles = cut({start + 1: start, start + 3: start + 2}, attacked=4)
    assert numbers(roles.attacked) == [start, start + 2, start + 4, start + 5]
    assert roles.chosen.tolist() == [0, 2, 4, 5]
    assert len(roles.private) == 10
    with pytest.raises(DataError, match="only 8 that differ"):
        cut({start + 1: start, start + 3: start + 2}, attacked=9)


def stored(count=6):
    draws = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 4, 4), generator=draws, dtype=torch.uint8)
    digests = torch.stack(
        [torch.tensor(list(digest(image)), dtype=torch.uint8) for image in pixels]
    )
    return pixels, digests


def test_chosen_images_lead_to_no_others():
    pixels, digests = stored()
    rows = torch.tensor([4, 1, 3])
    images = ImageSet(Selected(pixels, rows, digests[rows]), torch.arange(3), digests[rows])
    assert images.pixels.shape == (3, 3, 4, 4)
    assert torch.equal(images.raw(), pixels[rows])
    part = images.at(torch.tensor([2, 0]))
    assert torch.equal(part.raw(), pixels[[3, 4]])
    assert part.hashes() == [images.hashes()[2], images.hashes()[0]]
    for one in (images, part):
        with pytest.raises(IndexError):
            one.raw(torch.tensor([len(one)]))
        public = [name for name in dir(one.pixels) if not name.startswith("_")]
        assert public == ["at", "shape"]


def test_an_image_that_was_damaged_on_disk_is_not_used():
    pixels, digests = stored()
    images = ImageSet(Selected(pixels, torch.arange(6), digests), torch.arange(6), digests)
    images.raw(slice(0, 2))
    pixels[4, 0, 0, 0] ^= 1
    images.raw(slice(0, 4))
    with pytest.raises(DataError, match="damaged"):
        images.raw(torch.tensor([5, 4]))


def test_a_role_by_hash_of_an_endless_set_is_refused(cut, monkeypatch):
    monkeypatch.setattr(Numbered, "length", 2**32)
    with pytest.raises(DataError, match="too many to choose a role by their hashes"):
        hashed(cut)


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


def test_a_dataset_of_ones_own_class_is_not_taken_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from mibench.data.base import Dataset\n"
        "from mibench.data.sets import ImageSet\n"
        "from mibench.task import Classification\n\n\n"
        "class Mine(Dataset):\n"
        '    """Grey images."""\n\n'
        '    task = Classification(("a", "b"))\n\n'
        "    def size(self, split):\n"
        "        return 9\n\n"
        "    def load(self, split, start, count):\n"
        "        pixels = torch.full((count, 3, 8, 8), 7, dtype=torch.uint8)\n"
        "        return ImageSet(pixels, torch.zeros(count, dtype=torch.int64))\n"
    )
    dataset = open_dataset("./mine.py:Mine", 8, None, tmp_path)
    assert dataset.task.names == ("a", "b")
    assert len(dataset.load("any", 0, 3)) == 3


def test_a_name_that_is_a_folder_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    with pytest.raises(UnknownNameError, match=r"for the folder of that name write \./own"):
        open_dataset("own", 8, None, tmp_path)
