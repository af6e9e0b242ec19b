"""The commands put together, and what happens when one fails."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mibench import __version__
from mibench.cli import (
    board,
    challenge,
    check,
    doctor,
    listing,
    prior,
    protocols,
    reproduce,
    rescore,
    run,
    show,
    submission,
    sweep,
)
from mibench.errors import MibenchError

MISTAKE = 2
"""Exit status when the user can mend the problem; also that of a wrong option."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


class Commands(TyperGroup):
    """A group whose commands fail in one line where the user can mend the problem.

    Any other exception is a bug of ours and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except MibenchError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(MISTAKE) from error
        except KeyboardInterrupt as error:
            typer.echo(
                "interrupted: the parts trained so far are kept; the same command goes on", err=True
            )
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="How much of a private image leaks in split inference, and what a defense costs.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mibench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command("run")(run.run)
app.command("sweep")(sweep.sweep)
app.command("list")(listing.list_components)
app.command("show")(show.show)
app.command("check")(check.check)
app.command("reproduce")(reproduce.reproduce)
app.command("rescore")(rescore.rescore)
app.add_typer(protocols.app, name="protocols")
app.add_typer(prior.app, name="prior")
app.add_typer(submission.app, name="submission")
app.add_typer(board.app, name="board")
app.add_typer(challenge.app, name="challenge")
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of the console script ``mibench``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding lacks must not end a run of hours.
            stream.reconfigure(errors="replace")
    warnings.formatwarning = _one_line
    app()


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    return f"warning: {' '.join(str(message).split())}\n"
