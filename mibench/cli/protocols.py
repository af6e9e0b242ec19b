"""``mibench protocols``: which there are, what each one fixes, where two of them differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

app = typer.Typer(
    no_args_is_help=True, help="List protocols, show what one fixes, or compare two of them."
)

Name = Annotated[str, typer.Argument(help="Id of a released protocol, or a .yaml file.")]


@app.command("list")
def list_protocols(
    track: Annotated[
        str | None, typer.Option(help="Only this track, such as lite or standard.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Only this dataset, such as cifar10.")] = None,
) -> None:
    """List the released protocols, a line each."""
    from mibench.cli.protocol_text import COLUMNS, row
    from mibench.cli.terminal import console as make_console
    from mibench.protocol import load_protocol, released

    protocols = [load_protocol(name) for name in released()]
    _check("track", track, {one.track for one in protocols})
    _check("dataset", dataset, {one.data.dataset for one in protocols})
    table = _table()
    for column in COLUMNS:
        right = column in ("pixels", "attacked", "minutes")
        table.add_column(column, justify="right" if right else "left")
    for one in protocols:
        if track in (None, one.track) and dataset in (None, one.data.dataset):
            table.add_row(*row(one))
    console = make_console()
    # A row stays on one line, for grep and the like; a narrow terminal wraps it by itself.
    unlimited = console.options.update(max_width=10_000)
    console.width = max(console.width, console.measure(table, options=unlimited).maximum)
    console.print(table)
    console.print(
        "\nminutes: a defense and one attack on two CPU cores, where measured", style="dim"
    )


@app.command("show")
def show_protocol(
    name: Name,
    as_json: Annotated[
        bool, typer.Option("--json", help="Only what a result rests on, as JSON.")
    ] = False,
) -> None:
    """Show everything that a protocol fixes, as a YAML file with all defaults spelled out."""
    from rich.text import Text

    from mibench.cli.protocol_text import as_yaml, example, standing
    from mibench.cli.terminal import console as make_console
    from mibench.files import pretty_json
    from mibench.protocol import load_protocol

    protocol = load_protocol(name)
    if as_json:
        typer.echo(pretty_json(protocol.recorded()), nl=False)
        return
    head = (
        f"content id {protocol.content_id}, {standing(protocol)}",
        f"run it with: {example(protocol, name)}",
    )
    console = make_console()
    for line in head:
        console.print(Text(f"# {line}", style="dim"), soft_wrap=True)
    console.print()
    for line, note in as_yaml(protocol):
        text = Text(line)
        if note:
            text.append(f"{'  ':<{max(2, 34 - len(line))}}# {note}", style="dim")
        console.print(text, soft_wrap=True)


@app.command("diff")
def diff_protocols(one: Name, other: Name) -> None:
    """Show where two protocols differ."""
    from rich.text import Text

    from mibench.cli.protocol_text import differences
    from mibench.cli.terminal import console as make_console
    from mibench.protocol import load_protocol

    left, right = load_protocol(one), load_protocol(other)
    found = list(differences(left.recorded(), right.recorded()))
    console = make_console()
    if not found:
        console.print(
            f"no difference: {one} and {other} fix the same values ({left.content_id})",
            soft_wrap=True,
        )
        return
    table = _table()
    table.add_column("key", no_wrap=True)
    for name, protocol in ((one, left), (other, right)):
        table.add_column(Text(f"{name}\n{protocol.content_id}"), overflow="fold")
    for cells in found:
        table.add_row(*cells)
    console.print(table)


def _check(kind: str, given: str | None, known: set[str]) -> None:
    """Refuses a filter that can match nothing."""
    from mibench.errors import UnknownNameError
    from mibench.suggest import unknown

    if given is not None and given not in known:
        raise UnknownNameError(unknown(kind, given, known))


def _table() -> Table:
    from rich.table import Table

    return Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
