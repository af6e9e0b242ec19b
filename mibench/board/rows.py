"""From records to rows: which runs belong together, and what a row says of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from mibench.board import gain as over_noise
from mibench.board import rules
from mibench.board.entries import Contents, Held, read
from mibench.board.model import (
    Advisory,
    BestKnown,
    Board,
    Level,
    Row,
    Section,
)
from mibench.board.rules import Interval
from mibench.checks.base import one_line
from mibench.errors import MibenchError
from mibench.evaluate import OVER_BUDGET
from mibench.files import Json, canonical_json, content_id
from mibench.job import SUITE, UNDEFENDED
from mibench.metrics.intervals import estimate_mean, normalised_leakage
from mibench.record import Component, Record, Score
from mibench.registry import defenses
from mibench.scoring import spread
from mibench.strike import interval_seed

NOISE = "noise"
"""The defense whose strengths make the noise curve."""
STRENGTH = "snr_db"
"""The parameter of `NOISE` that may differ along the curve."""
DIGITS = 9
"""Decimals of numbers that are computed here: other machines differ behind them."""
LONGEST_SLUG = 60


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


ON_FRONT_WITHOUT = {Condition.TRACK, Condition.ACCURACY, Condition.SUITE}
"""Conditions that a row on the Pareto front may lack."""


@dataclass(frozen=True)
class _Draft:
    """A row in the making."""

    row: Row
    runs: tuple[Held, ...]
    all: tuple[Held, ...]
    lacks: frozenset[Condition]
    key: Interval | None

    @property
    def record(self) -> Record:
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
    taken = {one.record.supersedes: name for name, one in contents.held.items()}
    made = [_section(held, contents, taken) for held in sections.values()]
    made.sort(key=lambda one: (not any(row.ranked for row in one.rows), one.protocol.id,
                               one.protocol.content))  # fmt: skip
    return Board(version=version, sections=tuple(made), advisories=contents.advisories)


def _section(held: Sequence[Held], contents: Contents, taken: Mapping[str | None, str]) -> Section:
    groups: dict[str, list[Held]] = {}
    for one in held:
        groups.setdefault(_group(one, superseded=one.listed.id in taken), []).append(one)
    drafts = [_draft(runs, key, contents, taken) for key, runs in sorted(groups.items())]
    noise = _Noise(held)
    drafts = [replace(one, row=replace(one.row, gain=noise.gain(one))) for one in drafts]
    rows = _ordered(_with_front(_with_places(drafts)))
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
    """What runs of one row have in common, as a short name."""
    record, origin = held.record, held.listed.entry.origin
    who = record.adversary
    defense = record.defense
    return content_id(
        {
            "defense": [defense.name, defense.version, defense.params, defense.location],
            # The version of a built-in says that it gives the same; of others, the code alone does.
            "code": defense.code if defense.location is not None else None,
            "backbone": [record.backbone.name, record.backbone.params],
            "submission": origin.submission,
            "manifest": record.manifest,
            "deviations": sorted(one for one in record.deviations if not one.startswith("seed ")),
            "adversary": None
            if who is None
            else [who.knowledge, who.transmissions, who.auxiliary, who.coalitions],
            "superseded": superseded,
        }
    )


def _draft(
    runs: Sequence[Held], group: str, contents: Contents, taken: Mapping[str | None, str]
) -> _Draft:
    chosen = _headline(runs)
    record = chosen[0].record
    others = sorted(
        (one for one in runs if one not in chosen),
        key=lambda one: (one.record.attack.name, one.record.seed, one.listed.id),
    )
    scores = {one.metric: _over_seeds(chosen, one) for one in record.scores}
    leakage = {one.metric: _leakage_over_seeds(chosen, one) for one in record.scores}
    accuracy, drop, lost = _accuracy(chosen)
    advisories = tuple(one for one in contents.advisories if _concerns(one, chosen))
    by = next((taken[one.listed.id] for one in chosen if one.listed.id in taken), None)
    level = min((one.listed.entry.level for one in chosen), key=list(Level).index)
    key = _key(chosen, leakage)
    lacks: dict[Condition, list[str]] = {}
    for condition, reason in _reasons(chosen, lost, level, advisories, by, key):
        lacks.setdefault(condition, []).append(reason)
    label = _label(chosen[0])
    row = Row(
        headline=tuple(one.listed for one in chosen),
        others=tuple(one.listed for one in others),
        label=label,
        slug=_slug(record, group),
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
        best_known=_best_known([*chosen, *others], leakage, contents.best_known),
    )
    interval = None if isinstance(key, str) else key
    return _Draft(row, tuple(chosen), (*chosen, *others), frozenset(lacks), interval)


def _headline(runs: Sequence[Held]) -> list[Held]:
    """One run a seed: of the suite, else of the attack that leaks most.

    Of several runs of one attack and seed the first that was made counts, whatever came out.
    """
    by_attack: dict[str, dict[int, Held]] = {}
    for one in sorted(runs, key=lambda one: (one.record.started, one.listed.id)):
        by_attack.setdefault(one.record.attack.name, {}).setdefault(one.record.seed, one)
    name = SUITE if SUITE in by_attack else max(
        sorted(by_attack), key=lambda one: _harm(list(by_attack[one].values()))
    )  # fmt: skip
    return [one for _, one in sorted(by_attack[name].items())]


def _harm(runs: Sequence[Held]) -> float:
    """What a row of these runs would be ranked by."""
    found = []
    for one in runs:
        known = {score.metric: score.value for score in one.record.leakage}
        values = [known.get(f"leakage({name})") for name in rules.KEYS]
        found.append(max((value for value in values if value is not None), default=-np.inf))
    return float(np.mean(found))


def _label(held: Held) -> str:
    record, origin = held.record, held.listed.entry.origin
    defense = record.defense
    changed = {
        key: value
        for key, value in defense.params.items()
        if key not in (defaults := _defaults(defense))
        or canonical_json(value) != canonical_json(defaults[key])
    }
    told = ", ".join(f"{key}={_word(value)}" for key, value in sorted(changed.items()))
    name = origin.submission if origin.submission is not None else defense.name
    label = f"{name} ({told})" if told else name
    if record.adversary is not None and record.adversary.coalitions:
        each = " or ".join("+".join(map(str, one)) for one in record.adversary.coalitions)
        label += f", servers {each} attacked"
    return one_line(label)


def _word(value: Json) -> str:
    return value if isinstance(value, str) else canonical_json(value).decode()


def _defaults(defense: Component) -> dict[str, Json]:
    """Default parameters of a defense that comes with mibench; none of others."""
    known = any(e.name == defense.name and e.origin == "mibench" for e in defenses.entries())
    if not known or defense.location is not None:
        return {}
    try:
        found = defenses.load(defense.name).Params()
    except (MibenchError, ValueError):  # one that cannot do without parameters
        return {}
    return cast("dict[str, Json]", found.model_dump(mode="json"))


def _slug(record: Record, group: str) -> str:
    name = f"{record.protocol.id}-{record.defense.name}".lower()
    plain = re.sub(r"[^a-z0-9]+", "-", name).strip("-")[:LONGEST_SLUG]
    return f"{plain}-{group[:8]}"


# --- numbers of a row ----------------------------------------------------------------------------


def _column(held: Held, name: str) -> Tensor | None:
    """Values per image (N,), or None where the run has none."""
    if name not in held.table.columns:
        return None
    return torch.tensor(held.table[name].to_numpy(np.float64))


def _mean_columns(runs: Sequence[Held], name: str) -> Tensor | None:
    """Values per image, mean over the runs; all of them attacked the same images."""
    found = [_column(one, name) for one in runs]
    known = [one for one in found if one is not None]
    return torch.stack(known).mean(0) if len(known) == len(runs) else None


def _score_of(record: Record, place: str, metric: str) -> Score | None:
    return next((one for one in getattr(record, place) if one.metric == metric), None)


def _over_seeds(runs: Sequence[Held], like: Score) -> Score:
    """A score as the record has it, or over several seeds: images are resampled, seeds are not."""
    if len(runs) == 1:
        return like
    return _averaged(
        runs, "scores", like, lambda: _summary(runs, like.metric, like.higher_is_better)
    )


def _leakage_over_seeds(runs: Sequence[Held], like: Score) -> Score:
    """Normalised leakage, under the name of its metric."""
    own = _score_of(runs[0].record, "leakage", f"leakage({like.metric})")
    assert own is not None, "a finished record has one for each score"
    own = own.model_copy(update={"metric": like.metric})
    if len(runs) == 1:
        return own
    return _averaged(runs, "leakage", own, lambda: _share(runs, like))


def _averaged(
    runs: Sequence[Held], place: str, like: Score, compute: Callable[[], dict[str, object] | None]
) -> Score:
    name = f"leakage({like.metric})" if place == "leakage" else like.metric
    parts = [_score_of(one.record, place, name) for one in runs]
    lacking = next((one for one in parts if one is None or one.value is None), like)
    values = compute() if all(one is not None and one.value is not None for one in parts) else None
    if values is None:
        reason = (lacking.reason if lacking is not None else None) or "a seed has no value"
        blank = dict.fromkeys(("value", "ci_low", "ci_high", "p50", "p95", "worst", "source"))
        return like.model_copy(update={**blank, "n": 0, "reason": reason})
    source = f"mean over seeds {', '.join(str(one.record.seed) for one in runs)}"
    return like.model_copy(update={**_rounded(values), "source": source})


def _summary(runs: Sequence[Held], metric: str, higher: bool) -> dict[str, object] | None:
    values = _mean_columns(runs, metric)
    if values is None:
        return None
    mean = estimate_mean(values, interval_seed(runs[0].record.seed))
    return {
        "value": mean.value, "ci_low": mean.low, "ci_high": mean.high, "n": mean.n,
        "reason": mean.reason, **spread(values, "higher" if higher else "lower"),
    }  # fmt: skip


def _share(runs: Sequence[Held], like: Score) -> dict[str, object] | None:
    columns = [
        _mean_columns(runs, f"{prefix}{like.metric}")
        for prefix in ("", "prior_only_", "undefended_")
    ]
    values, floor, reference = columns
    if values is None or floor is None or reference is None:
        return None
    found = normalised_leakage(
        values,
        floor,
        reference,
        more_leakage="higher" if like.higher_is_better else "lower",
        seed=interval_seed(runs[0].record.seed),
    )
    if found.value is None:
        return None
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high, "n": found.n,
            "reason": found.reason}  # fmt: skip


def _rounded(values: Mapping[str, object]) -> dict[str, object]:
    return {k: round(v, DIGITS) if isinstance(v, float) else v for k, v in values.items()}


def _accuracy(runs: Sequence[Held]) -> tuple[float, float, dict[str, float]]:
    """Accuracy, points of it that are lost, and the same of every kind of accuracy."""
    lost: dict[str, float] = {}
    for name in ("accuracy", "balanced accuracy"):
        pairs = [
            (bare.value, own.value)
            for run in runs
            for own, bare in [
                (
                    _score_of(run.record, "utility", name),
                    _score_of(run.record, "utility", f"undefended {name}"),
                )
            ]
            if own is not None and bare is not None
            if own.value is not None and bare.value is not None
        ]
        if pairs:
            lost[name] = round(100 * sum(b - o for b, o in pairs) / len(pairs), DIGITS)
    values = [_score_of(run.record, "utility", "accuracy") for run in runs]
    known = [one.value for one in values if one is not None and one.value is not None]
    accuracy = sum(known) / len(known) if known else float("nan")
    return round(accuracy, DIGITS), lost.get("accuracy", float("nan")), lost


# --- rank ----------------------------------------------------------------------------------------


def _key(runs: Sequence[Held], leakage: Mapping[str, Score]) -> Interval | str:
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
    columns = [_mean_columns(runs, f"{prefix}{name}") for prefix in
               ("", "prior_only_", "undefended_")]  # fmt: skip
    values, floor, top = columns
    if values is None or floor is None or top is None:
        return leakage.ci_low, leakage.ci_high
    score = _score_of(runs[0].record, "scores", name)
    certain = bool((values == values[0]).all()) and float(values[0]) in (0.0, 1.0)
    if score is None or score.unit != "share" or not certain:
        return leakage.ci_low, leakage.ci_high
    base, span = float(floor.mean()), float((top - floor).mean())
    ends = rules.all_or_none(float(values[0]), len(values))
    low, high = ((end - base) / span for end in ends)
    return min(low, leakage.ci_low), max(high, leakage.ci_high)


def _reasons(
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
            f"Its protocol is of the track {record.protocol.track}, which is \
never ranked.",
        )
    yield from _departures(records)
    if record.attack.name != SUITE:
        yield (
            Condition.SUITE,
            f"It was attacked with {record.attack.name} alone, not with the \
whole suite.",
        )
    else:
        attacks = record.protocol.values.get("attacks")
        made = {part.attack.partition("@")[0] for part in record.suite}
        if missing := sorted(set(attacks if isinstance(attacks, Mapping) else ()) - made):
            yield Condition.SUITE, f"Its suite lacks {', '.join(missing)}."
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


def _concerns(advisory: Advisory, runs: Sequence[Held]) -> bool:
    for one in runs:
        record = one.record
        parts = (record.defense, record.attack, record.backbone)
        hit = any(part.code in advisory.code.get(part.name, []) for part in parts)
        if hit or one.listed.id in advisory.records:
            return True
        if record.protocol.content in advisory.protocols:
            return True
    return False


def _best_known(
    runs: Sequence[Held], leakage: Mapping[str, Score], known: Iterable[BestKnown]
) -> dict[str, BestKnown] | None:
    """By metric, the submitted attack that leaks most, where it leaks more than the headline."""
    ids = {one.listed.id for one in runs}
    found: dict[str, BestKnown] = {}
    most = {name: one.value for name, one in leakage.items() if one.value is not None}
    for one in known:
        if one.record not in ids:
            continue
        for score in one.leakage:
            name = score.metric.removeprefix("leakage(").removesuffix(")")
            if score.value is not None and score.value > most.get(name, -np.inf):
                most[name], found[name] = score.value, one
    return found or None


def _with_places(drafts: Sequence[_Draft]) -> list[_Draft]:
    keys = {at: one.key for at, one in enumerate(drafts) if not one.lacks and one.key is not None}
    ranks = dict(zip(keys, rules.places(list(keys.values())), strict=True))
    return [replace(one, row=replace(one.row, rank=ranks.get(at))) for at, one in enumerate(drafts)]


def _with_front(drafts: Sequence[_Draft]) -> list[_Draft]:
    """Marks the front among rows that met the same attacks on the same images.

    Those of the suite where there are any; else those of the attack that most rows met.
    """
    fit = [
        at for at, one in enumerate(drafts)
        if one.lacks <= ON_FRONT_WITHOUT and one.key is not None
    ]  # fmt: skip
    sets: dict[tuple[str, str], list[int]] = {}
    for at in fit:
        record = drafts[at].record
        sets.setdefault((record.attack.name, record.manifest or ""), []).append(at)
    if not sets:
        return list(drafts)
    chosen = sets[max(sets, key=lambda one: (one[0] == SUITE, len(sets[one]), one))]
    points = [(drafts[at].row.accuracy, cast("Interval", drafts[at].key).value) for at in chosen]
    marked = {at for at, on in zip(chosen, rules.front(points), strict=True) if on}
    return [
        replace(one, row=replace(one.row, pareto=at in marked)) for at, one in enumerate(drafts)
    ]


def _ordered(drafts: Sequence[_Draft]) -> list[Row]:
    def place(one: _Draft) -> tuple[object, ...]:
        leak = float("inf") if one.key is None else one.key.value
        rank = one.row.rank
        return (rank is None, one.row.superseded_by is not None, bool(one.row.advisories),
                leak, one.row.slug)  # fmt: skip

    return [one.row for one in sorted(drafts, key=place)]


# --- noise ---------------------------------------------------------------------------------------


class _Noise:
    """The noise curve of a section, and what rows gain over it.

    Args:
        held: all records of the section.
    """

    def __init__(self, held: Sequence[Held]) -> None:
        self._held = [one for one in held if not _off_curve(one.record)]
        self._noise = [one for one in self._held if _is_noise(one.record)]
        strengths: dict[str, set[object]] = {}
        for one in self._noise:
            for name in _attacks(one):
                strengths.setdefault(name, set()).add(one.record.defense.params.get(STRENGTH))
        self.attack = max(
            sorted(strengths), key=lambda name: (len(strengths[name]), name == SUITE), default=None
        )

    def points(self) -> dict[str, tuple[tuple[float, Score], ...]]:
        """Accuracy and leakage of every point by metric, the undefended end last."""
        if self.attack is None:
            return {}
        found: dict[str, tuple[tuple[float, Score], ...]] = {}
        for like in self._noise[0].record.scores:
            points = [
                point
                for runs in self._strengths().values()
                for point in [self._point(runs, like)]
                if point is not None
            ]
            if points:
                found[like.metric] = tuple(sorted([*points, self._end(like)], key=lambda p: p[0]))
        return found

    def gain(self, draft: _Draft) -> dict[str, Score]:
        """The gain of a row by metric; null with the reason where it cannot be had."""
        return {
            one.metric: self._gain(draft, one) for one in draft.record.scores
        }  # fmt: skip

    def _gain(self, draft: _Draft, like: Score) -> Score:
        defense = draft.record.defense
        if self.attack is None:
            return over_noise.nothing(like, "no noise was measured under this protocol")
        if defense.name == UNDEFENDED:
            return over_noise.nothing(like, "the undefended split is the end of the noise curve")
        if _is_noise(draft.record):
            return over_noise.nothing(like, "it is the noise that others are compared with")
        if like.value is None:
            return over_noise.nothing(like, like.reason)
        mine = {
            one.record.seed: one
            for one in reversed(draft.all)
            if self.attack in _attacks(one) and not _off_curve(one.record)
        }
        if not mine:
            return over_noise.nothing(
                like, f"it was not attacked with {self.attack}, as noise was, or departs from the "
                "protocol"
            )  # fmt: skip
        pairs = {
            seed: pair
            for seed, one in sorted(mine.items())
            for pair in [self._compared(one, like)]
            if pair is not None
        }
        if not pairs:
            return over_noise.nothing(
                like, f"seed {', '.join(map(str, sorted(mine)))} of noise was not measured"
            )
        seeds = ", ".join(map(str, pairs))
        score = over_noise.gain(
            list(pairs.values()),
            like,
            interval_seed(draft.record.seed),
            f"both attacked with {self.attack}, seed {seeds}",
        )
        return score.model_copy(update=_rounded(score.model_dump()))

    def _compared(self, one: Held, like: Score) -> over_noise.Compared | None:
        """A run beside the noise of the same seed and images."""
        assert self.attack is not None
        peers = [
            other
            for other in self._noise
            if other.record.seed == one.record.seed
            and other.record.manifest == one.record.manifest
            and self.attack in _attacks(other)
        ]
        peers = list({_strength(other.record): other for other in reversed(peers)}.values())
        row = _under(one, self.attack, like.metric)
        floor, bare = self._ends(one, like.metric)
        accuracy = _share_right(one.record, "accuracy")
        end = _share_right(one.record, "undefended accuracy")
        points = []
        for other in peers:
            values, at = (
                _under(other, self.attack, like.metric),
                _share_right(other.record, "accuracy"),
            )
            if values is not None and at is not None:
                points.append((at.value, values))
        if row is None or floor is None or bare is None or accuracy is None or end is None:
            return None
        if not points:
            return None
        points.sort(key=lambda point: point[0])
        return over_noise.Compared(row, floor, bare, accuracy, end.value, tuple(points))

    def _ends(self, one: Held, metric: str) -> tuple[Tensor | None, Tensor | None]:
        """Blind guess and undefended split under the curve's attack, of the seed of a run.

        The undefended split is the same for all runs of a seed, so that any of them can tell.
        """
        assert self.attack is not None
        same = [
            other
            for other in self._held
            if other.record.seed == one.record.seed and other.record.manifest == one.record.manifest
        ]
        for other in same:
            if other.record.attack.name == self.attack:
                return _column(other, f"prior_only_{metric}"), _column(
                    other, f"undefended_{metric}"
                )
        for other in same:
            if other.record.defense.name == UNDEFENDED and self.attack in _attacks(other):
                bare = _under(other, self.attack, metric)
                return _column(other, f"prior_only_{metric}"), bare
        return None, None

    def _strengths(self) -> dict[str, list[Held]]:
        """Runs of each strength that met the curve's attack, one a seed."""
        found: dict[str, dict[int, Held]] = {}
        for one in self._noise:
            if self.attack in _attacks(one):
                found.setdefault(_strength(one.record), {}).setdefault(one.record.seed, one)
        return {name: [one for _, one in sorted(runs.items())] for name, runs in found.items()}

    def _point(self, runs: Sequence[Held], like: Score) -> tuple[float, Score] | None:
        """One strength: accuracy and leakage under the curve's attack, over its seeds."""
        assert self.attack is not None
        columns, right = [], []
        for one in runs:
            floor, bare = self._ends(one, like.metric)
            values = _under(one, self.attack, like.metric)
            accuracy = _share_right(one.record, "accuracy")
            if floor is None or bare is None or values is None or accuracy is None:
                continue
            columns.append(torch.stack([values, floor, bare]))
            right.append(accuracy.value)
        if not columns:
            return None
        values, floor, bare = torch.stack(columns).mean(0)
        found = normalised_leakage(
            values,
            floor,
            bare,
            more_leakage="higher" if like.higher_is_better else "lower",
            seed=interval_seed(runs[0].record.seed),
        )
        if found.value is None:
            return None
        score = _blank_share(like).model_copy(
            update=_rounded(
                {"value": found.value, "ci_low": found.low, "ci_high": found.high, "n": found.n,
                 "reason": found.reason, "source": f"{STRENGTH} {_strength(runs[0].record)}"}
            )
        )  # fmt: skip
        return round(sum(right) / len(right), DIGITS), score

    def _end(self, like: Score) -> tuple[float, Score]:
        """The undefended split: it leaks 1, and is as accurate as the model without a defense."""
        right = [
            one.value
            for runs in self._strengths().values()
            for run in runs
            for one in [_share_right(run.record, "undefended accuracy")]
            if one is not None
        ]
        score = _blank_share(like).model_copy(
            update={"value": 1.0, "ci_low": 1.0, "ci_high": 1.0, "source": UNDEFENDED,
                    "reason": None}
        )  # fmt: skip
        return round(sum(right) / len(right), DIGITS), score


def _blank_share(like: Score) -> Score:
    blank = dict.fromkeys(("value", "ci_low", "ci_high", "p50", "p95", "worst", "source"))
    return like.model_copy(
        update={**blank, "unit": "share of the undefended leakage", "higher_is_better": True,
                "reason": "not computed"}
    )  # fmt: skip


def _off_curve(record: Record) -> bool:
    """Whether a run was not made as the protocol says, so that nothing is compared with it.

    A client that costs too much is still attacked like all others.
    """
    return any(not one.startswith(OVER_BUDGET) for one in record.deviations)


def _is_noise(record: Record) -> bool:
    """Whether this is the built-in noise, with no parameter changed but its strength."""
    if record.defense.name != NOISE or record.defense.location is not None:
        return False
    meant = _defaults(record.defense)
    return all(
        canonical_json(value) == canonical_json(meant.get(key))
        for key, value in record.defense.params.items()
        if key != STRENGTH
    )


def _strength(record: Record) -> str:
    return _word(record.defense.params.get(STRENGTH))


def _attacks(one: Held) -> list[str]:
    """Attacks of which a run holds values per image: its own, and those of a suite."""
    return [one.record.attack.name, *(part.attack for part in one.record.suite if part.scores)]


def _under(one: Held, attack: str, metric: str) -> Tensor | None:
    """Values per image of one attack: the run's own, or those of a part of a suite."""
    own = one.record.attack.name == attack
    return _column(one, metric if own else f"{attack}_{metric}")


def _share_right(record: Record, name: str) -> over_noise.Accuracy | None:
    score = _score_of(record, "utility", name)
    if score is None or score.value is None:
        return None
    return over_noise.Accuracy(score.value, (score.value * (1 - score.value) / score.n) ** 0.5)
