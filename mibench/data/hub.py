"""Datasets in the layout of the Hugging Face hub: from there, or from a folder of parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mibench.data.content import content_key
from mibench.data.decoded import EncodedDataset, Source
from mibench.data.images import Decoder, UnfitImageError
from mibench.data.sets import ImageSet
from mibench.data.tables import Rows, encoded, library, read_parquet
from mibench.errors import DataError, UnavailableError
from mibench.registry import fingerprint


class HubDataset(EncodedDataset):
    """A dataset of the hub with one image column.

    A subclass names the hub repository and its columns, and overrides `columns` and `label` if its
    labels are not classes. With a data root, the same columns are read from
    ``<data root>/<folder>/<split>-*.parquet`` (or from ``data/`` below it), offline.

    Attributes:
        hub_id: the repository.
        folder: name of the folder below the data root; empty for the dataset's own name.
        image_column: the column of images.
        label_column: the column of class labels.
        native_size: side of all images, which are then not resized; None if they vary.
    """

    hub_id: ClassVar[str]
    folder: ClassVar[str] = ""
    image_column: ClassVar[str]
    label_column: ClassVar[str]
    native_size: ClassVar[int | None] = None

    more = "Use the whole dataset, or a protocol made for this part"

    def load(self, split: str, start: int, count: int) -> ImageSet:
        """Decodes a slice of a split, in the source's order; see `Dataset.load`."""
        decoded = self.enough(split, start, count)
        images, unfit, reason = decoded.load(start, count)
        if unfit:
            raise DataError(
                f"{self.where(split)}: image {unfit[0]} {reason}; copy the files again."
            )
        return images

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold labels."""
        return (self.label_column,)

    @property
    def blank(self) -> Tensor:
        """A label that says nothing, of the type and shape of all labels."""
        return torch.tensor(-1)

    def label(self, row: Mapping[str, Any]) -> Tensor:
        """Returns the label of a row.

        Raises:
            UnfitImageError: it is not one of the task's.
        """
        label = row[self.label_column]
        if not isinstance(label, int) or not 0 <= label < self.task.outputs:
            raise UnfitImageError(
                f"has the label {label!r}, but there are the classes 0 to {self.task.outputs - 1}"
            )
        return torch.tensor(label)

    # --- where the rows come from -----------------------------------------------------------------

    def where(self, split: str) -> str:
        """The split and the hub's repository or the folder."""
        if self.data_root is None:
            return f"the split {split!r} of {self.hub_id}"
        return f"the split {split!r} in {self.data_root / self._folder}"

    @property
    def _folder(self) -> str:
        return self.folder or self.name

    def source(self, split: str) -> Source:
        """Opens the table of a split; see `EncodedDataset.source`."""
        native = self.native_size
        if native is not None and native != self.image_size:
            raise DataError(
                f"{self.name} has images of {native}x{native} pixels, but the protocol says "
                f"{self.image_size}x{self.image_size}."
            )
        if self.data_root is None:
            table = self._from_hub(split)
            files = [Path(file["filename"]) for file in table.cache_files]
        else:
            files = self._local_files(self.data_root / self._folder, split)
            table = read_parquet(files, self.where(split))
        for column in (self.image_column, *self.columns):
            if column not in table.column_names:
                raise DataError(
                    f"{self.where(split)} has no column {column!r} "
                    f"(it has {', '.join(table.column_names)}); the layout of the hub's "
                    f"{self.hub_id} is expected."
                )
        if not len(table):
            raise DataError(f"{self.where(split)} holds no images; copy the files again.")
        return Source(
            title=f"{self.name} {split}",
            origin={
                "dataset": self.name,
                "version": self.version,
                "code": fingerprint(type(self)),
                "split": split,
                "files": content_key(files, None, self.where(split)),
            },
            rows=Rows(encoded(table, self.image_column, self.where(split)), self.image_column),
            image_column=self.image_column,
            label=self.label,
            blank=self.blank,
            decoder=Decoder(self.image_size, exact=native is not None),
        )

    def _local_files(self, folder: Path, split: str) -> list[Path]:
        if not folder.is_dir():
            raise DataError(
                f"no folder {folder}; --data-root (or MIBENCH_DATA) must hold a folder "
                f"{self._folder!r} with <split>-*.parquet files as on the hub ({self.hub_id})."
            )
        files = sorted(folder.glob(f"{split}-*.parquet"))
        files = files or sorted((folder / "data").glob(f"{split}-*.parquet"))
        if not files:
            raise DataError(
                f"{folder} has no file {split}-*.parquet, so the split {split!r} is missing."
            )
        return files

    def _from_hub(self, split: str) -> Any:
        datasets = library()
        offline = " (HF_HUB_OFFLINE is set)" if datasets.config.HF_HUB_OFFLINE else ""
        give = (
            f"give a folder that holds {self._folder}/<split>-*.parquet with --data-root or "
            "MIBENCH_DATA."
        )
        try:
            return datasets.load_dataset(self.hub_id, split=split)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            if _is_gated(error):
                raise UnavailableError(
                    f"{self.hub_id} is gated: accept its terms on its hub page and log in with "
                    f"`hf auth login`, or {give}"
                ) from error
            raise UnavailableError(
                f"cannot get {self.hub_id} from the hub{offline}; connect to the internet, or "
                f"{give}"
            ) from error
        except ValueError as error:
            raise DataError(f"{self.hub_id} has no split {split!r}: {error}") from error


def _is_gated(error: BaseException | None) -> bool:
    """Says whether the hub refused since the user has not accepted the terms of a dataset."""
    from huggingface_hub.errors import GatedRepoError

    while error is not None:
        if isinstance(error, GatedRepoError) or "gated dataset" in str(error):
            return True
        error = error.__cause__
    return False
