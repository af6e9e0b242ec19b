"""From records to rows: which runs belong together, and what a row says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import cast

import numpy as np

from mibench.board import rules
from mibench.board.columns import accuracy_of, leakage_over_seeds, over_seeds
from mibench.board.conditions import Condition, concerns, key_of, reasons_against
from mibench.board.entries import Contents, Held, by_start, read
from mibench.board.model import (
    BestKnown,
    Board,
    Level,
    Row,
    Section,
)
from mibench.board.names import OTHER_ATTACK, OTHER_SEED, is_own_attack, label_of, slug_of
from mibench.board.noise import Noise
from mibench.board.rules import Interval
from mibench.files import Json, content_id
from mibench.job import SUITE
from mibench.record import Record, Score

ON_FRONT_WITHOUT = {Condition.TRACK, Condition.ACCURACY, Condition.SUITE}
"""Conditions that a row on the Pareto front may lack."""
FEWEST_ON_FRONT = 3
"""Rows that compete for the front, at least: of one or two the mark says nothing."""


@dataclass(frozen=True)
class _Draft:
    """A row in the making.

    Attributes:
        row: what is known of it so far.
        runs: its headline.
        all: headline and others.
        lacks: conditions of a rank that it does not meet.
        key: the leakage that it is ranked by.
    """

    row: Row
    runs: tuple[Held, ...]
    all: tuple[Held, ...]
    lacks: frozenset[Condition]
    key: Interval | None

    @property
    def record(self) -> Record:
        """The first of its headline."""
        return self.runs[0].record


def assemble(root: Path) -> Board:
    """Makes the board of a version from what lies in its folder.

    Raises:
        BoardError: something there is broken or does not belong there; all problems at once.
    """
    return board_of(read(root), root.resolve().name)


def board_of(contents: Contents, version: str) -> Board:
    """Makes the board of what was read."""
    sections: dict[str, list[Held]] = {}
    for one in contents.held.values():
        sections.setdefault(one.record.protocol.content, []).append(one)
    taken = _superseded(contents.held)
    made = [_section(held, contents, taken) for held in sections.values()]
    made.sort(key=_prominence)
    return Board(version=version, sections=tuple(made), advisories=contents.advisories)


def _prominence(section: Section) -> tuple[object, ...]:
    """Sections with many ranked rows first, then those with many rows."""
    ranked = sum(row.ranked for row in section.rows)
    return -ranked, -len(section.rows), section.protocol.id, section.protocol.content


def _section(held: Sequence[Held], contents: Contents, taken: Mapping[str, str]) -> Section:
    groups: dict[str, list[Held]] = {}
    for one in held:
        groups.setdefault(_group(one, superseded=one.listed.id in taken), []).append(one)
    drafts = [_draft(runs, key, contents, taken) for key, runs in sorted(groups.items())]
    # What was found wrong, or was replaced, is no measure for others.
    sound = [
        one
        for one in held
        if one.listed.id not in taken
        and not any(concerns(wrong, [one]) for wrong in contents.advisories)
    ]
    noise = Noise(sound)
    drafts = [
        replace(one, row=replace(one.row, gain=noise.gain(one.record, one.all))) for one in drafts
    ]
    rows = _ordered(_with_front(_with_places(drafts), noise))
    first = next((one for one in drafts if one.record.attack.name == SUITE), drafts[0]).record
    return Section(
        protocol=first.protocol,
        dataset=first.data.dataset if first.data is not None else "unknown",
        backbone=_backbone(first),
        rows=tuple(rows),
        floor={one.metric: one for one in first.prior_only if one.value is not None},
        noise=noise.points(),
        noise_attack=noise.attack,
    )


def _backbone(record: Record) -> str:
    rule = record.protocol.values.get("backbone")
    cut = rule.get("split_point") if isinstance(rule, Mapping) else None
    return f"{record.backbone.name}, split after {cut}" if cut else record.backbone.name


# --- runs that belong together -------------------------------------------------------------------


def _group(held: Held, *, superseded: bool) -> str:
    """What runs of one row have in common, as a short name; they may differ in attack and seed."""
    made = _made(held)
    departures = [one for one in held.record.deviations if not OTHER_SEED.match(one)]
    if is_own_attack(held.record):  # its maker made nothing of the defense
        made["submission"] = None
        departures = [one for one in departures if not OTHER_ATTACK.match(one)]
    return content_id({**made, "deviations": departures, "superseded": superseded})


def _made(held: Held) -> dict[str, Json]:
    """What was measured: the defense, its maker, the images and the adversary."""
    record, origin = held.record, held.listed.entry.origin
    defense, who = record.defense, record.adversary
    return {
        "protocol": record.protocol.content,
        "defense": [defense.name, defense.version, defense.params, defense.location],
        # The version of a built-in says that it gives the same; of others, the code alone does.
        "code": defense.code if defense.location is not None else None,
        "backbone": [record.backbone.name, record.backbone.params],
        "submission": origin.submission,
        "manifest": record.manifest,
        "adversary": None
        if who is None
        else [who.knowledge, who.transmissions, who.auxiliary, who.coalitions],
    }


def _superseded(held: Mapping[str, Held]) -> dict[str, str]:
    """The record that takes the place of another one, by the other's id.

    That it says so is not enough: it must be of the same thing, attack and seed, and verified as
    far. Or anybody could take anybody's row away.
    """
    found = {}
    for name, one in sorted(held.items()):
        other = held.get(one.record.supersedes or "")
        if other is None:
            continue
        same = _made(one) == _made(other) and one.record.seed == other.record.seed
        same = same and one.record.attack.name == other.record.attack.name
        levels = list(Level)
        far = levels.index(one.listed.entry.level) >= levels.index(other.listed.entry.level)
        if same and far:
            found[other.listed.id] = name
    return found | _by_submission(held)


def _by_submission(held: Mapping[str, Held]) -> dict[str, str]:
    """The same where a later submission of the same authors takes the place of an earlier one."""
    found = {}
    levels = list(Level)
    for name, one in sorted(held.items()):
        ours = one.listed.entry.origin
        for other in held.values():
            theirs = other.listed.entry.origin
            if ours.supersedes is None or theirs.submission != ours.supersedes:
                continue
            alike = one.record.seed == other.record.seed
            alike = alike and one.record.protocol.content == other.record.protocol.content
            alike = alike and one.record.attack.name == other.record.attack.name
            far = levels.index(one.listed.entry.level) >= levels.index(other.listed.entry.level)
            if alike and far and set(ours.authors) & set(theirs.authors):
                found[other.listed.id] = name
    return found


def _draft(
    runs: Sequence[Held], group: str, contents: Contents, taken: Mapping[str, str]
) -> _Draft:
    chosen = _headline(runs)
    record = chosen[0].record
    others = sorted(
        (one for one in runs if one not in chosen),
        key=lambda one: (one.record.attack.name, one.record.seed, one.listed.id),
    )
    scores = {one.metric: over_seeds(chosen, one) for one in record.scores}
    leakage = {one.metric: leakage_over_seeds(chosen, one) for one in record.scores}
    accuracy, drop, lost = accuracy_of(chosen)
    advisories = tuple(one for one in contents.advisories if concerns(one, chosen))
    by = next((taken[one.listed.id] for one in chosen if one.listed.id in taken), None)
    level = min((one.listed.entry.level for one in chosen), key=list(Level).index)
    key = key_of(chosen, leakage)
    lacks: dict[Condition, list[str]] = {}
    for condition, reason in reasons_against(chosen, lost, level, advisories, by, key):
        lacks.setdefault(condition, []).append(reason)
    label = label_of(chosen[0])
    row = Row(
        headline=tuple(one.listed for one in chosen),
        others=tuple(one.listed for one in others),
        label=label,
        slug=slug_of(record, group),
        attack=record.attack.name,
        accuracy=accuracy,
        drop=drop,
        scores=scores,
        leakage=leakage,
        gain={},
        rank=None,
        reasons=tuple(text for told in lacks.values() for text in told),
        pareto=False,
        level=level,
        advisories=advisories,
        superseded_by=by,
        best_known=_best_known([*chosen, *others], leakage, contents),
    )
    interval = None if isinstance(key, str) else key
    return _Draft(row, tuple(chosen), (*chosen, *others), frozenset(lacks), interval)


def _headline(runs: Sequence[Held]) -> list[Held]:
    """One run a seed: of the suite, else of the attack that leaks most.

    Only the protocol's own attacks and seeds count, where there is any, so that nobody adds those
    that came out well. Of several runs of one attack and seed the first that was made counts, for
    the same reason.
    """
    ours = [one for one in runs if not is_own_attack(one.record)] or runs
    meant = [one for one in ours if not _of_another_seed(one)]
    by_attack: dict[str, dict[int, Held]] = {}
    for one in by_start(meant or ours):
        by_attack.setdefault(one.record.attack.name, {}).setdefault(one.record.seed, one)
    name = SUITE
    if SUITE not in by_attack:
        name = max(sorted(by_attack), key=lambda one: _harm(list(by_attack[one].values())))
    return [one for _, one in sorted(by_attack[name].items())]


def _of_another_seed(held: Held) -> bool:
    return any(map(OTHER_SEED.match, held.record.deviations))


def _harm(runs: Sequence[Held]) -> float:
    """What a row of these runs would be ranked by."""
    found = []
    for one in runs:
        known = {score.metric: score.value for score in one.record.leakage}
        values = [known.get(f"leakage({name})") for name in rules.KEYS]
        found.append(max((value for value in values if value is not None), default=-np.inf))
    return float(np.mean(found))


# --- rank ----------------------------------------------------------------------------------------


def _best_known(
    runs: Sequence[Held], leakage: Mapping[str, Score], contents: Contents
) -> dict[str, BestKnown] | None:
    """By metric, the submitted attack that leaks most, where it leaks more than the headline.

    It is the answer to a challenge, or a run of somebody's own attack that was scored again here.
    """
    ids = {one.listed.id for one in runs}
    found: dict[str, BestKnown] = {}
    most = {name: one.value for name, one in leakage.items() if one.value is not None}
    answers = [one for one in contents.best_known if one.record in ids]
    for one in [*answers, *_own_attacks(runs, contents)]:
        for score in one.leakage:
            name = score.metric.removeprefix("leakage(").removesuffix(")")
            if score.value is not None and score.value > most.get(name, -np.inf):
                most[name], found[name] = score.value, one
    return found or None


def _own_attacks(runs: Sequence[Held], contents: Contents) -> Iterable[BestKnown]:
    """What somebody's own attacks reach among the runs of a row."""
    for one in runs:
        record, entry = one.record, one.listed.entry
        wrong = any(concerns(advisory, [one]) for advisory in contents.advisories)
        if not is_own_attack(record) or _of_another_seed(one) or wrong:
            continue
        if entry.level is not Level.CLAIMED:
            yield BestKnown(
                record=one.listed.id,
                by=entry.origin.submission or record.attack.name,
                origin=entry.origin,
                level=entry.level,
                scores=record.scores,
                permuted=record.permuted,
                leakage=record.leakage,
            )


def _with_places(drafts: Sequence[_Draft]) -> list[_Draft]:
    keys = {at: one.key for at, one in enumerate(drafts) if not one.lacks and one.key is not None}
    ranks = dict(zip(keys, rules.places(list(keys.values())), strict=True))
    return [replace(one, row=replace(one.row, rank=ranks.get(at))) for at, one in enumerate(drafts)]


def _with_front(drafts: Sequence[_Draft], noise: Noise) -> list[_Draft]:
    """Marks the front among rows of the same images, by the attack that all of them met.

    That is the attack of the noise curve, alone or in a suite; where no noise was measured, the
    suite, or the attack that most rows met.
    """
    fit = [
        one for one in drafts
        if one.lacks <= ON_FRONT_WITHOUT and one.key is not None and not isnan(one.row.accuracy)
    ]  # fmt: skip
    sets: dict[tuple[str, str], dict[str, tuple[float, float]]] = {}
    for one in fit:
        key, attack = cast("Interval", one.key).value, one.record.attack.name
        if noise.attack is not None:
            found = [noise.leakage(one.all, s) for s in one.record.scores if s.metric in rules.KEYS]
            known = [value for value in found if value is not None]
            if len(known) < len(found) or not known:
                continue
            key, attack = max(known), noise.attack
        manifest = one.record.manifest or ""
        sets.setdefault((attack, manifest), {})[one.row.slug] = (one.row.accuracy, key)
    chosen = sets[max(sets, key=lambda one: (one[0] == SUITE, len(sets[one]), one))] if sets else {}
    if len(chosen) < FEWEST_ON_FRONT:
        return list(drafts)
    on = dict(zip(chosen, rules.front(list(chosen.values())), strict=True))
    return [
        replace(one, row=replace(one.row, pareto=on.get(one.row.slug, False))) for one in drafts
    ]


def _ordered(drafts: Sequence[_Draft]) -> list[Row]:
    def place(one: _Draft) -> tuple[object, ...]:
        leak = float("inf") if one.key is None else one.key.value
        both = [one.row.leakage[name].value for name in rules.KEYS if name in one.row.leakage]
        least = min((value for value in both if value is not None), default=leak)
        return (one.row.rank is None, one.row.superseded_by is not None, bool(one.row.advisories),
                leak, least, one.row.slug)  # fmt: skip

    return [one.row for one in sorted(drafts, key=place)]
