"""``mibench list``: what there is."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from mibench.errors import InvalidParamsError, MibenchError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mibench.registry import Entry

IMAGE_SIZE = 32
"""Side in pixels of the images for which backbones are shown."""
CLASSES = 10
"""Classes for which backbones are shown; only the head, which is no split point, depends on it."""


class Kind(StrEnum):
    """What can be listed."""

    DEFENSES = "defenses"
    ATTACKS = "attacks"
    PROTOCOLS = "protocols"
    DATASETS = "datasets"
    BACKBONES = "backbones"
    METRICS = "metrics"
    MEASURES = "measures"


def list_components(
    kind: Annotated[
        Kind | None, typer.Argument(help="What to list; all, shortly, if left out.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1024,
            help="For backbones: side of the images whose features are shown, in pixels "
            f"[default: {IMAGE_SIZE}].",
        ),
    ] = None,
) -> None:
    """List what there is, with its facts."""
    from mibench.cli.terminal import console as make_console

    if image_size is not None and kind is not Kind.BACKBONES:
        raise InvalidParamsError(
            "--image-size concerns backbones alone; write `mibench list backbones --image-size "
            f"{image_size}`, or leave it out."
        )
    console = make_console()
    if kind is Kind.BACKBONES:
        _backbones(console, image_size or IMAGE_SIZE)
        return
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


def _backbones(console: Console, size: int) -> None:
    from mibench import registry

    console.print(
        f"Split points for images of {size}x{size} pixels: the features, how many values they have "
        "for each value of the image, and the client's part (2 FLOPs a multiply-add).",
        soft_wrap=True,
    )
    for entry in registry.backbones.entries():
        console.print()
        _print(console, [(entry.name, entry.summary, _facts(entry))], indent=0, facts=True)
        try:
            console.print(_cuts(entry.name, size))
        except MibenchError as error:
            console.print(f"  cannot be shown: {error}", soft_wrap=True)


def _cuts(name: str, size: int) -> Table:
    from rich.table import Table

    from mibench.backbones.survey import survey
    from mibench.task import Classification

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("  split point", no_wrap=True)
    for title in ("features", "values / image", "client parameters", "client MFLOPs"):
        table.add_column(title, justify="right", no_wrap=True)
    task = Classification(tuple(map(str, range(CLASSES))))
    for cut in survey(name, {}, (3, size, size), task):
        table.add_row(
            f"  {cut.split_point}",
            " x ".join(map(str, cut.feature_shape)),
            f"{cut.expansion:.2f}",
            f"{cut.parameters:,}",
            f"{cut.flops / 1e6:,.2f}",
        )
    return table


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
