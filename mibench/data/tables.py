"""Tables of encoded images from parquet files, through the datasets library."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mibench.data.content import content_key
from mibench.errors import DataError

RELEASED = 2**26
"""Bytes of encoded images after which a table's files are opened anew."""


def library() -> Any:
    """Returns the datasets library, made quiet."""
    import datasets

    datasets.disable_progress_bars()
    # What it logs of a broken file comes back as the reason of our own error.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    return datasets


def read_parquet(files: Sequence[Path], where: str, root: Path | None = None) -> Any:
    """Opens parquet files as one table.

    Args:
        files: at least one.
        where: what messages call them.
        root: see `content_key`.

    Raises:
        DataError: a file is not whole, or they do not fit together; or the library's own copy of
            them is not whole.
    """
    import pyarrow.parquet

    datasets = library()
    try:
        # Its file names are patterns.
        names = [glob.escape(str(file)) for file in files]
        # By itself, the library finds its copy of a file by the path and the time of the last
        # change, which another file may share. Its copy also follows the configuration's name.
        name = content_key(files, root, where)[:16]
        table = datasets.load_dataset("parquet", name=name, data_files=names)["train"]
        rows = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    except Exception as error:
        reason = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)
        raise DataError(
            f"{where} cannot be read ({reason}); copy {files[0].name} again."
        ) from error
    if len(table) != rows:
        copy = Path(table.cache_files[0]["filename"]).parent
        raise DataError(
            f"{where} holds {rows} images, but the copy of it in {copy} holds {len(table)}; "
            "delete that folder and run again."
        )
    return table


class Rows:
    """Rows of a table of encoded images, read without what was read staying in memory.

    The library maps its files into memory, where every page that was read counts as memory of this
    process. So the files are opened anew after some reading.

    Args:
        table: a table of the datasets library whose images are left encoded.
        column: the column of images.
    """

    def __init__(self, table: Any, column: str) -> None:
        self.table = table
        self._column = column
        self._read = 0

    def __len__(self) -> int:
        return len(self.table)

    def read(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Returns these rows, images encoded."""
        columns = self.table[list(numbers)]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self._read += sum(len((row[self._column] or {}).get("bytes") or b"") for row in rows)
        if self._read > RELEASED:
            self._read = 0
            self._open_anew()
        return rows

    def _open_anew(self) -> None:
        files = [one["filename"] for one in self.table.cache_files]
        if not files:  # a table in memory
            return
        datasets, rows = library(), len(self.table)
        self.table = None
        parts = [datasets.Dataset.from_file(file) for file in files]
        whole = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
        assert len(whole) == rows, "a table is its files, in order"
        self.table = whole.cast_column(self._column, datasets.Image(decode=False))


def encoded(table: Any, column: str, where: str) -> Any:
    """Returns the table with this column as encoded images, never decoded by the library.

    Raises:
        DataError: the column holds no images.
    """
    datasets = library()
    try:
        # Files that were not written by `datasets` do not say that the column holds images.
        return table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:
        raise DataError(f"{where}: the column {column!r} holds no images.") from error
