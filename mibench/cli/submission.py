"""``mibench submission``: a defense or an attack from outside, from its folder to the board."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from mibench.cli import options

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    no_args_is_help=True,
    help="Submit a defense or an attack: write its folder, check it, score it, verify it.",
)

REFUSED = 2
"""Exit status where something is wrong with a submission."""


@app.command("new")
def new(
    name: Annotated[
        str, typer.Argument(help="Lower-case letters, digits and dashes, as in channel-noise.")
    ],
    kind: Annotated[
        Literal["defense", "attack"], typer.Option(help="What is submitted.")
    ] = "defense",
    title: Annotated[
        str | None, typer.Option(help="Of the method (default: a mark that you fill in).")
    ] = None,
    author: Annotated[
        str | None, typer.Option(help="Your name (default: a mark that you fill in).")
    ] = None,
    into: Annotated[Path, typer.Option(help="Where the folder goes.")] = Path("submissions"),
) -> None:
    """Write a folder with a small defense (or attack) that works, a test and submission.yaml."""
    from mibench.submission.new import create
    from mibench.submission.static import problems

    with _told():
        folder = create(name, into, kind, title, author)
    typer.echo(f"{folder} is there: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    left = problems(folder)
    for one in left:
        typer.echo(f"to do: {one}")
    typer.echo(f"Then: mibench submission validate {folder}")


@app.command("validate")
def validate(
    folders: Annotated[list[Path], typer.Argument(help="Folders of submissions.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the problems as JSON.")] = False,
) -> None:
    """Name everything that is wrong with submissions, a line each; nothing of them is run.

    Exit status 0: nothing is wrong; 2: something is.
    """
    import dataclasses
    import json

    from mibench.submission.static import problems

    found = {str(folder): problems(folder) for folder in folders}
    if as_json:
        told = {name: [dataclasses.asdict(one) for one in some] for name, some in found.items()}
        typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
    else:
        for name, some in found.items():
            for one in some:
                typer.echo(str(one), err=True)
            words = f"{len(some)} problem{'s'[: len(some) != 1]}" if some else "nothing is wrong"
            typer.echo(f"{_shown(name)}: {words}")
    if any(found.values()):
        raise typer.Exit(REFUSED)


@app.command("score")
def score(
    folder: Annotated[Path, typer.Argument(help="Folder of a submission.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of its runs (default: runs/submissions/NAME)."),
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(help="For a defense: one attack instead of the suite. Never ranked."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="One of its protocols (default: all in submission.yaml)."),
    ] = None,
    device: Annotated[str, typer.Option(help="A PyTorch device.")] = "cpu",
    data_root: options.DataRoot = None,
    hours: Annotated[float, typer.Option(min=0.01, help="Time for one run.")] = 12.0,
) -> None:
    """Run a submission under its protocols, in a sandbox, and keep record, images and weights.

    Runs that are there already are not made again.
    """
    from mibench.submission.score import RUNS
    from mibench.submission.score import score as make

    with _told():
        runs = make(
            folder,
            out or RUNS / folder.resolve().name,
            data_root,
            attack=attack,
            protocol=protocol,
            device=device,
            seconds=hours * 3600,
            say=typer.echo,
        )
    for run in runs:
        typer.echo(f"Then: mibench submission verify {folder} --level rescored --run {run}")


@app.command("verify")
def verify(
    folder: Annotated[Path, typer.Argument(help="Folder of a submission.")],
    run: Annotated[
        Path, typer.Option(help="Folder of one of its runs, as `score` has written it.")
    ],
    level: Annotated[
        Literal["claimed", "rescored", "reproduced"],
        typer.Option(help="How far to go; what is missing below comes first."),
    ] = "rescored",
    root: Annotated[Path, typer.Option(help="The leaderboard.")] = Path("leaderboard/v1"),
    data_root: options.DataRoot = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of the rerun (default: one that nobody could know before)."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the rerun.")] = None,
    hours: Annotated[float, typer.Option(min=0.01, help="Time for the rerun.")] = 12.0,
) -> None:
    """Check a run of a submission up to a level of trust, and put it on the leaderboard.

    claimed: the record follows from its files, and the component passes `mibench check`. rescored:
    scores were computed again from the images, accuracy from the weights. reproduced: it was run
    again with another seed. Exit status 0: the level is reached; 2: it is not, and why.
    """
    from mibench.artifacts import ArtifactStore
    from mibench.board.model import Level
    from mibench.submission.verify import verify as make

    with _told():
        entry = make(
            folder,
            run,
            root,
            Level(level),
            data_root,
            ArtifactStore(),
            seed=seed,
            out=out,
            seconds=hours * 3600,
            say=typer.echo,
        )
    typer.echo(f"{root}/records/{entry.record}: {entry.level}")


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


class _told:  # noqa: N801 - used as a statement
    """Prints every line of a refusal, and ends with its status."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from mibench.errors import SubmissionError

        if isinstance(error, SubmissionError):
            refuse(error.lines)


def refuse(lines: Sequence[str]) -> NoReturn:
    """Prints what is wrong, a line each, and ends."""
    for line in lines:
        typer.echo(f"error: {_shown(' '.join(line.split()))}", err=True)
    raise typer.Exit(REFUSED)
