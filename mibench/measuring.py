"""What the corrupted servers' shares tell of the image, whatever the attack: all measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from mibench import progress, seeding
from mibench.artifacts import ArtifactStore, Checkpoint
from mibench.data.roles import Roles
from mibench.data.sets import ImageSet
from mibench.deployment import Deployed
from mibench.errors import PluginError
from mibench.files import Json
from mibench.information.base import VALUES, Amounts, Messages, View
from mibench.job import Job
from mibench.metrics.intervals import Estimate
from mibench.record import Score
from mibench.registry import (
    fingerprint,
    imported_fingerprint,
    lineage,
    measures,
)
from mibench.threat import Adversary, Knowledge, Target, mended
from mibench.training import Step
from mibench.utility import values_sent


@dataclass(frozen=True)
class Told:
    """What the shares tell, by every measure that there is.

    Attributes:
        scores: one per measure, by name.
        facts: what a measure notes beside its number, by measure.
    """

    scores: list[Score] = field(default_factory=list)
    facts: dict[str, Json] = field(default_factory=dict)


def tell(
    job: Job,
    deployed: Deployed,
    corrupted: tuple[int, ...],
    roles: Roles,
    store: ArtifactStore,
    device: str,
) -> Told:
    """Takes all measures of a deployed defense, or finds them in the cache.

    The number follows from the defense and from who reads it, not from the attack. It is taken on
    one message of each image, also where the protocol's adversary sees several, and on images of
    the attacker; no private image is looked at. The client is known in full, whatever the adversary
    of the protocol knows.

    Args:
        job: names the protocol and the seed.
        deployed: the trained defense.
        corrupted: servers that are read.
        roles: the images.
        store: where the numbers are kept.
        device: a PyTorch device.
    """
    look = _Look(job, deployed, corrupted, roles, torch.device(device))
    told, names = Told(), measures.names()
    with progress.task("Measuring what the shares tell", total=len(names)) as task:
        for name in names:
            score, facts = _taken(name, look, store)
            told.scores.append(score)
            if facts:
                told.facts[score.metric] = dict(facts)
            task.advance()
    return told


@dataclass(frozen=True)
class _Look:
    """A deployed defense as some servers see it; nothing is sent before a measure asks for it."""

    job: Job
    deployed: Deployed
    corrupted: tuple[int, ...]
    roles: Roles
    device: torch.device

    @property
    def amounts(self) -> Amounts:
        return Amounts.of(self.job.protocol.track)

    @cached_property
    def view(self) -> View:
        held = max(1, VALUES // values_sent(self.deployed.defense, self.roles.validation))
        adversary = Adversary(Knowledge.WHITE_BOX, self.corrupted)
        return View(
            auxiliary=self._sent(self.roles.auxiliary.take(min(self.amounts.learned, held))),
            validation=self._sent(self.roles.validation.take(min(self.amounts.read, held))),
            target=Target(self.deployed.defense, adversary, self.deployed.identity),
            amounts=self.amounts,
            seed=self.job.seed,
            device=self.device,
        )

    @cached_property
    def _shared_code(self) -> list[str]:
        return [fingerprint(one) for one in (_Look, Estimate, Target, Step)]

    def _sent(self, images: ImageSet) -> Messages:
        seed = seeding.derive(self.job.seed, "measured", images.identity)
        shares = self.deployed.defense.transmit(images, self.job.protocol.batch, seed)
        read = tuple(shares[server].float() for server in self.corrupted)
        return Messages(images.images(), mended(read))

    def spec(self, method: type) -> dict[str, Json]:
        """All that a measure's number follows from."""
        return {
            "defense": self.deployed.identity,
            "corrupted": list(self.corrupted),
            "code": [
                *lineage(method),
                imported_fingerprint(method, "mibench.information"),
                imported_fingerprint(method, "mibench.defenses.parts"),
                *self._shared_code,
            ],
            "auxiliary": self.roles.auxiliary.identity,
            "validation": self.roles.validation.identity,
            "amounts": self.amounts.model_dump(mode="json"),
            "batch": self.job.protocol.batch,
            "seed": self.job.seed,
            "device": self.device.type,
            "threads": self.job.protocol.threads,
            "torch": torch.__version__,
        }


def _taken(name: str, look: _Look, store: ArtifactStore) -> tuple[Score, Mapping[str, Json]]:
    method = measures.load(name)

    def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
        reading = method()(look.view, checkpoint)
        estimate = cast("dict[str, Json]", asdict(reading.estimate))
        return {}, {"estimate": estimate, "source": reading.source, "facts": dict(reading.facts)}

    try:
        kept = store.fetch("measure", {"measure": name, **look.spec(method)}, make).facts
    except PluginError as error:
        if method.__module__.startswith("mibench."):
            raise
        kept = {"estimate": asdict(Estimate(None, None, None, 0, str(error)))}
    found = Estimate(**cast("dict[str, Json]", kept["estimate"]))  # type: ignore[arg-type]
    score = Score(
        metric=method.name,
        version=method.version,
        unit=method.unit,
        higher_is_better=method.higher_is_better,
        value=found.value,
        ci_low=found.low,
        ci_high=found.high,
        n=found.n,
        source=cast("str | None", kept.get("source")),
        reason=found.reason,
    )
    return score, cast("Mapping[str, Json]", kept.get("facts", {}))
