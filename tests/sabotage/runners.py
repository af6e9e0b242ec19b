"""How a case of each kind is put through its battery."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from cases import Case
from runners_of_results import RESULT_HONEST, RESULT_RUNNERS

from mibench.checks.base import Finding
from mibench.checks.confine import Limits
from mibench.checks.defense import check_defense
from mibench.checks.process import LIMIT_CHECKS, Nursery
from mibench.checks.trial import MAPS
from mibench.registry import defenses

SHORT = replace(MAPS, recipe={**MAPS.recipe, "steps": 12})
"""Enough to tell a cheat; what learns slowly is not judged here."""
TIGHT = Limits(seconds=8.0, memory_bytes=2**30)
"""For what hangs or grows: a test need not wait long."""

Runner = Callable[[Nursery, Case, "Sequence[str] | None"], list[Finding]]


def defense(nursery: Nursery, case: Case, only: Sequence[str] | None) -> list[Finding]:
    """A defense on maps, after a short training."""
    limits = TIGHT if case.caught_by in LIMIT_CHECKS else Limits()
    name = f"{case.path}:{case.component}"
    return check_defense(nursery, name, settings=[SHORT], only=only, limits=limits)


RUNNERS: dict[str, Runner] = {"defenses": defense, **RESULT_RUNNERS}
"""By the folder of the cases."""

Honest = tuple[tuple[str, ...], Callable[[Nursery, str], list[Finding]]]
BUILT_IN = tuple(one.name for one in defenses.entries() if one.origin == "mibench")
HONEST: dict[str, Honest] = {"defenses": (BUILT_IN, check_defense), **RESULT_HONEST}
"""What nothing may flag: names, and what checks them in full."""
