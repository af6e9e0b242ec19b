"""From a job to a trained defense, ready to be attacked."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from mibench import progress, seeding
from mibench.artifacts import Artifact, ArtifactStore, Checkpoint, open_artifact
from mibench.backbones.base import BackboneSpec
from mibench.data.roles import Roles
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Facts
from mibench.errors import DivergedError, InvalidParamsError, PluginError, blaming
from mibench.files import Json, canonical_json, content_id
from mibench.job import Job
from mibench.params import build
from mibench.registry import (
    defenses,
    fingerprint,
    imported_fingerprint,
    lineage,
    package_fingerprint,
)
from mibench.task import Task
from mibench.training import Step

EXAMINED = 1024
"""Validation images on which a defense reports facts of itself, at most."""
TRAINING_SECONDS = "training_seconds"
"""Name of the fact that says how long a training took."""
CONSTANT = 1e-6
"""Deviation between the messages of two images below which they are the same message."""


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
        resumed, began = checkpoint.begun, time.perf_counter()
        with blaming(method, "fit"):
            learner.to(device)
            facts = learner.fit(roles.train, job.protocol.recipe, seed, checkpoint)
            canonical_json(facts)
        # Of a training that was interrupted, nobody has measured the whole.
        seconds = None if resumed else round(time.perf_counter() - began, 3)
        return learner.state_dict(), {**facts, TRAINING_SECONDS: seconds}

    made_of = _made_of(learner, job)
    initial = hash_tensors(learner.state_dict())
    spec: dict[str, Json] = {
        **made_of,
        # Follows the seed, the libraries' initialisation, and pretrained weights from the hub.
        "initial": initial,
        "recipe": job.protocol.recipe.model_dump(mode="json"),
        "train": roles.train.identity,
        "torch": torch.__version__,
        "seed": job.seed,
        "device": torch.device(device).type,
        "threads": job.protocol.threads,
    }
    defense = build_defense(job, shape, roles.task)
    if job.weights is None:
        artifact = store.fetch("defense", spec, make)
        if artifact.reused:
            progress.note(f"reused the trained defense {job.defense} ({artifact.key[:8]})")
        defense.load_state_dict(artifact.tensors)
    else:
        artifact, trained_on = load_weights(defense, job)
        if trained_on != roles.train.identity:
            raise InvalidParamsError(
                f"--weights: {job.weights} was trained on other images than this protocol's train "
                "role, which may be the private ones; train it on those"
            )
    defense.to(device).eval().requires_grad_(requires_grad=False)
    check_contract(defense, roles.validation.images(slice(0, 4)).to(device))
    weights = hash_tensors(artifact.tensors)
    return Deployed(
        defense=defense,
        weights=weights,
        identity=content_id({**made_of, "weights": weights}),
        facts={
            "artifact": artifact.key,
            "initial_weights": initial,
            "trained_weights": weights,
            **artifact.facts,
        },
    )


def load_weights(defense: Defense, job: Job) -> tuple[Artifact, Json]:
    """Loads the trained weights that the job names into a defense.

    Returns:
        The artifact, and the identity of the images that it was trained on.

    Raises:
        StorageError: the folder holds no whole artifact.
        InvalidParamsError: they are the weights of another defense, backbone or parameter set.
    """
    assert job.weights is not None
    artifact, spec = open_artifact(job.weights)
    if artifact.kind != "defense":
        raise InvalidParamsError(
            f"--weights: {job.weights} holds a trained {artifact.kind}, not a defense"
        )
    wanted = _made_of(defense, job)
    if missing := {"train", *wanted} - set(spec):
        raise InvalidParamsError(
            f"--weights: {job.weights} does not say its {', '.join(sorted(missing))}; it was made "
            "by another version of mibench"
        )
    for key in ("defense", "backbone", "task", "params"):
        if canonical_json(spec[key]) != canonical_json(wanted[key]):
            raise InvalidParamsError(
                f"--weights: {job.weights} was trained with {_difference(key, spec, wanted)}"
            )
    if spec["code"] != wanted["code"]:
        progress.note(f"the weights in {job.weights} were trained with other code than this")
    try:
        defense.load_state_dict(artifact.tensors)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise InvalidParamsError(
            f"--weights: {job.weights} does not fit this version of {job.defense}: "
            f"{lines[-1].strip()}"
        ) from error
    return artifact, spec["train"]


def _made_of(defense: Defense, job: Job) -> dict[str, Json]:
    """What the meaning of the weights follows from."""
    # A control holds another defense.
    methods = [one for one in defense.modules() if isinstance(one, Defense)]
    return {
        "defense": job.defense,
        "params": defense.params.model_dump(mode="json"),
        "backbone": job.protocol.backbone.model_dump(mode="json"),
        "code": [
            *chain.from_iterable(code_of(type(one)) for one in methods),
            package_fingerprint("mibench.backbones"),
            fingerprint(Step),
        ],
        "task": [type(defense.task).__name__, defense.task.outputs],
    }


def code_of(method: type) -> list[str]:
    """Returns the hashes of all code of a defense: its file, its ancestors', and their helpers."""
    return [*lineage(method), imported_fingerprint(method, "mibench.defenses.parts")]


def _difference(key: str, had: Mapping[str, Json], wanted: Mapping[str, Json]) -> str:
    """Names the first value in which two descriptions differ."""
    one, other = had[key], wanted[key]
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        name = next(name for name in {**one, **other} if one.get(name) != other.get(name))
        key, one, other = f"{key} {name}", one.get(name), other.get(name)
    return f"{key} = {json.dumps(one)}, and this job has {json.dumps(other)}"


@torch.no_grad()
def examine(defense: Defense, images: ImageSet) -> Facts:
    """Returns what a deployed defense reports of itself on validation images."""
    method = type(defense)
    with seeding.stream(0, "examination"), blaming(method, "examine"):
        facts = defense.examine(images.take(EXAMINED))
        canonical_json(facts)
    return facts


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
    with blaming(method, "predict"):
        predicted = defense.predict(images)
    random = any(not torch.equal(a, b) for a, b in zip(shares, again, strict=True))
    if not random and method.log_likelihood is Defense.log_likelihood:
        if len(predicted) != len(shares) or not all(map(torch.equal, shares, predicted)):
            raise PluginError(
                f"{who} is not random, but {method.__name__}.predict() returns something else than "
                "it sends, without a law of its own; an attack has to meet the true message"
            )
    elif random and method.predict is Defense.predict:
        raise PluginError(
            f"{who} is random, so {method.__name__} must override predict() and log_likelihood(): "
            "an attack has to meet the true law of what is sent"
        )
    if any((one - one[:1]).abs().max() < CONSTANT for one in predicted):
        raise DivergedError(
            f"defense {method.name}: a server gets the same message for every image, so the "
            "training has collapsed; lower the weights of the penalties, or the learning rate"
        )


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 over named tensors on the CPU, shortened to 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
