"""What an image set is, and how a protocol's roles are cut from a dataset."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mibench.errors import DataError
from mibench.protocol import DataRule, RoleRule
from mibench.registry import datasets


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images with class labels, held as bytes and handed out as floats.

    Attributes:
        pixels: uint8 (N, 3, H, W).
        labels: int64 (N,).
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Returns the images at ``index`` as floats (n, 3, H, W) in [0, 1]."""
        return self.pixels[index].float() / 255

    def take(self, count: int) -> ImageSet:
        """Returns the first ``count`` images."""
        return ImageSet(self.pixels[:count], self.labels[:count])

    def hashes(self) -> list[str]:
        """Returns the manifest: SHA-256 of each decoded image's bytes, in order."""
        rows = self.pixels.contiguous().flatten(1).numpy()
        return [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]

    @cached_property
    def identity(self) -> str:
        """SHA-256 over all pixels and labels in order, shortened to 16 hexadecimal digits."""
        digest = hashlib.sha256(self.pixels.contiguous().numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


class Dataset(ABC):
    """A named source of images. A subclass says where they come from and how many classes it has.

    Args:
        data_root: Folder with one sub-folder per dataset in the hub's parquet layout, or None for
            the hub itself. Datasets that need no download ignore it.
        image_size: Side of the square images in pixels, as the protocol wants them.
    """

    required: ClassVar[tuple[str, ...]] = ("load",)
    name: ClassVar[str]
    version: ClassVar[int]
    class_names: ClassVar[tuple[str, ...]]

    def __init__(self, data_root: Path | None, image_size: int) -> None:
        self.data_root = data_root
        self.image_size = image_size

    @abstractmethod
    def load(self, split: str, start: int, count: int) -> ImageSet:
        """Returns images ``start`` to ``start + count`` of a split, in the source's own order.

        Raises:
            DataError: the split is missing, shorter than asked, unreadable, or its images do not
                have the declared size.
            UnavailableError: the images must be downloaded and cannot be.
        """


@dataclass(frozen=True)
class Roles:
    """The four disjoint image sets of a protocol.

    Attributes:
        train: trains the model and its defense.
        auxiliary: the attacker's own images.
        validation: the attacker's own choices (weights, stopping) are made on these.
        private: the users' images: accuracy on all, attacks on the first ``attacked``.
        class_names: names of the classes, in label order.
    """

    train: ImageSet
    auxiliary: ImageSet
    validation: ImageSet
    private: ImageSet
    class_names: tuple[str, ...]


def load_roles(rule: DataRule, data_root: Path | None) -> Roles:
    """Cuts the four roles as the protocol says and proves that none shares a private image.

    Raises:
        DataError: an image of one role is, byte for byte, an image of the private role as well.
    """
    dataset = datasets.load(rule.dataset)(data_root, rule.image_size)

    def cut(role: RoleRule) -> ImageSet:
        return dataset.load(role.split, role.start, role.count)

    roles = Roles(
        train=cut(rule.train),
        auxiliary=cut(rule.auxiliary),
        validation=cut(rule.validation),
        private=cut(rule.private),
        class_names=dataset.class_names,
    )
    _refuse_overlap(roles)
    return roles


def _refuse_overlap(roles: Roles) -> None:
    scored = set(roles.private.hashes())
    for role in ("train", "auxiliary", "validation"):
        seen = sum(image in scored for image in getattr(roles, role).hashes())
        if seen:
            raise DataError(
                f"{seen} images of the role {role!r} are also in the role 'private'; "
                "an attack or a defense would be scored on images it has seen. "
                "Mend the data folder or the protocol's roles."
            )


def stack(images: list[Tensor], labels: list[int]) -> ImageSet:
    """Builds a set from uint8 (3, H, W) tensors and their labels."""
    return ImageSet(torch.stack(images), torch.tensor(labels, dtype=torch.int64))
