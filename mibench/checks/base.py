"""What a check says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check ended, the best first.

    ``skipped``: it does not apply to this component, or what it needs is not here. ``warned``: what
    was found can be honest, and a reader of results must know of it; it stands in the way of
    nothing. ``failed``: results of this component are no measure, and it is not ranked.
    """

    PASSED = "passed"
    SKIPPED = "skipped"
    WARNED = "warned"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """What one check tried and found.

    Attributes:
        check: name of the check, such as ``wire-logits``; lower case with dashes, and it stays.
        verdict: how it ended.
        tried: what was done, in one sentence.
        found: what came of it, with numbers and their units.
        advice: what the author can do; empty for a check that passed.
    """

    check: str
    verdict: Verdict
    tried: str
    found: str
    advice: str = ""


def caught(findings: Iterable[Finding]) -> list[str]:
    """Returns the names of the checks that failed, in order, each once."""
    return list(dict.fromkeys(one.check for one in findings if one.verdict is Verdict.FAILED))


def one_line(text: str) -> str:
    """Foreign text on one line, short, without what could steer a terminal."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return plain if len(plain) <= 300 else plain[:297] + "..."
