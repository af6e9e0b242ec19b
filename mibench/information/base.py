"""What a measure of information is, and what it is shown of a deployed defense."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from pydantic import Field
from torch import Tensor

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.defenses.base import Shares
from mibench.errors import blaming
from mibench.files import Json
from mibench.metrics.intervals import Estimate
from mibench.params import Parameters
from mibench.threat import Target

VALUES = 2**27
"""Values of all shares that are held of each set of images, at most."""


class Amounts(Parameters):
    """How much work the measures may take.

    Attributes:
        learned: auxiliary images that are learned from, at most.
        read: validation images that are measured, at most.
        seeds: independent networks of a learned measure.
        steps: training steps of each, in batches of ``batch``.
        batch: images per training step.
        published: images of each set that `siftfunnel-mine` sees, at most; it costs most.
        epochs: of `siftfunnel-mine`; the published code has 100.
    """

    learned: int = Field(default=4096, ge=1)
    read: int = Field(default=1024, ge=1)
    seeds: int = Field(default=3, ge=2)
    steps: int = Field(default=150, ge=1)
    batch: int = Field(default=256, ge=2)
    published: int = Field(default=1024, ge=1)
    epochs: int = Field(default=3, ge=1)

    @classmethod
    def of(cls, track: str) -> Amounts:
        """Returns the amounts of a protocol's track."""
        return _OF_TRACK.get(track, cls())


_OF_TRACK = {
    "test": Amounts(learned=64, read=32, seeds=2, steps=2, batch=16, published=16, epochs=1),
    "smoke": Amounts(learned=512, read=256, steps=40, batch=64, published=128, epochs=1),
}


@dataclass(frozen=True)
class Messages:
    """Images of the attacker with what the corrupted servers receive of them.

    Attributes:
        images: (N, 3, H, W) in [0, 1].
        shares: one per corrupted server, (N, ...) each; of one transmission, finite, on the CPU.
    """

    images: Tensor
    shares: Shares

    def __len__(self) -> int:
        return len(self.images)

    def take(self, count: int) -> Messages:
        """Returns the first ``count`` images with their shares."""
        return self.at(torch.arange(min(count, len(self))))

    def at(self, index: Tensor) -> Messages:
        """Returns the images at ``index`` with their shares."""
        return Messages(self.images[index], tuple(share[index] for share in self.shares))

    @property
    def values(self) -> int:
        """Values of all shares of one image."""
        return sum(share[0].numel() for share in self.shares)


@dataclass(frozen=True)
class View:
    """What a measure sees of a deployed defense: the corrupted servers' view of images of theirs.

    No private image is among them. What a measure learns, it learns from auxiliary images; the
    number is taken on validation images.

    Attributes:
        auxiliary: to learn from.
        validation: to measure.
        target: the client with its law, of the corrupted servers' shares alone.
        amounts: how much work may be done.
        seed: of the run; draw from named streams of it.
        device: where tensors live while computing.
    """

    auxiliary: Messages
    validation: Messages
    target: Target
    amounts: Amounts
    seed: int
    device: torch.device


@dataclass(frozen=True)
class Reading:
    """What a measure found.

    Attributes:
        estimate: the number with its interval, or the reason why there is none.
        source: what was measured how, where the name alone would mislead.
        facts: more for the record.
    """

    estimate: Estimate
    source: str | None = None
    facts: Mapping[str, Json] = field(default_factory=dict)


def nothing(reason: str) -> Reading:
    """A reading without a number."""
    return Reading(Estimate(None, None, None, 0, reason))


class Measure(ABC):
    """One number that tells how much the corrupted servers' shares say of the image.

    Attributes:
        name: registered name, set by ``measures.register``.
        version: of the definition, set by ``measures.register``; raised whenever values change.
        unit: of the number; empty for a pure number.
        higher_is_better: whether a higher value means that more leaks.
    """

    required: ClassVar[tuple[str, ...]] = ("measure",)
    name: ClassVar[str]
    version: ClassVar[int]
    unit: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True

    @final
    def __call__(self, view: View, checkpoint: Checkpoint) -> Reading:
        """Measures, with PyTorch's global generators set to a stream of this measure's own."""
        with seeding.stream(view.seed, "measure", self.name), blaming(type(self), "measure"):
            return self.measure(view, checkpoint)

    @abstractmethod
    def measure(self, view: View, checkpoint: Checkpoint) -> Reading:
        """Measures.

        Args:
            view: the shares, and the client that they come from.
            checkpoint: where a training keeps its state.

        Returns:
            The reading; where there can be no number, the reason instead.
        """
