"""``make sabotage``: every sabotaged component through its whole battery, and the honest ones.

Prints which check caught what, and both rates: caught by the check that should, and honest
built-ins flagged. Ends with status 1 unless all are caught and none is flagged.
"""

from __future__ import annotations

import argparse
import sys
import time

from cases import cases
from runners import HONEST, RUNNERS

from mibench.checks.base import caught
from mibench.checks.process import Nursery
from mibench.checks.targets import KINDS, preload


def main() -> int:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=list(RUNNERS), help="one kind only")
    parser.add_argument("--honest", action="store_true", help="the honest components only")
    asked = parser.parse_args()
    kinds = [asked.kind] if asked.kind else list(RUNNERS)
    with Nursery(preload(list(KINDS))) as nursery:
        rates = [] if asked.honest else [_sabotaged(nursery, kinds)]
        rates.append(_honest(nursery, kinds))
    for _, words in rates:
        say(words)
    return 0 if all(good for good, _ in rates) else 1


def _sabotaged(nursery: Nursery, kinds: list[str]) -> tuple[bool, str]:
    chosen = [case for case in cases() if case.kind in kinds]
    hits = 0
    say(f"{'trick':<40} {'must be caught by':<20} {'caught by':<60} seconds")
    for case in chosen:
        began = time.monotonic()
        names = caught(RUNNERS[case.kind](nursery, case, None))
        hit = case.caught_by in names
        hits += hit
        mark = "" if hit else "   MISSED"
        seconds = time.monotonic() - began
        say(f"{case!s:<40} {case.caught_by:<20} {', '.join(names):<60} {seconds:.0f}{mark}")
    return hits == len(chosen), f"sabotage caught by the check that should: {hits} of {len(chosen)}"


def _honest(nursery: Nursery, kinds: list[str]) -> tuple[bool, str]:
    flagged, count = 0, 0
    for kind in kinds:
        names, check = HONEST.get(kind, ((), None))
        for name in names:
            began = time.monotonic()
            found = caught(check(nursery, name))
            count, flagged = count + 1, flagged + bool(found)
            verdict = f"FLAGGED by {', '.join(found)}" if found else "no check failed"
            say(f"honest {kind}/{name:<32} {verdict:<60} {time.monotonic() - began:.0f}")
    return flagged == 0, f"honest built-ins flagged: {flagged} of {count}"


def say(words: str) -> None:
    """Prints a line at once, also into a pipe."""
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
