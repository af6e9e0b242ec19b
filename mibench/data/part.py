"""A protocol's roles on a part of its dataset, for trying things out; never ranked."""

from __future__ import annotations

from pathlib import Path

from mibench.data.base import Dataset, open_dataset, role_images
from mibench.errors import DataError
from mibench.protocol import DataRule, RoleRule

ROLES = ("train", "auxiliary", "validation", "private")


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
