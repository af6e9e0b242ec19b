"""``mibench reproduce``: a record run again, and whether it comes out the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mibench.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from mibench.record import Record
    from mibench.verdict import Row, Verdict

DIFFERENT = 1
"""Exit status where the rerun does not give the record's result."""
SAID = {
    "identical": "IDENTICAL: every value of every image is the record's, to the last bit.",
    "same": "SAME: no mean has moved by more than the noise floor and the images' scatter allow.",
    "different": "DIFFERENT: the record's result did not come out again.",
}


def reproduce(
    record: Annotated[Path, typer.Argument(help="A record.json, or the folder of a run.")],
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Another seed than the record's: does the result depend on it?"),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Default: the kind of device that the record names.")
    ] = None,
    data_root: options.DataRoot = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the rerun (default: that of the run with -again)."),
    ] = None,
    cached: Annotated[
        bool,
        typer.Option(
            "--cached",
            help="Take trained parts from the cache. Quick, and proves only that scores follow "
            "from what lies there.",
        ),
    ] = False,
) -> None:
    """Run a record again from its own content, and say whether it gives the same.

    Everything is trained anew. Exit status 0: identical or the same; 1: different; 2: the rerun
    cannot be made, and why.
    """
    from mibench.cli.terminal import console as make_console
    from mibench.errors import StorageError
    from mibench.record import read_record

    had = read_record(record)
    folder = record if record.is_dir() else record.parent
    other = seed is not None and seed != had.seed
    target = out or default_folder(folder, seed if other else None)
    if (target / "record.json").exists():
        raise StorageError(f"{target} holds a record already; choose another --out")
    # From here on PyTorch is needed, which takes seconds to import.
    import shutil

    from mibench.artifacts import ArtifactStore
    from mibench.cli.devices import choose_device
    from mibench.cli.display import shown
    from mibench.files import ensure_writable
    from mibench.reproduce import job_of
    from mibench.reproduce import reproduce as rerun

    job_of(had, seed)  # what is wrong with the record shows before anything is written
    kind = str(had.provenance.get("device", "cpu")).partition(" ")[0].partition(":")[0]
    where = choose_device(device or kind)
    ensure_writable(target)
    fresh = target / "cache"
    store = ArtifactStore() if cached else ArtifactStore(fresh)
    console = make_console()
    console.print(
        f"Parts are taken from the cache {store.root} where it has them: this proves nothing of "
        "their training"
        if cached
        else f"Everything is trained anew, in {fresh}, which goes when all is done",
        soft_wrap=True,
    )
    with shown(console):
        verdict = rerun(had, folder, target, store, data_root, where, seed)
    if not cached:
        shutil.rmtree(fresh, ignore_errors=True)
    print_verdict(console, had, verdict, target)
    if verdict.word == "different":
        raise typer.Exit(DIFFERENT)


def default_folder(folder: Path, seed: int | None) -> Path:
    """Returns the run's folder with ``-again``, and the seed if it is another."""
    place = folder.resolve()
    return place.with_name(f"{place.name}-again{'' if seed is None else f'-s{seed}'}")


def print_verdict(console: Console, record: Record, verdict: Verdict, out: Path) -> None:
    """Prints the verdict, where the rerun first differs, and the scores side by side."""
    from mibench.verdict import CIRCUMSTANCES

    console.print(SAID[verdict.word], soft_wrap=True)
    matter = [one for one in verdict.differences if one.place not in CIRCUMSTANCES]
    aside = [one for one in verdict.differences if one.place in CIRCUMSTANCES]
    if verdict.word == "identical":
        for one in aside:
            console.print(f"Without an effect, {one}", soft_wrap=True, markup=False)
    elif verdict.first is not None:
        console.print(f"First difference, {verdict.first}", soft_wrap=True, markup=False)
        for one in [*aside, *matter][:30]:
            if one != verdict.first:
                console.print(f"  then {one}", soft_wrap=True, markup=False)
    if verdict.rows:
        console.print(_table(verdict.rows))
        console.print(
            "The interval is that of the change of the same images; it covers images, not training "
            "runs. How far a repeated training moves a mean is in docs/noise-floor.md.",
            soft_wrap=True,
        )
        console.print(f"Rerun: {out}", soft_wrap=True, markup=False)
    if record.supersedes is not None:
        console.print(
            f"The record was scored anew from {record.supersedes}; its run was made once",
            soft_wrap=True,
        )


def _table(rows: list[Row]) -> object:
    from rich.table import Table

    from mibench.cli.table import DIGITS

    table = Table(title="Means in the record and in the rerun", title_justify="left")
    for name in ("score", "of", "record", "rerun", "change, 95 % interval", "noise floor", ""):
        table.add_column(name)
    for row in rows:
        digits = DIGITS.get(row.metric, 3) + 1
        change = f"{row.after - row.before:+.{digits}f}"
        if row.low is not None and row.high is not None and row.paired:
            change += f" ({row.low:+.{digits}f} to {row.high:+.{digits}f})"
        table.add_row(
            row.metric.upper(), row.place.replace("_", " "), f"{row.before:.{digits}f}",
            f"{row.after:.{digits}f}", change, f"±{row.tolerance:.{digits}f}",
            "" if row.agrees else "differs",
        )  # fmt: skip
    return table
