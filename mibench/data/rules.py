"""Roles for what is there: a part of the protocol's dataset, or a folder of one's own.

Results under either are never ranked.
"""

from __future__ import annotations

from pathlib import Path

from mibench.data.base import Dataset
from mibench.data.folder import Folder
from mibench.data.roles import load_roles, open_dataset, role_images
from mibench.errors import DataError
from mibench.protocol import ROLES, DataRule, RoleRule, is_folder


def fitted(rule: DataRule, data_root: Path | None, cache: Path) -> DataRule:
    """Scales the roles down to the images that are there.

    Where a split holds fewer images than its ranges need, all starts and counts in it are scaled
    in proportion and rounded down, so ranges that were disjoint stay so. A rule that fits is
    returned as it is.

    Args:
        rule: the roles of a protocol.
        data_root: see `open_dataset`.
        cache: see `open_dataset`.

    Raises:
        DataError: a split is missing, or so small that a role would have fewer than two images.
        UnavailableError: images must be downloaded and cannot be.
    """
    opened: dict[str, Dataset] = {}
    sources: dict[tuple[str, str], list[RoleRule]] = {}
    roles: dict[str, RoleRule] = {name: getattr(rule, name) for name in ROLES}
    for role in roles.values():
        name = role.dataset or rule.dataset
        if name not in opened:
            opened[name] = open_dataset(name, rule.image_size, data_root, cache)
        if role.hashed is None:
            sources.setdefault((name, role.split), []).append(role)
    scale = {
        (name, split): (opened[name].size(split), max(_end(role) for role in ranges))
        for (name, split), ranges in sources.items()
    }
    small = {
        name: _scaled(role, *scale[role.dataset or rule.dataset, role.split])
        if role.hashed is None
        else role
        for name, role in roles.items()
    }
    for name, role in small.items():
        if role != roles[name] and (role.count or 0) < 2:
            have, _ = scale[role.dataset or rule.dataset, role.split]
            raise DataError(
                f"{have} images in the split {role.split!r} are too few: the role {name!r} would "
                "have fewer than two; give a larger part."
            )
    private = small["private"]
    count = private.count
    if private.hashed is not None:
        count = len(role_images(opened[rule.dataset], private))
    assert count is not None, "a rule without hashes has a count"
    return DataRule(
        dataset=rule.dataset,
        image_size=rule.image_size,
        attacked=min(rule.attacked, max(count, 2)),
        **small,
    )


def _end(role: RoleRule) -> int:
    return role.start + (role.count or 0)


def _scaled(role: RoleRule, have: int, need: int) -> RoleRule:
    if have >= need or role.count is None:
        return role
    # A count of zero is no valid rule; the caller refuses a count of one all the same.
    return RoleRule(
        split=role.split,
        start=role.start * have // need,
        count=max(1, role.count * have // need),
        dataset=role.dataset,
    )


def own_rule(folder: Folder, like: DataRule) -> DataRule:
    """Returns the roles of a user's own folder.

    Where it has its own test images (else validation images), those are the private ones and the
    rest is cut from ``train``; otherwise all four are cut from its one split. The hash of an image
    says which role it plays, so copies stay together and images that are added move no others.

    Args:
        folder: the folder.
        like: the rule of the protocol, for the size of the images and how many are attacked.

    Raises:
        DataError: there are too few images.
    """
    name = str(folder.path)
    held_out = next((split for split in ("test", "validation") if split in folder.splits), None)

    def role(low: float, high: float, split: str = "train") -> RoleRule:
        return RoleRule(split=split, hashed=(low, high))

    if held_out is not None:
        roles = {"train": role(0, 0.6), "auxiliary": role(0.6, 0.95), "validation": role(0.95, 1)}
        roles["private"] = role(0, 1, held_out)
    else:
        roles = {"train": role(0, 0.5), "auxiliary": role(0.5, 0.8), "validation": role(0.8, 0.85)}
        roles["private"] = role(0.85, 1)
    private = len(set(role_images(folder, roles["private"]).hashes()))
    if private < 2:
        raise DataError(
            f"{folder.path} has too few images: one would be private; give a larger folder."
        )
    rule = DataRule(
        dataset=name if is_folder(name) else f"./{name}",
        image_size=like.image_size,
        attacked=min(like.attacked, private),
        **roles,
    )
    # So that the content of a protocol follows the images and not their place.
    found = load_roles(rule, None, folder.cache)
    pinned = {
        role: one.model_copy(update={"identity": getattr(found, role).identity})
        for role, one in roles.items()
    }
    return rule.model_copy(update=pinned)
