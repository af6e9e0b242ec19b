"""What the leaderboard holds: entries as they lie in git, and rows as they are shown."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mibench.record import ProtocolId, Record, Score

FORMAT = 1
"""Version of ``entry.json`` that this code writes."""
PLAIN = r"^[A-Za-z0-9_][A-Za-z0-9._-]*$"
"""Names: no letter that looks like another one, and nothing that turns the direction of text."""


class Level(StrEnum):
    """How far an entry has been verified; a later one includes the earlier ones."""

    CLAIMED = "claimed"
    """Its form is right, and its means follow from its values per image."""
    RESCORED = "rescored"
    """Its scores were computed again from its images, and its accuracy from its weights."""
    REPRODUCED = "reproduced"
    """It was run again with another seed and came out the same within the noise floor."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Origin(_Part):
    """Where an entry comes from.

    Attributes:
        kind: ``builtin`` for what comes with mibench, ``submission`` for what others gave.
        submission: name of its folder in ``submissions/``.
        title: of the method, as its authors call it.
        authors: their names.
        paper: where it was published: an arXiv number, a DOI or an address.
        code: address of the authors' own code.
        licence: SPDX identifier of the submitted code and weights.
        supersedes: name of an earlier submission that this one takes the place of.
    """

    kind: Literal["builtin", "submission"] = "builtin"
    submission: Annotated[str, Field(pattern=PLAIN)] | None = None
    title: str | None = None
    authors: list[str] = []
    paper: str | None = None
    code: str | None = None
    licence: str | None = None
    supersedes: Annotated[str, Field(pattern=PLAIN)] | None = None


class CheckLine(_Part):
    """One finding of `mibench check`: its check, ``passed``/``warned``/``failed``/``skipped``."""

    check: str
    verdict: str
    found: str


class Verification(_Part):
    """One step up in trust.

    Attributes:
        level: that was reached.
        date: of the verification, ``YYYY-MM-DD``.
        version: of the mibench that verified.
        checks: what was checked and found.
        verdict: of the rerun, such as ``same``; null below ``reproduced``.
        seed: of the rerun.
        differences: what came out differently, in words; empty where nothing did.
    """

    level: Level
    date: str
    version: str
    checks: list[CheckLine] = []
    verdict: str | None = None
    seed: int | None = None
    differences: list[str] = []


class Gallery(_Part):
    """The picture of some reconstructions: one row an image, one column a thing to compare.

    Attributes:
        sha256: of the picture's file.
        side: of one image, pixels.
        columns: what stands in each column, from the left: ``original``, names of attacks,
            ``permuted`` for the control.
        images: index of the attacked image in each row; the most leaked first.
    """

    sha256: str
    side: int = Field(ge=1, le=1024)
    columns: list[str] = Field(min_length=2, max_length=32)
    images: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=16)


class Entry(_Part):
    """``entry.json``: what stands beside a record and may grow; the record itself never changes.

    Attributes:
        format_version: of this file.
        record: id of the record that it belongs to.
        origin: who made it.
        claims: numbers that the authors give themselves; shown, never ranked.
        gallery: null where no picture may be shown, or none was made.
        gallery_reason: why there is none.
        verifications: in the order in which they were made.
    """

    format_version: int = FORMAT
    record: str
    origin: Origin = Origin()
    claims: dict[str, float] = {}
    gallery: Gallery | None = None
    gallery_reason: str | None = None
    verifications: list[Verification] = []

    @property
    def level(self) -> Level:
        """The highest level that was reached."""
        reached = [one.level for one in self.verifications]
        return max(reached, key=list(Level).index, default=Level.CLAIMED)


class Advisory(_Part):
    """``leaderboard/advisories/*.yaml``: what was found wrong with rows after they were published.

    Attributes:
        id: name of the file.
        date: ``YYYY-MM-DD``.
        title: in a few words.
        text: what is wrong, and what to do.
        records: ids that it concerns.
        protocols: contents of protocols all of whose rows it concerns.
        code: by component name, hashes of the code that it concerns.
    """

    id: str = Field(pattern=PLAIN)
    date: str
    title: str
    text: str
    records: list[str] = []
    protocols: list[str] = []
    code: dict[str, list[str]] = {}


class BestKnown(_Part):
    """A submitted attack's result on the frozen shares of one row's defense.

    Attributes:
        record: id of the record whose defense was attacked.
        by: name of the submission.
        origin: whom to credit.
        level: how far it was verified.
        scores: of its reconstructions.
        permuted: the same reconstructions held against other images.
        leakage: normalised by the floor and the undefended split of ``record``.
        challenge: id of the challenge that was answered.
        reconstructions: SHA-256 over the bytes of the submitted images, in order.
        checks: what in the images is suspicious, or that nothing is.
    """

    format_version: int = FORMAT
    record: str
    by: str = Field(pattern=PLAIN)
    origin: Origin
    level: Level
    scores: list[Score]
    permuted: list[Score]
    leakage: list[Score]
    challenge: str | None = None
    reconstructions: str | None = None
    checks: list[CheckLine] = []


@dataclass(frozen=True)
class Listed:
    """A record with what stands beside it."""

    record: Record
    entry: Entry

    @property
    def id(self) -> str:
        """Id of the record."""
        return self.entry.record


@dataclass(frozen=True)
class Row:
    """One defense with its parameters under one protocol and one adversary.

    Attributes:
        headline: the runs whose numbers stand in the table, one a seed: those of the suite where
            there are any, else those of the attack that leaks most.
        others: further runs of the same defense, such as single attacks.
        label: name of the defense, and parameters that differ from the defaults.
        slug: name of the row's page, without an ending; unique on the board.
        attack: ``suite``, or the name of the one attack behind the headline.
        accuracy: share of right answers, mean over seeds.
        drop: points of accuracy that it loses against the undefended model of the same runs.
        scores: of the attack by metric; over images and seeds.
        leakage: normalised, by metric (``ssim``, not ``leakage(ssim)``).
        gain: over noise at the same accuracy, by metric: noise's leakage less the row's.
        rank: best and worst place that the intervals allow; null where it is not ranked.
        reasons: why it is not ranked; empty where it is.
        pareto: whether no other row is at least as accurate and leaks less.
        level: lowest level of the headline's runs.
        advisories: what was found wrong with it.
        superseded_by: id of a record that takes the place of one of its runs.
        best_known: by metric, the submitted attack that leaks more than the headline.
    """

    headline: tuple[Listed, ...]
    others: tuple[Listed, ...]
    label: str
    slug: str
    attack: str
    accuracy: float
    drop: float
    scores: dict[str, Score]
    leakage: dict[str, Score]
    gain: dict[str, Score]
    rank: tuple[int, int] | None
    reasons: tuple[str, ...]
    pareto: bool
    level: Level
    advisories: tuple[Advisory, ...] = ()
    superseded_by: str | None = None
    best_known: dict[str, BestKnown] | None = None

    @property
    def ranked(self) -> bool:
        """Whether it has a place."""
        return self.rank is not None


@dataclass(frozen=True)
class Section:
    """All rows of one protocol: the ranked ones in order, then the others.

    Attributes:
        protocol: which one; rows of another content are in another section.
        dataset: its dataset.
        backbone: its architecture and split point, in words.
        rows: the ranked ones by rank, then the others by leakage.
        floor: the best blind guess by metric, from one of the records.
        noise: accuracy and leakage of the points of the noise curve, by metric, by accuracy.
        noise_attack: the attack that the curve was measured with.
    """

    protocol: ProtocolId
    dataset: str
    backbone: str
    rows: tuple[Row, ...]
    floor: dict[str, Score]
    noise: dict[str, tuple[tuple[float, Score], ...]]
    noise_attack: str | None


@dataclass(frozen=True)
class Board:
    """Everything that the pages show.

    Attributes:
        version: name of its folder, such as ``v1``.
        sections: one for each protocol, those with ranked rows first.
        advisories: all of them, newest first.
    """

    version: str
    sections: tuple[Section, ...]
    advisories: tuple[Advisory, ...]
