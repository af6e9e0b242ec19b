"""The noise curve of a protocol, and which runs are held against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mibench.board import gain as over_noise
from mibench.board.columns import DIGITS, column, leakage_fields, rounded, score_of
from mibench.board.entries import Held, by_start
from mibench.board.model import Entry, Level
from mibench.board.names import defaults_of, word
from mibench.evaluate import OVER_BUDGET
from mibench.files import canonical_json
from mibench.job import SUITE, UNDEFENDED
from mibench.record import Record, Score
from mibench.strike import interval_seed

NOISE = "noise"
"""The defense whose strengths make the noise curve."""
STRENGTH = "snr_db"
"""The parameter of `NOISE` that may differ along the curve."""


class Noise:
    """The noise curve of a section, and what rows gain over it.

    Args:
        held: all records of the section.
    """

    def __init__(self, held: Sequence[Held]) -> None:
        self._held = by_start(
            one for one in held if _may_bend(one.listed.entry) and not _off_curve(one.record)
        )
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

    def gain(self, record: Record, runs: Sequence[Held]) -> dict[str, Score]:
        """The gain of a row by metric; null with the reason where it cannot be had.

        Args:
            record: the first of its headline.
            runs: all that there are of it, the headline first.
        """
        return {one.metric: self._gain(record, runs, one) for one in record.scores}

    def _gain(self, record: Record, runs: Sequence[Held], like: Score) -> Score:
        if self.attack is None:
            return over_noise.nothing(like, "no noise counts under this protocol yet")
        if _is_undefended(record):
            return over_noise.nothing(like, "the undefended split is the end of the noise curve")
        if _is_noise(record):
            return over_noise.nothing(like, "it is the noise that others are compared with")
        if like.value is None:
            return over_noise.nothing(like, like.reason)
        mine = self._of_the_attack(runs)
        if not mine:
            reason = f"it was not attacked with {self.attack}, as noise was"
            if any(_off_curve(one.record) for one in runs):
                reason = "it departs from the protocol, and noise does not"
            return over_noise.nothing(like, reason)
        pairs = {
            seed: pair
            for seed, one in sorted(mine.items())
            for pair in [self._compared(one, like)]
            if pair is not None
        }
        if not pairs:
            seeds = ", ".join(map(str, sorted(mine)))
            return over_noise.nothing(
                like, f"noise, or the undefended split, of seed {seeds} was not measured"
            )
        score = over_noise.gain(pairs, like, interval_seed(record.seed), self.attack)
        return score.model_copy(update=rounded(score.model_dump()))

    def leakage(self, runs: Sequence[Held], like: Score) -> float | None:
        """What a row leaks under the curve's attack, mean over seeds; None where it never met it.

        Args:
            runs: all that there are of the row, the headline first.
            like: the score of the metric that is asked for.
        """
        if self.attack is None:
            return None
        point = self._point(list(self._of_the_attack(runs).values()), like)
        return None if point is None else point[1].value

    def _of_the_attack(self, runs: Sequence[Held]) -> dict[int, Held]:
        """Runs of a row that met the curve's attack, alone or in a suite, by seed."""
        return {
            one.record.seed: one
            for one in reversed(by_start(runs))
            if self.attack in _attacks(one) and not _off_curve(one.record)
        }

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
            values = _under(other, self.attack, like.metric)
            at = _share_right(other.record, "accuracy")
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
                return column(other, f"prior_only_{metric}"), column(other, f"undefended_{metric}")
        for other in same:
            if _is_undefended(other.record) and self.attack in _attacks(other):
                bare = _under(other, self.attack, metric)
                return column(other, f"prior_only_{metric}"), bare
        return None, None

    def _strengths(self) -> dict[str, list[Held]]:
        """Runs of each strength that met the curve's attack, one a seed."""
        found: dict[str, dict[int, Held]] = {}
        for one in self._noise:
            if self.attack in _attacks(one):
                found.setdefault(_strength(one.record), {}).setdefault(one.record.seed, one)
        return {name: [one for _, one in sorted(runs.items())] for name, runs in found.items()}

    def _point(self, runs: Sequence[Held], like: Score) -> tuple[float, Score] | None:
        """Accuracy and leakage under the curve's attack, over the seeds of a row or a strength."""
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
        found = leakage_fields(values, floor, bare, like, runs[0].record.seed)
        if found is None:
            return None
        source = f"{STRENGTH} {_strength(runs[0].record)}"
        score = _blank_share(like).model_copy(update=rounded({**found, "source": source}))
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


def _may_bend(entry: Entry) -> bool:
    """Whether a record may shape the curve: what somebody else made, or only claimed, may not."""
    return entry.origin.kind == "builtin" and entry.level is not Level.CLAIMED


def _off_curve(record: Record) -> bool:
    """Whether a run was not made as the protocol says, so that nothing is compared with it.

    A client that costs too much is still attacked like all others.
    """
    return not all(one.startswith(OVER_BUDGET) for one in record.deviations)


def _is_undefended(record: Record) -> bool:
    return record.defense.name == UNDEFENDED and record.defense.location is None


def _is_noise(record: Record) -> bool:
    """Whether this is the built-in noise, with no parameter changed but its strength."""
    if record.defense.name != NOISE or record.defense.location is not None:
        return False
    meant = defaults_of(record.defense)
    return all(
        canonical_json(value) == canonical_json(meant.get(key))
        for key, value in record.defense.params.items()
        if key != STRENGTH
    )


def _strength(record: Record) -> str:
    return word(record.defense.params.get(STRENGTH))


def _attacks(one: Held) -> list[str]:
    """Attacks of which a run holds values per image: its own, and those of a suite."""
    return [one.record.attack.name, *(part.attack for part in one.record.suite if part.scores)]


def _under(one: Held, attack: str, metric: str) -> Tensor | None:
    """Values per image of one attack: the run's own, or those of a part of a suite."""
    own = one.record.attack.name == attack
    return column(one, metric if own else f"{attack}_{metric}")


def _share_right(record: Record, name: str) -> over_noise.Accuracy | None:
    score = score_of(record, "utility", name)
    if score is None or score.value is None:
        return None
    return over_noise.Accuracy(score.value, (score.value * (1 - score.value) / score.n) ** 0.5)
