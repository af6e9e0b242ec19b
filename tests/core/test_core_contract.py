"""Defenses that try to reach the servers by another way than their shares."""

import pytest
import torch
from torch import nn

from mibench.backbones.base import BackboneSpec
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense
from mibench.deployment import check_contract
from mibench.errors import DivergedError, PluginError
from mibench.task import Classification
from mibench.utility import answers

TASK = Classification(("a", "b", "c", "d"))


class Honest(Defense):
    """Plain split inference."""

    name, version = "honest", 1

    def protect(self, images):
        return (self.client(images),)


class Stash(Honest):
    """Sends zeros and keeps the features on the object."""

    def protect(self, images):
        self.kept = self.client(images)
        return (torch.zeros_like(self.kept),)

    def serve(self, index, share):
        return self.server(self.kept[: len(share)])


class Mirror(Honest):
    """Turns the order of the batch around, so that the attacked share is another image's."""

    def protect(self, images):
        return (self.client(images).flip(0),)

    def fuse(self, replies):
        return replies[0].flip(0)


class TwoShares(Honest):
    """Declares one server and sends two shares."""

    def protect(self, images):
        features = self.client(images)
        return features[:, :1], features


class NoTuple(Honest):
    """Forgets the tuple."""

    def protect(self, images):
        return self.client(images)


class Shy(Honest):
    """Adds noise and tells nobody its law."""

    def protect(self, images):
        features = self.client(images)
        return (features + torch.randn_like(features),)


class Liar(Honest):
    """Sends the features and says that it sends nothing."""

    def predict(self, images):
        return (torch.zeros_like(self.client(images)),)


class Broken(Honest):
    """Sends what is not a number."""

    def protect(self, images):
        return (self.client(images) * float("nan"),)


@pytest.fixture
def make():
    def build(cls):
        spec = BackboneSpec("small-resnet", {"stem": 8, "width": 8}, "stem")
        split = spec.build((3, 16, 16), TASK, seed=0)
        return cls(split, cls.Params()).eval()

    return build


@pytest.fixture
def labelled(make):
    """Images with the labels that the honest model gives, so that it is always right."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (400, 3, 16, 16), dtype=torch.uint8)
    images = ImageSet(pixels, torch.zeros(400, dtype=torch.int64))
    model = make(Honest)
    nn.init.normal_(model.server[-1][-1].weight, std=3.0)
    with torch.no_grad():
        labels = model(images.images()).argmax(1)
    assert len(labels.unique()) > 1
    return ImageSet(pixels, labels), model.server.state_dict()


def accuracy(make, labelled, cls):
    images, state = labelled
    model = make(cls)
    model.server.load_state_dict(state)
    return TASK.correct(answers(model, images, batch=50), images.labels).mean().item()


def test_an_honest_defense_keeps_its_accuracy(make, labelled):
    assert accuracy(make, labelled, Honest) == 1


def test_servers_do_not_see_what_the_client_keeps(make, labelled):
    with pytest.raises(PluginError, match="has no attribute 'kept'"):
        accuracy(make, labelled, Stash)


def test_the_order_of_a_batch_carries_nothing(make, labelled):
    images, _ = labelled
    chance = images.labels.bincount().max().item() / len(images)
    assert accuracy(make, labelled, Mirror) < chance + 0.1


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (TwoShares, r"2 shares, but the defense declares 1"),
        (NoTuple, r"must return a tuple"),
        (Shy, r"must override predict\(\) and log_likelihood\(\)"),
        (Liar, r"predict\(\) returns something else than it sends"),
        (Broken, r"not a number"),
    ],
)
def test_a_broken_contract_is_refused_in_one_line(make, cls, words):
    with pytest.raises(PluginError, match=words) as caught:
        check_contract(make(cls), torch.rand(4, 3, 16, 16))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["forward", "__call__", "transmit"])
def test_the_wiring_cannot_be_overridden(name):
    with pytest.raises(PluginError, match=rf"overrides {name}"):
        type("Mine", (Honest,), {name: lambda self, *_: None})


class Collapsed(Honest):
    """Sends the same features for every image, as a training under heavy penalties may end."""

    def protect(self, images):
        return (0 * self.client(images) + 0.3,)


def test_a_collapsed_training_is_one_clear_line(make):
    with pytest.raises(DivergedError, match=r"defense honest: .* same message for every image"):
        check_contract(make(Collapsed), torch.rand(4, 3, 16, 16))


class Gappy(Honest):
    """Drops channels by the image; its law compares what arrived, which `predict` has whole."""

    def protect(self, images):
        features = self.client(images)
        return (features * (features.mean((2, 3), keepdim=True) > features.mean()),)

    def predict(self, images):
        return (self.client(images),)

    def log_likelihood(self, shares, predicted):
        residual = (shares[0] - predicted[0]) * (shares[0] != 0)
        return -residual.square().flatten(1).sum(1)


def test_a_deterministic_defense_may_have_a_law_of_its_own(make):
    check_contract(make(Gappy), torch.rand(4, 3, 16, 16))
