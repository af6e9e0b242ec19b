"""What a model is trained to tell of an image: its class, or a list of yes-or-no attributes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Task(ABC):
    """Labels, the loss that learns them and the score that counts them.

    Attributes:
        names: names of the classes or attributes, in label order.
        smoothing: label smoothing of the loss, in [0, 1).
    """

    names: tuple[str, ...]
    smoothing: float = 0.0

    @property
    def outputs(self) -> int:
        """Number of logits."""
        return len(self.names)

    def smoothed(self, smoothing: float) -> Task:
        """Returns the same task with label smoothing."""
        return replace(self, smoothing=smoothing)

    @abstractmethod
    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss (scalar) of logits (B, outputs)."""

    @abstractmethod
    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns how much of each image is told rightly, (B,) in [0, 1]."""

    @abstractmethod
    def describe(self, label: Tensor) -> str:
        """Returns one image's label in words."""


class Classification(Task):
    """One class out of many; labels are int64 (B,)."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing)

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """1 where the class with the largest logit is the label."""
        return (logits.argmax(1) == labels).float()

    def describe(self, label: Tensor) -> str:
        """The name of the class."""
        return self.names[int(label)]


class Attributes(Task):
    """Yes-or-no attributes, several at once; labels are uint8 (B, outputs)."""

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Binary cross-entropy, averaged over the attributes."""
        wanted = labels.to(logits.dtype) * (1 - self.smoothing) + self.smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, wanted)

    def correct(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Share of the attributes that are told rightly."""
        return ((logits > 0) == labels.bool()).float().mean(1)

    def describe(self, label: Tensor) -> str:
        """The names of the attributes that hold."""
        return ", ".join(name for name, holds in zip(self.names, label, strict=True) if holds)
