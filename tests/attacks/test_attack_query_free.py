"""The query-free attack: a shadow learned through the servers, and an attack on it."""

import pytest
import torch
from small_splits import SPECS
from tiny_attacks import smallest
from torch import nn
from torch.nn import functional as F

from mibench.artifacts import ArtifactStore
from mibench.attacks.query_free import QueryFree, Shadow
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense
from mibench.errors import NotApplicableError, ThreatModelError
from mibench.task import Attributes
from mibench.threat import Adversary, Knowledge, Target

NAMES = tuple(f"value {at} is large" for at in range(48))
TRAINED = {
    "steps": 150,
    "batch": 32,
    "lr": 1e-2,
    "width": 16,
    "decoder": {"steps": 150, "batch": 32, "lr": 5e-3},
    "gradient": {"steps": 80, "restarts": 1, "tuning_images": 4},
}


class Telling(Defense):
    """Two servers that each tell of every pixel of a coarse image whether it is bright."""

    def __init__(self):
        nn.Module.__init__(self)
        self.task = Attributes(NAMES)
        self.scale = nn.Parameter(torch.tensor(8.0), requires_grad=False)

    @property
    def servers(self):
        return 2

    def protect(self, images):
        coarse = F.avg_pool2d(images, 4) - 0.5
        return coarse, -coarse.flatten(1)

    def serve(self, index, share):
        return self.scale * (1 - 2 * index) * share.flatten(1)


def labelled(images):
    bright = F.avg_pool2d(images.images(), 4).flatten(1) > 0.5
    return ImageSet(images.pixels, bright.to(torch.uint8))


def against(defense, servers=(0,), transmissions=1, identity="toy"):
    adversary = Adversary(Knowledge.DATA_ONLY, servers, transmissions)
    return Target(defense, adversary, identity)


def prepared(workshop, target, pictures, count=128, **params):
    attack = QueryFree(QueryFree.Params(**params), workshop)
    attack.prepare(target, labelled(pictures(count)), labelled(pictures(16, seed=1)))
    return attack


def quick(**changes):
    return smallest(QueryFree.Params, **changes)


# A shadow that has to learn every place of a vector by itself is the worse one.
@pytest.mark.parametrize(
    ("then", "servers", "least", "left"),
    [
        ("decoder", (0,), 0.85, 0.3),
        ("decoder", (1,), 0.65, 0.85),
        ("decoder", (0, 1), 0.65, 0.3),
        ("gradient", (0,), 0.85, 0.5),
    ],
)
def test_what_the_servers_tell_is_enough(workshop, pictures, then, servers, least, left):
    defense = Telling()
    target = against(defense, servers)
    attack = prepared(workshop, target, pictures, 256, then=then, **TRAINED)
    secret = pictures(24, seed=2).images()
    torch.manual_seed(0)
    rebuilt = attack.reconstruct(target.adversary.reads(defense.protect(secret)))
    assert rebuilt.shape == secret.shape
    mean = pictures(256).images().mean(0)
    assert F.mse_loss(rebuilt, secret) < left * F.mse_loss(mean.expand_as(secret), secret)
    assert target.queries == 0
    facts = attack.facts()
    assert len(facts["shadow_accuracy"]) == len(servers)
    assert min(facts["shadow_accuracy"]) > least
    assert "validation_mse" in facts["on_the_shadow"]


def test_it_gets_along_with_what_its_adversary_has(workshop, pictures):
    target = against(Telling())
    prepared(workshop, target, pictures, **quick())
    for closed in (target.query, target.client):
        with pytest.raises(ThreatModelError):
            closed(pictures(2).images())
    assert QueryFree.knowledge == Knowledge.DATA_ONLY


def test_nothing_but_the_corrupted_servers_is_used(workshop, pictures, monkeypatch):
    fed = []

    class Watched(Telling):
        def serve(self, index, share):
            fed.append((index, share.shape[1:]))
            return super().serve(index, share)

        def fuse(self, replies):
            raise AssertionError("the fusion is the client's")

        def predict(self, images):
            raise AssertionError("the law is not known")

    prepared(workshop, against(Watched(), (1,)), pictures, **quick())
    assert set(fed) == {(1, (48,))}


@pytest.mark.parametrize("features", SPECS)
@pytest.mark.parametrize("name", ["none", "mid", "noise"])
def test_servers_stay_as_they_are(workshop, make_defense, pictures, name, features):
    defense = make_defense(name, features)
    before = {key: value.clone() for key, value in defense.state_dict().items()}
    attack = QueryFree(QueryFree.Params(**quick()), workshop)
    attack.prepare(against(defense), pictures(32), pictures(8, seed=1))
    attack.reconstruct(defense.transmit(pictures(3, seed=2), 3, 0))
    assert not defense.training
    for key, value in defense.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in defense.parameters())


def test_transmissions_are_averaged(workshop, pictures):
    defense, secret = Telling(), pictures(6, seed=2).images()
    target = against(defense, (0, 1), transmissions=2)
    attack = prepared(workshop, target, pictures, **quick())
    sent = defense.protect(secret)
    noise = [0.1 * torch.randn_like(share) for share in sent]
    torch.testing.assert_close(
        attack.reconstruct(tuple(s + n for s, n in zip(sent, noise, strict=True))
                           + tuple(s - n for s, n in zip(sent, noise, strict=True))),
        attack.reconstruct(sent + sent),
    )  # fmt: skip
    assert not torch.allclose(attack.reconstruct(sent), attack.reconstruct((sent[0], 2 * sent[1])))


def test_the_shadow_is_trained_once_for_each_target(workshop, pictures, monkeypatch):
    made = []
    fetch = ArtifactStore.fetch

    def counted(self, kind, spec, make):
        artifact = fetch(self, kind, spec, make)
        made.extend([] if artifact.reused else [kind])
        return artifact

    monkeypatch.setattr(ArtifactStore, "fetch", counted)
    one = prepared(workshop, against(Telling()), pictures, **quick())
    assert made == ["shadow", "decoder"]
    two = prepared(workshop, against(Telling()), pictures, **quick())
    assert made == ["shadow", "decoder"]
    secret = Telling().protect(pictures(4, seed=2).images())[:1]
    assert torch.equal(one.reconstruct(secret), two.reconstruct(secret))
    # What follows does not change the shadow; another target, or other labels, do.
    prepared(workshop, against(Telling()), pictures, **quick(then="gradient"))
    assert made == ["shadow", "decoder", "tuning"]
    prepared(workshop, against(Telling(), identity="other"), pictures, **quick())
    assert made[3:] == ["shadow", "decoder"]
    other = QueryFree(QueryFree.Params(**quick()), workshop)
    flipped = ImageSet(pictures(128).pixels, 1 - labelled(pictures(128)).labels)
    other.prepare(against(Telling()), flipped, labelled(pictures(16, seed=1)))
    assert made[5:] == ["shadow", "decoder"]


def test_replies_that_are_no_scores_are_refused(workshop, make_defense, pictures):
    params = {"servers": 2, "density": 0.25, "embedding": 3}
    defense = make_defense("privdfs", "map", params)
    with pytest.raises(NotApplicableError, match="server 1 replies values of shape") as caught:
        prepared(workshop, against(defense, (1,)), pictures, **quick())
    for word in ("(8,)", "not the task's 5 scores", "`decoder`"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 16, 16)],
        [(5, 32, 32)],
        [(5, 8, 8), (7, 4, 4)],
        [(5, 2, 2)],
        [(3, 5, 7)],
        [(64, 6)],
        [(65, 6)],
        [(20, 6), (13, 6)],
        [(9,)],
        [(2, 3, 4, 5)],
        [(4, 8, 8), (17, 6), (9,)],
    ],
    ids=str,
)
def test_shadows_have_shares_of_any_shape_and_learn_with_all_parts(shapes):
    torch.manual_seed(0)
    shadow = Shadow((3, 16, 16), shapes, 8)
    images = torch.rand(4, 3, 16, 16).requires_grad_()
    shares = shadow.protect(images)
    assert [tuple(share.shape) for share in shares] == [(4, *shape) for shape in shapes]
    assert shadow.servers == len(shapes)
    sum((share * torch.randn_like(share)).sum() for share in shares).backward()
    assert all(p.grad.abs().sum() > 0 for p in shadow.parameters())
    # Every pixel takes part, and no image meets another once the shadow is finished.
    assert (images.grad.abs().sum((0, 1)) > 0).all()
    shadow.eval()
    with torch.no_grad():
        alone = shadow.protect(images[:1])
        for one, share in zip(alone, shadow.protect(images), strict=True):
            torch.testing.assert_close(one, share[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 8, 8), (17, 6), (9,)], ids=str)
def test_received_shares_are_read_on_the_scale_of_the_shadow(shape):
    shadow = Shadow((3, 16, 16), [shape], 8)
    torch.manual_seed(0)
    plain = torch.randn(64, *shape)
    shadow.measure([(3 * plain[:40] + 2,), (3 * plain[40:] + 2,)])
    received = 0.1 * plain - 7
    torch.testing.assert_close(shadow.matched((received,))[0], 3 * plain + 2, rtol=1e-3, atol=1e-3)
    # Each channel by itself: all of one channel of maps and tokens, each value of a vector.
    axis = {3: 1, 2: 2}.get(len(shape), 1)
    scale = torch.rand(plain.shape[axis]) + 0.5
    other = received * scale.view([-1 if at == axis else 1 for at in range(plain.ndim)])
    torch.testing.assert_close(shadow.matched((other,))[0], 3 * plain + 2, rtol=1e-3, atol=1e-3)
    few = received[:15]
    assert shadow.matched((few,))[0] is few
    dead = torch.full_like(received, 4.0)
    torch.testing.assert_close(shadow.matched((dead,))[0], shadow.heads[0].mean.expand_as(dead))


@pytest.mark.parametrize("side", [32, 64, 224])
def test_shadows_reach_the_grid_of_a_share_by_halving(side):
    shadow = Shadow((3, side, side), [(4, side // 16, side // 16)], 8)
    assert shadow.trunk(torch.rand(1, 3, side, side)).shape[2] == max(4, side // 16)
