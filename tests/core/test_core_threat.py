"""The threat model: a target grants what its adversary was granted, and nothing else."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mibench.defenses.base import Defense
from mibench.errors import ThreatModelError
from mibench.task import Classification
from mibench.threat import Adversary, Knowledge, Target, mended

ORDER = [Knowledge.DATA_ONLY, Knowledge.BLACK_BOX, Knowledge.WHITE_BOX]


class ThreeServers(Defense):
    """Sends three scaled copies of the mean colour, with noise."""

    def __init__(self):
        nn.Module.__init__(self)
        self.scale = nn.Parameter(torch.ones(()))
        self.task = Classification(("a", "b", "c"))

    @property
    def servers(self):
        return 3

    def serve(self, index, share):
        return (index + 1) * self.scale * share.square()

    def fuse(self, replies):
        raise AssertionError("the fusion is the client's")

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
    assert public == {
        "adversary",
        "client",
        "identity",
        "log_likelihood",
        "queries",
        "query",
        "replies",
        "share_shapes",
        "task",
    }
    for name in public:
        value = getattr(seen, name)
        assert not isinstance(value, nn.Module | torch.Tensor)
        assert isinstance(getattr(value, "__self__", seen), Target)
    # The task is names and a smoothing.
    assert {type(value) for value in vars(seen.task).values()} == {tuple, float}
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


@pytest.mark.parametrize("knowledge", ORDER)
@pytest.mark.parametrize(("corrupted", "transmissions"), [((1,), 1), ((0, 2), 1), ((0, 2), 3)])
def test_corrupted_servers_reply_to_whoever_holds_them(knowledge, corrupted, transmissions):
    seen = target(knowledge, corrupted, transmissions)
    assert seen.task.outputs == 3
    shapes = seen.share_shapes(images())
    assert shapes == [(3,)] * len(corrupted) * transmissions
    shares = tuple(torch.rand(2, *shape, requires_grad=True) for shape in shapes)
    replies = seen.replies(shares)
    assert len(replies) == len(shares)
    for at, (share, reply) in enumerate(zip(shares, replies, strict=True)):
        weight = corrupted[at % len(corrupted)] + 1
        torch.testing.assert_close(reply, weight * share.square())
        (gradient,) = torch.autograd.grad(reply.sum(), share, retain_graph=True)
        torch.testing.assert_close(gradient, 2 * weight * share)
    assert seen.queries == 0


def test_shapes_tell_nothing_of_an_image_and_shift_no_draws():
    class Curious(ThreeServers):
        def protect(self, images):
            assert not images.any()
            return super().protect(images)

    seen = Target(Curious(), Adversary(Knowledge.DATA_ONLY, (0,)), "abc")
    torch.manual_seed(0)
    undisturbed = torch.rand(3)
    torch.manual_seed(0)
    seen.share_shapes(torch.ones(2, 3, 8, 8))
    assert torch.equal(torch.rand(3), undisturbed)


@settings(deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.0, -3.0, 2.5, math.nan, math.inf, -math.inf]), min_size=3,
                 max_size=3),
        min_size=1, max_size=5,
    )
)  # fmt: skip
def test_what_is_not_finite_is_read_as_the_mean_of_the_rest(rows):
    (mended_share,) = mended((torch.tensor(rows),))
    for place in range(3):
        column = [row[place] for row in rows]
        known = [value for value in column if math.isfinite(value)]
        mean = sum(known) / len(known) if known else 0.0
        wanted = [value if math.isfinite(value) else mean for value in column]
        torch.testing.assert_close(mended_share[:, place], torch.tensor(wanted))


def test_finite_shares_are_passed_on_as_they_are():
    share = torch.rand(2, 3)
    assert mended((share,))[0] is share
