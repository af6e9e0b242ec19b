"""``mibench board``: the leaderboard, made from its records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mibench.cli import options

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

app = typer.Typer(no_args_is_help=True, help="The leaderboard: add runs, build and check pages.")

Root = Annotated[Path, typer.Option(help="Folder of a version of the leaderboard.")]
_ROOT = Path("leaderboard/v1")
HOST = "127.0.0.1"
"""Only programs of this machine are answered."""


@app.command("add")
def add(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    root: Root = _ROOT,
    data_root: options.DataRoot = None,
) -> None:
    """Put finished runs on the leaderboard; a record that is there already stays as it is."""
    from mibench.board import entries
    from mibench.board.model import Level
    from mibench.cli.terminal import console as make_console
    from mibench.errors import BoardError, MibenchError

    console, failed = make_console(), []
    for run in runs:
        try:
            entry = entries.add(run, root, data_root=data_root)
        except MibenchError as error:
            failed.append(str(error))
            continue
        console.print(f"{run}: record {entry.record}, {entry.level.value}", soft_wrap=True)
        if entry.level is Level.CLAIMED and not entry.verifications[-1].differences:
            console.print("  not rescored: give the images with --data-root", soft_wrap=True)
        for text in entry.verifications[-1].differences:
            console.print(f"  {text}", soft_wrap=True)
        if entry.gallery is None:
            console.print(f"  no gallery: {entry.gallery_reason}", soft_wrap=True)
    if failed:
        raise BoardError("; ".join(failed))
    console.print("Now run `mibench board build`.")


@app.command("build")
def build(root: Root = _ROOT) -> None:
    """Write the pages and tables, and the table in the README between its marks."""
    from mibench.board.build import write

    done = write(root)
    rows = [row for section in done.board.sections for row in section.rows]
    ranked = sum(row.ranked for row in rows)
    typer.echo(
        f"{done.files} files for {len(rows)} rows ({ranked} ranked): "
        f"{len(done.changed)} changed, {len(done.removed)} removed"
    )


@app.command("check")
def check(root: Root = _ROOT) -> None:
    """Check records, numbers, pages and size; ends with status 2 and says what does not hold."""
    from mibench.board.build import check as checked
    from mibench.board.layout import LARGEST_BOARD

    found = checked(root)
    typer.echo(
        f"{found.records} records, {found.rows} rows, {found.ranked} of them ranked: all holds; "
        f"{found.bytes / 2**20:.2f} of {LARGEST_BOARD / 2**20:g} MiB"
    )


@app.command("diff")
def diff(
    other: Annotated[str, typer.Argument(help="Folder of a version, or a revision of git.")],
    root: Root = _ROOT,
) -> None:
    """Show as Markdown which rows are new, gone or changed since another state."""
    from mibench.board.build import diff as compared

    typer.echo(compared(root, other), nl=False)


@app.command("serve")
def serve(
    root: Root = _ROOT,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
) -> None:
    """Show the pages to browsers of this machine; end with Ctrl-C."""
    server = make_server(root, port)
    with server:
        typer.echo(f"http://{HOST}:{server.server_address[1]}/site/ (Ctrl-C ends)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            typer.echo("ended")


def make_server(root: Path, port: int) -> ThreadingHTTPServer:
    """A server of the version's folder, for this machine alone.

    Raises:
        BoardError: there are no pages yet, or the port is in use.
    """
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    from mibench.board import layout
    from mibench.errors import BoardError

    if not (layout.site(root) / layout.INDEX).is_file():
        raise BoardError(f"{layout.site(root)} holds no pages; run `mibench board build` first")
    handler = partial(SimpleHTTPRequestHandler, directory=str(root))
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise BoardError(
            f"cannot listen on port {port}: {error.strerror}; choose another --port"
        ) from error
