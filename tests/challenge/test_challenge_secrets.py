"""Nothing in a challenge shows the images, and no weight is there that the adversary lacks."""

import hashlib
import io
import re

import pytest
import torch
from challenge_runs import protocol_of_tests
from PIL import Image
from safetensors.torch import load_file

from mibench.backbones.base import BackboneSpec
from mibench.challenge import open_challenge
from mibench.challenge.grants import granted
from mibench.challenge.schema import SHARES, WEIGHTS
from mibench.data.roles import load_roles
from mibench.errors import InvalidParamsError
from mibench.registry import defenses
from mibench.task import Classification
from mibench.threat import Adversary, Knowledge, Target


def revealed(folder, images, labels):
    """What of these images, uint8 (N, 3, H, W), lies in the files of a folder."""
    found, tensors = set(), {}
    for path in sorted(folder.rglob("*")):
        data = path.read_bytes()
        if b"\x89PNG" in data or b"\xff\xd8\xff\xe0" in data:
            found.add("a picture")
        for image in images:
            chw, hwc = (one.contiguous() for one in (image, image.permute(1, 2, 0)))
            forms = [chw.numpy().tobytes(), hwc.numpy().tobytes()]
            forms += [(one.float() / 255).numpy().tobytes() for one in (chw, hwc)]
            if any(form in data for form in forms):
                found.add("pixels")
            digest = hashlib.sha256(forms[0]).digest()
            if digest in data or digest.hex().encode() in data:
                found.add("hashes")
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        else:
            text = data.decode(errors="replace")
            if re.search(r"[\[,\s]+".join(map(str, labels.tolist())), text):
                found.add("labels")
    for tensor in tensors.values():
        row = tensor.flatten()
        if len(row) == len(labels) and torch.equal(row.double(), labels.double()):
            found.add("labels")
    return found


def png(image):
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def attacked(made):
    return load_roles(made.job.protocol.data, None, made.store.root).attacked


def test_no_image_label_or_hash_is_in_the_folder(made, attacked):
    assert revealed(made.folder, attacked.raw(), attacked.labels) == set()


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (lambda images, labels: png(images[3]), "a picture"),
        (lambda images, labels: b"..." + images[5].numpy().tobytes(), "pixels"),
        (lambda images, labels: (images[2].float() / 255).numpy().tobytes(), "pixels"),
        (lambda images, labels: hashlib.sha256(images[1].numpy().tobytes()).digest(), "hashes"),
        (
            lambda images, labels: hashlib.sha256(images[1].numpy().tobytes()).hexdigest().encode(),
            "hashes",
        ),
        (lambda images, labels: f"labels: {labels.tolist()}".encode(), "labels"),
    ],
)
def test_what_is_planted_is_found(copy, attacked, plant, what):
    (copy / "planted.bin").write_bytes(plant(attacked.raw(), attacked.labels))
    assert what in revealed(copy, attacked.raw(), attacked.labels)


def test_a_share_is_no_image(opened, attacked):
    # Not even where a client sends as many values as an image has.
    (share,) = opened.shares
    assert share.shape[0] == len(attacked)
    assert share.shape[1:] != attacked.raw().shape[1:]


def test_other_servers_and_the_fusion_stay_behind(several):
    opened = open_challenge(several.folder)
    challenge, corrupted = opened.challenge, several.record.adversary.corrupted
    (mine,) = corrupted
    others = [at for at in range(3) if at != mine]
    assert any(name.startswith(f"branches.{mine}.") for name in challenge.granted)
    for at in others:
        assert not any(name.startswith(f"branches.{at}.") for name in challenge.granted)
    assert not any(name.startswith("fusion.") for name in challenge.granted)
    assert any(name.startswith("fusion.") for name in challenge.withheld)
    tensors = load_file(several.folder / WEIGHTS)
    assert set(tensors) == set(challenge.granted)
    assert challenge.partly["embed"] == others
    assert tensors["embed"][others].isnan().all()
    assert tensors["embed"][mine].isfinite().all()
    assert (tensors["assignment"][others] == 0).all()
    assert {one.server for one in challenge.messages} == {mine}
    assert [one.transmission for one in challenge.messages] == [0, 1]
    assert set(load_file(several.folder / SHARES)) == {one.name for one in challenge.messages}


def built(name, **params):
    protocol = protocol_of_tests()
    ten = Classification(tuple("0123456789"))
    split = BackboneSpec("small-resnet", protocol.backbone.params, "stem").build(
        (3, 32, 32), ten, 0
    )
    method = defenses.load(name)
    return method(split, method.Params(**params)).eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module")
def auxiliary(tmp_path_factory):
    place = tmp_path_factory.mktemp("roles")
    return load_roles(protocol_of_tests().data, None, place).auxiliary


@pytest.mark.parametrize("name", sorted(defenses.names()))
def test_what_is_granted_is_enough_and_what_is_withheld_unused(name, auxiliary):
    defense = built(name)
    before = {key: value.clone() for key, value in defense.state_dict().items()}
    adversary = Adversary(Knowledge.WHITE_BOX, (defense.servers - 1,))
    found = granted(defense, adversary, auxiliary)
    assert all(torch.equal(value, before[key]) for key, value in defense.state_dict().items()), (
        "it was left changed"
    )
    assert {*found.tensors, *found.withheld} == set(before)
    blind = built(name)
    state = blind.state_dict()
    with torch.no_grad():
        for key, value in state.items():
            value.copy_(found.tensors[key]) if key in found.tensors else value.fill_(
                float("nan") if value.is_floating_point() else 0
            )
    images = auxiliary.images(slice(20, 26))
    theirs, ours = Target(defense, adversary, "a"), Target(blind, adversary, "b")
    assert all(map(torch.equal, theirs.client(images), ours.client(images)))
    for turn in range(6):
        torch.manual_seed(turn)
        sent = theirs.query(images)
        torch.manual_seed(turn)
        assert all(map(torch.equal, sent, ours.query(images)))
    assert all(map(torch.equal, theirs.replies(sent), ours.replies(sent)))
    likely = [target.log_likelihood(sent, target.client(images)) for target in (theirs, ours)]
    assert torch.equal(*likely)
    assert likely[0].isfinite().all()


def test_who_has_data_alone_gets_the_servers_networks_alone(auxiliary):
    found = granted(built("noise"), Adversary(Knowledge.DATA_ONLY, (0,)), auxiliary)
    assert found.tensors
    assert all(name.startswith("server.") for name in found.tensors)
    assert any(name.startswith("client.") for name in found.withheld)


def test_queries_cannot_be_granted_by_a_folder(auxiliary):
    with pytest.raises(InvalidParamsError, match="a folder cannot answer"):
        granted(built("noise"), Adversary(Knowledge.BLACK_BOX, (0,)), auxiliary)
