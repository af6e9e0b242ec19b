"""Near copies: attacked images that another role holds mirrored, encoded anew or brightened.

Exact copies are found by their hash and left out (`mibench.data.roles`). A near copy has another
hash and gives an attack or a defense the same unfair view of the image under attack.

Two images are near copies when, in either orientation, all of this holds:

1. Their *sketches* agree: luminance averaged to 8 x 8 cells, less its mean, scaled to unit length;
   the inner product of both is at least 0.95. Only the four best of each image and orientation go
   on.
2. Their pixels correlate: Pearson's coefficient over all 3 * H * W values is at least 0.93.
3. Their pixels agree: after the best gain (in [0.5, 2]) and offset, one each for the whole image,
   the PSNR is at least 22 dB. So a change of brightness or contrast is no difference.

The numbers are those of `Likeness`, chosen so that 999 of 1000 images of CIFAR-10 are found again
after a JPEG of quality 75, or brightened, shrunk to 24 pixels and encoded.

An image without any contrast has no sketch and is no near copy of anything. Copies that are
shifted, cropped, turned or recoloured are not found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mibench import progress
from mibench.artifacts import ArtifactStore, Checkpoint
from mibench.data.roles import Roles
from mibench.data.sets import ImageSet
from mibench.errors import SharedImagesError
from mibench.files import Json
from mibench.registry import fingerprint

TOLERATED = 0.05
"""Near copies in one role, as a share of the attacked images, above which a run is refused."""
TOLERATED_FEW = 3
"""So many are tolerated however few images are attacked."""

_AT_ONCE = 2048
_LUMINANCE = (0.299, 0.587, 0.114)
_FLAT = 1e-3


@dataclass(frozen=True)
class Likeness:
    """When two images are near copies.

    Attributes:
        cells: side of the grid of a sketch.
        alike: least inner product of two sketches of unit length.
        candidates: images whose pixels are compared, for each image and orientation.
        correlated: least correlation of the pixels.
        close: least PSNR in dB after the best gain and offset.
    """

    cells: int = 8
    alike: float = 0.95
    candidates: int = 4
    correlated: float = 0.93
    close: float = 22.0


NEAR = Likeness()
"""The rule in use."""


def near_copies(images: ImageSet, others: ImageSet) -> Tensor:
    """Tells which images have a near copy among others.

    Args:
        images: N images.
        others: images of the same shape.

    Returns:
        bool (N,).
    """
    found = torch.zeros(len(images), dtype=torch.bool)
    seen = torch.cat([sketches(chunk) for chunk in images.chunks()])
    mirrored = torch.cat([sketches(chunk.flip(3)) for chunk in images.chunks()])
    alike, which = _candidates(torch.cat([seen, mirrored]), others)
    row, place = (alike >= NEAR.alike).nonzero().unbind(1)
    for start in range(0, len(row), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        ours, turned = row[part] % len(images), row[part] >= len(images)
        mine = images.images(ours)
        mine = torch.where(turned.view(-1, 1, 1, 1), mine.flip(3), mine)
        found[ours[same_picture(mine, others.images(which[row[part], place[part]]))]] = True
    return found


def count_near_copies(roles: Roles, store: ArtifactStore) -> dict[str, int]:
    """Counts, for each role but the private one, attacked images of which it holds a near copy.

    Photographs of real datasets have a few (about 1 % of the test images of CIFAR-10 in its
    training images): these are counted and told. The roles stay as they are.

    Returns:
        By role, counts above 0.

    Raises:
        SharedImagesError: a role holds near copies of more images than chance would give.
    """
    attacked = roles.attacked
    limit = tolerated(len(attacked))
    found: dict[str, int] = {}
    for role in ("train", "auxiliary", "validation"):
        others: ImageSet = getattr(roles, role)

        def make(
            _: Checkpoint, others: ImageSet = others
        ) -> tuple[dict[str, Tensor], dict[str, Json]]:
            return {}, {"count": int(near_copies(attacked, others).sum())}

        spec: dict[str, Json] = {
            "attacked": attacked.identity,
            "others": others.identity,
            "code": fingerprint(Likeness),
        }
        count = store.fetch("near-copies", spec, make).facts["count"]
        assert isinstance(count, int)
        if count > limit:
            raise SharedImagesError(
                f"the role {role!r} holds near copies (mirrored, encoded anew, brightened) of "
                f"{count} of the {len(attacked)} attacked images, and at most {limit} can be "
                "chance; an attack or a defense would be judged on images it has seen. "
                "Mend the data folder or the protocol's roles."
            )
        if count:
            found[role] = count
            progress.note(f"{role} holds near copies of {count} attacked images")
    return found


def tolerated(attacked: int) -> int:
    """How many attacked images may have near copies in a role."""
    return max(TOLERATED_FEW, int(TOLERATED * attacked))


def sketches(images: Tensor) -> Tensor:
    """Returns what is compared first: images (B, 3, H, W) in [0, 1] → unit vectors (B, 64).

    An image without contrast gives zeros.
    """
    weights = images.new_tensor(_LUMINANCE).view(1, 3, 1, 1)
    cells = F.adaptive_avg_pool2d((images * weights).sum(1, keepdim=True), NEAR.cells).flatten(1)
    cells = cells - cells.mean(1, keepdim=True)
    length = cells.norm(dim=1, keepdim=True)
    return torch.where(length > _FLAT, cells / length, 0)


def same_picture(images: Tensor, others: Tensor) -> Tensor:
    """Compares pixels, pair by pair, orientation kept: (B, 3, H, W) twice → bool (B,)."""
    a, b = (one.flatten(1).double() for one in (images, others))
    a, b = (one - one.mean(1, keepdim=True) for one in (a, b))
    together, own, theirs = (a * b).sum(1), a.square().sum(1), b.square().sum(1)
    gain = (together / theirs.clamp_min(1e-12)).clamp(0.5, 2)
    error = (a - gain[:, None] * b).square().mean(1)
    correlated = together >= NEAR.correlated * (own * theirs).sqrt().clamp_min(1e-12)
    return correlated & (error <= 10 ** (-NEAR.close / 10))


def _candidates(seen: Tensor, others: ImageSet) -> tuple[Tensor, Tensor]:
    """The best matches of each sketch among others: inner products and places, (N, k)."""
    best = torch.empty(len(seen), 0)
    where = torch.empty(len(seen), 0, dtype=torch.int64)
    start = 0
    for chunk in others.chunks(_AT_ONCE):
        product = seen @ sketches(chunk).T
        score, place = product.topk(min(NEAR.candidates, product.shape[1]), dim=1)
        best, where = torch.cat([best, score], 1), torch.cat([where, place + start], 1)
        best, order = best.topk(min(NEAR.candidates, best.shape[1]), dim=1)
        where = where.gather(1, order)
        start += len(chunk)
    return best, where
