"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Seed = Annotated[int | None, typer.Option(min=0, help="Seed (default: the protocol's first).")]
Device = Annotated[
    str, typer.Option(help="auto (CUDA where there is one, else the CPU), cpu, cuda, mps, ...")
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        envvar="MIBENCH_DATA",
        help="Folder with <dataset>/<split>-*.parquet (default: the Hugging Face hub).",
    ),
]
