"""YAML with the line of every value, and all that is wrong with it at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import yaml

from mibench.files import Json
from mibench.params import CoreLoader

Place: TypeAlias = tuple[int | str, ...]
"""Keys and positions that lead to a value."""
DEEPEST = 12
"""Lists and mappings inside one another, at most."""


@dataclass
class Marked:
    """What a file holds.

    Attributes:
        values: as JSON would hold them; None where it is no YAML at all.
        lines: number of the line of each value, by its place; the first line is 1.
        problems: lines with what is wrong there.
    """

    values: Json = None
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def line(self, place: Place) -> int:
        """Line of a value, or of the nearest thing around it that is there."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place, 1)


def read_marked(text: str) -> Marked:
    """Reads YAML 1.2 of plain values, lists and mappings, without aliases and without tags."""
    found = Marked()
    loader = CoreLoader(text)
    try:
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        found.problems.append((1 if mark is None else mark.line + 1, f"not valid YAML: {reason}"))
        return found
    except (ValueError, RecursionError) as error:
        found.problems.append((1, f"not valid YAML: {' '.join(str(error).split())}"))
        return found
    finally:
        loader.dispose()
    if node is not None:
        found.values = _value(loader, node, (), found, set())
    return found


def _value(
    loader: CoreLoader, node: yaml.Node, place: Place, found: Marked, seen: set[int]
) -> Json:
    line = node.start_mark.line + 1
    at = found.lines.setdefault(place, line)
    if id(node) in seen or len(place) > DEEPEST:
        # An alias is the very node that it stands for; ten of ten of ten fill the memory.
        found.problems.append((at, "aliases and deep nesting are not read; write values out"))
        return None
    seen.add(id(node))
    if node.tag not in _PLAIN:
        found.problems.append((line, f"the tag {node.tag[:60]!r} is not read; write a plain value"))
        return None
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Json] = {}
        for key_node, value_node in node.value:
            there = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or not _is_text(key_node):
                found.problems.append((there, f"the key {str(key)[:60]!r} is not a string"))
                continue
            if key in values:
                before = found.lines[(*place, key)]
                found.problems.append((there, f"the key {key!r} is there twice, see line {before}"))
                continue
            found.lines[(*place, key)] = there
            values[key] = _value(loader, value_node, (*place, key), found, seen)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, one, (*place, at), found, seen) for at, one in enumerate(node.value)]
    try:
        value: Json = loader.construct_object(node)
    except (ValueError, OverflowError, yaml.YAMLError) as error:
        found.problems.append((line, " ".join(str(error).split())[:200]))
        return None
    return value


_PLAIN = {
    f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")
}


def _is_text(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:str"
