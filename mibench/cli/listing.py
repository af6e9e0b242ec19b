"""``mibench list``: what there is."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mibench.registry import Entry


class Kind(StrEnum):
    """What can be listed."""

    DEFENSES = "defenses"
    ATTACKS = "attacks"
    PROTOCOLS = "protocols"
    DATASETS = "datasets"
    BACKBONES = "backbones"
    METRICS = "metrics"


def list_components(
    kind: Annotated[
        Kind | None, typer.Argument(help="What to list; all, shortly, if left out.")
    ] = None,
) -> None:
    """List what there is, with its facts."""
    from mibench.cli.terminal import console as make_console

    console = make_console()
    for one in [kind] if kind else list(Kind):
        if kind is None:
            console.print(one.value, style="bold")
        rows = _protocols() if one is Kind.PROTOCOLS else _components(one)
        _print(console, rows, indent=0 if kind else 2, facts=kind is not None)


def _print(console: Console, rows: list[tuple[str, str, str]], *, indent: int, facts: bool) -> None:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, summary, more in rows:
        table.add_row(" " * indent + name, summary)
        if facts and more:
            table.add_row("", more, style="dim")
    console.print(table)


def _components(kind: Kind) -> list[tuple[str, str, str]]:
    from mibench import registry

    entries: list[Entry] = getattr(registry, kind.value).entries()
    return [(entry.name, entry.summary, _facts(entry)) for entry in entries]


def _facts(entry: Entry) -> str:
    facts = [f"{name}: {value}" for name, value in entry.facts.items() if value != "-"]
    if entry.origin != "mibench":
        facts.append(f"from: {entry.origin}")
    return "; ".join(facts)


def _protocols() -> list[tuple[str, str, str]]:
    from mibench.protocol import load_protocol, released

    rows = []
    for name in released():
        protocol = load_protocol(name)
        data, rule = protocol.data, protocol.adversary
        facts = [
            f"track: {protocol.track} ({'ranked' if protocol.ranked else 'never ranked'})",
            f"content: {protocol.content_id}",
            f"data: {data.dataset}, {data.attacked} images attacked",
            f"adversary: {rule.knowledge}, reads {rule.coalition} of the servers",
        ]
        rows.append((name, protocol.title, "; ".join(facts)))
    return rows
