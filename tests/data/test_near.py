"""Near copies: found however they are disguised, not seen where there are none, and refused."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mibench.artifacts import ArtifactStore
from mibench.data.near import TOLERATED_FEW, count_near_copies, near_copies, sketches
from mibench.data.procedural import Procedural
from mibench.data.roles import Roles
from mibench.data.sets import ImageSet
from mibench.errors import DataError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Generated images that all differ."""
    source = Procedural(None, 32, tmp_path_factory.mktemp("cache"))
    return source.load("stream", 0, 400)


def of(images):
    """An image set of floats in [0, 1]."""
    return ImageSet((images.clamp(0, 1) * 255).round().to(torch.uint8), torch.zeros(len(images)))


def each(images, change):
    """The images after a change by Pillow."""
    changed = [
        np.array(change(Image.fromarray(image)))
        for image in images.raw().permute(0, 2, 3, 1).numpy()
    ]
    return ImageSet(torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2), images.labels)


def as_jpeg(image, quality=75):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer)


def resized(image, side=24):
    return image.resize((side, side), Image.BICUBIC).resize(image.size, Image.BICUBIC)


DISGUISES = {
    "none": lambda one: one,
    "mirrored": lambda one: of(one.images().flip(3)),
    "jpeg": lambda one: each(one, as_jpeg),
    "mirrored jpeg": lambda one: each(of(one.images().flip(3)), as_jpeg),
    "smaller and back": lambda one: each(one, resized),
    "brighter": lambda one: of(one.images() * 1.1),
    "paler": lambda one: of(one.images() * 0.8 + 0.1),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_every_disguised_copy_is_found(drawn, name):
    private, rest = drawn.take(100), drawn.at(torch.arange(200, 400))
    copies = DISGUISES[name](private).images().flip(0)
    found = near_copies(private, of(torch.cat([rest.images(), copies])))
    assert found.float().mean() >= 0.99


def test_different_images_are_none(drawn):
    found = near_copies(drawn.take(200), drawn.at(torch.arange(200, 400)))
    assert not found.any()


@settings(max_examples=15)
@given(copied=st.sets(st.integers(0, 39), max_size=12), mirrored=st.booleans())
def test_those_that_have_a_copy_are_named_and_no_others(drawn, copied, mirrored):
    private, rest = drawn.take(40), drawn.at(torch.arange(200, 300)).images()
    copies = private.images(torch.tensor(sorted(copied), dtype=torch.int64)) * 0.95
    copies = copies.flip(3) if mirrored else copies
    found = near_copies(private, of(torch.cat([copies, rest])))
    assert set(found.nonzero().flatten().tolist()) == copied


def test_an_image_without_contrast_is_nobodys_copy():
    grey = of(torch.full((3, 3, 32, 32), 0.5))
    assert sketches(grey.images()).abs().sum() == 0
    assert not near_copies(grey, grey).any()


def roles(drawn, auxiliary):
    rest = drawn.at(torch.arange(300, 400))
    return Roles(rest, auxiliary, rest, drawn.take(40), torch.arange(20), None)


def test_a_few_are_counted_and_told(drawn, tmp_path, noted):
    others = drawn.at(torch.arange(200, 300)).images()
    mine = drawn.take(40).images().flip(3)
    few = of(torch.cat([others, mine[:TOLERATED_FEW], mine[30:]]))  # the last are not attacked
    store = ArtifactStore(tmp_path)
    assert count_near_copies(roles(drawn, few), store) == {"auxiliary": TOLERATED_FEW}
    assert any("near copies of 3 attacked" in line for line in noted)
    assert count_near_copies(roles(drawn, of(others)), store) == {}


@pytest.mark.parametrize("name", [name for name in DISGUISES if name != "none"])
def test_more_are_refused(drawn, tmp_path, name):
    others = drawn.at(torch.arange(200, 300)).images()
    copies = DISGUISES[name](drawn.take(TOLERATED_FEW + 1)).images()
    with pytest.raises(DataError, match=r"near copies .* of 4 of the 20 attacked images"):
        count_near_copies(roles(drawn, of(torch.cat([others, copies]))), ArtifactStore(tmp_path))


def test_the_search_is_kept(drawn, tmp_path, monkeypatch):
    store, some = ArtifactStore(tmp_path), roles(drawn, drawn.at(torch.arange(200, 300)))
    count_near_copies(some, store)
    monkeypatch.setattr("mibench.data.near.near_copies", None)
    assert count_near_copies(some, store) == {}
