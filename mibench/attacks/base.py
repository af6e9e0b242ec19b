"""What an attack is, and the workshop in which it trains its parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mibench import progress
from mibench.artifacts import Artifact, ArtifactStore, Checkpoint
from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.files import Json
from mibench.params import Parameters
from mibench.registry import fingerprint, lineage, package_fingerprint
from mibench.threat import Knowledge, Target
from mibench.training import Step


@dataclass(frozen=True)
class Workshop:
    """Where an attack trains its parts.

    Attributes:
        image_shape: (3, H, W) of the images to rebuild.
        seed: seed of the run; draw from named streams of it.
        device: where tensors live while computing.
        store: the cache of trained parts.
        threads: CPU threads; part of a cached part's identity, since it changes the last bits.
    """

    image_shape: tuple[int, int, int]
    seed: int
    device: torch.device
    store: ArtifactStore
    threads: int

    def keep(
        self,
        kind: str,
        spec: Mapping[str, Json],
        make: Callable[[Checkpoint], tuple[Mapping[str, Tensor], Mapping[str, Json]]],
    ) -> Artifact:
        """Returns the part that ``spec`` denotes: from the cache, or made now and kept."""
        where: dict[str, Json] = {
            "seed": self.seed,
            "device": self.device.type,
            "threads": self.threads,
            "training": fingerprint(Step),
            "threat": fingerprint(Target),
            "torch": torch.__version__,
        }
        artifact = self.store.fetch(kind, {**spec, **where}, make)
        if artifact.reused:
            progress.note(f"reused {kind} {artifact.key[:8]} from the cache")
        return artifact


class Attack(ABC):
    """A data reconstruction attack.

    A subclass sets `knowledge` to the least it needs and overrides `reconstruct`, and `prepare`
    where it learns or tunes anything beforehand.

    Args:
        params: the attack's own parameters.
        workshop: where it trains its parts.
    """

    required: ClassVar[tuple[str, ...]] = ("reconstruct",)
    name: ClassVar[str]
    version: ClassVar[int]
    knowledge: ClassVar[Knowledge] = Knowledge.BLACK_BOX
    labels: ClassVar[bool] = False
    """Whether it learns from labels of the servers' task on the attacker's images."""

    class Params(Parameters):
        """Parameters of the attack; each field becomes a ``--set attack.<field>`` option."""

    def __init__(self, params: Params, workshop: Workshop) -> None:
        self.params = params
        self.workshop = workshop

    def prepare(  # noqa: B027 - an attack may have nothing to learn
        self, target: Target, auxiliary: ImageSet, validation: ImageSet
    ) -> None:
        """Learns and tunes everything that does not need a private share.

        Args:
            target: the deployed client as the adversary sees it.
            auxiliary: the attacker's images, to learn from.
            validation: the attacker's images, to choose with; disjoint from ``auxiliary``.
        """

    @classmethod
    def budget(cls, params: Any) -> tuple[str, ...]:  # noqa: ARG003
        """Counts among its parameters that buy strength with time, by dotted name; to be doubled.

        Args:
            params: of this class's `Params`; some decide which others are used.
        """
        return ()

    @abstractmethod
    def reconstruct(self, shares: Shares) -> Tensor:
        """Rebuilds the images of a batch of received shares.

        Random draws come from PyTorch's global state, which the caller has seeded.

        Args:
            shares: the corrupted servers' shares, batch axis first, on the workshop's device.

        Returns:
            Images (B, 3, H, W) in [0, 1]. A choice among iterates may use only a loss that the
            attacker can compute.
        """

    def blind(self, count: int) -> Tensor | None:  # noqa: ARG002
        """Draws ``count`` images from the attack's prior without any share, if it has one."""
        return None

    def spec(self) -> dict[str, Json]:
        """Identity of this attack for the cache: name, version, code and parameters."""
        return {
            "attack": self.name,
            "version": self.version,
            "code": [*lineage(type(self)), package_fingerprint("mibench.attacks")],
            "params": self.params.model_dump(mode="json"),
            "image_shape": list(self.workshop.image_shape),
        }

    def spec_of(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> dict[str, Json]:
        """Identity of what `prepare` makes of these, for the cache."""
        return {
            **self.spec(),
            "target": target.identity,
            "auxiliary": auxiliary.identity,
            "validation": validation.identity,
        }

    def facts(self) -> dict[str, Json]:
        """What the preparation chose or reached, for the record."""
        return {}
