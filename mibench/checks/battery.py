"""A battery: named checks in order, each a function of what is on trial."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from mibench.checks.base import Finding, Verdict

T = TypeVar("T")
Outcome: TypeAlias = tuple[Verdict, str]
"""How a check ended, and what was found."""

SEVERITY = (Verdict.SKIPPED, Verdict.PASSED, Verdict.WARNED, Verdict.FAILED)


@dataclass(frozen=True)
class Check(Generic[T]):
    """One check.

    Attributes:
        name: as in `Finding.check`.
        tried: what it does, in one sentence.
        advice: what to do where it does not pass.
        run: what is on trial → the outcome.
    """

    name: str
    tried: str
    advice: str
    run: Callable[[T], Outcome]

    def finding(self, trial: T) -> Finding:
        """Runs it."""
        verdict, found = self.run(trial)
        good = verdict in (Verdict.PASSED, Verdict.SKIPPED)
        return Finding(self.name, verdict, self.tried, found, "" if good else self.advice)


class Battery(Generic[T]):
    """Checks in the order in which they were added."""

    def __init__(self) -> None:
        self.checks: dict[str, Check[T]] = {}

    def check(
        self, name: str, *, tried: str, advice: str
    ) -> Callable[[Callable[[T], Outcome]], Callable[[T], Outcome]]:
        """Adds a function as a check."""

        def add(run: Callable[[T], Outcome]) -> Callable[[T], Outcome]:
            self.checks[name] = Check(name, tried, advice, run)
            return run

        return add


def passed(found: str) -> Outcome:
    """An outcome without fault."""
    return Verdict.PASSED, found


def failed(found: str) -> Outcome:
    """An outcome that stands in the way of ranking."""
    return Verdict.FAILED, found


def warned(found: str) -> Outcome:
    """An outcome that a reader must know of."""
    return Verdict.WARNED, found


def skipped(found: str) -> Outcome:
    """A check that does not apply, with the reason."""
    return Verdict.SKIPPED, found


def worst(findings: Iterable[tuple[str, Finding]]) -> list[Finding]:
    """Keeps, of several settings, the worst finding of each check.

    Args:
        findings: title of the setting, and a finding in it.
    """
    kept: dict[str, tuple[str, Finding]] = {}
    for title, one in findings:
        before = kept.get(one.check)
        if before is None or _severity(one) > _severity(before[1]):
            kept[one.check] = (title, one)
    return [
        Finding(
            one.check,
            one.verdict,
            one.tried,
            f"{title}: {one.found}" if title else one.found,
            one.advice,
        )
        for title, one in kept.values()
    ]


def _severity(finding: Finding) -> int:
    return SEVERITY.index(finding.verdict)
