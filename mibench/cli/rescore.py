"""``mibench rescore``: stored reconstructions scored with the metrics of today."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from mibench.cli import options


def rescore(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    data_root: options.DataRoot = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the new record (default: that of the run with -rescored)."),
    ] = None,
) -> None:
    """Score the stored reconstructions of a run anew; the old record stays as it is."""
    from mibench.cli.terminal import console as make_console
    from mibench.errors import RecordError, StorageError

    if not run.is_dir():
        raise RecordError(f"there is no folder {run}; give the folder that a run has written")
    place = run.resolve()
    target = out or place.with_name(f"{place.name}-rescored")
    if (target / "record.json").exists():
        raise StorageError(f"{target} holds a record already; choose another --out")
    # From here on PyTorch is needed, which takes seconds to import.
    from mibench.artifacts import ArtifactStore
    from mibench.cli.display import shown
    from mibench.cli.table import print_record
    from mibench.files import ensure_writable
    from mibench.outputs import WEIGHTS, write_result
    from mibench.rescore import rescore as anew

    console = make_console()
    with shown(console):
        found = anew(run, ArtifactStore(), data_root)
    ensure_writable(target)
    if (run / WEIGHTS).is_dir():  # verifying the new record needs the same trained defense
        shutil.copytree(run / WEIGHTS, target / WEIGHTS, dirs_exist_ok=True)
    record = write_result(found.result, target)
    print_record(console, record)
    for name, change in found.computed.items():
        text = "new" if change is None else f"no image's value has moved by more than {change:.3g}"
        console.print(f"{name}: computed from the images; {text}", soft_wrap=True)
    for name in found.kept:
        console.print(f"{name}: kept, its version has not changed", soft_wrap=True)
    for name, reason in found.refused.items():
        console.print(f"{name}: left out, {reason}", soft_wrap=True)
    console.print(f"Files: {target}; supersedes {record.supersedes}", soft_wrap=True)
