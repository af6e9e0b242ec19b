"""What an image set is, and how a protocol's roles are cut from datasets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from mibench import progress
from mibench.errors import DataError
from mibench.protocol import DataRule, RoleRule
from mibench.registry import datasets
from mibench.task import Task

CHUNK = 256
"""Images that are looked at at a time where a whole set is walked through."""
TOLERATED_COPIES = 0.005
"""Private images, as a share of all, that may lie in another role and are then left out there."""


class Pixels(Protocol):
    """Rows of images that need not lie in memory: a tensor, or anything that is read like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, 3, H, W)."""

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """Returns the images of these rows as uint8 (n, 3, H, W), on the CPU."""


class ImageSet:
    """Images with labels, kept as bytes wherever they lie and handed out as floats.

    Args:
        pixels: rows of images, uint8 (M, 3, H, W).
        labels: one per image: int64 (N,), or uint8 (N, A) of attributes.
        rows: int64 (N,), where each image lies in ``pixels``; by default all rows in order.
        digests: SHA-256 of each image's bytes, uint8 (N, 32), where they are known already.
    """

    def __init__(
        self,
        pixels: Pixels,
        labels: Tensor,
        rows: Tensor | None = None,
        digests: Tensor | None = None,
    ) -> None:
        self.pixels = pixels
        self.labels = labels
        self.rows = torch.arange(len(labels)) if rows is None else rows
        self._known = digests

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def raw(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Returns the images at ``index`` as uint8 (n, 3, H, W)."""
        return self.pixels[self.rows[index]]

    def images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Returns the images at ``index`` as floats (n, 3, H, W) in [0, 1]."""
        return self.raw(index).float() / 255

    def chunks(self, size: int = CHUNK) -> Iterator[Tensor]:
        """Yields all images in order, as floats, so many at a time."""
        for start in range(0, len(self), size):
            yield self.images(slice(start, start + size))

    def take(self, count: int) -> ImageSet:
        """Returns the first ``count`` images."""
        return self.at(torch.arange(min(count, len(self))))

    def at(self, index: Tensor) -> ImageSet:
        """Returns the images at ``index``, without reading them."""
        digests = None if self._known is None else self._known[index]
        return ImageSet(self.pixels, self.labels[index], self.rows[index], digests)

    def hashes(self) -> list[str]:
        """Returns the manifest: SHA-256 of each decoded image's bytes, in order."""
        return [bytes(row).hex() for row in self._digests.numpy()]

    @cached_property
    def identity(self) -> str:
        """SHA-256 over all images and labels in order, shortened to 16 hexadecimal digits."""
        digest = hashlib.sha256(self._digests.numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def verify(self) -> None:
        """Reads every image and compares it with its hash.

        Raises:
            DataError: an image is not what it was when its hash was taken.
        """
        if self._known is not None and not torch.equal(self._known, self._digested()):
            raise DataError(
                "a decoded image in the cache is damaged; delete the folder 'images' of the cache "
                "(`mibench doctor` names it) and run again."
            )

    @cached_property
    def _digests(self) -> Tensor:
        return self._digested() if self._known is None else self._known

    def _digested(self) -> Tensor:
        found = []
        for start in range(0, len(self), CHUNK):
            found += [digest(image) for image in self.raw(slice(start, start + CHUNK))]
        return torch.from_numpy(np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32).copy())


def digest(image: Tensor) -> bytes:
    """Returns the SHA-256 of one decoded image (3, H, W), uint8."""
    return hashlib.sha256(image.contiguous().numpy().tobytes()).digest()


class Dataset(ABC):
    """A named source of images. A subclass says where they come from and what is asked of them.

    Args:
        data_root: Folder with one sub-folder per dataset in the hub's parquet layout, or None for
            the hub itself. Datasets that need no download ignore it.
        image_size: Side of the square images in pixels, as the protocol wants them.
        cache: Folder in which decoded images may be kept.

    Attributes:
        task: the classes or attributes of the labels.
    """

    required: ClassVar[tuple[str, ...]] = ("load", "size")
    name: ClassVar[str]
    version: ClassVar[int]
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


@dataclass(frozen=True)
class Roles:
    """The four image sets of a protocol.

    Attributes:
        train: trains the model and its defense.
        auxiliary: the attacker's own images.
        validation: the attacker's own choices (weights, stopping) are made on these.
        private: the users' images: accuracy on all, attacks on the first ``attacked``.
        task: what the model learns, from the dataset of ``train`` and ``private``.
        left_out: by role, images that were left out since they are private ones as well.
    """

    train: ImageSet
    auxiliary: ImageSet
    validation: ImageSet
    private: ImageSet
    task: Task
    left_out: dict[str, int] = field(default_factory=dict)


def open_dataset(name: str, image_size: int, data_root: Path | None, cache: Path) -> Dataset:
    """Returns the dataset of this name, or the user's own folder if it is a path.

    Raises:
        UnknownNameError: no dataset has this name.
        DataError: the folder does not exist or holds no images.
    """
    if is_folder(name):
        from mibench.data.folder import Folder

        return Folder(Path(name), image_size, cache)
    dataset: Dataset = datasets.load(name)(data_root, image_size, cache)
    return dataset


def is_folder(name: str) -> bool:
    """Says whether a dataset is given as a path: it holds a separator, or starts with a dot."""
    return "/" in name or "\\" in name or name.startswith((".", "~"))


def load_roles(rule: DataRule, data_root: Path | None, cache: Path) -> Roles:
    """Cuts the four roles as the protocol says, none of which shares a private image.

    A few copies of private images in another role (CIFAR-100 has ten in its official training
    split) are left out of that role; more are refused.

    Raises:
        DataError: images are missing or unfit, or many images of another role are private ones.
        UnavailableError: images must be downloaded and cannot be.
    """
    opened: dict[str, Dataset] = {}

    def cut(role: RoleRule) -> ImageSet:
        name = role.dataset or rule.dataset
        if name not in opened:
            opened[name] = open_dataset(name, rule.image_size, data_root, cache)
        return role_images(opened[name], role)

    private = cut(rule.private)
    parts: dict[str, ImageSet] = {}
    left_out: dict[str, int] = {}
    for role in ("train", "auxiliary", "validation"):
        images = cut(getattr(rule, role))
        parts[role], left_out[role] = _without(images, private, role)
    if rule.attacked > len(private):
        raise DataError(
            f"the protocol attacks {rule.attacked} images, but the role 'private' has only "
            f"{len(private)}; give a larger dataset."
        )
    return Roles(
        **parts,
        private=private,
        task=opened[rule.dataset].task,
        left_out={role: count for role, count in left_out.items() if count},
    )


def role_images(dataset: Dataset, role: RoleRule) -> ImageSet:
    """Returns the images that play a role; those chosen by hash come in the order of their hashes.

    Raises:
        DataError: see `Dataset.load`; or no image's hash falls into the role's interval.
        UnavailableError: see `Dataset.load`.
    """
    if role.hashed is None:
        assert role.count is not None, "a rule without hashes has a count"
        return dataset.load(role.split, role.start, role.count)
    whole = dataset.load(role.split, 0, dataset.size(role.split))
    # Where an image goes follows from its content: copies stay together, and images that are added
    # later move none of those that were there.
    low, high = role.hashed
    place = [int(name[:8], 16) / 2**32 for name in whole.hashes()]
    chosen = [index for index, at in enumerate(place) if low <= at < high]
    if not chosen:
        raise DataError(
            f"{len(whole)} images are too few: a role of the protocol stays empty; "
            "give a larger dataset."
        )
    chosen.sort(key=place.__getitem__)
    part = whole.at(torch.tensor(chosen))
    return part if role.count is None else part.take(role.count)


def _without(images: ImageSet, private: ImageSet, role: str) -> tuple[ImageSet, int]:
    scored = set(private.hashes())
    copies = [name in scored for name in images.hashes()]
    count = sum(copies)
    if not count:
        return images, 0
    if count > TOLERATED_COPIES * len(private):
        raise DataError(
            f"{count} images of the role {role!r} are also in the role 'private'; "
            "an attack or a defense would be scored on images it has seen. "
            "Mend the data folder or the protocol's roles."
        )
    progress.note(f"left out of {role}: {count} images that are private ones as well")
    return images.at((~torch.tensor(copies)).nonzero().flatten()), count


def stack(images: list[Tensor], labels: list[int]) -> ImageSet:
    """Builds a set in memory from uint8 (3, H, W) tensors and their classes."""
    return ImageSet(torch.stack(images), torch.tensor(labels, dtype=torch.int64))
