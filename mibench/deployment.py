"""From a job to a trained defense, ready to be attacked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mibench import progress, seeding
from mibench.artifacts import ArtifactStore, Checkpoint
from mibench.backbones.base import BackboneSpec
from mibench.data.roles import Roles
from mibench.defenses.base import Defense, Facts
from mibench.errors import PluginError, blaming
from mibench.files import Json, canonical_json, content_id
from mibench.job import Job
from mibench.params import build
from mibench.registry import defenses, fingerprint, lineage, package_fingerprint
from mibench.task import Task
from mibench.training import Step


@dataclass(frozen=True)
class Deployed:
    """A trained defense, ready to be attacked.

    Attributes:
        defense: the model in evaluation mode.
        weights: hash of the trained weights.
        identity: hash of all that the messages follow from: weights, code and parameters of the
            defense. What is learned against it is found again by this.
        facts: what training reported.
    """

    defense: Defense
    weights: str
    identity: str
    facts: Facts


def build_defense(job: Job, image_shape: tuple[int, int, int], task: Task) -> Defense:
    """Builds the job's defense around a fresh backbone, with initial weights of the job's seed.

    Raises:
        MibenchError: a name or parameter is wrong, or the defense cannot be built.
    """
    rule = job.protocol.backbone
    spec = BackboneSpec(rule.name, rule.params, rule.split_point)
    split = spec.build(image_shape, task.smoothed(job.protocol.recipe.smoothing), job.seed)
    method = defenses.load(job.defense)
    params = build(method.Params, job.defense_params, f"defense {job.defense}")
    with seeding.stream(job.seed, "defense"), blaming(method, "__init__"):
        return method(split, params)


def fit(job: Job, roles: Roles, store: ArtifactStore, device: str) -> Deployed:
    """Trains the job's defense on the train role, or takes it from the cache.

    What is deployed is a new object with the trained weights, so that nothing but its state
    dictionary can pass from training to use.

    Raises:
        PluginError: the defense breaks the contract of `Defense`.
    """
    shape = roles.train.image_shape
    learner = build_defense(job, shape, roles.task)
    method = type(learner)

    def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Facts]:
        seed = seeding.derive(job.seed, "fit")
        with blaming(method, "fit"):
            learner.to(device)
            facts = learner.fit(roles.train, job.protocol.recipe, seed, checkpoint)
            canonical_json(facts)
        return learner.state_dict(), facts

    made_of: dict[str, Json] = {
        "params": learner.params.model_dump(mode="json"),
        "backbone": job.protocol.backbone.model_dump(mode="json"),
        "code": [
            *lineage(method),
            fingerprint(Defense),
            package_fingerprint("mibench.backbones"),
            fingerprint(Step),
        ],
        "task": [type(roles.task).__name__, roles.task.outputs],
    }
    initial = hash_tensors(learner.state_dict())
    artifact = store.fetch(
        "defense",
        {
            **made_of,
            "defense": job.defense,
            # Follows the seed, the libraries' initialisation, and pretrained weights from the hub.
            "initial": initial,
            "recipe": job.protocol.recipe.model_dump(mode="json"),
            "train": roles.train.identity,
            "torch": torch.__version__,
            "seed": job.seed,
            "device": torch.device(device).type,
            "threads": job.protocol.threads,
        },
        make,
    )
    if artifact.reused:
        progress.note(f"reused the trained defense {job.defense} ({artifact.key[:8]})")
    defense = build_defense(job, shape, roles.task)
    defense.load_state_dict(artifact.tensors)
    defense.to(device).eval().requires_grad_(requires_grad=False)
    check_contract(defense, roles.validation.images(slice(0, 4)).to(device))
    weights = hash_tensors(artifact.tensors)
    return Deployed(
        defense=defense,
        weights=weights,
        identity=content_id({**made_of, "weights": weights}),
        facts={"initial_weights": initial, **artifact.facts},
    )


@torch.no_grad()
def check_contract(defense: Defense, images: Tensor) -> None:
    """Refuses a defense whose shares are not what it declares.

    Raises:
        PluginError: the shares are no tuple of one tensor per server and row per image, are not
            finite, or are random without a law that attacks could know.
    """
    method = type(defense)
    with blaming(method, "protect"):
        shares, again = defense.protect(images), defense.protect(images)
    who = f"{method.__name__}.protect()"
    if not isinstance(shares, tuple) or not all(isinstance(share, Tensor) for share in shares):
        raise PluginError(f"{who} must return a tuple of tensors, one per server")
    if len(shares) != defense.servers:
        raise PluginError(
            f"{who} returned {len(shares)} shares, but the defense declares {defense.servers} "
            "servers; override `servers`, so that every server can be attacked"
        )
    for share in shares:
        if share.ndim < 2 or len(share) != len(images):
            raise PluginError(
                f"{who} returned a share of shape {tuple(share.shape)} for {len(images)} images; "
                "the first axis must be the batch"
            )
        if not share.isfinite().all():
            raise PluginError(f"{who} returned values that are infinite or not a number")
    random = any(not torch.equal(a, b) for a, b in zip(shares, again, strict=True))
    if not random:
        with blaming(method, "predict"):
            predicted = defense.predict(images)
        if len(predicted) != len(shares) or not all(map(torch.equal, shares, predicted)):
            raise PluginError(
                f"{who} is not random, but {method.__name__}.predict() returns something else than "
                "it sends; an attack has to meet the true message"
            )
    elif method.predict is Defense.predict:
        raise PluginError(
            f"{who} is random, so {method.__name__} must override predict() and log_likelihood(): "
            "an attack has to meet the true law of what is sent"
        )


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 over named tensors on the CPU, shortened to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
