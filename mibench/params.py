"""Parameters of components: read from YAML or the command line, checked, explained when wrong."""

import enum
import json
import re
import types
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from mibench.errors import InvalidParamsError
from mibench.files import Json
from mibench.suggest import hint, unknown

P = TypeVar("P", bound=BaseModel)

_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FORM = "expected root.key=value, such as attack.steps=50"


class Parameters(BaseModel):
    """Base of a component's parameters: frozen, strict, no unknown keys, no infinity or NaN.

    Strict means that `"4"` is not an integer and `1` is not a boolean; an integer is fine where a
    float is asked for, and a list from YAML where a tuple is (see `build`).
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, strict=True, validate_default=True
    )


def _members(annotation: object) -> list[object]:
    """The alternatives of a union, without `Annotated`; a plain type is its own alternative."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for arg in get_args(annotation) for member in _members(arg)]
    return [annotation]


def _read_exponents(value: object, annotation: object) -> object:
    """Make 1e-3 a number, which readers of YAML 1.1 leave a string, where only a number fits."""
    members = _members(annotation)
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value) if float in members and str not in members else value
    for member in members:
        args = get_args(member)
        if isinstance(value, list | tuple) and get_origin(member) in (tuple, list):
            each = args if len(args) == len(value) and Ellipsis not in args else args[:1]
            kinds = each if len(each) == len(value) else each * len(value)
            return [_read_exponents(item, kind) for item, kind in zip(value, kinds, strict=False)]
        if (
            isinstance(value, Mapping)
            and isinstance(member, type)
            and issubclass(member, BaseModel)
        ):
            fields = member.model_fields
            return {
                key: _read_exponents(item, fields[key].annotation) if key in fields else item
                for key, item in value.items()
            }
    return value


# --- what is expected ---------------------------------------------------------------------------


def _bounds(metadata: Sequence[object]) -> list[str]:
    """Limits in words, from the constraints that pydantic keeps of a field."""
    found: list[str] = []
    for item in metadata:
        if isinstance(item, FieldInfo):
            found += _bounds(item.metadata)
            continue
        for attribute, words in (
            ("gt", "> {}"),
            ("ge", ">= {}"),
            ("lt", "< {}"),
            ("le", "<= {}"),
            ("multiple_of", "a multiple of {}"),
            ("min_length", "at least {} long"),
            ("max_length", "at most {} long"),
            ("pattern", "of the form {}"),
        ):
            limit = getattr(item, attribute, None)
            if limit is not None:
                found.append(words.format(limit))
    return found


_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "null",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
}


def _expected(annotation: object, metadata: Sequence[object] = ()) -> str:
    """A type and its limits in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _expected(args[0], [*args[1:], *metadata])
    if origin in (Union, types.UnionType):
        text = " or ".join(map(_expected, args))
    elif origin is Literal:
        text = f"one of {', '.join(map(_shown, args))}"
    elif origin is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        text = f"a list of {len(args)} ({'; '.join(map(_expected, args))})"
    elif origin in (tuple, list, set, frozenset):
        length = " and ".join(_bounds(metadata))
        return f"a list{length and ' '}{length}, each {_expected(args[0])}"
    elif origin is dict:
        text = f"a mapping, each value {_expected(args[1])}"
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        text = f"a mapping with the keys {', '.join(annotation.model_fields) or '(none)'}"
    elif isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        text = f"one of {', '.join(_shown(member.value) for member in annotation)}"
    else:
        text = _WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))
    limits = _bounds(metadata)
    return f"{text} {' and '.join(limits)}" if limits else text


def _shown(value: object) -> str:
    """A value as one would write it, short and on one line."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def _given(value: object) -> str:
    return f"{_shown(value)} (a string)" if isinstance(value, str) else _shown(value)


class _Place:
    """The declared thing that an error's location points to, as deep as it can be followed."""

    def __init__(self, model: type[BaseModel], owner: str, location: Sequence[int | str]) -> None:
        self.annotation: object = model
        self.metadata: Sequence[object] = ()
        self.default: object = PydanticUndefined
        self.path = owner
        self.whole = True
        for step in location:
            if not self._enter(step):
                # the rest is pydantic's name of a union's branch, or an unknown key
                self.whole = False
                break

    def _enter(self, step: int | str) -> bool:
        members = [member for member in _members(self.annotation) if member is not type(None)]
        if len(members) != 1:
            return False
        (inner,) = members
        args = get_args(inner)
        origin = get_origin(inner)
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            field = inner.model_fields.get(str(step))
            if field is None:
                return False
            self.annotation, self.metadata = field.annotation, field.metadata
            self.default = field.get_default(call_default_factory=False)
            if field.default_factory is not None:
                self.default = PydanticUndefined
            self.path += f".{step}"
            return True
        if isinstance(step, int) and origin in (tuple, list):
            fixed = origin is tuple and not (len(args) == 2 and args[1] is Ellipsis)
            if fixed and step >= len(args):
                return False
            self.annotation, self.path = args[step if fixed else 0], f"{self.path}[{step}]"
        elif origin is dict and step != "[key]":
            self.annotation, self.path = args[1], f"{self.path}.{step}"
        else:
            return False
        self.metadata, self.default = (), PydanticUndefined
        return True

    def expected(self) -> str:
        text = _expected(self.annotation, self.metadata)
        if self.default is PydanticUndefined or isinstance(self.default, BaseModel):
            return text
        return f"{text} (default {_shown(self.default)})"


def _explain(error: ErrorDetails, model: type[BaseModel], owner: str) -> str:
    location, kind = error["loc"], error["type"]
    place = _Place(model, owner, location)
    if kind == "extra_forbidden":
        parent = _Place(model, owner, location[:-1])
        inner = next(m for m in _members(parent.annotation) if m is not type(None))
        keys: list[str] = []
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys = list(inner.model_fields)
        key = str(location[-1])
        return (
            f"unknown parameter {parent.path}.{key} (given {_given(error['input'])}); "
            f"{hint(key, keys)}"
        )
    if kind == "missing" and place.whole:
        return f"{place.path} is missing; expected {place.expected()}"
    if kind in ("value_error", "assertion_error"):
        # a component's own check: its words say more than the type
        reason = " ".join(str(error.get("ctx", {}).get("error", error["msg"])).split())
        at = f"given {_given(error['input'])}, " if location else ""
        return f"{place.path}: {at}{reason}"
    extra = ", finite" if kind == "finite_number" else ""
    return f"{place.path}: given {_given(error['input'])}, expected {place.expected()}{extra}"


def _plain(value: object) -> object:
    """What `json` cannot write by itself but a caller in Python may well pass."""
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, PurePath):
        return str(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be a parameter")


def build(cls: type[P], values: Mapping[str, Json], owner: str) -> P:
    """Check values and make parameters of them.

    Args:
        cls: The parameters' class.
        values: Keys and values as YAML or JSON holds them.
        owner: What the parameters belong to, such as `defense`; begins every path in a message.

    Returns:
        The frozen parameters.

    Raises:
        InvalidParamsError: If a key is unknown or missing, or a value of a wrong type or out of
            range. The message is one line and names every wrong key.
    """
    found, problems = attempt(cls, values, owner)
    if found is None:
        raise InvalidParamsError("; ".join(text for _, text in problems))
    return found


def attempt(
    cls: type[P], values: Mapping[str, Json], owner: str
) -> tuple[P | None, list[tuple[tuple[int | str, ...], str]]]:
    """Check values like `build`, and return what is wrong instead of raising it.

    Args:
        cls: The parameters' class.
        values: Keys and values as YAML or JSON holds them.
        owner: What the parameters belong to; begins every path in a message.

    Returns:
        The frozen parameters, or None; and for each problem its place and one line of text.
    """
    try:
        # By way of JSON, for that is where strict pydantic takes a list for a tuple.
        text = json.dumps(_read_exponents(values, cls), default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        return None, [((), f"{owner}: {' '.join(str(error).split())}")]
    try:
        return cls.model_validate_json(text), []
    except ValidationError as error:
        found = error.errors(include_url=False)
        # the branches of one union complain one by one: one line of them is enough
        lines = {_explain(item, cls, owner): item["loc"] for item in reversed(found)}
        return None, [(place, line) for line, place in reversed(lines.items())]


# --- YAML ---------------------------------------------------------------------------------------


class CoreLoader(yaml.SafeLoader):
    """YAML 1.2's core schema: 1e-3 is a number; no, 12:30 and 2020-01-01 are text."""

    # its own table: the base's holds what version 1.1 took for numbers, dates and booleans
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - declared so by PyYAML

    def core_int(self, node: yaml.ScalarNode) -> int:
        """An integer, also in base 8 and 16."""
        text = str(self.construct_scalar(node))
        return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))

    def core_float(self, node: yaml.ScalarNode) -> float:
        """A number, also infinite or none."""
        return float(re.sub(r"\.(inf|nan)$", r"\1", str(self.construct_scalar(node)).lower()))

    def unique_mapping(self, node: yaml.MappingNode) -> dict[str, Json]:
        """A mapping whose keys are strings, each there once."""
        found: dict[str, Json] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is not a string")
            if key in found:
                raise yaml.MarkedYAMLError(problem=f"the key {key!r} is there twice")
            found[key] = self.construct_object(value_node, deep=True)
        return found


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    CoreLoader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})$"), _first)
CoreLoader.add_constructor(_TAG + "int", CoreLoader.core_int)
CoreLoader.add_constructor(_TAG + "float", CoreLoader.core_float)
CoreLoader.add_constructor(_TAG + "map", CoreLoader.unique_mapping)


def _is_json(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, bool | int | float | str)


def parse_yaml(text: str, source: str) -> Json:
    """Read YAML as its version 1.2 has it, and only what JSON can hold.

    Args:
        text: The document.
        source: What a message calls it, such as a file's path.

    Returns:
        The value.

    Raises:
        InvalidParamsError: If it is not YAML, has a key twice, or holds what JSON cannot.
    """
    try:
        value = yaml.load(text, Loader=CoreLoader)  # noqa: S506 - a SafeLoader underneath
        if not _is_json(value):
            raise yaml.MarkedYAMLError(problem="only plain values, lists and mappings may be there")
    except Exception as error:  # tags such as !!timestamp make PyYAML raise nearly anything
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None and "\n" in text.strip() else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InvalidParamsError(f"{source} is not valid YAML{line}: {reason}") from error
    result: Json = value
    return result


def parse_assignments(
    items: Sequence[str],
    roots: Sequence[str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Json]]:
    """Read assignments from the command line.

    Args:
        items: Such as `["defense.density=0.04", "attack.decoder.steps=3"]`; the values are YAML.
        roots: The first words that are allowed; all if None.
        aliases: Other first words and the root that each stands for, such as the name of the
            component; they may hold dashes.

    Returns:
        Values by root and key, nested where a key has more parts.

    Raises:
        InvalidParamsError: If an item is malformed, sets what another item sets, or has a root
            that is not allowed.
    """
    result: dict[str, dict[str, Json]] = {}
    set_by: dict[tuple[str, ...], str] = {}
    for item in items:
        name, equals, text = item.partition("=")
        first, *rest = name.strip().split(".")
        path = ((aliases or {}).get(first, first), *rest)
        # A root that is allowed by name may hold dashes.
        keys = path if roots is None else path[1:]
        if not equals or len(path) < 2 or not all(_KEY.fullmatch(part) for part in keys):
            raise InvalidParamsError(f"cannot read {item!r}: {_FORM}")
        if roots is not None and path[0] not in roots:
            raise InvalidParamsError(f"cannot read {item!r}: {unknown('root', path[0], roots)}")
        for other, earlier in set_by.items():
            shared = min(len(path), len(other))
            if path[:shared] == other[:shared]:
                raise InvalidParamsError(f"{item!r} and {earlier!r} set the same key; keep one")
        value = parse_yaml(text, f"the value of {item!r}")
        if value is None and text.strip().lower() not in ("null", "~"):
            # an empty shell variable, or "#..." that YAML takes for a comment
            raise InvalidParamsError(
                f"cannot read {item!r}: there is no value; {_FORM}, or null, or quotes for text"
            )
        set_by[path] = item
        inner: dict[str, Any] = result.setdefault(path[0], {})
        for part in path[1:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = value
    return result


def merged(below: Mapping[str, Json], above: Mapping[str, Json]) -> dict[str, Json]:
    """Returns ``below`` with the values of ``above`` on top, key by key where both are nested."""
    found = dict(below)
    for key, value in above.items():
        under = found.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        found[key] = merged(under, value) if both else value  # type: ignore[arg-type]
    return found
