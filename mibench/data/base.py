"""What a dataset is: a named source of images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from mibench.data.sets import ImageSet
from mibench.task import Task


class Dataset(ABC):
    """A named source of images. A subclass says where they come from and what is asked of them.

    Args:
        data_root: Folder with one sub-folder per dataset in the hub's parquet layout, or None for
            the hub itself. Datasets that need no download ignore it.
        image_size: Side of the square images in pixels, as the protocol wants them.
        cache: Folder in which decoded images may be kept.

    Attributes:
        task: the classes or attributes of the labels.
        shown: whether its terms let a few private images stand on a public page.
    """

    required: ClassVar[tuple[str, ...]] = ("load", "size")
    name: ClassVar[str]
    version: ClassVar[int]
    shown: ClassVar[bool] = False
    task: Task

    def __init__(self, data_root: Path | None, image_size: int, cache: Path) -> None:
        self.data_root = data_root
        self.image_size = image_size
        self.cache = cache

    @abstractmethod
    def size(self, split: str) -> int:
        """Returns the number of images of a split.

        Raises:
            DataError: the split is missing or unreadable.
            UnavailableError: the images must be downloaded and cannot be.
        """

    @abstractmethod
    def load(self, split: str, start: int, count: int) -> ImageSet:
        """Returns images ``start`` to ``start + count`` of a split, in the source's own order.

        Raises:
            DataError: the split is missing, shorter than asked, unreadable, or holds images or
                labels that do not fit the dataset.
            UnavailableError: the images must be downloaded and cannot be.
        """
