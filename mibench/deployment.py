"""From a job to a trained defense, ready to be attacked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mibench import progress, seeding
from mibench.artifacts import ArtifactStore, Checkpoint
from mibench.backbones.base import BackboneSpec, Split
from mibench.data.base import Roles
from mibench.defenses.base import Defense, Facts
from mibench.errors import blaming
from mibench.job import Job
from mibench.params import build
from mibench.registry import defenses, fingerprint
from mibench.training import Step


@dataclass(frozen=True)
class Deployed:
    """A trained defense, ready to be attacked.

    Attributes:
        defense: the model in evaluation mode.
        identity: content id of the trained weights.
        facts: what training reported.
    """

    defense: Defense
    identity: str
    facts: Facts


def fit(job: Job, roles: Roles, store: ArtifactStore, device: str) -> Deployed:
    """Trains the job's defense on the train role, or takes it from the cache."""
    rule = job.protocol.backbone
    spec = BackboneSpec(rule.name, rule.params, rule.split_point)
    split = spec.build(roles.train.image_shape, len(roles.class_names), job.seed)
    method = defenses.load(job.defense)
    params = build(method.Params, job.defense_params, f"defense {job.defense}")
    with seeding.stream(job.seed, "defense"), blaming(method, "__init__"):
        defense = method(split, params).to(device)

    def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Facts]:
        seed = seeding.derive(job.seed, "fit")
        with blaming(method, "fit"):
            facts = defense.fit(roles.train, job.protocol.recipe, seed, checkpoint)
        return defense.state_dict(), facts

    artifact = store.fetch(
        "defense",
        {
            "defense": job.defense,
            "params": params.model_dump(mode="json"),
            "backbone": rule.model_dump(mode="json"),
            "recipe": job.protocol.recipe.model_dump(mode="json"),
            "train": roles.train.identity,
            "code": [fingerprint(c) for c in (method, type(split.backbone), Split, Defense, Step)],
            "seed": job.seed,
            "device": torch.device(device).type,
            "threads": job.protocol.threads,
        },
        make,
    )
    if artifact.reused:
        progress.note(f"reused the trained defense {job.defense} ({artifact.key[:8]})")
    defense.load_state_dict(artifact.tensors)
    defense.eval()
    return Deployed(defense.requires_grad_(requires_grad=False), artifact.key, artifact.facts)
