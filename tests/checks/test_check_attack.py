"""Checks of attacks: an honest one passes, and what is watched in its process is seen."""

import gc

import pytest
import torch

from mibench.attacks.decoder import Decoder
from mibench.checks.attack import SMALL, battery, check_attack
from mibench.checks.attack_host import Bait, Gate, Watched, _guarded
from mibench.checks.base import Verdict, caught
from mibench.checks.process import LIMIT_CHECKS, Nursery
from mibench.job import with_counts
from mibench.params import build
from mibench.registry import attacks
from mibench.threat import Adversary, Knowledge

HONEST = '''
import torch

from mibench import seeding
from mibench.attacks.base import Attack


class Lookup(Attack):
    """Answers with a mixture of the auxiliary images whose messages are nearest."""

    def prepare(self, target, auxiliary, validation):
        self.images = auxiliary.images()
        with seeding.stream(self.workshop.seed, "lookup"):
            self.messages = target.query(self.images)[0].flatten(1)

    def reconstruct(self, shares):
        distance = torch.cdist(shares[0].flatten(1), self.messages)
        near, places = distance.topk(8, largest=False)
        weights = (1 / near).unsqueeze(-1)
        mixed = (self.images[places].flatten(2) * weights).sum(1) / weights.sum(1)
        return mixed.reshape(-1, *self.workshop.image_shape).clamp(0, 1)
'''


@pytest.fixture(scope="module")
def nursery():
    with Nursery(["mibench.checks.attack_host"]) as started:
        yield started


def test_an_honest_attack_passes(nursery, tmp_path):
    path = tmp_path / "lookup.py"
    path.write_text(HONEST)
    findings = check_attack(nursery, f"{path}:Lookup")
    assert caught(findings) == []
    assert [one.check for one in findings] == [*battery.checks, *LIMIT_CHECKS]
    passed = {one.check for one in findings if one.verdict is Verdict.PASSED}
    assert {"attack-private", "attack-truth", "attack-batch", "attack-floor"} <= passed


def test_the_built_in_that_is_the_measure_passes(nursery):
    findings = check_attack(nursery, "linear", only=["attack-calibrated", "attack-shares"])
    assert [one.verdict for one in findings] == [Verdict.PASSED] * 2


def test_the_small_parameters_are_valid_and_name_built_ins():
    for name, params in SMALL.items():
        method = attacks.load(name)
        assert build(method.Params, params, name)
    missing = {e.name for e in attacks.entries() if e.origin == "mibench"} - set(SMALL)
    assert missing == {"linear"}


def test_bait_is_noted_only_while_the_attack_works():
    gate = Gate()
    bait = Bait(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), gate)
    bait.images()
    assert gate.seen == []
    with gate.at_work():
        len(bait)
        bait.images()
        bait.images()
    assert [kind for kind, _ in gate.seen] == ["bait"] * len(gate.seen)
    assert ["bait", "images"] in gate.seen


def test_the_model_is_guarded_outside_its_target(make_defense):
    gate = Gate()
    plain = make_defense("none", "map")
    images = torch.rand(2, 3, 16, 16)
    wanted = plain.protect(images)[0]
    guarded = _guarded(plain, gate)
    target = Watched(guarded, Adversary(Knowledge.WHITE_BOX, (0,)), gate)
    with gate.at_work():
        sent = target.query(images)[0]
        predicted = target.client(images)
        target.log_likelihood((sent,), predicted)
        target.replies((sent,))
        target.share_shapes(images)
        assert target.task.outputs
    assert torch.equal(sent, wanted)
    assert gate.seen == []
    assert target.queries == target.counted == 2
    with gate.at_work():
        target._Target__defense.client[0]
    assert gate.seen
    assert all(kind == "model" for kind, _ in gate.seen)
    gc.collect()


def test_counts_are_set_wherever_they_lie():
    given = {"lr": 0.1, "decoder": {"steps": 3, "batch": 8}}
    made = with_counts(given, {"steps": 5, "decoder.steps": 7})
    assert made == {"lr": 0.1, "steps": 5, "decoder": {"steps": 7, "batch": 8}}
    assert given["decoder"]["steps"] == 3
    assert Decoder.Params(steps=5).steps == 5
