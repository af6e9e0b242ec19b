"""A later submission takes the place of an earlier one on the board, where that is fair."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from mibench.board.model import Entry, Origin, Verification
from mibench.board.rows import _by_submission


@dataclass
class Said:
    """What a record on the board says, as far as this goes."""

    submission: str
    supersedes: str | None = None
    author: str = "Ada L."
    level: str = "rescored"
    seed: int = 0
    content: str = "c"
    attack: str = "suite"

    def held(self, name):
        origin = Origin(
            kind="submission",
            submission=self.submission,
            authors=[self.author],
            supersedes=self.supersedes,
        )
        reached = Verification(level=self.level, date="2026-01-01", version="0")
        entry = Entry(record=name, origin=origin, verifications=[reached])
        record = SimpleNamespace(
            seed=self.seed,
            protocol=SimpleNamespace(content=self.content),
            attack=SimpleNamespace(name=self.attack),
        )
        return SimpleNamespace(listed=SimpleNamespace(entry=entry, id=name), record=record)


def taken(**later):
    both = {"a": Said("old"), "b": Said("new", **{"supersedes": "old", **later})}
    return _by_submission({name: one.held(name) for name, one in both.items()})


def test_the_later_one_takes_the_place():
    assert taken() == {"a": "b"}
    assert taken(level="reproduced") == {"a": "b"}


@pytest.mark.parametrize(
    "later",
    [
        {"supersedes": None},
        {"supersedes": "other"},
        {"author": "Bob"},
        {"level": "claimed"},
        {"seed": 1},
        {"content": "d"},
        {"attack": "linear"},
    ],
)
def test_nobody_takes_away_what_is_not_theirs(later):
    assert taken(**later) == {}
