"""The battery for defenses: what is honest passes, and how outcomes of several settings combine."""

from dataclasses import replace

import pytest
import torch

from mibench.checks.base import Finding, Verdict, caught
from mibench.checks.battery import worst
from mibench.checks.defense import CHECKS, NAMES, PRELOAD, RUNS, check_defense
from mibench.checks.defense_wiring import deviating
from mibench.checks.process import LIMIT_CHECKS, Nursery
from mibench.checks.trial import MAPS, TOKENS
from mibench.errors import MibenchError

SHORT = replace(MAPS, recipe={**MAPS.recipe, "steps": 12})
MAPS_ONLY = '''
from torch import nn
from mibench.defenses.base import Defense


class MapsOnly(Defense):
    """Four mixtures of channels."""

    def __init__(self, split, params):
        super().__init__(split, params)
        channels = split.feature_shape[0]
        self.client.append(nn.Conv2d(channels, 4, 1))
        self.server.insert(0, nn.Conv2d(4, channels, 1))

    def protect(self, images):
        return (self.client(images),)
'''


@pytest.fixture(scope="module")
def nursery():
    with Nursery(PRELOAD) as started:
        yield started


@pytest.mark.parametrize(
    ("name", "params"), [("noise", {"law": "laplace"}), ("privdfs", {"servers": 2})]
)
def test_an_honest_defense_fails_no_check(nursery, name, params):
    findings = check_defense(nursery, name, params, settings=[SHORT])
    assert caught(findings) == []
    assert [one.check for one in findings if one.check in CHECKS] == list(CHECKS)
    assert {one.check for one in findings} == set(NAMES)


def test_a_law_is_told_from_a_false_one(nursery):
    # Noise of an image has a law that is measured, of few tensors one that allows a tolerance.
    for name, params in (("noise", {"place": "input"}), ("shredder", {})):
        (law,) = (
            one
            for one in check_defense(nursery, name, params, settings=[SHORT], only=["law"])
            if one.check == "law"
        )
        assert law.verdict is Verdict.PASSED, law.found


def test_a_defense_for_maps_only_is_judged_on_maps(nursery, tmp_path):
    (tmp_path / "maps.py").write_text(MAPS_ONLY)
    settings = [SHORT, replace(TOKENS, recipe=SHORT.recipe)]
    name = f"{tmp_path}/maps.py:MapsOnly"
    found = check_defense(nursery, name, settings=settings, only=["wire-shares"])
    verdicts = {one.check: one.verdict for one in found}
    assert verdicts[RUNS] is Verdict.WARNED
    assert verdicts["wire-shares"] is Verdict.PASSED
    alone = check_defense(nursery, name, settings=settings[1:], only=["wire-shares"])
    assert caught(alone) == [RUNS]


def test_a_wrong_parameter_is_the_users_mistake(nursery):
    with pytest.raises(MibenchError, match="snr"):
        check_defense(nursery, "noise", {"snr": 1}, settings=[SHORT])


def test_the_worst_of_several_settings_counts():
    def one(check, verdict):
        return Finding(check, verdict, "tried", "found")

    kept = worst(
        [
            ("maps", one("a", Verdict.PASSED)),
            ("maps", one("b", Verdict.SKIPPED)),
            ("maps", one("c", Verdict.FAILED)),
            ("tokens", one("a", Verdict.WARNED)),
            ("tokens", one("b", Verdict.PASSED)),
            ("tokens", one("c", Verdict.PASSED)),
        ]
    )
    assert [(k.check, k.verdict.value) for k in kept] == [
        ("a", "warned"),
        ("b", "passed"),
        ("c", "failed"),
    ]
    assert kept[0].found == "tokens: found"


def test_values_differ_only_beyond_rounding():
    one = torch.randn(4, 100)
    assert deviating(one, one + 1e-6) == 0
    assert deviating(one, one + 1) == 1
    assert deviating(one, one[:, :50]) == 1
    other = one.clone()
    other[0, 0] = float("nan")
    assert deviating(one, other) == pytest.approx(1 / 400)


def test_every_check_says_what_it_tries_and_what_to_do():
    for name, check in CHECKS.items():
        assert check.tried
        assert check.advice
        assert name == check.name
    assert not set(CHECKS) & set(LIMIT_CHECKS)
