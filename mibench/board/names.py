"""What rows are called."""

from __future__ import annotations

import re
from typing import cast

from mibench.board.entries import Held
from mibench.checks.base import one_line
from mibench.errors import MibenchError
from mibench.files import Json, canonical_json
from mibench.record import Component, Record
from mibench.registry import defenses

LONGEST_SLUG = 60
OTHER_SEED = re.compile(r"seed \d+ is none of the protocol's")
"""How the deviation of a run of another seed than the protocol's begins."""
OTHER_ATTACK = re.compile(r"attack .+ is none of the protocol's|attack\.\S+ set by hand")
"""How the deviations of a run with somebody's own attack begin."""


def is_own_attack(record: Record) -> bool:
    """Whether somebody's own attack was made on a defense that comes with mibench."""
    return record.attack.location is not None and record.defense.location is None


def label_of(held: Held) -> str:
    """Name of a submission or defense, with the parameters that are not its defaults."""
    record, origin = held.record, held.listed.entry.origin
    defense = record.defense
    changed = {
        key: value
        for key, value in defense.params.items()
        if key not in (defaults := defaults_of(defense))
        or canonical_json(value) != canonical_json(defaults[key])
    }
    told = ", ".join(f"{key}={word(value)}" for key, value in sorted(changed.items()))
    submitted = None if is_own_attack(record) else origin.submission
    name = submitted or defense.name
    if submitted is None and defense.location is not None:
        name += f" from {defense.location}"  # or a file could pass for a built-in
    label = f"{name} ({told})" if told else name
    if record.adversary is not None and record.adversary.coalitions:
        each = " or ".join("+".join(map(str, one)) for one in record.adversary.coalitions)
        label += f", servers {each} attacked"
    return one_line(label)


def word(value: Json) -> str:
    """A parameter as text."""
    return value if isinstance(value, str) else canonical_json(value).decode()


def defaults_of(defense: Component) -> dict[str, Json]:
    """Default parameters of a defense that comes with mibench; none of others."""
    known = any(e.name == defense.name and e.origin == "mibench" for e in defenses.entries())
    if not known or defense.location is not None:
        return {}
    try:
        found = defenses.load(defense.name).Params()
    except (MibenchError, ValueError):  # one that cannot do without parameters
        return {}
    return cast("dict[str, Json]", found.model_dump(mode="json"))


def slug_of(record: Record, group: str) -> str:
    """The name of a row's page: readable, and unique by the group of its runs."""
    name = f"{record.protocol.id}-{record.defense.name}".lower()
    plain = re.sub(r"[^a-z0-9]+", "-", name).strip("-")[:LONGEST_SLUG]
    return f"{plain}-{group[:8]}"
