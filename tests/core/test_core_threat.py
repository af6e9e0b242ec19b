"""The threat model: a target grants what its adversary was granted, and nothing else."""

import dataclasses

import pytest
import torch
from torch import nn

from mibench.defenses.base import Defense
from mibench.errors import ThreatModelError
from mibench.threat import Adversary, Knowledge, Target

ORDER = [Knowledge.DATA_ONLY, Knowledge.BLACK_BOX, Knowledge.WHITE_BOX]


class ThreeServers(Defense):
    """Sends three scaled copies of the mean colour, with noise."""

    def __init__(self):
        nn.Module.__init__(self)
        self.scale = nn.Parameter(torch.ones(()))

    @property
    def servers(self):
        return 3

    def predict(self, images):
        return tuple(self.scale * (k + 1) * images.mean((2, 3)) for k in range(3))

    def protect(self, images):
        return tuple(share + 0.1 * torch.rand_like(share) for share in self.predict(images))


def target(knowledge, corrupted=(0,), transmissions=1):
    return Target(ThreeServers(), Adversary(knowledge, corrupted, transmissions), "abc")


def images(count=2):
    return torch.rand(count, 3, 8, 8)


@pytest.mark.parametrize("held", ORDER)
@pytest.mark.parametrize("needed", ORDER)
def test_more_knowledge_includes_less(held, needed):
    assert held.grants(needed) is (ORDER.index(held) >= ORDER.index(needed))


CALLS = {
    "query": (Knowledge.BLACK_BOX, "queries to the client", lambda t: t.query(images())),
    "client": (Knowledge.WHITE_BOX, "the client's weights", lambda t: t.client(images())),
    "log_likelihood": (
        Knowledge.WHITE_BOX,
        "the defense's law",
        lambda t: t.log_likelihood((torch.rand(2, 3),), (torch.rand(2, 3),)),
    ),
}


@pytest.mark.parametrize("knowledge", ORDER)
@pytest.mark.parametrize("call", CALLS)
def test_each_door_opens_for_those_who_may(knowledge, call):
    needed, what, act = CALLS[call]
    if knowledge.grants(needed):
        act(target(knowledge))
        return
    closed = target(knowledge)
    with pytest.raises(ThreatModelError) as caught:
        act(closed)
    for word in (what, str(knowledge), str(needed)):
        assert word in str(caught.value)
    assert closed.queries == 0


@pytest.mark.parametrize("corrupted", [(0,), (2,), (0, 2), (0, 1, 2)])
def test_only_the_corrupted_servers_are_read(corrupted):
    seen, pictures = target(Knowledge.WHITE_BOX, corrupted), images()
    everything = ThreeServers().predict(pictures)
    for share, index in zip(seen.client(pictures), corrupted, strict=True):
        torch.testing.assert_close(share, everything[index])
    for share, index in zip(seen.query(pictures), corrupted, strict=True):
        assert (share - everything[index]).abs().max() <= 0.1 + 1e-6
    assert seen.identity == f"abc/{'+'.join(map(str, corrupted))}"


def test_queries_are_counted_by_image_and_drawn_anew():
    seen, pictures = target(Knowledge.BLACK_BOX), images(3)
    one = seen.query(pictures)
    assert seen.queries == 3
    two = seen.query(pictures)
    assert seen.queries == 6
    seen.query(images(5))
    assert seen.queries == 11
    assert not torch.equal(one[0], two[0])


def test_a_query_gives_no_gradient_and_the_client_does():
    pictures = images().requires_grad_()
    open_target = target(Knowledge.WHITE_BOX)
    assert not open_target.query(pictures)[0].requires_grad
    (gradient,) = torch.autograd.grad(open_target.client(pictures)[0].sum(), pictures)
    assert gradient.abs().sum() > 0


def test_the_likelihood_is_over_what_was_read():
    pictures = images()
    pair = target(Knowledge.WHITE_BOX, (0, 2))
    sent = pair.client(pictures)
    near = pair.log_likelihood(sent, sent)
    assert near.shape == (2,)
    assert (pair.log_likelihood(sent, tuple(s + 1 for s in sent)) < near).all()


@pytest.mark.parametrize("knowledge", ORDER)
def test_no_public_name_leads_to_the_defense(knowledge):
    seen = target(knowledge)
    public = {name for name in dir(seen) if not name.startswith("_")}
    assert public == {"adversary", "client", "identity", "log_likelihood", "queries", "query"}
    for name in public:
        value = getattr(seen, name)
        assert not isinstance(value, nn.Module | torch.Tensor)
        assert isinstance(getattr(value, "__self__", seen), Target)
    assert {field.name for field in dataclasses.fields(seen.adversary)} == {
        "knowledge",
        "corrupted",
        "transmissions",
    }


def test_an_adversary_cannot_promote_itself():
    seen = target(Knowledge.DATA_ONLY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        seen.adversary.knowledge = Knowledge.WHITE_BOX


def test_every_transmission_is_seen_and_drawn_anew():
    pictures = images()
    seen = target(Knowledge.WHITE_BOX, (0, 2), transmissions=3)
    sent = seen.query(pictures)
    assert len(sent) == 6
    assert seen.queries == 3 * len(pictures)
    assert not torch.equal(sent[0], sent[2])
    predicted = seen.client(pictures)
    assert len(predicted) == 6
    for share, guess in zip(sent, predicted, strict=True):
        assert share.shape == guess.shape
        assert (share - guess).abs().max() <= 0.1 + 1e-6
    assert seen.identity == "abc/0+2x3"


def test_the_likelihoods_of_transmissions_add_up():
    pictures = images()
    once, thrice = (target(Knowledge.WHITE_BOX, (0, 2), transmissions=n) for n in (1, 3))
    predicted = once.client(pictures)
    sent = thrice.query(pictures)
    parts = [once.log_likelihood(sent[at : at + 2], predicted) for at in (0, 2, 4)]
    whole = thrice.log_likelihood(sent, thrice.client(pictures))
    torch.testing.assert_close(whole, torch.stack(parts).sum(0))
