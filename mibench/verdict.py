"""Whether a rerun gives the same result as its record, and where it first differs.

The comparison walks the way of `evaluate()`: protocol, data, code, machine, weights, adversary,
values per image, means. The images of both are the same, so values are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from pydantic import JsonValue

from mibench.files import canonical_json
from mibench.metrics.intervals import bootstrap_mean
from mibench.record import PLACES, Component, Record, Score

TOLERANCE = {
    "psnr": 0.6, "ssim": 0.04, "lpips": 0.04, "recognition": 0.08, "reid-top1": 0.15,
    "reid-top5": 0.07, "reid-mrr": 0.11, "accuracy": 0.03, "balanced accuracy": 0.03,
}  # fmt: skip
"""How far the mean of the same images may move when a run is repeated elsewhere, by metric.

Another number of threads changes the last bits, as another machine does, and training enlarges
them: the largest change that ``docs/noise-floor.md`` shows, rounded up. LPIPS was not measured and
is taken as SSIM, balanced accuracy as accuracy. A metric that is not here has a tolerance of 0.
"""
SEEDS = {
    "psnr": 3.2, "ssim": 0.16, "lpips": 0.16, "recognition": 0.23, "reid-top1": 0.19,
    "reid-top5": 0.2, "reid-mrr": 0.19, "accuracy": 0.05, "balanced accuracy": 0.05,
}  # fmt: skip
"""The same for another seed: 2.8 times the largest standard deviation over seeds."""
CIRCUMSTANCES = ("code", "packages", "machine")
"""Places whose differences need not have an effect."""
EXACT = 1e-9
"""Relative difference up to which a mean follows from values that were rounded by nothing else."""


@dataclass(frozen=True)
class Difference:
    """One thing that is not as the record says.

    Attributes:
        place: where on the way: ``record``, ``protocol``, ``data``, ``code``, ``packages``,
            ``machine``, ``initial weights``, ``trained weights``, ``servers``, ``judge``,
            ``per image`` or ``means``.
        text: what was there and what is here.
    """

    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


@dataclass(frozen=True)
class Row:
    """One score of the record beside that of the rerun.

    Attributes:
        place: field of the record.
        metric: its name.
        before: mean in the record.
        after: mean of the rerun.
        low: lower end of the 95 % interval of the change; None where there is none.
        high: upper end.
        paired: whether the interval is that of the same images' changes.
        tolerance: how far the noise floor lets the mean move.
        agrees: whether the change is within both.
    """

    place: str
    metric: str
    before: float
    after: float
    low: float | None
    high: float | None
    paired: bool
    tolerance: float
    agrees: bool


@dataclass(frozen=True)
class Verdict:
    """How a rerun compares with its record.

    Attributes:
        word: ``identical`` (every value of every image), ``same`` (every mean moved by no more than
            the noise floor and the images' own scatter allow) or ``different``. With few images
            the scatter allows much: ``same`` means that no difference was found.
        differences: in the order of the way; those of `CIRCUMSTANCES` need not matter.
        rows: all scores side by side; empty where nothing was run.
    """

    word: Literal["identical", "same", "different"]
    differences: list[Difference]
    rows: list[Row]

    @property
    def first(self) -> Difference | None:
        """Where the rerun first differs."""
        return self.differences[0] if self.differences else None


def compare(
    before: Record, old: pd.DataFrame | None, after: Record, new: pd.DataFrame | None
) -> Verdict:
    """Compares a record with its rerun.

    Args:
        before: the record.
        old: the values per image beside it, or None where they are not there.
        after: the record of the rerun.
        new: its values per image.

    Returns:
        The verdict. Of another seed, results are never ``identical``: weights must differ, and only
        means are compared.
    """
    reseeded = before.seed != after.seed
    edited = list(_edited(before, old))
    way = [*edited, *on_the_way(before, after)]
    alike = old is not None and new is not None and _same_images(old, new)
    floor = SEEDS if reseeded else TOLERANCE
    rows = list(_rows(before, old if alike else None, after, new if alike else None, floor))
    if old is not None and new is not None and not alike:
        way.append(Difference("data", "per_image.parquet lists other images"))
    values = [] if reseeded or old is None or new is None else list(_per_image(old, new))
    means = [] if reseeded else list(_means(before, after))
    stuck = reseeded and before.defense_facts.get("trained_weights") is not None
    stuck = stuck and _fact(before, "trained_weights") == _fact(after, "trained_weights")
    if stuck:
        way.append(
            Difference("trained weights", f"those of seed {before.seed} and {after.seed} are equal")
        )
    way += values + means
    # Where no value of any image differs, a mean that does was not computed from them.
    whole = alike and not values and not reseeded
    # Where no score of the attack was compared, nothing is known to be the same.
    blank = not any(row.place == "scores" for row in rows)
    broken = (
        edited or stuck or blank or (whole and means) or any(one.place == "data" for one in way)
    )
    if broken or not all(row.agrees for row in rows):
        return Verdict("different", way, rows)
    return Verdict("identical" if whole else "same", way, rows)


def on_the_way(before: Record, after: Record) -> Iterator[Difference]:
    """What differs before the first image is attacked."""
    yield from _unequal("protocol", {"id": before.protocol.id, "content": before.protocol.content},
                        {"id": after.protocol.id, "content": after.protocol.content})  # fmt: skip
    for kind in ("backbone", "defense", "attack"):
        one, other = getattr(before, kind), getattr(after, kind)
        yield from _unequal("protocol", _flat(f"{kind}.", one.params),
                            _flat(f"{kind}.", other.params))  # fmt: skip
    yield from data_differences(before, after)
    yield from _unequal("code", _code(before), _code(after))
    yield from _unequal("packages", _packages(before), _packages(after))
    yield from _unequal("machine", _machine(before), _machine(after))
    if before.seed == after.seed:
        for fact in ("initial_weights", "trained_weights"):
            had, has = _fact(before, fact), _fact(after, fact)
            if None not in (had, has) and had != has:
                yield Difference(fact.replace("_", " "), f"{had} in the record, {has} here")
    if before.adversary is not None and after.adversary is not None:
        read = [one.adversary.corrupted for one in (before, after) if one.adversary is not None]
        if read[0] != read[1]:
            yield Difference("servers", f"{read[0]} attacked in the record, {read[1]} here")
    if before.judge is not None and after.judge is not None:
        judges = [one.judge.weights for one in (before, after) if one.judge is not None]
        if judges[0] != judges[1]:
            yield Difference("judge", f"weights {judges[0]} in the record, {judges[1]} here")


def data_differences(before: Record, after: Record) -> Iterator[Difference]:
    """Which images are not those of the record."""
    had, has = before.data, after.data
    if had is None or has is None:
        return
    for role in had.identities:
        if had.identities[role] != has.identities.get(role):
            yield Difference(
                "data",
                f"the role {role!r} holds other images: {had.identities[role]} in the record, "
                f"{has.identities.get(role)} here",
            )
    yield from _unequal("data", _flat("number of images, ", had.images),
                        _flat("number of images, ", has.images))  # fmt: skip
    # In format 1 the manifest was that of the attacked images alone.
    if before.format_version > 1 and before.manifest != after.manifest:
        yield Difference("data", f"manifest {before.manifest} in the record, {after.manifest} here")


def tolerance(metric: str, value: float, floor: Mapping[str, float]) -> float:
    """How far the noise floor lets the mean of a metric move, in its unit.

    That of the mean squared error follows from that of PSNR, so it is a share of ``value``.

    Args:
        metric: its name in the record.
        value: the mean in the record.
        floor: `TOLERANCE` or `SEEDS`.
    """
    if metric == "mse":
        return float(value * (10 ** (floor["psnr"] / 10) - 1))
    name = metric.removeprefix("undefended ").removeprefix("validation ")
    return floor.get(name, 0.0)


def _rows(
    before: Record,
    old: pd.DataFrame | None,
    after: Record,
    new: pd.DataFrame | None,
    floor: Mapping[str, float],
) -> Iterator[Row]:
    for place in (*PLACES, "utility"):
        theirs = {one.metric: one for one in getattr(after, place)}
        for score in getattr(before, place):
            other = theirs.get(score.metric)
            if score.value is None or other is None or other.value is None:
                continue
            column = PLACES.get(place, "") + score.metric
            allowed = tolerance(score.metric, score.value, floor)
            if place in PLACES and old is not None and new is not None and column in old:
                yield _paired(place, score, other.value, old[column], new.get(column), allowed)
            else:
                yield _unpaired(place, score, other.value, allowed)


def _paired(
    place: str, score: Score, after: float, old: pd.Series, new: object, allowed: float
) -> Row:
    assert score.value is not None
    assert isinstance(new, pd.Series), "a score with a value has a column"
    change = torch.tensor(new.to_numpy(np.float64) - old.to_numpy(np.float64))
    # One image has no scatter to allow for.
    low, high = (
        bootstrap_mean(change, seed=0) if len(change) > 1 else (float(change), float(change))
    )
    agrees = low <= allowed and high >= -allowed
    return Row(place, score.metric, score.value, after, low, high, True, allowed, agrees)


def _unpaired(place: str, score: Score, after: float, allowed: float) -> Row:
    """Without the images' own values: the new mean against the old interval, both ends moved."""
    before = score.value
    assert before is not None
    low = before if score.ci_low is None else score.ci_low
    high = before if score.ci_high is None else score.ci_high
    agrees = low - allowed <= after <= high + allowed
    return Row(place, score.metric, before, after, after - high, after - low, False, allowed,
               agrees)  # fmt: skip


def _edited(record: Record, table: pd.DataFrame | None) -> Iterator[Difference]:
    """Means of a record that do not follow from the values per image beside it."""
    if table is None:
        return
    for place, prefix in PLACES.items():
        for score in getattr(record, place):
            column = prefix + score.metric
            if score.value is None or column not in table:
                continue
            values = table[column].to_numpy(np.float64)
            found = float(values.mean())
            if abs(found - score.value) > EXACT * max(1.0, abs(found)):
                yield Difference(
                    "record",
                    f"{place} says that {score.metric} is {score.value:.6g}, but "
                    f"per_image.parquet gives {found:.6g}",
                )
            if score.n != len(values):
                yield Difference(
                    "record",
                    f"{place} says that {score.metric} rests on {score.n} images, but "
                    f"per_image.parquet has {len(values)}",
                )


def _same_images(old: pd.DataFrame, new: pd.DataFrame) -> bool:
    return len(old) == len(new) and list(old["sha256"]) == list(new["sha256"])


def _per_image(old: pd.DataFrame, new: pd.DataFrame) -> Iterator[Difference]:
    """For each column, the first image whose value differs."""
    if not _same_images(old, new):
        return
    for name in old.columns:
        if name not in new.columns:
            yield Difference("per image", f"{name} is in the record alone")
            continue
        unequal = np.flatnonzero(old[name].to_numpy() != new[name].to_numpy())
        if len(unequal):
            at = int(unequal[0])
            yield Difference(
                "per image",
                f"{name} of image {at} is {_shown(old[name].iloc[at])} in the record and "
                f"{_shown(new[name].iloc[at])} here ({len(unequal)} of {len(old)} images differ)",
            )


def _means(before: Record, after: Record) -> Iterator[Difference]:
    for place in (*PLACES, "leakage", "utility"):
        theirs = {one.metric: one for one in getattr(after, place)}
        for score in getattr(before, place):
            other = theirs.get(score.metric)
            if other is None:
                yield Difference("means", f"{place} of {score.metric} is in the record alone")
                continue
            had, has = (one.model_dump(exclude={"source", "reason"}) for one in (score, other))
            # Older formats have no percentiles; what is not there is not compared.
            for key in (key for key in had if had[key] is not None or key == "value"):
                if had[key] != has[key]:
                    yield Difference(
                        "means",
                        f"{place}, {score.metric}: {key} is {_shown(had[key])} in the record and "
                        f"{_shown(has[key])} here",
                    )


def _code(record: Record) -> dict[str, JsonValue]:
    def told(part: Component) -> str:
        return f"version {part.version}, code {part.code}"

    kinds = {"backbone": record.backbone, "defense": record.defense, "attack": record.attack}
    found: dict[str, JsonValue] = {f"{kind} {one.name}": told(one) for kind, one in kinds.items()}
    return found | {f"metric {one.metric}": f"version {one.version}" for one in record.scores}


def _packages(record: Record) -> dict[str, JsonValue]:
    packages = record.provenance.get("packages")
    own = {key: record.provenance.get(key) for key in ("mibench", "revision", "python")}
    return {**own, **packages} if isinstance(packages, dict) else own


def _machine(record: Record) -> dict[str, JsonValue]:
    return {key: record.provenance.get(key) for key in ("system", "device", "threads")}


def _fact(record: Record, name: str) -> JsonValue:
    return record.defense_facts.get(name)


def _unequal(
    place: str, before: Mapping[str, JsonValue], after: Mapping[str, JsonValue]
) -> Iterator[Difference]:
    for key in _names(before, after):
        had, has = before.get(key), after.get(key)
        if canonical_json(had) != canonical_json(has):
            yield Difference(place, f"{key} is {_shown(had)} in the record and {_shown(has)} here")


def _names(before: Iterable[str], after: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*before, *after]))


def _flat(prefix: str, values: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {f"{prefix}{key}": value for key, value in values.items()}


def _shown(value: object) -> str:
    if isinstance(value, float | np.floating):
        return f"{value:.9g}"
    return "missing" if value is None else str(value)
