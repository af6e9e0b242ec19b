"""What a place among the ranked rows takes, and what a row lacks of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, auto

from mibench.board import rules
from mibench.board.columns import beside_controls
from mibench.board.entries import Held
from mibench.board.model import Advisory, Level
from mibench.board.rules import Interval
from mibench.checks.base import one_line
from mibench.evaluate import OVER_BUDGET
from mibench.job import SUITE
from mibench.record import Record, Score


class Condition(Enum):
    """What a place among the ranked rows takes; see `docs/leaderboard.md`."""

    TRACK = auto()
    PROTOCOL = auto()
    SUITE = auto()
    CALIBRATED = auto()
    BUDGET = auto()
    ACCURACY = auto()
    KEYS = auto()
    LEVEL = auto()
    ADVISORY = auto()
    CURRENT = auto()


def key_of(runs: Sequence[Held], leakage: Mapping[str, Score]) -> Interval | str:
    """The leakage that a row is ranked by, or what is missing."""
    wanted = runs[0].record.protocol.values.get("metrics")
    meant = wanted if isinstance(wanted, Mapping) else leakage
    found = []
    for name in rules.KEYS:
        if name not in meant:
            continue
        score = leakage.get(name)
        if score is None or score.value is None:
            why = score.reason if score is not None else "it was not scored"
            return f"there is no normalised leakage in {name}: {why}"
        if score.ci_low is None or score.ci_high is None:
            return f"the leakage in {name} has no interval: {score.reason}"
        low, high = _never_certain(runs, name, score)
        found.append(Interval(score.value, low, high))
    return rules.larger(found) if found else "the protocol scores neither SSIM nor reid-top1"


def _never_certain(runs: Sequence[Held], name: str, leakage: Score) -> tuple[float, float]:
    """The interval of a leakage; Wilson's where every image has the same 0 or 1.

    Floor and undefended split stay at their means: the interval is for ranks alone.
    """
    assert leakage.ci_low is not None
    assert leakage.ci_high is not None
    found = beside_controls(runs, name)
    if found is None:
        return leakage.ci_low, leakage.ci_high
    values, floor, top = found
    if not bool((values == values[0]).all()) or float(values[0]) not in (0.0, 1.0):
        return leakage.ci_low, leakage.ci_high
    base, span = float(floor.mean()), float((top - floor).mean())
    if span == 0:
        return leakage.ci_low, leakage.ci_high
    ends = rules.all_or_none(float(values[0]), len(values))
    low, high = ((end - base) / span for end in ends)
    return min(low, leakage.ci_low), max(high, leakage.ci_high)


def reasons_against(
    runs: Sequence[Held],
    lost: Mapping[str, float],
    level: Level,
    advisories: Sequence[Advisory],
    superseded_by: str | None,
    key: Interval | str,
) -> Iterator[tuple[Condition, str]]:
    """Every condition of a rank that is not met, in one sentence."""
    records = [one.record for one in runs]
    record = records[0]
    if record.protocol.track not in ("lite", "standard"):
        yield (
            Condition.TRACK,
            f"Its protocol is of the track {record.protocol.track}, which is never ranked.",
        )
    yield from _departures(records)
    if record.attack.name != SUITE:
        yield (
            Condition.SUITE,
            f"It was attacked with {record.attack.name} alone, not with the whole suite.",
        )
    else:
        attacks = record.protocol.values.get("attacks")
        made = {part.attack.partition("@")[0] for part in record.suite}
        if missing := sorted(set(attacks if isinstance(attacks, Mapping) else ()) - made):
            yield Condition.SUITE, f"Its suite lacks {', '.join(missing)}."
    yield from _chosen_seeds(records)
    if not lost:
        yield Condition.ACCURACY, "Its accuracy is not known."
    for name, points in lost.items():
        if points > rules.MOST_LOST:
            yield (
                Condition.ACCURACY,
                f"It loses {points:.2f} points of {name}, and {rules.MOST_LOST:g} are allowed.",
            )
    if isinstance(key, str):
        yield Condition.KEYS, f"It cannot be ranked, since {key}."
    if level is Level.CLAIMED:
        yield Condition.LEVEL, "Its numbers are claimed and not yet rescored."
    for one in advisories:
        yield Condition.ADVISORY, f"Advisory {one.id}: {one.title}."
    if superseded_by is not None:
        yield Condition.CURRENT, f"Record {superseded_by} takes its place."


def _chosen_seeds(records: Sequence[Record]) -> Iterator[tuple[Condition, str]]:
    """Whether seeds were left out: the best of three would be a rank by luck."""
    listed = records[0].protocol.values.get("seeds")
    meant = listed if isinstance(listed, list) else []
    had = {one.seed for one in records}
    count = sum(one in had for one in meant)
    if count and (left := [one for one in meant[:count] if one not in had]):
        yield (
            Condition.PROTOCOL,
            (
                f"It was run with seed {', '.join(map(str, sorted(had)))}, and seeds are taken in "
                f"the protocol's order: {', '.join(map(str, left))} is left out."
            ),
        )


def _departures(records: Sequence[Record]) -> Iterator[tuple[Condition, str]]:
    """What keeps the record itself from being ranked."""
    told = False
    for line in dict.fromkeys(line for one in records for line in one.deviations):
        told = True
        if line.startswith(OVER_BUDGET):
            yield Condition.BUDGET, f"{line[0].upper()}{line[1:]}."
        else:
            yield Condition.PROTOCOL, f"It departs from the protocol: {one_line(line)}."
    weak = {entry.attack: entry for one in records for entry in one.calibration
            if entry.calibrated is False}  # fmt: skip
    for entry in weak.values():
        told = True
        yield (
            Condition.CALIBRATED,
            (
                f"The attack {entry.attack} is too weak: it reaches {entry.reached:.1f} dB of "
                f"{entry.reference} dB on the undefended split."
            ),
        )
    ranked = all(one.protocol.ranked for one in records)
    if not ranked and not told and records[0].protocol.track in ("lite", "standard"):
        yield Condition.PROTOCOL, "Its record says that it is not ranked."


def concerns(advisory: Advisory, runs: Sequence[Held]) -> bool:
    """Whether an advisory is about one of these runs."""
    for one in runs:
        record = one.record
        parts = (record.defense, record.attack, record.backbone)
        hit = any(part.code in advisory.code.get(part.name, []) for part in parts)
        if hit or one.listed.id in advisory.records:
            return True
        if record.protocol.content in advisory.protocols:
            return True
    return False
