"""What in submitted reconstructions cannot have come from the shares, or need not have.

The private images of a public dataset are public. A match is found here; someone who disguises one
is not. That is why results from images alone never decide a rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mibench.checks.base import Finding, Verdict
from mibench.data.near import near_copies, tolerated
from mibench.data.roles import Roles
from mibench.data.sets import ImageSet
from mibench.record import Record
from mibench.scoring import Scores

CLEARLY = 1.0
"""dB by which an image must be nearer to its original than an attack gets without any defense."""
CHEAT = "rebuild the images from the shares alone"
SAY = "say in the submission how this came about"


def suspicions(
    images: Tensor,
    roles: Roles,
    record: Record,
    scores: Scores,
    undefended: Scores,
    permuted: Scores,
) -> list[Finding]:
    """Looks at submitted reconstructions, one finding a check.

    Args:
        images: (N, 3, H, W) in [0, 1], as they are stored.
        roles: the protocol's images.
        record: that the challenge belongs to.
        scores: of the images.
        undefended: what the record's attack gets on the undefended split.
        permuted: of the images against other originals.
    """
    rebuilt = ImageSet((images * 255).round().to(torch.uint8), torch.zeros(len(images)))
    return [
        *_looked_up(rebuilt, roles, undefended),
        *_better_than_undefended(scores.per_image, undefended.per_image),
        *_taken_over(rebuilt, roles, record),
        *_all_alike(rebuilt),
        *_read_nothing(scores, permuted),
    ]


def _looked_up(rebuilt: ImageSet, roles: Roles, undefended: Scores) -> Iterator[Finding]:
    """Private images, pixel for pixel."""
    name, tried = "challenge-private", "seeks each image among all private images of the protocol"
    own, private = roles.attacked.hashes(), set(roles.private.hashes())
    bare = undefended.per_image.get("mse")
    perfect = [False] * len(own) if bare is None else (bare == 0).tolist()
    found = rebuilt.hashes()
    # An attack may rebuild an image to the last bit where nothing protects it.
    copies = [
        at
        for at, one in enumerate(found)
        if one in private and not (one == own[at] and perfect[at])
    ]
    if copies:
        said = f"{len(copies)} of {len(found)} are private images, pixel for pixel"
        yield Finding(name, Verdict.FAILED, tried, f"{said}, such as {copies[0]:04}.png", CHEAT)
        return
    others = torch.ones(len(roles.private), dtype=torch.bool)
    others[roles.chosen] = False
    beside = roles.private.at(others.nonzero().flatten())
    alike = int(near_copies(rebuilt, beside).sum()) if len(beside) else 0
    if alike > tolerated(len(rebuilt)):
        said = f"{alike} of {len(found)} are nearly private images that were not attacked"
        yield Finding(name, Verdict.WARNED, tried, said, SAY)
        return
    yield Finding(name, Verdict.PASSED, tried, "none is one of them")


def _better_than_undefended(
    scores: Mapping[str, Tensor], undefended: Mapping[str, Tensor]
) -> Iterator[Finding]:
    name = "challenge-undefended"
    tried = "compares PSNR with what the record's attack gets without any defense"
    if "psnr" not in scores or "psnr" not in undefended:
        yield Finding(name, Verdict.SKIPPED, tried, "there is no PSNR to compare")
        return
    ahead = scores["psnr"] - undefended["psnr"]
    above = int((ahead > CLEARLY).sum())
    if above:
        said = (
            f"{above} of {len(ahead)} are nearer to the original than that by more than "
            f"{CLEARLY:g} dB, one by {float(ahead.max()):.1f} dB"
        )
        yield Finding(name, Verdict.WARNED, tried, said, SAY)
        return
    yield Finding(name, Verdict.PASSED, tried, "none is clearly nearer to its original")


def _taken_over(rebuilt: ImageSet, roles: Roles, record: Record) -> Iterator[Finding]:
    """Images of other roles, or near copies of them."""
    name, tried = "challenge-copies", "seeks each image, or a near copy, among the other roles"
    told = []
    for role in ("auxiliary", "validation", "train"):
        alike = int(near_copies(rebuilt, getattr(roles, role)).sum())
        # A faithful reconstruction has the near copies that its original has.
        if alike > tolerated(len(rebuilt)) + record.near_copies.get(role, 0):
            told.append(f"{alike} of {len(rebuilt)} are nearly images of the role {role}")
    if told:
        yield Finding(name, Verdict.WARNED, tried, "; ".join(told), SAY)
        return
    yield Finding(name, Verdict.PASSED, tried, "no more are than chance allows")


def _all_alike(rebuilt: ImageSet) -> Iterator[Finding]:
    name, tried = "challenge-distinct", "counts different images"
    found = rebuilt.hashes()
    if len(set(found)) < len(found):
        said = f"there are {len(set(found))} different images for {len(found)} originals"
        yield Finding(name, Verdict.WARNED, tried, said, SAY)
        return
    yield Finding(name, Verdict.PASSED, tried, "all differ")


def _read_nothing(scores: Scores, permuted: Scores) -> Iterator[Finding]:
    name, tried = "challenge-permuted", "holds the same images against other originals"
    psnr = {
        key: {one.metric: one for one in part.summary}.get("psnr")
        for key, part in (("own", scores), ("other", permuted))
    }
    own, other = psnr["own"], psnr["other"]
    if own is None or other is None or own.value is None or other.value is None:
        yield Finding(name, Verdict.SKIPPED, tried, "there is no PSNR to compare")
        return
    said = f"{own.value:.2f} dB to their own originals, {other.value:.2f} dB to others"
    bound = own.value if own.ci_low is None else own.ci_low
    if bound <= other.value:
        yield Finding(name, Verdict.WARNED, tried, f"{said}: nothing was read in the shares", SAY)
        return
    yield Finding(name, Verdict.PASSED, tried, said)
