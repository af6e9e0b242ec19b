"""Datasets in the layout of the Hugging Face hub: from there, or from a folder of parquet files."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mibench import progress
from mibench.data.base import Dataset, ImageSet, stack
from mibench.errors import DataError, UnavailableError


class HubDataset(Dataset):
    """A dataset of the hub with one image column and one class label column.

    A subclass names the hub repository and its columns. With a data root, the same columns are
    read from ``<data root>/<name>/<split>-*.parquet`` (or from ``data/`` below it), offline.
    """

    hub_id: ClassVar[str]
    image_column: ClassVar[str]
    label_column: ClassVar[str]

    def load(self, split: str, start: int, count: int) -> ImageSet:
        """Decodes a slice of a split, in the source's order; see `Dataset.load`."""
        table = self._table(split)
        for column in (self.image_column, self.label_column):
            if column not in table.column_names:
                raise DataError(
                    f"{self._where(split)} has no column {column!r} "
                    f"(it has {', '.join(table.column_names)}); the layout of the hub's "
                    f"{self.hub_id} is expected."
                )
        if start + count > len(table):
            raise DataError(
                f"{self._where(split)} holds {len(table)} images, but the protocol needs images "
                f"{start} to {start + count}. Use the whole dataset, or a protocol made for this "
                "part."
            )
        images: list[Tensor] = []
        labels: list[int] = []
        with progress.task(f"Reading {self.name} {split}", total=count) as task:
            for row in self._rows(table, split, start, count):
                pixels = np.asarray(row[self.image_column])
                if pixels.shape != (self.image_size, self.image_size, 3):
                    raise DataError(
                        f"{self._where(split)}: image {start + len(images)} is "
                        f"{pixels.shape[1]}x{pixels.shape[0]} pixels, but the protocol says "
                        f"{self.image_size}x{self.image_size}."
                    )
                images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous())
                labels.append(self._label(row, split, start + len(labels)))
                task.advance()
        return stack(images, labels)

    def _label(self, row: Any, split: str, index: int) -> int:
        label = row[self.label_column]
        if not isinstance(label, int) or not 0 <= label < len(self.class_names):
            raise DataError(
                f"{self._where(split)}: image {index} has the label {label!r}, but there are the "
                f"classes 0 to {len(self.class_names) - 1}."
            )
        return label

    def _rows(self, table: Any, split: str, start: int, count: int) -> Any:
        import datasets

        try:
            # Files that were not written by `datasets` do not say that the column holds images.
            table = table.cast_column(self.image_column, datasets.Image())
        except Exception as error:
            raise DataError(
                f"{self._where(split)}: the column {self.image_column!r} holds no images."
            ) from error
        rows = iter(table.select(range(start, start + count)))
        while True:
            try:
                row = next(rows)
                yield {**row, self.image_column: row[self.image_column].convert("RGB")}
            except StopIteration:
                return
            except Exception as error:
                raise DataError(
                    f"{self._where(split)} holds an unreadable image: {error}"
                ) from error

    def _where(self, split: str) -> str:
        if self.data_root is None:
            return f"the split {split!r} of {self.hub_id}"
        return f"the split {split!r} in {self.data_root / self.name}"

    def _table(self, split: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        # What it logs of a broken file comes back as the reason of our own error.
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)
        if self.data_root is None:
            return self._from_hub(split)
        folder = self.data_root / self.name
        if not folder.is_dir():
            raise DataError(
                f"no folder {folder}; --data-root (or MIBENCH_DATA) must hold a folder "
                f"{self.name!r} with <split>-*.parquet files as on the hub ({self.hub_id})."
            )
        files = sorted(folder.glob(f"{split}-*.parquet"))
        files = files or sorted((folder / "data").glob(f"{split}-*.parquet"))
        if not files:
            raise DataError(
                f"{folder} has no file {split}-*.parquet, so the split {split!r} is missing."
            )
        try:
            return datasets.load_dataset("parquet", data_files=[str(file) for file in files])[
                "train"
            ]
        except Exception as error:
            reason = str(error.__cause__ or error).splitlines()[0]
            raise DataError(
                f"{self._where(split)} cannot be read ({reason}); copy {files[0].name} again."
            ) from error

    def _from_hub(self, split: str) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.hub_id, split=split)
        except (OSError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
            offline = " (HF_HUB_OFFLINE is set)" if datasets.config.HF_HUB_OFFLINE else ""
            raise UnavailableError(
                f"cannot get {self.hub_id} from the hub{offline}; connect to the internet, or "
                f"give a folder that holds {self.name}/<split>-*.parquet with --data-root or "
                "MIBENCH_DATA."
            ) from error
        except ValueError as error:
            raise DataError(f"{self.hub_id} has no split {split!r}: {error}") from error
