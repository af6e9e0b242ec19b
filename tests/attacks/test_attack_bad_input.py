"""What no attack can do anything with: said in one line, or scored like anything else."""

import pytest
import torch
from tiny_attacks import NAMES, assault_on, tiny_job, tiny_roles

from mibench.assault import LEAST_IMAGES
from mibench.errors import DataError, InvalidParamsError
from mibench.evaluate import open_record
from mibench.registry import attacks
from mibench.threat import Knowledge

WEAKER = [
    (name, granted)
    for name in NAMES
    for granted in Knowledge
    if not granted.grants(attacks.load(name).knowledge)
]
BREAKS = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@pytest.mark.parametrize(("name", "granted"), WEAKER)
def test_more_knowledge_than_is_granted_is_refused(name, granted):
    job, needed = tiny_job(name, {"knowledge": granted}), attacks.load(name).knowledge
    with pytest.raises(InvalidParamsError) as caught:
        open_record(job, "cpu")
    assert f"attack {name} needs {needed} knowledge" in str(caught.value)
    assert f"tiny-v1 grants {granted}" in str(caught.value)


def test_there_are_attacks_that_need_more():
    assert {granted for _, granted in WEAKER} == {Knowledge.DATA_ONLY, Knowledge.BLACK_BOX}


@pytest.mark.parametrize("count", [0, 1, LEAST_IMAGES["auxiliary"] - 1])
@pytest.mark.parametrize("name", NAMES)
def test_too_few_auxiliary_images_are_refused(make_defense, pictures, tmp_path, name, count):
    roles = tiny_roles(pictures(count), pictures(8, seed=1), pictures(4, seed=2))
    with pytest.raises(DataError) as caught:
        assault_on(make_defense("none", "map"), tiny_job(name), roles, tmp_path)
    said = str(caught.value)
    assert f"the role 'auxiliary' has {count} images" in said
    assert f"attack {name} needs at least {LEAST_IMAGES['auxiliary']}" in said
    assert "data.auxiliary" in said
    assert "\n" not in said


@pytest.mark.parametrize("count", range(LEAST_IMAGES["validation"]))
def test_too_few_validation_images_are_refused(make_defense, pictures, tmp_path, count):
    roles = tiny_roles(pictures(32), pictures(count, seed=1), pictures(4, seed=2))
    with pytest.raises(DataError, match=f"the role 'validation' has {count} images"):
        assault_on(make_defense("none", "map"), tiny_job("decoder"), roles, tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_the_fewest_images_that_are_allowed_are_enough(make_defense, pictures, tmp_path, name):
    fewest = LEAST_IMAGES["auxiliary"], LEAST_IMAGES["validation"]
    roles = tiny_roles(pictures(fewest[0]), pictures(fewest[1], seed=1), pictures(2, seed=2))
    params = {"servers": 2, "density": 0.25}
    defense = make_defense("privdfs", "map", params)  # coalitions are screened as well
    assert scored(assault_on(defense, tiny_job(name), roles, tmp_path), 2).isfinite().all()


def scored(assault, count):
    """What an attack makes of what it received; the stage refuses anything but images."""
    rebuilt = assault.from_true_shares()
    assert rebuilt.shape == (count, 3, 16, 16)
    return rebuilt


class Flattened(torch.nn.Module):
    """A client whose features are the same everywhere, or for every image."""

    def __init__(self, client, value):
        super().__init__()
        self.inner, self.value = client, value

    def forward(self, images):
        return 0 * self.inner(images) + self.value


@pytest.mark.parametrize("value", [0.0, 7.0])
@pytest.mark.parametrize("features", ["map", "class-token"])
@pytest.mark.parametrize("name", NAMES)
def test_a_constant_share_is_scored(make_defense, pictures, tmp_path, name, features, value):
    defense = make_defense("none", features)
    defense.client = Flattened(defense.client, value)
    roles = tiny_roles(pictures(16), pictures(4, seed=1), pictures(3, seed=2))
    assault = assault_on(defense, tiny_job(name), roles, tmp_path)
    (share,) = assault.shares
    assert (share == value).all()
    scored(assault, 3)


@pytest.mark.parametrize("name", NAMES)
def test_a_share_that_is_constant_for_one_image_is_scored(make_defense, pictures, tmp_path, name):
    roles = tiny_roles(pictures(16), pictures(4, seed=1), pictures(3, seed=2))
    assault = assault_on(make_defense("none", "map"), tiny_job(name), roles, tmp_path)
    assault.shares[0][1] = 0
    scored(assault, 3)


@pytest.mark.parametrize("broken", BREAKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_share_that_is_not_finite_is_named_and_scored(
    make_defense, pictures, tmp_path, monkeypatch, noted, name, broken
):
    defense = make_defense("privdfs", "map", {"servers": 2, "density": 0.25})
    auxiliary, secret = pictures(32), pictures(4, seed=2)
    bad = torch.cat([auxiliary.images()[5:6], secret.images()[2:3]])
    protect = defense.protect

    def overflowing(images):
        first, second = protect(images)
        hit = (images[:, None] == bad).flatten(2).all(2).any(1)
        second = second.clone()
        second[hit, 1] = BREAKS[broken]
        return first, second

    defense.protect = overflowing
    roles = tiny_roles(auxiliary, pictures(8, seed=1), secret)
    assault = assault_on(defense, tiny_job(name, {"coalition": 2}), roles, tmp_path)
    said = (
        "defense privdfs: the share of server 1 holds values that are infinite or not a number "
        "for 1 of 4 images; each is read as the mean of the others in its place"
    )
    assert [note for note in noted if "privdfs" in note] == [said]
    assert all(share.isfinite().all() for share in assault.shares)
    assert assault.adversary.broken == 1
    scored(assault, 4)


def test_nothing_is_said_of_finite_shares(make_defense, pictures, tmp_path, noted):
    roles = tiny_roles(pictures(16), pictures(4, seed=1), pictures(3, seed=2))
    assault_on(make_defense("none", "map"), tiny_job("decoder"), roles, tmp_path)
    assert not [note for note in noted if "not a number" in note]


@pytest.mark.parametrize("name", NAMES)
def test_a_message_of_absurd_size_is_scored(make_defense, pictures, tmp_path, name):
    roles = tiny_roles(pictures(16), pictures(4, seed=1), pictures(3, seed=2))
    assault = assault_on(make_defense("none", "map"), tiny_job(name), roles, tmp_path)
    assault.shares[0][1] = 1e30
    scored(assault, 3)
