"""``mibench show``: a record as a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(
    record: Annotated[Path, typer.Argument(help="A record.json, or the folder of a run.")],
) -> None:
    """Show the table of a record."""
    from mibench.cli.table import print_record
    from mibench.cli.terminal import console
    from mibench.record import read_record

    print_record(console(), read_record(record))
