"""Every sabotaged component is caught, by the check that should."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from cases import cases
from runners import RUNNERS

from mibench.checks.base import Verdict, caught
from mibench.checks.process import Nursery
from mibench.checks.targets import KINDS, preload

CASES = [case for case in cases() if case.kind in RUNNERS]


@pytest.fixture(scope="module")
def nursery():
    # All but the vision transformers, which no case needs.
    with Nursery([name for name in preload(list(KINDS)) if name != "timm"]) as started:
        yield started


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_caught_by_the_check_that_should(nursery, case):
    findings = RUNNERS[case.kind](nursery, case, [case.caught_by])
    assert case.caught_by in caught(findings), [
        (one.check, str(one.verdict), one.found) for one in findings
    ]
    for one in findings:
        assert "\n" not in one.found
        assert bool(one.advice) is (one.verdict in (Verdict.FAILED, Verdict.WARNED))


def test_there_are_enough_of_them():
    assert len(CASES) >= 25
    assert len({case.trick for case in CASES}) == len(CASES)
