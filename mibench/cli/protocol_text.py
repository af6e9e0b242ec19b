"""Protocols as text: as a YAML file with every default spelled out, as a row, as differences."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence

import yaml
from pydantic import BaseModel

from mibench.cli.run import estimate_minutes
from mibench.files import Json
from mibench.params import parse_yaml
from mibench.protocol import Protocol, released

COLUMNS = (
    "id", "track", "ranked", "content id", "dataset", "pixels", "cut at", "attacked", "minutes",
)  # fmt: skip
"""What `row` gives, in order."""
NOT_SET = "(not set)"
"""Stands where only one of two protocols has a key."""

_ENTRY = re.compile(r"^ {4}(\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)
_BARE = re.compile(r"[A-Za-z_][\w./-]*")


def row(protocol: Protocol) -> tuple[str, ...]:
    """Returns the cells of one line of a listing, as `COLUMNS` names them."""
    data, backbone = protocol.data, protocol.backbone
    return (
        protocol.id,
        protocol.track,
        "yes" if protocol.ranked else "never",
        protocol.content_id,
        data.dataset,
        str(data.image_size),
        f"{backbone.name}@{backbone.split_point}",
        str(data.attacked),
        _minutes(protocol),
    )


def _minutes(protocol: Protocol) -> str:
    """From the quickest attack to the slowest, against a defense."""
    times = [estimate_minutes(protocol, "any", attack) for attack in protocol.attacks]
    known = [max(1, round(time)) for time in times if time is not None]
    if not known:
        return "-"
    low, high = min(known), max(known)
    return str(low) if low == high else f"{low}-{high}"


def standing(protocol: Protocol) -> str:
    """Says in words whether results can be ranked, and if not, why."""
    if protocol.ranked:
        return "ranked"
    if protocol.changes:
        return f"never ranked: differs from the released {protocol.id} in " + ", ".join(
            protocol.changes
        )
    if protocol.id not in released():
        return "never ranked: not a released protocol"
    return "never ranked"


def example(protocol: Protocol, name: str) -> str:
    """Returns a command that runs something under a protocol, given by id or path."""
    import shlex

    attack = next(iter(protocol.attacks), "decoder")
    # A rebuilt setting of a paper on attacks has no defense.
    defense = "none" if protocol.track == "reproduction" else "privdfs"
    return f"mibench run --defense {defense} --attack {attack} --protocol {shlex.quote(name)}"


def as_yaml(protocol: Protocol) -> list[tuple[str, str]]:
    """Returns the lines of a YAML file that gives the same protocol, each with its comment.

    Every default is spelled out. The comments come from the docstrings of `mibench.protocol`.
    """
    lines: list[tuple[str, str]] = []
    notes = meanings(Protocol)
    values: dict[str, Json] = protocol.model_dump(mode="json")
    for key, value in values.items():
        note = notes.get(key, "")
        if not isinstance(value, Mapping) or not value:
            lines.append((f"{key}: {flow(value)}", note))
            continue
        lines += [("", ""), (f"{key}:", note)]
        part = getattr(protocol, key)
        inner = meanings(type(part)) if isinstance(part, BaseModel) else {}
        lines += [(f"  {flow(k)}: {flow(item)}", inner.get(k, "")) for k, item in value.items()]
    return lines


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """Returns the first sentence on each attribute in a class's docstring; none under -OO."""
    _, _, section = (inspect.getdoc(model) or "").partition("Attributes:\n")
    return {
        name: " ".join(text.split()).replace("``", "").partition(". ")[0].rstrip(".")
        for name, text in _ENTRY.findall(section)
    }


def flow(value: Json) -> str:
    """Returns a value in YAML's flow style, on one line, readable by `parse_yaml`."""
    if isinstance(value, str):
        if _BARE.fullmatch(value) and parse_yaml(value, "value") == value:
            return value
        quoted = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf"))
        return quoted.strip()
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{flow(key)}: {flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, Sequence):
        return f"[{', '.join(map(flow, value))}]"
    return json.dumps(value)


def differences(
    one: Mapping[str, Json], other: Mapping[str, Json], prefix: str = ""
) -> Iterator[tuple[str, str, str]]:
    """Yields what differs: dotted key, value of the one, value of the other (or `NOT_SET`)."""
    for key in {**one, **other}:
        name, a, b = f"{prefix}{key}", one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{name}.")
            continue
        # As text, in which 1 and 1.0 differ, as they do for the content id.
        left = flow(a) if key in one else NOT_SET
        right = flow(b) if key in other else NOT_SET
        if left != right:
            yield name, left, right
