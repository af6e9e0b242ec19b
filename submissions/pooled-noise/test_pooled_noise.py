"""Run with: pytest submissions/pooled-noise"""

from pathlib import Path

from mibench.checks import targets
from mibench.checks.process import Nursery

PLACE = f"{Path(__file__).resolve().parent / 'defense.py'}:PooledNoise"


def test_it_passes_the_battery():
    with Nursery(targets.preload(["defense"])) as nursery:
        target = targets.Target("defense", PLACE)
        findings = targets.run(nursery, target, {}, lambda what: None)
    assert not [f"{one.check}: {one.found}" for one in findings if one.verdict == "failed"]
