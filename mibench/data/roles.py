"""How a protocol's four roles are cut from datasets, so that none shares an image with another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mibench import progress
from mibench.data.base import Dataset
from mibench.data.folder import Folder
from mibench.data.sets import ImageSet
from mibench.errors import DataError, SharedImagesError, UnknownNameError
from mibench.protocol import DataRule, RoleRule, is_folder
from mibench.registry import datasets
from mibench.task import Task

TOLERATED_COPIES = 0.005
"""Images of a role, as a share of all, that may lie in another one and are then left out there."""
LARGEST_HASHED = 10**7
"""Images of a split from which a role may be chosen by hash: all of them are read."""


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
        DataError: images are missing or unfit.
        SharedImagesError: two roles share many.
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


def private_images(dataset: Dataset, rule: DataRule) -> tuple[ImageSet, Tensor]:
    """Returns the private images of a protocol, and the places of the attacked ones.

    Raises:
        DataError: see `role_images`; or too few of them differ.
        UnavailableError: see `Dataset.load`.
    """
    images = role_images(dataset, rule.private)
    return images, _distinct(images, rule.attacked)


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
            raise SharedImagesError(
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
