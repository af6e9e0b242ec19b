"""What a target of ``mibench check`` is: a component of which kind, or several in one file."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mibench.checks.base import Finding
from mibench.errors import InvalidParamsError, PluginError, UnknownNameError
from mibench.files import Json
from mibench.registry import Registry, attacks, defenses, metrics
from mibench.suggest import unknown

KINDS: dict[str, Registry[Any]] = {"defense": defenses, "attack": attacks, "metric": metrics}
"""Kinds of components that have a battery, ``check_KIND`` in the module ``mibench.checks.KIND``."""


@dataclass(frozen=True)
class Target:
    """One component to check.

    Attributes:
        kind: of `KINDS`.
        name: as the registry of the kind loads it.
    """

    kind: str
    name: str


def battery(kind: str) -> Callable[..., list[Finding]]:
    """Returns the function that checks components of a kind."""
    found: Callable[..., list[Finding]] = getattr(
        importlib.import_module(f"mibench.checks.{kind}"), f"check_{kind}"
    )
    return found


def preload(kinds: Sequence[str]) -> list[str]:
    """Returns the modules that processes of these kinds should have at hand."""
    found: list[str] = []
    for kind in kinds:
        found += getattr(importlib.import_module(f"mibench.checks.{kind}"), "PRELOAD", ())
    return list(dict.fromkeys(found))


def is_place(target: str) -> bool:
    """Says whether a target is a file or an importable class, and no registered name."""
    return ":" in target or target.endswith(".py")


def registered(target: str, kind: str | None) -> Target:
    """Finds a registered name, in all kinds or in one.

    Raises:
        UnknownNameError: no kind has it.
        InvalidParamsError: several have.
    """
    kinds = [one for one in KINDS if kind in (None, one) and target in KINDS[one]]
    if len(kinds) > 1:
        raise InvalidParamsError(
            f"{target!r} is the name of {' and of '.join(f'a {one}' for one in kinds)}; say which "
            f"with --kind {kinds[0]}"
        )
    if not kinds:
        names = [name for one in KINDS if kind in (None, one) for name in KINDS[one].names()]
        raise UnknownNameError(unknown(kind or "component", target, names))
    return Target(kinds[0], target)


def place_of(target: str) -> tuple[str, list[str]]:
    """Splits ``./file.py:Class`` into place and class; a file alone stands for all its classes.

    The file is parsed and not run.

    Raises:
        PluginError: there is no such file, or it is not Python.
    """
    where, _, name = target.rpartition(":")
    if not where:
        where, name = target, ""
    if not where.endswith(".py"):
        return where, [name]
    path = Path(where).expanduser().resolve()
    try:
        tree = ast.parse(path.read_bytes())
    except OSError as error:
        raise PluginError(f"cannot read {where}: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        raise PluginError(f"{where} is not Python: {error}") from error
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return str(path), [name] if name else classes


def run(
    nursery: Any,
    target: Target,
    params: Mapping[str, Json],
    progress: Callable[[str], None],
) -> list[Finding]:
    """Puts a component through the battery of its kind."""
    given = {"params": params} if params else {}
    return battery(target.kind)(nursery, target.name, progress=progress, **given)
