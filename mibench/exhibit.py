"""What reconstructions are held against: the originals, and a witness that knows more of them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol as Interface

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mibench.artifacts import ArtifactStore
from mibench.data.roles import Roles
from mibench.data.sets import ImageSet, digest
from mibench.errors import UnavailableError
from mibench.judge import ROLE, train_judge
from mibench.protocol import Protocol
from mibench.record import JudgeFacts
from mibench.task import Task

KEPT = 64
"""Batches of images whose features a witness remembers."""
TIE = 1e-6
"""Difference of two cosines below which a judge cannot tell two images apart."""


class Seer(Interface):
    """Looks at images (N, 3, H, W) in [0, 1]; see `mibench.judge.Judge`."""

    def embed(self, images: Tensor) -> Tensor:
        """Features (N, D), float64 on the CPU."""

    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, outputs) on the CPU."""


@dataclass(frozen=True)
class Sought:
    """Where an image's original stands among all images of a gallery, by their likeness to it.

    Attributes:
        nearer: (N,), images of the gallery that are more like it than the original is.
        alike: (N,), images as like it as the original, within `TIE`, the original left out.
    """

    nearer: Tensor
    alike: Tensor


class Witness:
    """A judge that knows the labels of the originals, and a gallery in which each has its place.

    An original is recognised by its bytes, so that no order of images can be mistaken.

    Args:
        seer: the judge.
        task: what labels mean.
        known: the originals and whatever stands beside them in the gallery.
        too_few: why nothing can be sought in this gallery, if so.
    """

    def __init__(self, seer: Seer, task: Task, known: ImageSet, too_few: str | None = None) -> None:
        self._seer, self._task, self._too_few = seer, task, too_few
        distinct: dict[str, int] = {}
        for at, name in enumerate(known.hashes()):
            distinct.setdefault(name, at)
        self._places = {name: place for place, name in enumerate(distinct)}
        self._known = known.at(torch.tensor(list(distinct.values())))
        self._remembered: dict[bytes, Tensor] = {}

    def told(self, images: Tensor, originals: Tensor) -> Tensor:
        """How much of each original's label the judge tells from the image, (N,) in [0, 1]."""
        labels = self._known.labels[self._placed(originals)]
        return self._task.correct(self._seer.logits(images), labels).double()

    def sought(self, images: Tensor, originals: Tensor) -> Sought:
        """Seeks the original of each image in the gallery, by the cosine of the judge's features.

        Raises:
            UnavailableError: the gallery is too small.
        """
        self.require_gallery()
        place = self._placed(originals)[:, None]
        likeness = self._features(images) @ self._gallery.T
        ahead = likeness - likeness.gather(1, place)
        alike = ahead.abs() <= TIE
        alike.scatter_(1, place, value=False)
        return Sought(nearer=(ahead > TIE).sum(1), alike=alike.sum(1))

    def require_gallery(self) -> None:
        """Refuses to seek anything in a gallery that is too small.

        Raises:
            UnavailableError: it is.
        """
        if self._too_few is not None:
            raise UnavailableError(self._too_few)

    @property
    def gallery(self) -> int:
        """Images among which an original is sought; 0 where they are too few."""
        return 0 if self._too_few is not None else len(self._places)

    @cached_property
    def _gallery(self) -> Tensor:
        return normalize(torch.cat([self._seer.embed(part) for part in self._known.chunks()]))

    def _features(self, images: Tensor) -> Tensor:
        """Features (N, D) of unit length. Several metrics ask for those of the same images."""
        key = hashlib.sha256(images.detach().cpu().contiguous().numpy().tobytes()).digest()
        if key not in self._remembered:
            if len(self._remembered) == KEPT:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[key] = normalize(self._seer.embed(images))
        return self._remembered[key]

    def _placed(self, originals: Tensor) -> Tensor:
        pixels = (originals.detach().cpu() * 255).round().to(torch.uint8)
        names = [digest(image).hex() for image in pixels]
        unknown = sum(name not in self._places for name in names)
        if unknown:
            raise ValueError(f"{unknown} of {len(names)} originals are not known to the judge")
        return torch.tensor([self._places[name] for name in names])


@dataclass(frozen=True)
class Exhibit:
    """What reconstructions are held against.

    Attributes:
        originals: images (N, 3, H, W) in [0, 1].
        witness: knows the originals; None where there is no judge.
        reason: why there is none.
    """

    originals: Tensor
    witness: Witness | None = None
    reason: str = "there is no judge here"

    def asked(self) -> Witness:
        """Returns the witness.

        Raises:
            UnavailableError: there is none.
        """
        if self.witness is None:
            raise UnavailableError(self.reason)
        return self.witness


@dataclass(frozen=True)
class Case:
    """Everything that the attacks of one run are judged with.

    Attributes:
        attacked: the private images under attack, in a gallery of private images.
        known: validation images, in a gallery of validation images, to choose blind guesses with.
        judge: who recognises the images, for the record; None where there is no judge.
    """

    attacked: Exhibit
    known: Exhibit
    judge: JudgeFacts | None = None


def open_case(protocol: Protocol, roles: Roles, store: ArtifactStore, device: str) -> Case:
    """Trains the protocol's judge, or takes it from the cache, and shows it what is under attack.

    Args:
        protocol: names the judge.
        roles: the images.
        store: cache of trained parts.
        device: a PyTorch device.
    """
    originals = roles.attacked.images()
    count = min(len(roles.attacked), len(roles.validation))
    known = roles.validation.take(count).images()
    rule, reason = protocol.judge, None
    if rule is None:
        reason = f"protocol {protocol.id} names no judge"
    elif protocol.adversary.auxiliary == "other":
        reason = "a judge learns from auxiliary images, which have none of these labels here"
    if rule is None or reason is not None:
        nobody = reason or ""
        return Case(Exhibit(originals, None, nobody), Exhibit(known, None, nobody))
    judge = train_judge(rule, protocol, roles, store, device)
    gallery = _gallery(roles, rule.gallery)
    missing = rule.gallery - len(gallery)
    too_few = (
        f"a gallery of {rule.gallery} images is needed, and only {len(gallery)} private ones differ"
        if missing > 0
        else None
    )
    attacked = Witness(judge, roles.task, gallery, too_few)
    beside = Witness(judge, roles.task, roles.validation.take(max(rule.gallery, count)))
    return Case(
        attacked=Exhibit(originals, attacked),
        known=Exhibit(known, beside),
        judge=JudgeFacts(
            artifact=judge.artifact,
            weights=judge.weights,
            backbone=judge.component,
            trained_on=ROLE,
            accuracy=float(attacked.told(originals, originals).mean()),
            gallery=attacked.gallery,
        ),
    )


def _gallery(roles: Roles, count: int) -> ImageSet:
    """The attacked images, and after them the first other private images that all differ."""
    names = roles.private.hashes()
    chosen = {names[at]: at for at in roles.chosen.tolist()}
    for at, name in enumerate(names):
        if len(chosen) >= count:
            break
        chosen.setdefault(name, at)
    return roles.private.at(torch.tensor(list(chosen.values())))
