"""Checks of a protocol's images: no role holds pictures of another one."""

from __future__ import annotations

from pathlib import Path

from mibench.artifacts import ArtifactStore
from mibench.checks.base import Finding, Verdict
from mibench.data.near import count_near_copies, tolerated
from mibench.data.roles import load_roles
from mibench.errors import SharedImagesError
from mibench.protocol import DataRule

COPIES, NEAR_COPIES = "data-copies", "data-near-copies"
"""Names of the checks."""
_TRIED = {
    COPIES: "compared the hashes of all images of all roles",
    NEAR_COPIES: "searched every role for attacked images mirrored, encoded anew or brightened",
}
_ADVICE = "take the private images, and what is made of them, out of the other roles"


def check_data(rule: DataRule, data_root: Path | None, store: ArtifactStore) -> list[Finding]:
    """Cuts the roles, as a run does, and looks for copies.

    Args:
        rule: of a protocol.
        data_root: folder of datasets in the hub's layout, or None for the hub.
        store: cache of decoded images and of the search.

    Raises:
        DataError: images are missing or unfit.
        UnavailableError: images must be downloaded and cannot be.
    """
    try:
        roles = load_roles(rule, data_root, store.root)
    except SharedImagesError as error:
        later = Finding(NEAR_COPIES, Verdict.SKIPPED, _TRIED[NEAR_COPIES], "the roles are not cut")
        return [Finding(COPIES, Verdict.FAILED, _TRIED[COPIES], str(error), _ADVICE), later]
    left = ", ".join(f"{count} of {role}" for role, count in roles.left_out.items())
    words = f"left out, since an earlier role holds them: {left}" if left else "none"
    found = [Finding(COPIES, Verdict.PASSED, _TRIED[COPIES], words)]
    try:
        near = count_near_copies(roles, store)
    except SharedImagesError as error:
        return [
            *found,
            Finding(NEAR_COPIES, Verdict.FAILED, _TRIED[NEAR_COPIES], str(error), _ADVICE),
        ]
    attacked = len(roles.attacked)
    counted = ", ".join(f"{count} in {role}" for role, count in near.items()) or "none"
    words = f"{counted}, of {attacked} attacked images; {tolerated(attacked)} a role may be chance"
    return [*found, Finding(NEAR_COPIES, Verdict.PASSED, _TRIED[NEAR_COPIES], words)]
