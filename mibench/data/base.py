"""What an image set is, and how a protocol's roles are cut from datasets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from mibench import progress
from mibench.errors import DataError, UnknownNameError
from mibench.protocol import DataRule, RoleRule, is_folder
from mibench.registry import datasets
from mibench.task import Task

CHUNK = 256
"""Images that are looked at at a time where a whole set is walked through."""
TOLERATED_COPIES = 0.005
"""Images of a role, as a share of all, that may lie in another one and are then left out there."""

LARGEST_HASHED = 10**7
"""Images of a split from which a role may be chosen by hash: all of them are read."""


class Pixels(Protocol):
    """Rows of images that need not lie in memory: a tensor, or anything that is read like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, 3, H, W)."""

    def __getitem__(self, rows: Tensor | slice, /) -> Tensor:
        """Returns the images of these rows as uint8 (n, 3, H, W), on the CPU."""


class Selected:
    """Chosen rows of larger pixels; no other row can be reached from here.

    Each image is compared with its hash when it is first read, so what was damaged on disk since it
    was decoded is not used unnoticed.

    Args:
        pixels: the larger pixels.
        rows: int64 (N,), the chosen rows.
        digests: SHA-256 of each chosen image, uint8 (N, 32).
    """

    def __init__(self, pixels: Pixels, rows: Tensor, digests: Tensor) -> None:
        self.__pixels = pixels
        self.__rows = rows
        self.__digests = digests
        self.__checked = torch.zeros(len(rows), dtype=torch.bool)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, 3, H, W)."""
        return len(self.__rows), *self.__pixels.shape[1:]

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        """Returns the chosen images at ``index``, uint8 (n, 3, H, W).

        Raises:
            DataError: an image is not what it was when its hash was taken.
        """
        images = self.__pixels[self.__rows[index]]
        known = self.__digests[index]
        for place in (~self.__checked[index]).nonzero().flatten().tolist():
            if digest(images[place]) != bytes(known[place].numpy()):
                raise DataError(
                    "a decoded image in the cache is damaged; delete the folder 'images' of the "
                    "cache (`mibench doctor` names it) and run again."
                )
        self.__checked[index] = True
        return images

    def at(self, index: Tensor) -> Selected:
        """Returns the chosen images at ``index``, without reading them."""
        return Selected(self.__pixels, self.__rows[index], self.__digests[index])


class ImageSet:
    """Images with labels, kept as bytes wherever they lie and handed out as floats.

    Args:
        pixels: uint8 (N, 3, H, W), in memory or not.
        labels: one per image: int64 (N,), or uint8 (N, A) of attributes.
        digests: SHA-256 of each image's bytes, uint8 (N, 32), where they are known already.
    """

    def __init__(self, pixels: Pixels, labels: Tensor, digests: Tensor | None = None) -> None:
        self.pixels = pixels
        self.labels = labels
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
        return self.pixels[index]

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
        chosen = self.pixels.at(index) if isinstance(self.pixels, Selected) else self.pixels[index]
        return ImageSet(chosen, self.labels[index], digests)

    def hashes(self) -> list[str]:
        """Returns the manifest: SHA-256 of each decoded image's bytes, in order."""
        return [bytes(row).hex() for row in self._digests.numpy()]

    @cached_property
    def identity(self) -> str:
        """SHA-256 over all images and labels in order, shortened to 16 hexadecimal digits."""
        digest = hashlib.sha256(self._digests.numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def _digests(self) -> Tensor:
        if self._known is not None:
            return self._known
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
        private: the users' images: accuracy on all.
        chosen: places of the attacked images among the private ones: the first that all differ.
        task: what the model learns, from the dataset of ``train`` and ``private``.
        left_out: by role, images that were left out since another role holds a copy of them.
    """

    train: ImageSet
    auxiliary: ImageSet
    validation: ImageSet
    private: ImageSet
    chosen: Tensor
    task: Task
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def attacked(self) -> ImageSet:
        """The private images under attack."""
        return self.private.at(self.chosen)


def open_dataset(name: str, image_size: int, data_root: Path | None, cache: Path) -> Dataset:
    """Returns the dataset of this name, or the user's own folder if it is a path.

    Raises:
        UnknownNameError: no dataset has this name.
        DataError: the folder does not exist or holds no images.
    """
    if is_folder(name):
        from mibench.data.folder import Folder

        return Folder(Path(name), image_size, cache)
    try:
        dataset: Dataset = datasets.load(name)(data_root, image_size, cache)
    except UnknownNameError as error:
        if Path(name).exists():
            hint = f"{error}; for the folder of that name write ./{name}"
            raise UnknownNameError(hint) from error
        raise
    return dataset


def load_roles(rule: DataRule, data_root: Path | None, cache: Path) -> Roles:
    """Cuts the four roles as the protocol says, none of which shares an image with another.

    Real datasets hold copies of images (CIFAR-100 has ten test images in its official training
    split). A few copies are left out of the later of two roles, in the order private, train,
    validation, auxiliary; more are refused. Auxiliary images that are training images by the
    protocol's own rule stay.

    Raises:
        DataError: images are missing or unfit, or two roles share many.
        UnavailableError: images must be downloaded and cannot be.
    """
    opened: dict[str, Dataset] = {}

    def cut(role: RoleRule) -> ImageSet:
        name = role.dataset or rule.dataset
        if name not in opened:
            opened[name] = open_dataset(name, rule.image_size, data_root, cache)
        return role_images(opened[name], role)

    parts: dict[str, ImageSet] = {}
    left_out: dict[str, int] = {}
    for role in ("private", "train", "validation", "auxiliary"):
        images = cut(getattr(rule, role))
        earlier = [name for name in parts if (name, role) != ("train", "auxiliary")]
        if rule.strength != "training":
            earlier = list(parts)
        parts[role], left_out[role] = _without(images, role, {n: parts[n] for n in earlier})
    return Roles(
        **parts,
        chosen=_distinct(parts["private"], rule.attacked),
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
    size = dataset.size(role.split)
    if size > LARGEST_HASHED:
        raise DataError(
            f"{dataset.name} has {size} images in the split {role.split!r}, too many to choose a "
            "role by their hashes; name a range with start and count."
        )
    whole = dataset.load(role.split, 0, size)
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


def _without(images: ImageSet, role: str, earlier: Mapping[str, ImageSet]) -> tuple[ImageSet, int]:
    """Leaves out what an earlier role holds, and returns how many images that were."""
    names = images.hashes()
    copies: set[str] = set()
    for other, theirs in earlier.items():
        shared = set(names).intersection(theirs.hashes())
        count = sum(name in shared for name in names)
        if count > TOLERATED_COPIES * len(theirs):
            raise DataError(
                f"{count} images of the role {role!r} are also in the role {other!r}; "
                "an attack or a defense would be judged on images it has seen. "
                "Mend the data folder or the protocol's roles."
            )
        copies |= shared
    if not copies:
        return images, 0
    kept = images.at(torch.tensor([at for at, name in enumerate(names) if name not in copies]))
    count = len(images) - len(kept)
    progress.note(f"left out of {role}: {count} images that another role holds as well")
    return kept, count


def _distinct(private: ImageSet, count: int) -> Tensor:
    """Returns where the first images lie that all differ: a copy would be its own control."""
    first: dict[str, int] = {}
    for at, name in enumerate(private.hashes()):
        first.setdefault(name, at)
    if len(first) < count:
        raise DataError(
            f"the protocol attacks {count} images, but the role 'private' has only {len(first)} "
            "that differ; give a larger dataset."
        )
    return torch.tensor(list(first.values())[:count])


def stack(images: list[Tensor], labels: list[int]) -> ImageSet:
    """Builds a set in memory from uint8 (3, H, W) tensors and their classes."""
    return ImageSet(torch.stack(images), torch.tensor(labels, dtype=torch.int64))
