"""A training in phases: what each is told, what is frozen, and going on after a kill."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_splits import build_split
from torch import nn

from mibench.artifacts import Checkpoint
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Phase, divided
from mibench.errors import InvalidParamsError, PluginError
from mibench.protocol import Recipe
from mibench.task import Classification

RECIPE = Recipe(steps=9, batch=8, lr=0.05, crop=2, precision="fp32")


class Killed(BaseException):
    """Ends a training from outside."""


class TwoPhases(Defense):
    """Trains the network, then one number beside it; notes what it is told."""

    name, version = "two-phases", 1
    phases = (Phase("network", 2 / 3), Phase("gain", 1 / 3))

    def __init__(self, split, params):
        super().__init__(split, params)
        self.gain = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(()))
        self.told, self.kill_at = [], None

    def protect(self, images):
        return (self.gain * self.client(images),)

    def begin(self, phase, train):
        self.told.append((phase, len(train)))
        for part in (self.client, self.server):
            part.requires_grad_(phase == "network")
        self.gain.requires_grad_(phase == "gain")
        self.seen.fill_(train.images(slice(0, 1)).mean())

    def observe(self, train, step):
        self.told.append((step.phase, step.index, step.total))
        if (step.phase, step.index) == self.kill_at:
            raise Killed

    def finish(self, train):
        self.told.append("finish")
        assert not self.training


@pytest.fixture
def train():
    pixels = torch.rand(32, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return ImageSet((pixels * 255).to(torch.uint8), torch.arange(32) % 5)


def make(seed=0):
    torch.manual_seed(seed)
    return TwoPhases(build_split("map", Classification(tuple("abcde"))), Defense.Params())


def test_each_phase_has_its_share_of_the_steps_and_a_schedule_of_its_own(train, tmp_path):
    defense = make()
    facts = defense.fit(train, RECIPE, 0, Checkpoint(tmp_path))
    steps = [("network", i, 6) for i in range(6)], [("gain", i, 3) for i in range(3)]
    assert defense.told == [("network", 32), *steps[0], ("gain", 32), *steps[1], "finish"]
    assert facts["steps"] == 9
    assert set(facts["losses"]) == {"network/task", "gain/task"}


def test_what_a_phase_freezes_stays(train, tmp_path):
    defense, kept = make(), {}
    noted = defense.begin

    def begin(phase, images):
        noted(phase, images)
        kept[phase] = {k: v.detach().clone() for k, v in defense.named_parameters()}

    defense.begin = begin
    defense.fit(train, RECIPE, 0, Checkpoint(tmp_path))
    assert torch.equal(kept["gain"]["gain"], torch.ones(1))
    assert not torch.equal(defense.gain, torch.ones(1))
    for name, value in defense.named_parameters():
        if name != "gain":
            assert torch.equal(value, kept["gain"][name])
            assert not torch.equal(value, kept["network"][name])


@pytest.mark.parametrize("kill_at", [("network", 4), ("gain", 0), ("gain", 2)])
def test_a_killed_training_ends_where_an_undisturbed_one_does(train, tmp_path, kill_at):
    whole = make()
    whole.fit(train, RECIPE, 0, Checkpoint(tmp_path / "whole"))
    broken = make()
    broken.kill_at = kill_at
    with pytest.raises(Killed):
        broken.fit(train, RECIPE, 0, Checkpoint(tmp_path / "broken", interval=0))
    again = make()
    facts = again.fit(train, RECIPE, 0, Checkpoint(tmp_path / "broken", interval=0))
    # A finished phase is not trained again.
    assert (("network", 0, 6) in again.told) is False
    assert len(facts["losses"]["network/task"]) == 6
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    "phases",
    [
        (),
        (Phase("long", 3.0),),
        (Phase("same", 0.5), Phase("same", 0.5)),
        (Phase("../../out", 1.0),),
        (Phase("a", 0.5), Phase("b", 0.25)),
    ],
)
def test_phases_that_are_no_division_of_the_training_are_refused(phases):
    with pytest.raises(PluginError, match=r"distinct names .* shares that\s+add up to 1"):
        divided(phases, 10, "mine")


@given(st.integers(2, 5000), st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5))
def test_phases_take_the_steps_of_the_recipe_and_no_more(steps, weights):
    phases = tuple(Phase(f"p{n}", w / sum(weights)) for n, w in enumerate(weights))
    try:
        parts = divided(phases, steps, "mine")
    except InvalidParamsError:
        assert steps * min(weights) / sum(weights) < 1
        return
    assert sum(count for _, count in parts) == steps
    assert all(abs(count - steps * phase.share) <= 1 for phase, count in parts)
